"""What a run directory tells about its run, in little work: thousands of them are read at once. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ..errors import OK, REQUEUE, UserError
from . import history
from .history import Decided, Ended, Event, Started, Submitted, outcome
from .tail import METRICS, newest_values

Phase: TypeAlias = Literal["new", "submitted", "running", "requeued", "done", "stopped", "failed"]
"""new: neither submitted nor started; submitted: not started since; running: started, and no end recorded (it may have
been killed); requeued: put back by its job's script; stopped: with a checkpoint, on request."""

# Of a config.yaml that gtddp wrote: to parse all of it, a thousand times, takes seconds.
_TRAIN = re.compile(r"^train:\n((?:[ -].*\n)*)", re.MULTILINE)
_LENGTH = re.compile(r"^  (steps|epochs): (\d+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A run, as its directory tells it."""

    run: Path
    owner: int
    """Numeric id of the user who owns the directory."""
    phase: Phase
    settled: bool
    """Whether it stays in that phase, whatever the scheduler says."""
    executor: str | None
    """That it was submitted to, or slurm for a script of Slurm's; None where it was started by hand."""
    job: str | None
    """The newest job, where it has one."""
    hosts: list[str]
    """Of the newest start."""
    step: int | None
    total: int | None
    """Training steps of the whole run; None before it is known."""
    loss: float | None
    """Newest training loss."""
    accuracy: float | None
    """Newest validation accuracy, as a share."""
    throughput: float | None
    """Samples a second."""
    restarts: int
    """Starts after the first one."""
    reason: str
    """Why it ended, where it did not end well."""


def read_facts(run: Path) -> Facts:
    """Reads the history, the end of the metrics, the summary and the length of a run. Raises UserError."""
    try:
        owner = run.stat().st_uid
        config = (run / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run} is not a run directory: {error}") from error
    events = history.read(run)
    summary = read_summary(run)
    phase, reason = _phase(events, summary)
    tail = newest_values(run / METRICS, ("step", "epoch", "train/loss", "val/accuracy", "throughput"))
    submitted = next((event for event in reversed(events) if isinstance(event, Submitted)), None)
    starts = [event for event in events if isinstance(event, Started)]
    executor, job = (None, None) if submitted is None else (submitted.executor, submitted.job)
    if submitted is None and starts and starts[-1].job is not None:
        executor, job = "slurm", starts[-1].job  # by a script of the user's own
    step = tail.get("step")
    return Facts(
        run=run,
        owner=owner,
        phase=phase,
        settled=phase in ("new", "done") or outcome(events, executor or "") is not None,
        executor=executor,
        job=job,
        hosts=starts[-1].hosts if starts else [],
        step=None if step is None else int(step),
        total=_total(config, tail),
        loss=tail.get("train/loss"),
        accuracy=tail.get("val/accuracy"),
        throughput=tail.get("throughput"),
        restarts=max(0, len(starts) - 1),
        reason=reason,
    )


def _phase(events: Sequence[Event], summary: Mapping[str, object]) -> tuple[Phase, str]:
    """Where the run stands, and why it ended."""
    match events[-1] if events else None:
        case Submitted():
            return "submitted", ""
        case Started():
            return "running", ""
        case Decided(requeued=True, reason=reason):
            return "requeued", reason
        case Ended(code=code, reason=reason) | Decided(code=code, reason=reason):
            if code == OK:
                return "done", ""
            return ("stopped" if code == REQUEUE else "failed"), reason or f"exit code {code}"
    return ("done" if summary.get("finished") is True else "new"), ""


def read_summary(run: Path) -> Mapping[str, object]:
    """What a run came to; nothing before its end. Raises UserError where the file is damaged."""
    file = run / "summary.json"
    try:
        summary: Mapping[str, object] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from error
    return summary


def _total(config: str, tail: Mapping[str, float]) -> int | None:
    """Steps of the run. Of a run in epochs the data set says it, and each line of metrics has it: epoch and step."""
    train = _TRAIN.search(config)
    length = {key: int(value) for key, value in _LENGTH.findall(train[1] if train else "")}
    if "steps" in length:
        return length["steps"]
    if "epochs" not in length or not tail.get("epoch"):
        return None
    return length["epochs"] * round(tail["step"] / tail["epoch"])

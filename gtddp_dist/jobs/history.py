"""The history of a run: submissions, starts, how they ended, and what was decided then.

`history.jsonl` in the run directory has one JSON object a line, appended: nothing that is there is changed. A start
without an end was killed. No torch: `gtddp status` and a job's script read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeAlias

from ..errors import OK, UserError

FILE = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The run was handed to an executor."""

    job: str
    """Its number there; an array's task is 12_3."""
    executor: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """Processes of the run are about to train."""

    step: int
    """Step that they continue from."""
    job: str | None
    """Slurm's number of the job; None outside of one."""
    restart: int
    """How often Slurm had put the job back before."""
    hosts: list[str]
    """Host of every rank, each host once."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The processes of the run are about to end by themselves."""

    step: int
    code: int
    """Exit code (`gtddp_dist.errors`)."""
    reason: str
    """For people; empty for a run that is done."""
    signals: list[str] = field(default_factory=list)
    """Stop signals that came, on any rank."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What a job's script did once its processes had ended."""

    job: str
    restart: int
    code: int
    """Exit code of srun."""
    step: int
    """Last step that was logged or kept."""
    requeued: bool
    reason: str


Event: TypeAlias = Submitted | Started | Ended | Decided

_KINDS: dict[str, type[Submitted] | type[Started] | type[Ended] | type[Decided]] = {
    "submitted": Submitted,
    "started": Started,
    "ended": Ended,
    "decided": Decided,
}
_NAMES = {cls: name for name, cls in _KINDS.items()}


def record(run: Path, event: Event) -> None:
    """Adds an event to the history of the run in that directory, and puts it on the disk."""
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": _NAMES[type(event)]}
    text = json.dumps(line | asdict(event)) + "\n"
    # One write to a file opened for appending: lines of two processes do not mix.
    descriptor = os.open(run / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(run: Path) -> list[Event]:
    """The events of a run in the order in which they came; none where it has no history.

    A last line without its end is left out: whoever wrote it died meanwhile. Raises UserError for a line that is no
    event.
    """
    file = run / FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    events: list[Event] = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            values = json.loads(line)
            del values["time"]
            events.append(_KINDS[values.pop("event")](**values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}, line {number}: is not an event of a run: {error}") from error
    return events


def since_submission(events: Sequence[Event]) -> list[Event]:
    """What has happened since the run was submitted last; everything where it never was."""
    newest = max((at for at, event in enumerate(events) if isinstance(event, Submitted)), default=-1)
    return list(events[newest + 1 :])


def last_end(events: Sequence[Event]) -> Ended | None:
    """How the processes of the newest start ended by themselves; None where they did not, or have not yet."""
    for event in reversed(events):
        if isinstance(event, Ended):
            return event
        if isinstance(event, Started | Submitted | Decided):
            break
    return None


def outcome(events: Sequence[Event], executor: str) -> int | None:
    """How a run has ended for good since it was submitted: its exit code; None while it has not.

    A Slurm job's script has the last word on every end but a good one.
    """
    now = since_submission(events)
    last = now[-1] if now else None
    if isinstance(last, Decided) and not last.requeued:
        return last.code
    if isinstance(last, Ended) and (last.code == OK or executor != "slurm"):
        return last.code
    return None

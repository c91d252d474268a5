"""The result of a sweep: a table (CSV and Markdown), TensorBoard's HParams view, a picture."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from ..files import write_text_atomically
from ..jobs.status import RunStatus, counts
from ..strict_yaml import Value
from .folder import SweepFolder
from .picture import plot_sweep
from .result import METRICS, Result, read_numbers, varied
from .space import show
from .spec import SweepSpec

SHOWN = 30
"""Rows of the table that are printed; the files have all."""


def report(folder: SweepFolder, statuses: Sequence[RunStatus]) -> str:
    """Writes tables, HParams and the picture of a sweep; returns what to print.

    Args:
        folder: of the sweep.
        statuses: of its trials, in their order.
    """
    spec, trials = folder.read()
    results = [
        Result(trial, status, read_numbers(folder.run(trial))) for trial, status in zip(trials, statuses, strict=True)
    ]
    results.sort(key=lambda result: _order(result, spec))
    keys = varied(trials)
    write_text_atomically(folder.table_csv, _csv(results, keys))
    drawn = plot_sweep(folder.picture, results, spec, keys, folder.path.absolute().name)
    write_text_atomically(folder.table_md, _markdown(folder, results, spec, keys, picture=drawn))
    _write_hparams(folder.hparams, results)
    files = [folder.table_csv, folder.table_md, *([folder.picture] if drawn else [])]
    return "\n".join(
        (
            _table(results[:SHOWN], spec, keys, "simple"),
            *([f"... and {len(results) - SHOWN} more"] if len(results) > SHOWN else []),
            "",
            counts(statuses),
            *_failures(results),
            f"result       {', '.join(str(file) for file in files)}",
            f"TensorBoard  gtddp tensorboard {folder.path}",
        )
    )


def _order(result: Result, spec: SweepSpec) -> tuple[bool, float]:
    """Best first; trials without the metric last."""
    value = result.metric(spec.metric)
    if value is None:
        return True, 0.0
    return False, -value if spec.more_is_better else value


def _csv(results: Iterable[Result], keys: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("trial", "label", *keys, "state", "step", "total", *METRICS, "restarts", "job", "reason"))
    for result in results:
        status = result.status
        writer.writerow(
            (
                result.trial.name,
                result.trial.label,
                *(show(result.trial.values.get(key)) for key in keys),
                status.state,
                status.step,
                status.total,
                *(result.numbers.get(name) for name in METRICS),
                status.restarts,
                status.job,
                status.reason,
            )
        )
    return text.getvalue()


def _table(results: Iterable[Result], spec: SweepSpec, keys: Sequence[str], form: str) -> str:
    metrics = list(dict.fromkeys((spec.metric, "val/accuracy", "val/loss", "train/loss", "seconds_per_step")))
    rows = [
        (
            result.trial.name,
            result.trial.label,
            *(show(result.trial.values.get(key)) for key in keys),
            result.status.state,
            *(_shown(result.numbers.get(name), name) for name in metrics),
        )
        for result in results
    ]
    headers = ("trial", "label", *keys, "state", *metrics)
    align = ("left", "left", *["right"] * len(keys), "left", *["right"] * len(metrics))
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=align)


def _markdown(
    folder: SweepFolder, results: Sequence[Result], spec: SweepSpec, keys: Sequence[str], *, picture: bool
) -> str:
    parts = [f"# {folder.path.absolute().name}", counts(result.status for result in results)]
    if picture:
        parts.append(f"![{spec.metric} of the trials]({folder.picture.name})")
    if "train.seed" in keys:
        parts += ["## Over the seeds", _over_seeds(results, spec, [key for key in keys if key != "train.seed"])]
    parts += ["## Trials", _table(results, spec, keys, "github")]
    if failures := _failures(results):
        parts += ["## Not done", "\n".join(f"* {line.strip()}" for line in failures)]
    return "\n\n".join(parts) + "\n"


def _over_seeds(results: Sequence[Result], spec: SweepSpec, keys: Sequence[str]) -> str:
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        point = (result.trial.label, *(show(result.trial.values.get(key)) for key in keys))
        groups.setdefault(point, []).append(result)
    rows = []
    for point, members in groups.items():
        values = [value for member in members if (value := member.metric(spec.metric)) is not None]
        mean = sum(values) / len(values) if values else None
        bounds = (min(values), max(values)) if values else (None, None)
        order = math.inf if mean is None else (-mean if spec.more_is_better else mean)
        told = (_shown(mean, spec.metric), *(_shown(bound, spec.metric) for bound in bounds))
        rows.append((order, (*point, f"{len(values)}/{len(members)}", *told)))
    rows.sort(key=lambda row: row[0])
    headers = ("label", *keys, "seeds done", f"mean {spec.metric}", "lowest", "highest")
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate([row for _, row in rows], headers, tablefmt="github", disable_numparse=True, colalign=align)


def _failures(results: Iterable[Result]) -> list[str]:
    """A line for each trial that is over and not done."""
    return [
        f"  {result.trial.name}: {result.status.state}: {' '.join(result.status.reason.split())}"
        for result in results
        if result.status.over and result.status.state not in ("done", "new")
    ]


def _shown(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"


def _write_hparams(folder: Path, results: Sequence[Result]) -> None:
    """A folder for each trial that is done, with its settings and numbers, for TensorBoard's HParams view."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for result in results:
        if result.status.state != "done":
            continue  # also one that stopped for a loss that is not finite, which has numbers too
        settings: dict[str, str | float | bool] = {"label": result.trial.label}
        settings |= {key: _plain(value) for key, value in result.trial.values.items()}
        # Under names of their own: the curves of a run are not to get a second point at their end.
        numbers = {f"result/{name.replace('/', ' ')}": value for name, value in result.numbers.items()}
        with SummaryWriter(str(folder / result.trial.name)) as writer:
            writer.add_hparams(settings, numbers, run_name=".")


def _plain(value: Value) -> str | float | bool:
    """What the HParams view has a type for."""
    return value if isinstance(value, bool | int | float | str) else show(value)

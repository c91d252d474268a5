"""What a run came to: `summary.json`, the table at the end, and where things are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from .checkpoint import JSON
from .config import to_yaml
from .config_schema import Config, RunConfig
from .parts import Parts
from .run_directory import Record, RunDirectory

Summary = Mapping[str, JSON]


def summarise(parts: Parts, records: Sequence[Record]) -> dict[str, JSON]:
    """The numbers of a run that has ended, from its metrics; null where a number was not finite or not measured.

    `train/loss` is the mean over the steps of the last epoch, as the log has it: a single line of the log is
    a mean over few batches. `val/...` is of the end, `val/accuracy_best` the highest of all evaluations.
    """
    config, progress = parts.config, parts.state.progress
    last = records[-1]
    best = max(records, key=lambda record: record.get("val/accuracy", -1.0))
    return {
        "optimizer": config.optimizer.name,
        "finished": progress.step == parts.total_steps,
        "steps": progress.step,
        "epochs": progress.step / parts.order.steps_per_epoch,
        "seconds": progress.seconds,
        "seconds_per_step": progress.seconds / progress.step,
        "train/loss": _mean_train_loss(records, progress.step - parts.order.steps_per_epoch),
        "val/loss": last.get("val/loss"),
        "val/accuracy": last.get("val/accuracy"),
        "val/accuracy_best": best.get("val/accuracy"),
        "val/accuracy_best_step": int(best["step"]) if "val/accuracy" in best else None,
        "skipped_steps": progress.skipped,
        "parameters": parts.parameters,
        "seed": config.train.seed,
        "config_sha256": config_hash(config),
    }


def config_hash(config: Config) -> str:
    """Equal for two runs with the same settings, wherever they are kept."""
    return hashlib.sha256(to_yaml(dataclasses.replace(config, run=RunConfig())).encode()).hexdigest()


def results_table(summaries: Sequence[Summary]) -> str:
    """The results of one or several runs side by side."""
    rows = [
        (
            f"{summary['optimizer']}" + ("" if summary["finished"] else f"\n(stopped at step {summary['steps']})"),
            _number(summary["train/loss"], ".4g"),
            _number(summary["val/loss"], ".4g"),
            _number(summary["val/accuracy"], ".2%"),
            _number(summary["val/accuracy_best"], ".2%"),
            _number(summary["seconds_per_step"], ".4f"),
            summary["skipped_steps"],
        )
        for summary in summaries
    ]
    headers = (
        "optimizer",
        "train loss\n(last epoch)",
        "validation\nloss",
        "validation\naccuracy",
        "best of\nthe run",
        "seconds\na step",
        "refused\nsteps",
    )
    return tabulate(rows, headers, disable_numparse=True, stralign="right", colalign=("left",))


def where_things_are(config: Config, run: RunDirectory) -> str:
    """The files of a run that has ended, and how to look at its curves in a browser."""
    lines = [("run directory", str(run.path)), ("model", str(run.model_file)), ("curves", str(run.curves))]
    if config.log.tensorboard:
        lines.append(("TensorBoard", f"gtddp tensorboard {run.path}"))
    return "\n" + "\n".join(f"{name:<15}{what}" for name, what in lines)


def _mean_train_loss(records: Sequence[Record], after: int) -> float | None:
    """Mean of the logged training losses, each over the steps since the line before, from the step `after` on."""
    total, steps, before = 0.0, 0.0, 0.0
    for record in records:
        if "throughput" not in record:
            continue  # not the end of a window of the training loss
        if record["step"] > after:
            if "train/loss" not in record:
                return None
            total += record["train/loss"] * (record["step"] - before)
            steps += record["step"] - before
        before = record["step"]
    return total / steps if steps else None


def _number(value: JSON, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"

"""`gtddp bench pipeline`: a step on ranks, beside DeepSpeed's own pipeline engine on the same network and cuts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from .. import __version__
from ..config_schema import Config
from ..environment import describe_environment
from ..errors import OK
from ..files import write_text_atomically
from ..launch import Ranks, StopRequest, launch
from ..pipeline.company import company
from ..pipeline.grid import Grid, Shape

CONTENDERS = ("sgd", "gtddp-sgd")


@dataclass(frozen=True)
class Row:
    """What was measured of one contender."""

    optimizer: str
    seconds: float
    """Median of a step."""
    fastest: float
    slowest: float
    time_ratio_to_deepspeed: float
    """Median of the ratios to DeepSpeed's step of the same round."""
    sent_mb: float
    """Largest number of megabytes that a rank sends in a step; not known of DeepSpeed."""
    first_loss: float


def run_pipeline(config: Config, *, as_json: bool, out: Path | None) -> int:
    """Times contenders in turn on `parallel.pipe` x `parallel.data` ranks; an exit code."""

    def work(stop: StopRequest, ranks: Ranks) -> int:
        from .subject import cut, place_of

        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        trajectory, cuts = cut(config)
        place = place_of(config, ranks, cuts, len(trajectory.stages))
        facts = {"gtddp-dist": __version__, "torch": torch.__version__, "cuts": str(cuts)}
        with company(place, facts, lost_after_s=config.parallel.lost_after_s) as grid:
            rows = measure(config, grid, cuts)
            if grid.rank == 0:
                report(rows, config, cuts, as_json=as_json, out=out)
        return OK

    return launch(work, config.parallel.pipe * config.parallel.data)


def measure(config: Config, grid: Grid, cuts: Sequence[int], names: Sequence[str] = CONTENDERS) -> list[Row]:
    """Rounds in which every contender takes one step, timed from all ranks ready to all ranks done."""
    from .contenders import Contender, DeepSpeedPipeline, Ours  # imports deepspeed
    from .subject import batches

    ours = [Ours(config, name, grid, cuts) for name in names]
    contenders: list[Contender] = [DeepSpeedPipeline(config, grid, cuts), *ours]
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    losses: dict[str, float] = {}
    for each in range(config.bench.warmup + config.bench.steps):
        inputs, targets = batches(config, grid, each)
        for contender in contenders:
            grid.barrier()
            started = time.perf_counter()
            loss = contender.step(inputs, targets)
            grid.barrier()
            losses.setdefault(contender.name, loss)
            if each >= config.bench.warmup:
                seconds[contender.name].append(time.perf_counter() - started)
    sent = {o.name: max(n[0] for n in grid.gather([o.engine.worker.take_measurements()[2]])) for o in ours}
    steps = config.bench.warmup + config.bench.steps
    peer = seconds[DeepSpeedPipeline.name]
    return [
        Row(
            name,
            statistics.median(own),
            min(own),
            max(own),
            statistics.median(a / b for a, b in zip(own, peer, strict=True)),
            sent.get(name, float("nan")) / steps / 1e6,
            losses[name],
        )
        for name, own in seconds.items()
    ]


def report(rows: Sequence[Row], config: Config, cuts: Sequence[int], *, as_json: bool, out: Path | None) -> None:
    """Prints the rows, and keeps them in `out` with what they were measured on."""
    if as_json:
        print(json.dumps({"rows": [{k: v for k, v in asdict(row).items() if v == v} for row in rows]}))
    else:
        headers = ("", "seconds a step", "fastest", "slowest", "ratio to DeepSpeed", "MB sent", "first loss")
        print(tabulate([tuple(asdict(row).values()) for row in rows], headers, floatfmt=".4g", missingval="-"))
    if out is not None:
        content = {
            "environment": describe_environment(),
            "model": config.model.name,
            "grid": str(Shape(config.parallel.pipe, config.parallel.data)),
            "cuts": list(cuts),
            "batch_size": config.train.batch_size,
            "micro_batches": config.train.micro_batches,
            "image": list(config.bench.image),
            "rows": [{k: v for k, v in asdict(row).items() if v == v} for row in rows],
        }
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / "pipeline.json", json.dumps(content, indent=1) + "\n")

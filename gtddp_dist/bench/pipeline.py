"""`gtddp bench pipeline`: a step on ranks, beside DeepSpeed's own pipeline engine on the same network and cuts."""

from __future__ import annotations

import importlib.metadata
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
from ..environment import describe_environment, prepare_cpu
from ..errors import OK, UserError
from ..files import write_text_atomically
from ..launch import Ranks, StopRequest, launch
from ..pipeline.company import company
from ..pipeline.grid import Grid, Shape
from ..pipeline.instructions import Op
from ..registry import OPTIMIZERS


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


@dataclass(frozen=True)
class Measured:
    """What a run found: a row for each contender, and what this package's ranks did in their time.

    Attributes:
        rows: DeepSpeed's first.
        instructions: optimizer -> kind of instruction -> seconds a step of every rank, waiting included.
        waited: optimizer -> seconds a step that every rank waits for others.
    """

    rows: list[Row]
    instructions: dict[str, dict[str, list[float]]]
    waited: dict[str, list[float]]


def base_of(config: Config) -> str:
    """The optimizer of torch.optim to compare with: the configured one's base, or SGD where that is not torch's."""
    name = config.optimizer.name
    base = OPTIMIZERS[name].base or name
    return base if base in ("sgd", "rmsprop", "adam", "adamw") else "sgd"


def run_pipeline(config: Config, *, as_json: bool, out: Path | None) -> int:
    """Times the configured optimizer, its base, and the base in DeepSpeed's engine, in turn on all ranks of the grid.

    Returns:
        The exit code.

    Raises:
        UserError: a type that DeepSpeed would train in another way.
    """
    if config.train.dtype not in ("float32", "float64"):
        raise UserError(
            f"train.dtype={config.train.dtype}: DeepSpeed's engine has a mixed precision of its own; compare with "
            "train.dtype=float32"
        )

    def work(stop: StopRequest, ranks: Ranks) -> int:
        from .subject import cut, place_of

        prepare_cpu(config.train.threads)
        trajectory, cuts = cut(config)
        place = place_of(config, ranks, cuts, len(trajectory.stages))
        facts = {"gtddp-dist": __version__, "torch": torch.__version__, "cuts": str(cuts)}
        with company(place, facts, lost_after_s=config.parallel.lost_after_s) as grid:
            measured = measure(config, grid, cuts)
            if grid.rank == 0:
                report(measured, config, cuts, as_json=as_json, out=out)
        return OK

    return launch(work, config.parallel.pipe * config.parallel.data)


def measure(config: Config, grid: Grid, cuts: Sequence[int]) -> Measured:
    """Rounds in which every contender takes one step, timed from all ranks ready to all ranks done."""
    from .contenders import Contender, DeepSpeedPipeline, Ours  # imports deepspeed
    from .subject import batches

    base, steps = base_of(config), config.bench.steps
    ours = [Ours(config, name, grid, cuts) for name in dict.fromkeys((base, config.optimizer.name))]
    peer = DeepSpeedPipeline(config, base, grid, cuts)
    contenders: list[Contender] = [peer, *ours]
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    losses: dict[str, float] = {}
    for each in range(config.bench.warmup + steps):
        if each == config.bench.warmup:
            for own in ours:
                own.engine.worker.take_measurements()
        inputs, targets = batches(config, grid, each)
        for contender in contenders:
            grid.barrier()
            started = time.perf_counter()
            loss = contender.step(inputs, targets)
            grid.barrier()
            losses.setdefault(contender.name, loss)
            if each >= config.bench.warmup:
                seconds[contender.name].append(time.perf_counter() - started)
    instructions, waited, sent = {}, {}, {}
    for own in ours:
        kinds = grid.gather([own.engine.worker.seconds[op] / steps for op in Op])
        _, idle, sent_bytes = own.engine.worker.take_measurements()
        found = grid.gather([idle / steps, sent_bytes / steps / 1e6])
        instructions[own.name] = {
            op.value: list(ranks) for op, ranks in zip(Op, zip(*kinds, strict=True), strict=True) if any(ranks)
        }
        waited[own.name] = [numbers[0] for numbers in found]
        sent[own.name] = max(numbers[1] for numbers in found)
    rows = [
        Row(
            name,
            statistics.median(own_seconds),
            min(own_seconds),
            max(own_seconds),
            statistics.median(a / b for a, b in zip(own_seconds, seconds[peer.name], strict=True)),
            sent.get(name, float("nan")),
            losses[name],
        )
        for name, own_seconds in seconds.items()
    ]
    return Measured(rows, instructions, waited)


def report(measured: Measured, config: Config, cuts: Sequence[int], *, as_json: bool, out: Path | None) -> None:
    """Prints the rows, and keeps them in `out` with what they were measured on."""
    rows = measured.rows
    if as_json:
        print(json.dumps({"rows": [{k: v for k, v in asdict(row).items() if v == v} for row in rows]}))
    else:
        headers = ("", "seconds a step", "fastest", "slowest", "ratio to DeepSpeed", "MB sent", "first loss")
        print(tabulate([tuple(asdict(row).values()) for row in rows], headers, floatfmt=".4g", missingval="-"))
    if out is not None:
        content = {
            "environment": describe_environment(),
            "deepspeed": importlib.metadata.version("deepspeed"),
            "model": config.model.name,
            "grid": str(Shape(config.parallel.pipe, config.parallel.data)),
            "cuts": list(cuts),
            "batch_size": config.train.batch_size,
            "micro_batches": config.train.micro_batches,
            "image": list(config.bench.image),
            "rows": [{k: v for k, v in asdict(row).items() if v == v} for row in rows],
            "seconds_by_instruction": measured.instructions,
            "seconds_waited": measured.waited,
        }
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / "pipeline.json", json.dumps(content, indent=1) + "\n")

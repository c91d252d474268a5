"""`gtddp bench stages`: the seconds of every stage in one process, as a cost file that `gtddp plan` takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from ..build import gtddp_optimizer
from ..config_schema import Config
from ..curvature import SGD
from ..environment import describe_environment, prepare_cpu, select_device
from ..errors import OK
from ..files import write_text_atomically
from ..launch import Ranks, Rendezvous, StopRequest, launch
from ..optimizer import GTDDP
from ..pipeline.costs import balanced_cuts, check_cuts, write_costs
from ..pipeline.counting import StageCosts, count_stages
from ..pipeline.measured import Protocol, measure_stages
from ..training_step import Precision
from .subject import described, images_and_labels, micro_batch_of, new_model

_COLUMNS = ("forward", "backward", "gram", "sweep", "feedback", "weight", "statistics")


def run_stages(config: Config, *, processes: int = 1, as_json: bool, out: Path | None) -> int:
    """Times the stages of the network for one micro-batch; an exit code.

    Args:
        config: network, optimizer, and what makes a micro-batch; parallel.pipe says how many segments to propose.
        processes: that measure at the same time on this host, each for itself; the first one's times are kept. Cores
            and memory that ranks share make all of them slower.
        as_json: print JSON in place of a table.
        out: folder for costs.json and stages.json.

    Raises:
        UserError: a network or optimizer that cannot be taken, more segments than stages.
    """

    def work(stop: StopRequest, ranks: Ranks) -> int:
        meet = Rendezvous(ranks).allgather if ranks.world > 1 else None
        stages, cuts = _measured(config, meet)
        if ranks.rank == 0:
            print(_as_json(stages, cuts) if as_json else _table(stages, cuts, config.parallel.pipe))
            if out is not None:
                _keep(out, config, ranks.world, stages, cuts)
        return OK

    return launch(work, processes)


Cuts = dict[str, tuple[int, ...]]
"""counted, measured -> cuts that are balanced by that work."""


def _measured(config: Config, meet: Callable[[str, str], object] | None) -> tuple[tuple[StageCosts, ...], Cuts]:
    """The costs of all stages, and cuts; ``meet`` waits for the other processes."""
    prepare_cpu(config.train.threads)
    device = select_device(config.train.device)
    precision = Precision(config.train.dtype, device)
    subject = described(config)
    pipe, size = config.parallel.pipe, micro_batch_of(config)
    with precision.autocast():
        sample = torch.zeros(size, *config.bench.image, dtype=precision.dtype)
        counted = count_stages(subject.trajectory, sample, subject.counting)
    check_cuts(config.parallel.cuts or balanced_cuts(counted, pipe), pipe, len(counted))
    model = new_model(config).to(device)
    protocol = Protocol(
        by=subject.shape.by if subject.shape.feedback else "micro_batch",
        n_micro=config.train.micro_batches,
        warmup=config.bench.warmup,
        steps=config.bench.steps,
    )

    def batches(step: int) -> tuple[list[Tensor], list[Tensor]]:
        return images_and_labels(config, protocol.micro_batches, device, seed=step)

    if meet is not None:
        meet("starting to measure", "")
    stages = measure_stages(
        model,
        described(config, model).trajectory,
        lambda segment: _optimizer(segment, config),
        subject.counting,
        batches,
        F.cross_entropy,
        protocol,
        precision.autocast,
    )
    cuts = {"counted": balanced_cuts(counted, pipe), "measured": balanced_cuts(stages, pipe)}
    return stages, cuts


def _keep(out: Path, config: Config, processes: int, stages: Sequence[StageCosts], cuts: Cuts) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_costs(out / "costs.json", stages, "seconds")
    content = {
        "environment": describe_environment(),
        "model": config.model.name,
        "optimizer": config.optimizer.name,
        "micro_batch": micro_batch_of(config),
        "image": list(config.bench.image),
        "dtype": config.train.dtype,
        "device": str(select_device(config.train.device)),
        "torch_threads": torch.get_num_threads(),
        "processes": processes,
        "steps": config.bench.steps,
        "cuts": {name: list(found) for name, found in cuts.items()},
    }
    write_text_atomically(out / "stages.json", json.dumps(content, indent=1) + "\n")


def _optimizer(segment: nn.Module, config: Config) -> GTDDP:
    """The configured optimizer with its weight-gradients apart; of a base optimizer only these are of interest."""
    if config.optimizer.name in ("sgd", "rmsprop", "adam", "adamw"):
        return GTDDP(segment, SGD(lr=1e-3), gauss_newton_weight=0.0, capture="weighted")
    optimizer = gtddp_optimizer(segment, config)
    if optimizer.options.capture == "weighted":
        return optimizer
    optimizer.detach()
    options = {**dataclasses.asdict(optimizer.options), "capture": "weighted", "clip_norm": None}
    return GTDDP(segment, optimizer.curvature, **options)


def _milliseconds(stages: Sequence[StageCosts]) -> list[tuple[float, ...]]:
    return [tuple(1e3 * getattr(stage, name) for name in (*_COLUMNS, "work")) for stage in stages]


def _table(stages: Sequence[StageCosts], cuts: Cuts, pipe: int) -> str:
    rows: list[tuple[object, ...]] = [
        (index, stage.player, *times)
        for index, (stage, times) in enumerate(zip(stages, _milliseconds(stages), strict=True))
    ]
    rows.append(("", "all", *(sum(column) for column in zip(*_milliseconds(stages), strict=True))))
    table = tabulate(rows, ("stage", "player (ms a micro-batch)", *_COLUMNS, "all"), floatfmt=".3f")
    lines = [
        f"balanced cuts for pipe={pipe}, by {name} work: parallel.cuts={list(found)}" for name, found in cuts.items()
    ]
    return "\n".join([table, "", *lines]) if pipe > 1 else table


def _as_json(stages: Sequence[StageCosts], cuts: Cuts) -> str:
    rows = [dataclasses.asdict(stage) for stage in stages]
    return json.dumps({"unit": "seconds", "stages": rows, "cuts": {n: list(c) for n, c in cuts.items()}})

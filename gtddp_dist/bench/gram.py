"""`gtddp bench gram`: every way to every layer's Gram matrix."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch

from ..config_schema import Config
from ..optimizer import GTDDP
from ..players import AffineGradients, FormedGradients, GramPath
from .meters import now
from .single import Contender, batch
from .tally import counted

TOO_LONG = 50
"""Ways that cost so many times the cheapest one, counted, are not tried."""


@dataclass(frozen=True)
class Way:
    """One way to the Gram matrix of a layer's weight (and bias), for the samples of one recursion.

    Attributes:
        layer: the module.
        samples: of the recursion.
        way: `players.GramPath`.
        chosen: whether the step takes it.
        kept: whether the step keeps the per-sample gradients for the weight-gradient as well.
        cost: by which it is chosen (docs/performance.md).
        seconds: median; None where it was not tried, being too expensive.
        flops, allocated_bytes, peak_bytes: counted (`tally.Counts`).
    """

    layer: str
    samples: int
    way: str
    chosen: bool
    kept: bool
    cost: int
    seconds: float | None
    flops: int | None
    allocated_bytes: int | None
    peak_bytes: int | None


def gram_ways(config: Config) -> list[Way]:
    """All ways of every affine layer, with SGD's metric, for the samples of a recursion group."""
    contender = Contender(config, "gtddp-sgd")
    optimizer = contender.optimizer
    assert isinstance(optimizer, GTDDP)
    images, labels = batch(config, contender.device, seed=0)
    scope = contender.config.optimizer.scope
    samples = scope if isinstance(scope, int) else len(images)
    step = contender.samples(images, labels)
    found = []
    with torch.no_grad():
        for player in optimizer.trajectory.players:
            own = step.of(player, "gradient")
            for name, part in () if own is None else own.rows(slice(0, samples)).parts.items():
                if isinstance(part, AffineGradients):
                    found += _ways(config, name, part, samples)
    return found


def _ways(config: Config, layer: str, part: AffineGradients, samples: int) -> list[Way]:
    unit = dict.fromkeys(part.controls, 1.0)
    kept = isinstance(part.formed(False, samples), FormedGradients)
    taken: GramPath = "materialise" if kept else part.cheapest_path(samples)
    costs = part.path_costs(samples)
    paths: list[GramPath] = [path for path in get_args(GramPath) if path in costs]
    tried = [path for path in paths if costs[path] <= TOO_LONG * min(costs.values())]
    counts = {path: counted(partial(part.gram, unit, path)) for path in tried}  # warms up as well
    seconds: dict[GramPath, list[float]] = {path: [] for path in tried}
    for _ in range(config.bench.steps):
        for path in tried:
            started = now(part.inputs.device)
            part.gram(unit, path)
            seconds[path].append(now(part.inputs.device) - started)
    return [
        Way(
            layer,
            samples,
            path,
            path == taken,
            kept and path == taken,
            costs[path],
            statistics.median(seconds[path]) if path in tried else None,
            counts[path].flops if path in tried else None,
            counts[path].allocated_bytes if path in tried else None,
            counts[path].peak_bytes if path in tried else None,
        )
        for path in paths
    ]

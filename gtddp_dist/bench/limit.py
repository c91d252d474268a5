"""The FLOP limit of a step: what its method cannot do without, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..curvature import SGD
from ..curvature.kronecker import KroneckerCurvature
from ..optimizer import GTDDP
from ..phases import Phase
from ..pipeline.counting import flop_counter
from ..players import AffineGradients, FormedGradients, GramPath, SampleGradients
from ..players.base import Scale
from .single import Contender

T = TypeVar("T")

NEEDED: tuple[Phase, ...] = ("forward", "backward", "input-gradient", "rollout", "curvature", "update")
"""Phases that count for the limit as they were done: those of a base step, and the second forward pass of the nonlinear
rollout. *backward* has the one weight-gradient pass in it; *input-gradient* has not."""


def flop_limit(contender: Contender, flops_by_phase: Mapping[str, float], images: Tensor, labels: Tensor) -> float:
    """Operations that a step of this method needs at least.

    The phases `NEEDED` as they were done, and for every layer its Gram matrices and one weighted weight-gradient, by
    the way of `players` that takes the fewest operations for both. With a Kronecker metric, or with cotangents that are
    not the loss's gradient, there is one way, and both count as they were done.

    Args:
        contender: what took the step.
        flops_by_phase: operations of a step as they were done, over its kinds as often as they come.
        images, labels: a batch.
    """
    limit = sum(flops_by_phase.get(phase, 0.0) for phase in NEEDED)
    optimizer = contender.optimizer
    if not isinstance(optimizer, GTDDP):
        return limit
    options = optimizer.options
    fixed = isinstance(optimizer.curvature, KroneckerCurvature) or options.stream != "gradient"
    if fixed and options.feedback:
        return limit + sum(flops_by_phase.get(phase, 0.0) for phase in ("gram", "weight-gradient"))
    return limit + least_products(contender, images, labels)


def least_products(contender: Contender, images: Tensor, labels: Tensor) -> float:
    """Operations of every layer's Gram matrices (without feedback there are none) and, where the backward pass has not
    formed it, its weight-gradient, each layer by its cheapest way; the metric is a number or diagonal."""
    optimizer = contender.optimizer
    assert isinstance(optimizer, GTDDP)
    options = optimizer.options
    step = contender.samples(images, labels)
    group = min(options.scope, len(images)) if isinstance(options.scope, int) else len(images)
    number = isinstance(optimizer.curvature, SGD)
    total = 0.0
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # counted without computing
        for player in optimizer.trajectory.players:
            own = step.of(player, "gradient")
            for part in () if own is None else own.parts.values():
                ways = _ways(part, group, number) if options.feedback else [(0.0, _weighted(part))]
                total += min(gram + (weight if options.capture == "weighted" else 0.0) for gram, weight in ways)
    return total


def _ways(part: SampleGradients, group: int, number: bool) -> list[tuple[float, float]]:
    """Operations of a layer's Gram matrices, one for each group, and of its weight-gradient, way by way."""
    times = len(part.output_grads) / group
    metric: dict[str, Scale] = {n: 1.0 if number else torch.empty_like(p) for n, p in part.controls.items()}
    forming, grads = _count(part.per_sample)
    formed = FormedGradients(part.module, grads)
    product, _ = _count(partial(formed.rows(slice(0, group)).gram, metric))
    ways = [(forming + times * product, _weighted(formed))]
    if isinstance(part, AffineGradients) and number and "weight" in part.controls:
        ways.append((forming + times * product, _weighted(part)))
        ways += [
            (times * _by_pairs(part, path, metric, grads, group), _weighted(part))
            for path in part.path_costs(group)
            if path != "materialise"
        ]
    else:
        ways.append((times * _count(partial(part.rows(slice(0, group)).gram, metric))[0], _weighted(part)))
    return ways


def _by_pairs(
    part: AffineGradients, path: GramPath, metric: Mapping[str, Scale], grads: Mapping[str, Tensor], group: int
) -> float:
    """Operations of a Gram matrix by pairs of samples: those of one pair, times the pairs that the path's cost has.

    With it go the bias's own. To count all blocks of pairs would take minutes.
    """

    def of_bias(samples: int) -> float:
        if "bias" not in grads:
            return 0.0
        return _count(partial(FormedGradients(part.module, {"bias": grads["bias"][:samples]}).gram, metric))[0]

    first = part.rows(slice(0, 1))
    assert isinstance(first, AffineGradients)
    one, _ = _count(partial(first.gram, metric, path))
    pairs = part.path_costs(group)[path] / part.path_costs(1)[path]
    return (one - of_bias(1)) * pairs + of_bias(group)


def _weighted(part: SampleGradients) -> float:
    samples = len(next(iter(part.per_sample().values())))
    weights = next(iter(part.controls.values())).new_empty(samples, dtype=torch.float64)
    return _count(partial(part.weighted, weights))[0]


def _count(run: Callable[[], T]) -> tuple[float, T]:
    """Operations, and what came of them."""
    with flop_counter() as counter:
        found = run()
    return float(counter.get_total_flops()), found

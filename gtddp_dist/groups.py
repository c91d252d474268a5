"""The samples of a step, arranged for the recursion: which samples form a group, and each player's matrix S.

The samples of a step are one axis, micro-batch after micro-batch; recursion groups are contiguous runs of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from .capture import MicroBatch, Stream
from .errors import StepError
from .players import SampleGradients, Scale, prepare, sample_gradients
from .players.base import sum_tensors
from .trajectory import Player

Scope = Literal["batch", "micro_batch"] | int
LossReduction = Literal["mean", "sum"]
V = TypeVar("V")


@dataclass(frozen=True)
class RecursionGroup:
    """The samples of one recursion.

    Attributes:
        rows: their place on the step's sample axis.
        samples: B, how many.
        weight: omega, the weight of one sample in the group's objective (1/B for a mean loss).
        share: the group's share of the step's samples; its controls are averaged with it.
    """

    rows: slice
    samples: int
    weight: float
    share: float


def recursion_groups(
    sizes: Sequence[int], scope: Scope, replica_groups: int, loss_reduction: LossReduction
) -> list[RecursionGroup]:
    """Cut the step's sample axis into recursion groups.

    Args:
        sizes: samples of each micro-batch, in order.
        scope: "batch": one group a replica; "micro_batch": one a micro-batch; a number: that many samples.
        replica_groups: replicas that this process stands for; each has an equal run of the micro-batches.
        loss_reduction: "mean": the losses of the step add up to the mean over its samples; "sum": to the sum.

    Raises:
        StepError: the micro-batches cannot be divided so.
    """
    if scope == "batch":
        if len(sizes) % replica_groups:
            raise StepError(
                f"{len(sizes)} micro-batches before step() cannot be shared out among replica_groups={replica_groups}"
            )
        each = len(sizes) // replica_groups
        group_sizes = [sum(sizes[first : first + each]) for first in range(0, len(sizes), each)]
    elif scope == "micro_batch":
        group_sizes = list(sizes)
    else:
        for size in sizes:
            if size % scope:
                raise StepError(
                    f"scope={scope} does not divide a micro-batch of {size} samples; drop the last partial batch "
                    "(drop_last=True), or use scope='micro_batch'"
                )
        group_sizes = [scope] * (sum(sizes) // scope)
    total = sum(group_sizes)
    groups, first = [], 0
    for size in group_sizes:
        weight = 1 / size if loss_reduction == "mean" else total / size
        groups.append(RecursionGroup(slice(first, first + size), size, weight, size / total))
        first += size
    return groups


@dataclass(frozen=True)
class PlayerSamples:
    """The matrix S of one player: its modules' side by side. Products with B numbers come back in float64."""

    parts: Mapping[str, SampleGradients]

    def gram(self, inverse_metric: Mapping[str, Scale]) -> Tensor:
        """H = S R^-1 S^T, shape (B, B), for R^-1 by qualified parameter name."""
        gram = sum_tensors(part.gram(_of_module(name, inverse_metric)).double() for name, part in self.parts.items())
        return (gram + gram.mT) / 2

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        """S d, shape (B,), for d by qualified parameter name."""
        return sum_tensors(part.inner(_of_module(name, direction)).double() for name, part in self.parts.items())

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        """S^T w, by qualified parameter name."""
        return {
            qualified(module, name): grad
            for module, part in self.parts.items()
            for name, grad in part.weighted(weights_B).items()
        }

    def per_sample(self) -> dict[str, Tensor]:
        """S itself, by qualified parameter name: (B, *parameter shape)."""
        return {
            qualified(module, name): grad
            for module, part in self.parts.items()
            for name, grad in part.per_sample().items()
        }

    def rows(self, rows: slice) -> PlayerSamples:
        """The same for some of the samples."""
        return PlayerSamples(
            {
                name: sample_gradients(part.module, part.inputs[rows], part.output_grads[rows], part.factor)
                for name, part in self.parts.items()
            }
        )


def qualified(module: str, name: str) -> str:
    """A parameter's name in the model."""
    return f"{module}.{name}" if module else name


def _of_module(module: str, values: Mapping[str, V]) -> dict[str, V]:
    prefix = qualified(module, "")
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }


class StepSamples:
    """All micro-batches of a step, player by player.

    Args:
        micro_batches: what was captured.
        factor: what turns a captured loss derivative into that of a sample's own, unaveraged loss.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], factor: float | Tensor) -> None:
        self.micro_batches = micro_batches
        self.factors: dict[Stream, float | Tensor] = {"gradient": factor, "cotangent": 1.0}
        self.samples = sum(m.samples for m in micro_batches)

    def of(self, player: Player, stream: Stream) -> PlayerSamples | None:
        """The player's S for every sample of the step; None where no derivative reached it."""
        parts = {}
        for name, module in player.modules.items():
            captured = [m.derivatives[stream].get(module) for m in self.micro_batches]
            if any(grad is not None for grad in captured):
                inputs, output_grads = self._gathered(name, module, captured)
                parts[name] = sample_gradients(module, inputs, output_grads, self.factors[stream])
        return PlayerSamples(parts) if parts else None

    def _gathered(self, name: str, module: nn.Module, captured: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        dtype = next(module.parameters(recurse=False)).dtype
        if any(module not in m.inputs for m in self.micro_batches):
            raise StepError(f"module '{name}' ran in some of the step's micro-batches and not in others")
        shape = next(grad for grad in captured if grad is not None).shape[1:]
        raw = [m.inputs[module] for m in self.micro_batches]
        inputs = [prepare(module, x.to(dtype)) for x in raw]
        # A micro-batch whose loss did not depend on this module has a derivative of zero.
        grads = [
            x.new_zeros(len(x), *shape, dtype=dtype) if grad is None else grad.to(dtype)
            for x, grad in zip(raw, captured, strict=True)
        ]
        if len(inputs) == 1:
            return inputs[0], grads[0]
        return torch.cat(inputs), torch.cat(grads)

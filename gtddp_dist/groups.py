"""The samples of a step, arranged for the recursion: which samples form a group, and each player's matrix S.

The samples of a step are one axis, micro-batch after micro-batch; recursion groups are contiguous runs of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .capture import Capture, MicroBatch, Stream
from .errors import StepError
from .players import (
    FormedGradients,
    PlayerSamples,
    SampleGradients,
    is_affine,
    prepare,
    put_together,
    sample_gradients,
)
from .trajectory import Player

Scope = Literal["batch", "micro_batch"] | int
LossReduction = Literal["mean", "sum"]


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

    def rows_of(self, per_sample: int) -> slice:
        """The group's rows where every sample has that many."""
        return slice(self.rows.start * per_sample, self.rows.stop * per_sample)


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


class StepSamples:
    """All micro-batches of a step, player by player.

    Args:
        micro_batches: what was captured.
        factor: what turns a captured loss derivative into that of a sample's own, unaveraged loss.
        capture: what captured them; None where the inputs are all there.
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatch], factor: float | Tensor, capture: Capture | None = None
    ) -> None:
        self.micro_batches = micro_batches
        self._capture = capture
        self.factors: dict[Stream, float | Tensor] = {"gradient": factor, "sampled": 1.0, "exact": 1.0}
        self.samples = sum(m.samples for m in micro_batches)
        self._latest: dict[Stream, tuple[int, PlayerSamples | None]] = {}
        self._kept: dict[tuple[int, Stream], Mapping[str, SampleGradients]] = {}

    def rows_per_sample(self, stream: Stream) -> int:
        """How many cotangents of this stream a sample has."""
        for micro_batch in self.micro_batches:
            for derivative in micro_batch.derivatives[stream].values():
                return derivative.shape[0] // micro_batch.samples
        return 1

    def of(self, player: Player, stream: Stream) -> PlayerSamples | None:
        """The player's S for every sample of the step; None where no derivative reached it.

        The last player's is kept, for one stream each: a sweep asks for it several times.
        """
        index, latest = self._latest.get(stream, (-1, None))
        if index != player.index:
            latest = self._gathered_player(player, stream)
            self._latest[stream] = (player.index, latest)
        return latest

    def keep_formed(self, player: Player, stream: Stream, samples: PlayerSamples) -> PlayerSamples:
        """From now on S of those modules for which it is formed is this one."""
        self._kept[player.index, stream] = {n: p for n, p in samples.parts.items() if isinstance(p, FormedGradients)}
        self._latest[stream] = (player.index, samples)
        return samples

    def _gathered_player(self, player: Player, stream: Stream) -> PlayerSamples | None:
        parts: dict[str, SampleGradients] = {}
        kept = self._kept.get((player.index, stream), {})
        for name, module in player.modules.items():
            if name in kept:
                parts[name] = kept[name]
                continue
            captured = [m.derivatives[stream].get(module) for m in self.micro_batches]
            if any(module in m.formed.get(stream, {}) for m in self.micro_batches):
                parts[name] = FormedGradients(module, self._formed(name, module, stream), self.factors[stream])
            elif any(grad is not None for grad in captured):
                each = self._gathered(name, module, stream, self.micro_batches)
                if is_affine(module) or len(each) == 1:
                    inputs, output_grads = (torch.cat(z) if len(z) > 1 else z[0] for z in zip(*each, strict=True))
                    parts[name] = sample_gradients(module, inputs, output_grads, self.factors[stream])
                else:  # every micro-batch has statistics of its own
                    grads = [sample_gradients(module, x, y).per_sample() for x, y in each]
                    parts[name] = FormedGradients(module, put_together(grads), self.factors[stream])
        return PlayerSamples(parts) if parts else None

    def recall(self, player: Player) -> None:
        """Before the player's control changes: have there what is to be made anew of its stage and those in its run."""
        if self._capture is not None:
            self._capture.recall(self.micro_batches, next(iter(player.modules.values())))

    def _formed(self, name: str, module: nn.Module, stream: Stream) -> dict[str, Tensor]:
        """What was formed of every micro-batch; zero for one whose loss did not depend on the module."""
        self._check_ran(name, module)
        formed = [m.formed.get(stream, {}).get(module) for m in self.micro_batches]
        like = next(grads for grads in formed if grads is not None)
        each: list[Mapping[str, Tensor]] = []
        for m, grads in zip(self.micro_batches, formed, strict=True):
            if grads is None and module in m.derivatives[stream]:  # of another size, and not formed at once
                ((x, y),) = self._gathered(name, module, stream, [m])
                grads = sample_gradients(module, x, y).per_sample()
            elif grads is None:
                rows = m.samples * self.rows_per_sample(stream)
                grads = {n: g.new_zeros(rows, *g.shape[1:]) for n, g in like.items()}
            each.append(grads)
        return put_together(each)

    def _check_ran(self, name: str, module: nn.Module) -> None:
        if any(module not in m.inputs for m in self.micro_batches):
            raise StepError(f"module '{name}' ran in some of the step's micro-batches and not in others")

    def _gathered(
        self, name: str, module: nn.Module, stream: Stream, micro_batches: Sequence[MicroBatch]
    ) -> list[tuple[Tensor, Tensor]]:
        """Prepared inputs and output gradients of every micro-batch; one of them at least has some."""
        captured = [m.derivatives[stream].get(module) for m in micro_batches]
        dtype = next(module.parameters(recurse=False)).dtype
        self._check_ran(name, module)
        shape = next(grad for grad in captured if grad is not None).shape[1:]
        if self._capture is None:
            raw = [m.inputs[module] for m in micro_batches]
        else:
            raw = self._capture.inputs(micro_batches, module)
        inputs = [prepare(module, x.to(dtype)) for x in raw]
        per_sample = next(len(g) // len(x) for x, g in zip(raw, captured, strict=True) if g is not None)
        if per_sample > 1:
            inputs = [x.repeat_interleave(per_sample, dim=0) for x in inputs]
        # A micro-batch whose loss did not depend on this module has a derivative of zero.
        grads = [
            x.new_zeros(len(x), *shape, dtype=dtype) if grad is None else grad.to(dtype)
            for x, grad in zip(inputs, captured, strict=True)
        ]
        return list(zip(inputs, grads, strict=True))

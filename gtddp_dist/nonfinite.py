"""Where a value that is not finite came from, once a step was refused for it.

Looked for only then, so that it costs nothing otherwise. A NaN spreads: forward to all later activations, the loss and
with it to all gradients. So what comes first in `Kind` counts, of activations the first, of gradients the last layer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .capture import MicroBatch
from .diagnostics import StepFacts


class Kind(IntEnum):
    """What was not finite, causes before their effects."""

    DATA = 0
    WEIGHT = 1
    STATE = 2
    """Of the optimizer, such as a factor."""
    ACTIVATION = 3
    LOSS = 4
    GRADIENT = 5
    GRAM = 6
    UNKNOWN = 7


@dataclass(frozen=True)
class Source:
    """What was not finite first, as far as can be told, in words."""

    kind: Kind
    text: str

    @property
    def stays(self) -> bool:
        """Whether the next step meets it again: it is in what a checkpoint holds."""
        return self.kind in (Kind.WEIGHT, Kind.STATE)


UNKNOWN = Source(Kind.UNKNOWN, "the loss or a gradient")


def in_training(model: nn.Module, optimizer: Optimizer, inputs: Sequence[Tensor]) -> Source | None:
    """In what the step began with: the micro-batches of samples, the model's parameters, the optimizer's state."""
    first = 0
    for samples in inputs:
        bad = ~torch.isfinite(samples.flatten(1)).all(1)
        if bool(bad.any()):
            numbers = [str(first + int(i)) for i in bad.nonzero().flatten()[:5]]
            return Source(Kind.DATA, f"the data, in sample {', '.join(numbers)} of the batch")
        first += len(samples)
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        if not _finite(parameter):
            return Source(Kind.WEIGHT, f"the weight '{name}'")
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and not _finite(value):
                return Source(Kind.STATE, f"the optimizer's {key} of '{name}'")
    return None


def in_step(
    model: nn.Module,
    modules: Mapping[nn.Module, str],
    micro_batches: Iterable[MicroBatch],
    losses: Iterable[Tensor],
    facts: Sequence[StepFacts],
) -> Source | None:
    """In what the step has made: inputs of modules, the loss, gradients, Gram matrices."""
    captured = list(micro_batches)
    for micro_batch in captured:
        for module, value in micro_batch.inputs.items():  # in the order of the forward pass
            if not _finite(value):
                return Source(Kind.ACTIVATION, f"the activation that goes into module '{modules[module]}'")
    if not all(_finite(loss) for loss in losses):
        return Source(Kind.LOSS, "the loss")
    for micro_batch in captured:
        for place, value in micro_batch.derivatives["gradient"].items():  # in the order of the backward pass
            if isinstance(place, nn.Module) and not _finite(value):
                return Source(Kind.GRADIENT, f"the loss gradient at the output of module '{modules[place]}'")
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return Source(Kind.GRADIENT, f"the gradient of '{name}'")
    grams = [
        player
        for one in facts
        for player, groups in one.players.items()
        if not all(_finite(group.gains.gram) for group in groups)
    ]
    return Source(Kind.GRAM, f"the Gram matrix of stage {max(grams)}") if grams else None


def of_ranks(every: Sequence[str]) -> Source:
    """What came first of what all ranks have found: each of it by :func:`packed`, in the order of ranks."""
    found = [(Kind(kind), rank, text) for rank, one in enumerate(every) for kind, text in [json.loads(one)] if text]
    if not found:
        return UNKNOWN
    # Ranks are in the order of their segments.
    forward = min(found)[0] < Kind.LOSS
    kind, _, text = min(found, key=lambda one: (one[0], one[1] if forward else -one[1]))
    return Source(kind, text)


def packed(source: Source | None, where: str) -> str:
    """For other ranks; `where` says which rank this is."""
    return json.dumps([int(source.kind), f"{source.text}, on {where}"] if source else [int(Kind.UNKNOWN), ""])


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())

"""Runs of stages whose activations are let go after the forward pass, and made anew when they are needed.

A run goes under torch's activation checkpointing, so that autograd keeps only what goes into it; the backward pass
makes the rest anew. A step does so again, a forward pass alone, where it needs the inputs of the run's layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .buffers import copy_buffers, restore_buffers


def runs_of(stages: int) -> list[range]:
    """Consecutive stages in about as many runs as a run has stages: that keeps the sum of what goes into runs and of
    what one of them makes small."""
    count = math.isqrt(stages - 1) + 1
    bounds = [index * stages // count for index in range(count + 1)]
    return [range(*each) for each in itertools.pairwise(bounds)]


class Anew:
    """Around a run that is made anew: the model's buffers are what they were, and afterwards what they are.

    Unlike a context of contextlib it may be entered again and again, as torch does in every backward pass.

    Args:
        model: whose buffers.
        buffers: what they were (:func:`copy_buffers`).
        enter, leave: called at the start and at the end.
    """

    def __init__(
        self, model: nn.Module, buffers: Sequence[Tensor], enter: Callable[[], None], leave: Callable[[], None]
    ) -> None:
        self._model, self._buffers, self._enter, self._leave = model, buffers, enter, leave
        self._now: list[Tensor] = []

    def __enter__(self) -> None:
        self._now = copy_buffers(self._model)
        restore_buffers(self._model, self._buffers)
        self._enter()

    def __exit__(self, *error: object) -> None:
        restore_buffers(self._model, self._now)
        self._now = []
        self._leave()

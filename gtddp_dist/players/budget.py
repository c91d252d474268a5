"""`gram_memory`: how much memory per-sample gradients and Gram matrices may take beyond what was captured.

One half is for per-sample gradients that are kept until the step has used them again, the other for what is let go
once it is used: a layer's per-sample gradients are then formed for as many of its input channels at a time as fit.
Without a budget each layer takes the way that is fastest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Budget:
    """What of the memory is taken, in one step.

    Args:
        megabytes: in all, in units of 10^6 bytes.
    """

    def __init__(self, megabytes: float) -> None:
        self.half = int(megabytes * 1e6 / 2)
        self.kept = 0

    def keep(self, size: int) -> bool:
        """Whether so many bytes more may be kept; if so, they are taken."""
        fits = self.kept + size <= self.half
        self.kept += size if fits else 0
        return fits


_budget: ContextVar[Budget | None] = ContextVar("gram_memory", default=None)


@contextlib.contextmanager
def within(budget: Budget | None) -> Iterator[None]:
    """Within the block, players keep to the budget; None: to none."""
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


def budget() -> Budget | None:
    """The one to keep to."""
    return _budget.get()

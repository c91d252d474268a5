"""Bytes of tensors, counted: what operations allocate, and the most that is alive at once.

Only tensors that torch's dispatcher sees count; memory that a kernel takes for itself does not.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from ..pipeline.counting import flop_counter


class Tally(TorchDispatchMode):
    """Counts while it is on.

    Attributes:
        allocated: bytes of all storages that operations made.
        alive: those of them that have not been freed.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.alive = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Callable[..., object], types: object, args=(), kwargs=None
    ) -> object:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.allocated += size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.alive -= size


class _NoModules(ModuleTracker):
    """Does not track which module an operation belongs to: the hooks for it keep what activation checkpointing makes
    anew alive until the garbage collector comes."""

    def __enter__(self) -> ModuleTracker:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass(frozen=True)
class Counts:
    """What a piece of work took.

    Attributes:
        flops: multiplications and additions of matrix products and convolutions; not of decompositions, solutions of
            linear systems and elementwise work.
        allocated_bytes: of all tensors that it made.
        peak_bytes: of those that were alive at once, at most.
    """

    flops: int
    allocated_bytes: int
    peak_bytes: int


def counted(work: Callable[[], object]) -> Counts:
    """Does the work, and counts it; the garbage collector, whose time is chance, is off meanwhile."""
    gc.collect()
    gc.disable()
    counter = flop_counter()
    counter.mod_tracker = _NoModules()
    try:
        with Tally() as tally, counter:
            work()
    finally:
        gc.enable()
    return Counts(int(counter.get_total_flops()), tally.allocated, tally.peak)

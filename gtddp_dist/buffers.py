"""A model's buffers (running statistics) and the random state, put back after a forward pass that must not count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def copy_buffers(model: nn.Module) -> list[Tensor]:
    """What the buffers hold now."""
    return [buffer.clone() for buffer in model.buffers()]


def restore_buffers(model: nn.Module, copies: Sequence[Tensor]) -> None:
    """Write back what :func:`copy_buffers` returned."""
    with torch.no_grad():
        for buffer, copy in zip(model.buffers(), copies, strict=True):
            buffer.copy_(copy)


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Give the model's buffers their values back at the end of the block."""
    copies = copy_buffers(model)
    try:
        yield
    finally:
        restore_buffers(model, copies)


def unchanged_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Give torch's generators their state back at the end of the block."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices, device_type="cuda")

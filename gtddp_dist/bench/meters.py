"""A clock, and the peak of memory, of a device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def now(device: torch.device) -> float:
    """Seconds, by a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_above(device: torch.device) -> Callable[[], int]:
    """From now on: the peak of memory over the present level, in bytes.

    Resident memory of this process; on a GPU what torch's allocator gave out.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - level
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present level again
    level = _kilobytes("VmRSS")
    return lambda: max(0, _kilobytes("VmHWM") - level) * 1024


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1])

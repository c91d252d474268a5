"""`gtddp bench memory`: the peak of a step's memory, each contender in a process of its own."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from ..config_schema import Config
from .single import Contender, batch, check
from .tally import counted


@dataclass(frozen=True)
class StepCost:
    """What a step of one optimizer takes, by itself in a fresh process.

    Attributes:
        optimizer: the contender.
        batch_size: samples of a step.
        seconds, fastest, slowest: median and range of ``bench.steps`` steps after the first ones; of Kronecker
            curvatures steps without new factors.
        peak_bytes: memory at its highest over the level before the first step, which has the network and the images:
            resident memory of the process, on a GPU what torch's allocator gave out. The first step makes factors and
            bases.
        tensor_bytes: the most bytes of tensors made in a later step that are alive at once, counted (`tally`); state
            that an earlier step left is not among them.
    """

    optimizer: str
    batch_size: int
    seconds: float
    fastest: float
    slowest: float
    peak_bytes: int
    tensor_bytes: int


def step_cost(config: Config, optimizer: str, batch_size: int) -> StepCost:
    """Time and peak memory of a step of one optimizer at one batch size, in a fresh process.

    Args:
        config: network, bench.image, bench.steps, bench.warmup, and the optimizer's options for all contenders.
        optimizer: a contender (`names.CONTENDERS`).
        batch_size: samples of a step.

    Raises:
        UserError: a configuration that cannot be measured, or steps that are not finite.
    """
    train = dataclasses.replace(config.train, batch_size=batch_size)
    scope = config.optimizer.scope
    fitting = dataclasses.replace(config.optimizer, scope=min(scope, batch_size) if isinstance(scope, int) else scope)
    own = dataclasses.replace(config, train=train, optimizer=fitting)
    check(own)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_cost, own, optimizer, torch.get_num_threads()).result()


def _cost(config: Config, name: str, threads: int) -> StepCost:
    torch.set_num_threads(threads)
    contender = Contender(config, name)
    images, labels = batch(config, contender.device, seed=0)
    peak_above = _memory(contender.device)
    contender.step(images, labels)
    for _ in range(max(config.bench.warmup, 1)):
        contender.step(images, labels, contender.kinds[0])
    peak = peak_above()
    seconds = []
    for _ in range(config.bench.steps):
        started = now(contender.device)
        contender.step(images, labels, contender.kinds[0])
        seconds.append(now(contender.device) - started)
    counts = counted(lambda: contender.step(images, labels, contender.kinds[0]))
    return StepCost(
        name,
        config.train.batch_size,
        statistics.median(seconds),
        min(seconds),
        max(seconds),
        peak,
        counts.peak_bytes,
    )


def now(device: torch.device) -> float:
    """A clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> Callable[[], int]:
    """From now on: the peak over the present level."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - level
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present level again
    level = _kilobytes(status, "VmRSS")
    return lambda: (_kilobytes(status, "VmHWM") - level) * 1024


def _kilobytes(status: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1])

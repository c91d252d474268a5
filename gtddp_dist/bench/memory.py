"""`gtddp bench memory`: the peak of a step's memory, each contender in a process of its own."""

from __future__ import annotations

import dataclasses
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from ..config_schema import Config
from ..environment import prepare_cpu
from .meters import now, peak_above
from .peers import new_contender, prepared
from .single import batch, check
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
    prepare_cpu(threads)
    with prepared(config, [name]):
        return _measured(config, name)


def _measured(config: Config, name: str) -> StepCost:
    contender = new_contender(config, name)
    images, labels = batch(config, contender.device, seed=0)
    peak = peak_above(contender.device)
    contender.step(images, labels)
    for _ in range(max(config.bench.warmup, 1)):
        contender.step(images, labels, contender.kinds[0])
    peak_bytes = peak()
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
        peak_bytes,
        counts.peak_bytes,
    )

"""Units that take times, with nothing else running: steps of trainings in turn, and what a step costs by itself."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import cast

from ..bench.meters import now, peak_above
from ..checkpoint import JSON
from ..errors import UserError
from ..parts import Parts, build
from .plan import Settings, config_of
from .unit import Result, Unit

_TIME_STEPS = "gtddp_dist.experiments.timing:time_steps"
_COST = "gtddp_dist.experiments.timing:cost_of_step"
LONG_S = 5.0
"""Of steps that take longer the first is enough."""


def timing(settings: Sequence[Settings], rounds: int) -> Unit:
    """The unit that times steps of these trainings beside each other."""
    return Unit.of(_TIME_STEPS, {"settings": cast(JSON, list(settings)), "rounds": rounds}, alone=True)


def cost(settings: Settings, reference: Settings, rounds: int) -> Unit:
    """The unit that measures steps of a training in a process of its own, with steps of a reference in turn."""
    arguments = {"settings": dict(settings), "reference": dict(reference), "rounds": rounds}
    return Unit.of(_COST, cast(Mapping[str, JSON], arguments), alone=True)


def time_steps(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    """Median seconds of a step of each training, as `seconds`; the first step of each is not counted."""
    runs = [_run(settings) for settings in cast(list[JSON], arguments["settings"])]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(cast(int, arguments["rounds"]) + 1):
        for run, times in zip(runs, seconds, strict=True):
            times.append(_step(run, number))
    return {"seconds": [statistics.median(times[1:]) for times in seconds]}


def cost_of_step(arguments: Mapping[str, JSON]) -> Result:
    """`seconds` and `reference_seconds` of a step (medians), and `bytes`: its peak of memory above what stood before.

    Where the optimizer refuses the batch, only `refused`, its reason.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_cost_here, arguments).result()


def _cost_here(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    reference, rounds = cast(Settings, arguments["reference"]), cast(int, arguments["rounds"])
    _step(_run({**reference, "train.batch_size": 2}), 0)  # what libraries take at first use
    run = _run(arguments["settings"])
    gc.collect()
    peak = peak_above(run.precision.device)
    try:
        first = _step(run, 0)
    except UserError as error:
        return {"refused": str(error)}
    peak_bytes = peak()
    beside = _run(reference)
    _step(beside, 0)
    times, beside_times = [first] if first > LONG_S else [], []
    for number in range(1, rounds + 1):
        if first <= LONG_S:
            times.append(_step(run, number))
        beside_times.append(_step(beside, number))
    return {
        "seconds": statistics.median(times),
        "reference_seconds": statistics.median(beside_times),
        "bytes": peak_bytes,
    }


def _run(settings: JSON | Settings) -> Parts:
    return build(config_of(cast(Settings, settings)))


def _step(run: Parts, number: int) -> float:
    """Takes a training step; its seconds."""
    images, labels = run.data.batch(run.order.batch_indices(number), run.config.train.seed, number)
    started = now(run.precision.device)
    run.step(images, labels)
    return now(run.precision.device) - started

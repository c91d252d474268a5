"""The unit "time steps": several trainings, one step of each in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import cast

from ..checkpoint import JSON
from .plan import Settings, config_of
from .unit import Unit

FUNCTION = "gtddp_dist.experiments.timing:time_steps"


def timing(settings: Sequence[Settings], rounds: int) -> Unit:
    """The unit that times steps of these trainings beside each other, alone on the machine."""
    return Unit.of(FUNCTION, {"settings": cast(JSON, list(settings)), "rounds": rounds}, alone=True)


def time_steps(arguments: dict[str, JSON]) -> dict[str, JSON]:
    """Median seconds of a step of each training, as `seconds`; the first step of each is not counted."""
    from ..parts import build  # imports torch

    configs = [config_of(cast(Settings, settings)) for settings in cast(list[JSON], arguments["settings"])]
    runs = [build(config) for config in configs]
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(cast(int, arguments["rounds"]) + 1):
        for number, run in enumerate(runs):
            images, labels = run.data.batch(run.order.batch_indices(step), run.config.train.seed, step)
            started = time.perf_counter()
            run.step(images, labels)
            seconds[number].append(time.perf_counter() - started)
    return {"seconds": [statistics.median(times[1:]) for times in seconds]}

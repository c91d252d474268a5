"""The learning rate over the run, as a factor of the configured rate."""

from __future__ import annotations

import math

from .config_schema import ScheduleConfig


def factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor of the learning rate at a training step; a pure function.

    Warm-up: at step s < `warmup_steps` the factor is (s + 1) / warmup_steps times what the schedule says, so
    no step has the rate 0. Then

    * constant: 1;
    * cosine: from 1 at the end of the warm-up, along half a cosine, to `min_factor` at `total_steps`;
    * step: gamma to the power of the number of milestones that are not after the step.

    Args:
        config: the schedule.
        step: training steps done before this one; 0 is the first.
        total_steps: training steps of the run.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.name == "constant":
        return warm
    if config.name == "cosine":
        length = max(1, total_steps - config.warmup_steps)
        done = min(1.0, max(0.0, (step - config.warmup_steps) / length))
        share = 0.5 * (1.0 + math.cos(math.pi * done))
        return warm * (config.min_factor + (1.0 - config.min_factor) * share)
    passed = sum(milestone <= step for milestone in config.milestones)
    return warm * config.gamma**passed

"""`gtddp bench step`: what a step costs in one process, beside torch's SGD in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config_schema import Config
from ..optimizer import GTDDP
from ..pipeline.counting import flop_counter
from .limit import flop_limit
from .memory import StepCost
from .meters import now
from .names import REFERENCE
from .peers import new_contender, prepared
from .single import Contender, Kind, batch

BASIS_ROUNDS = 2
"""Rounds in which steps with new bases are timed: they take long, and count for one step in a hundred."""
PROFILED = 3
"""Steps of a kind over which phases are averaged."""

Seconds = dict[str, dict[Kind, list[float]]]
"""Contender -> kind of step -> seconds, round by round."""
CostOf = Callable[[str, int], StepCost]
"""(contender, batch size) -> what a step costs in a fresh process."""


@dataclass(frozen=True)
class Row:
    """What was measured of one contender, over steps of all its kinds as often as they come.

    Attributes:
        optimizer: the contender.
        seconds: median of a step.
        time_ratio_to_sgd: median over rounds of the ratio to SGD's step of the same round,
        fastest_ratio, slowest_ratio: and its range.
        memory_ratio_to_sgd: of ``peak_bytes``.
        peak_bytes, tensor_bytes: `memory.StepCost`'s.
        flops: operations of matrix products and convolutions, as they were done.
        flops_ratio_to_sgd: of them: the time ratio if every operation took as long as SGD's.
        time_over_flops: time ratio over that.
        flop_limit: operations that a step of this method needs at least (`limit`).
        flops_over_limit: ``flops`` over that.
        seconds_by_kind: median seconds of each kind of step.
    """

    optimizer: str
    seconds: float
    time_ratio_to_sgd: float
    fastest_ratio: float
    slowest_ratio: float
    memory_ratio_to_sgd: float
    peak_bytes: int
    tensor_bytes: int
    flops: float
    flops_ratio_to_sgd: float
    time_over_flops: float
    flop_limit: float
    flops_over_limit: float
    seconds_by_kind: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """Where a step's time and operations go.

    Attributes:
        optimizer: the contender.
        phase: of the step.
        player: whose; empty where it is nobody's.
        seconds, flops: of a step, over its kinds as often as they come.
    """

    optimizer: str
    phase: str
    player: str
    seconds: float
    flops: float


def distinct(config: Config, names: Sequence[str]) -> list[str]:
    """Without gtddp-sgd-batch where gtddp-sgd has one group for the batch as well."""
    scope = config.optimizer.scope
    same = not isinstance(scope, int) or scope >= config.train.batch_size
    return [name for name in names if name != "gtddp-sgd-batch" or not same or "gtddp-sgd" not in names]


def measure(config: Config, names: Sequence[str], cost_of: CostOf) -> tuple[list[Row], list[Profile]]:
    """All contenders in this process, a step of each in turn; memory in processes of their own."""
    with prepared(config, names):
        return _measure(config, names, cost_of)


def _measure(config: Config, names: Sequence[str], cost_of: CostOf) -> tuple[list[Row], list[Profile]]:
    contenders = [new_contender(config, name) for name in names]
    first: dict[str, tuple[list[Profile], float]] = {}
    for contender in contenders:  # the first step makes the bases of a Kronecker curvature
        first[contender.name] = _profiled(contender, config, contender.kinds[-1], counting=True)
    seconds = timed(config, contenders)
    counts: dict[str, float] = {}
    profiles: list[Profile] = []
    for contender in contenders:
        work = 0.0
        for kind in contender.kinds:
            if kind.name == "bases":
                found, flops = first[contender.name]
                times = found
            else:
                found, flops = _profiled(contender, config, kind, counting=True)
                times = [p for _ in range(PROFILED) for p in _profiled(contender, config, kind, counting=False)[0]]
            work += kind.share * flops
            profiles += _weighed(kind, found, times)
        counts[contender.name] = work
    summed = _summed(profiles)
    images, labels = batch(config, contenders[0].device, seed=0)
    limits = {c.name: flop_limit(c, flops_by_phase(summed, c.name), images, labels) for c in contenders}
    costs = {name: cost_of(name, config.train.batch_size) for name in names}
    reference = seconds[REFERENCE][contenders[0].kinds[0]]
    rows = []
    for contender in contenders:
        ratios = {
            kind: [a / b for a, b in zip(found, reference, strict=False)]
            for kind, found in seconds[contender.name].items()
        }
        ratio = sum(kind.share * statistics.median(found) for kind, found in ratios.items())
        flops_ratio = counts[contender.name] / counts[REFERENCE]
        medians = {kind: statistics.median(found) for kind, found in seconds[contender.name].items()}
        rows.append(
            Row(
                optimizer=contender.name,
                seconds=sum(kind.share * median for kind, median in medians.items()),
                time_ratio_to_sgd=ratio,
                fastest_ratio=sum(kind.share * min(found) for kind, found in ratios.items()),
                slowest_ratio=sum(kind.share * max(found) for kind, found in ratios.items()),
                memory_ratio_to_sgd=costs[contender.name].peak_bytes / costs[REFERENCE].peak_bytes,
                peak_bytes=costs[contender.name].peak_bytes,
                tensor_bytes=costs[contender.name].tensor_bytes,
                flops=counts[contender.name],
                flops_ratio_to_sgd=flops_ratio,
                time_over_flops=ratio / flops_ratio,
                flop_limit=limits[contender.name],
                flops_over_limit=counts[contender.name] / limits[contender.name],
                seconds_by_kind={kind.name: median for kind, median in medians.items()},
            )
        )
    return rows, summed


def flops_by_phase(profiles: Sequence[Profile], optimizer: str) -> dict[str, float]:
    """Operations of a contender's step, phase by phase; phases without any are left out."""
    found: dict[str, float] = {}
    for profile in profiles:
        if profile.optimizer == optimizer and profile.flops:
            found[profile.phase] = found.get(profile.phase, 0.0) + profile.flops
    return found


def timed(config: Config, contenders: Sequence[Contender]) -> Seconds:
    """Rounds in which every contender takes a step of each of its kinds, the order moved on by one each round.

    Kinds with new bases are in the first rounds alone, at the end of them.
    """
    seconds: Seconds = {c.name: {kind: [] for kind in c.kinds} for c in contenders}
    for number in range(-config.bench.warmup, config.bench.steps):
        at = number % len(contenders)
        order = [*contenders[at:], *contenders[:at]]
        images, labels = batch(config, contenders[0].device, seed=number + config.bench.warmup)
        turns = [(c, kind) for c in order for kind in c.kinds if kind.name != "bases"]
        if 0 <= number < BASIS_ROUNDS:
            turns += [(c, kind) for c in order for kind in c.kinds if kind.name == "bases"]
        for contender, kind in turns:
            started = now(contender.device)
            contender.step(images, labels, kind)
            if number >= 0:
                seconds[contender.name][kind].append(now(contender.device) - started)
    return seconds


def _profiled(contender: Contender, config: Config, kind: Kind, *, counting: bool) -> tuple[list[Profile], float]:
    """One step, phase by phase and player by player, and all its operations; while they are counted it is slower."""
    images, labels = batch(config, contender.device, seed=0)
    if counting:
        with flop_counter() as counter:
            recorder = contender.recorded(
                images, labels, kind, lambda: (now(contender.device), float(counter.get_total_flops()))
            )
            total = float(counter.get_total_flops())
    else:
        recorder = contender.recorded(images, labels, kind, lambda: (now(contender.device), 0.0))
        total = 0.0
    optimizer = contender.optimizer
    players = optimizer.trajectory.players if isinstance(optimizer, GTDDP) else ()
    return [
        Profile(contender.name, phase, "" if player is None else players[player].name, seconds, flops)
        for (phase, player), (seconds, flops) in recorder.charged.items()
    ], total


def _weighed(kind: Kind, counted: Sequence[Profile], timed: Sequence[Profile]) -> list[Profile]:
    """Operations of one and mean seconds of the others, times the kind's share of all steps."""
    steps = 1 if timed is counted else PROFILED
    return [Profile(p.optimizer, p.phase, p.player, kind.share * p.seconds / steps, 0.0) for p in timed] + [
        Profile(p.optimizer, p.phase, p.player, 0.0, kind.share * p.flops) for p in counted
    ]


def _summed(profiles: Sequence[Profile]) -> list[Profile]:
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for p in profiles:
        seconds, flops = found.get((p.optimizer, p.phase, p.player), (0.0, 0.0))
        found[p.optimizer, p.phase, p.player] = (seconds + p.seconds, flops + p.flops)
    return [Profile(*key, *amounts) for key, amounts in found.items()]

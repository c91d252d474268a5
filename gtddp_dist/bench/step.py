"""`gtddp bench step|gram|memory|all`: what a step costs in one process, beside torch's SGD in the same run."""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from ..checkpoint import JSON
from ..config_schema import Config
from ..environment import describe_environment, prepare_cpu
from ..errors import OK
from ..files import write_text_atomically
from ..optimizer import GTDDP
from ..pipeline.counting import flop_counter
from .gram import gram_ways
from .memory import StepCost, step_cost
from .meters import now
from .names import REFERENCE, chosen
from .single import Contender, Kind, batch, check

What = Literal["step", "gram", "memory", "all"]
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


def run_bench(config: Config, what: What, *, as_json: bool, out: Path | None) -> int:
    """Measures, prints and keeps what was asked for; an exit code.

    Raises:
        UserError: a configuration that one process does not measure, or steps that are not finite.
    """
    check(config)
    prepare_cpu(config.train.threads)
    names = chosen(config.bench.optimizers)
    load = os.getloadavg()
    cost_of = functools.cache(functools.partial(step_cost, config))  # rows and memory have the same processes
    content: dict[str, JSON] = {}
    if what in ("step", "all"):
        names = distinct(config, names)
        rows, profiles = measure(config, names, cost_of)
        content["rows"] = [asdict(row) for row in rows]
        content["profile"] = [asdict(profile) for profile in profiles]
    if what in ("gram", "all"):
        content["gram"] = [asdict(way) for way in gram_ways(config)]
    if what in ("memory", "all"):
        sizes = config.bench.batch_sizes or (config.train.batch_size,)
        content["memory"] = _memory(distinct(config, names), sizes, cost_of)
    print(json.dumps(content) if as_json else _tables(content))
    if out is not None:
        content |= {
            "environment": describe_environment(),
            "load_before": list(load),
            "load_after": list(os.getloadavg()),
            "model": config.model.name,
            "batch_size": config.train.batch_size,
            "scope": config.optimizer.scope,
            "dtype": config.train.dtype,
            "image": list(config.bench.image),
            "steps": config.bench.steps,
        }
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / f"{what}.json", json.dumps(content, indent=1) + "\n")
    return OK


def distinct(config: Config, names: Sequence[str]) -> list[str]:
    """Without gtddp-sgd-batch where gtddp-sgd has one group for the batch as well."""
    scope = config.optimizer.scope
    same = not isinstance(scope, int) or scope >= config.train.batch_size
    return [name for name in names if name != "gtddp-sgd-batch" or not same or "gtddp-sgd" not in names]


def measure(config: Config, names: Sequence[str], cost_of: CostOf) -> tuple[list[Row], list[Profile]]:
    """All contenders in this process, a step of each in turn; memory in processes of their own."""
    contenders = [Contender(config, name) for name in names]
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
                seconds_by_kind={kind.name: median for kind, median in medians.items()},
            )
        )
    return rows, _summed(profiles)


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


def _memory(names: Sequence[str], sizes: Sequence[int], cost_of: CostOf) -> list[JSON]:
    rows: list[JSON] = []
    for size in sizes:
        costs = {name: cost_of(name, size) for name in names}
        rows += [
            {
                "optimizer": name,
                "batch_size": size,
                "peak_bytes": cost.peak_bytes,
                "tensor_bytes": cost.tensor_bytes,
                "memory_ratio_to_sgd": cost.peak_bytes / costs[REFERENCE].peak_bytes,
                "tensor_ratio_to_sgd": cost.tensor_bytes / costs[REFERENCE].tensor_bytes,
            }
            for name, cost in costs.items()
        ]
    return rows


def _tables(content: dict[str, JSON]) -> str:
    """Every list of figures as a table; of profiles the sums over players, in milliseconds."""
    parts = []
    for name, rows in content.items():
        assert isinstance(rows, list)
        if name == "profile":
            sums: dict[str, dict[str, float]] = {}
            for row in rows:
                assert isinstance(row, dict)
                own, phase = sums.setdefault(str(row["optimizer"]), {}), str(row["phase"])
                own[phase] = own.get(phase, 0.0) + 1e3 * float(row["seconds"])  # type: ignore[arg-type]
            parts.append(
                tabulate([{"ms a step": o, **phases} for o, phases in sums.items()], headers="keys", floatfmt=".4g")
            )
        else:
            shown = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]  # type: ignore[union-attr]
            parts.append(tabulate(shown, headers="keys", floatfmt=".4g", missingval="-"))
    return "\n\n".join(parts)

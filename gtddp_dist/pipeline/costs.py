"""Cuts that share the stages' work out evenly, what each rank then has to do, and files of costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Literal, cast

from ..config_schema import PlanConfig
from ..errors import UserError
from ..files import write_text_atomically
from .counting import Counting, Metric, StageCosts, count_stages
from .order import StepShape
from .simulate import Link, RankCosts

__all__ = [
    "CostFile",
    "Counting",
    "Expected",
    "Metric",
    "StageCosts",
    "WorkUnit",
    "balanced_cuts",
    "check_cuts",
    "count_stages",
    "link_of",
    "read_costs",
    "segment_costs",
    "speed_of",
    "write_costs",
]

WorkUnit = Literal["operations", "seconds"]

_NUMBER = 8  # bytes of a number of the recursion: float64


# ----------------------------------------------------------------------------------------------------------
# Cuts


def balanced_cuts(costs: Sequence[StageCosts], pipe: int) -> tuple[int, ...]:
    """First stage of every segment but the first: the largest work of a segment is as small as can be.

    Of cuts that are equal in that, those whose messages are smallest.

    Raises:
        UserError: more segments than stages.
    """
    stages = len(costs)
    _check_pipe(pipe, stages)
    before = [0.0, *accumulate(cost.work for cost in costs)]
    # smallest[i]: the least possible largest segment of stages 0 to i - 1, in as many segments as so far.
    smallest = list(before)
    for segments in range(2, pipe + 1):
        smallest = [
            min((max(smallest[j], before[i] - before[j]) for j in range(segments - 1, i)), default=float("inf"))
            for i in range(stages + 1)
        ]
    limit = smallest[stages] * (1 + 1e-12)  # the same sums, added up in another order
    # Among segments within the limit: the least bytes over all cuts.
    infinite = float("inf")
    ways: list[tuple[float, tuple[int, ...]]] = [
        (0.0, ()) if i and before[i] <= limit else (infinite, ()) for i in range(stages + 1)
    ]
    for segments in range(2, pipe + 1):
        ways = [
            min(
                (
                    (ways[j][0] + costs[j].live_bytes + costs[j].gradient_bytes, (*ways[j][1], j))
                    for j in range(segments - 1, i)
                    if before[i] - before[j] <= limit
                ),
                default=(infinite, ()),
            )
            for i in range(stages + 1)
        ]
    return ways[stages][1]


def check_cuts(cuts: Sequence[int], pipe: int, stages: int) -> None:
    """Refuses cuts that do not make `pipe` segments of that many stages.

    Raises:
        UserError: names the cuts and the choices.
    """
    _check_pipe(pipe, stages)
    listed = ", ".join(map(str, cuts))
    if len(cuts) != pipe - 1:
        raise UserError(f"parallel.cuts=[{listed}]: {pipe} segments need {pipe - 1} cuts")
    missing = [cut for cut in cuts if not 1 <= cut < stages]
    if missing:
        named = ", ".join(map(str, missing))
        raise UserError(
            f"parallel.cuts=[{listed}]: {named} is no stage that a segment can begin with; the network has {stages} "
            f"stages, so take 1 to {stages - 1}"
        )
    if list(cuts) != sorted(set(cuts)):
        raise UserError(f"parallel.cuts=[{listed}]: expected stages in increasing order, each once")


def _check_pipe(pipe: int, stages: int) -> None:
    if pipe < 1:
        raise UserError(f"parallel.pipe={pipe}: expected at least one segment")
    if pipe > stages:
        raise UserError(
            f"parallel.pipe={pipe}: more ranks than stages; the network has {stages} stages, so take at most {stages} "
            "segments and spend the other ranks on parallel.data"
        )


@dataclass(frozen=True)
class Expected:
    """What the work of a step is expected to take: ranks put it in order by that.

    Attributes:
        costs: of every pipeline rank.
        link: between neighbours.
    """

    costs: tuple[RankCosts, ...]
    link: Link

    def digest(self) -> str:
        """Equal where ranks expect the same."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def link_of(plan: PlanConfig) -> Link:
    """The connection between two ranks that is assumed."""
    return Link(plan.bandwidth * 1e9, plan.latency_us * 1e-6)


def speed_of(plan: PlanConfig, unit: WorkUnit) -> float:
    """Units of work that a rank is assumed to do in a second."""
    return plan.tflops * 1e12 if unit == "operations" else 1.0


def segment_costs(
    costs: Sequence[StageCosts], cuts: Sequence[int], shape: StepShape, counting: Counting, speed: float = 1.0
) -> list[RankCosts]:
    """What every pipeline rank's work takes.

    Args:
        costs: of all stages, for one micro-batch.
        cuts: first stage of every segment but the first.
        shape: of the step: what is done by micro-batch, and what once.
        counting: the optimizer's part, as the stages were counted with.
        speed: units of work that a rank does in a second; 1 for costs in seconds.

    Raises:
        UserError: cuts that do not exist.
    """
    check_cuts(cuts, shape.pipe, len(costs))
    bounds = [0, *cuts, len(costs)]
    units = shape.n_micro if shape.by == "step" else 1  # micro-batches of a recursion unit
    samples = costs[0].samples
    values = _NUMBER * counting.value_numbers(samples) * units if shape.feedback else 0.0
    phis = _NUMBER * samples * counting.rows * units if shape.feedback else 0.0
    ranks = []
    for index in range(shape.pipe):
        own = costs[bounds[index] : bounds[index + 1]]
        live = costs[bounds[index + 1]].live_bytes if index + 1 < shape.pipe else 0
        back = own[0].gradient_bytes if index else 0
        seconds = {
            name: sum(getattr(stage, name) for stage in own) / speed
            for name in ("forward", "backward", "gram", "sweep", "feedback", "weight", "statistics")
        }
        plain = not shape.feedback or counting.weight_in_backward
        nonlinear = shape.feedback and shape.rollout == "nonlinear"
        linear = shape.feedback and shape.rollout == "linear"
        parameters = sum(stage.parameter_bytes for stage in own)
        factor_bytes = sum(stage.factor_bytes for stage in own)
        captures = shape.feedback or counting.metric in ("kfac", "ekfac")
        again = seconds["forward"] + seconds["feedback"] + seconds["weight"] * counting.weight_products
        ranks.append(
            RankCosts(
                forward=seconds["forward"],
                backward=seconds["backward"] + (seconds["weight"] if plain else 0.0),
                cotangent=seconds["backward"] * counting.rows if shape.cotangents else 0.0,
                gram=seconds["gram"] * units if shape.feedback else 0.0,
                sweep=seconds["sweep"] * units if shape.feedback else 0.0,
                feedback=seconds["feedback"] * units if linear else 0.0,
                weight=seconds["weight"] * counting.weight_products * units if linear else 0.0,
                statistics=seconds["statistics"] * shape.n_micro,
                rollout=again * shape.n_micro if nonlinear else 0.0,
                activation_bytes=live,
                gradient_bytes=back,
                cotangent_bytes=back * counting.rows if shape.cotangents else 0.0,
                value_bytes=values if index else 0.0,
                feedback_bytes=phis if linear and index + 1 < shape.pipe else 0.0,
                state_bytes=live * shape.n_micro if nonlinear else 0.0,
                parameter_bytes=parameters,
                optimizer_bytes=parameters * counting.state_per_parameter + 2 * factor_bytes,
                statistics_bytes=factor_bytes,
                kept_bytes=sum(stage.kept_bytes for stage in own),
                captured_bytes=sum(stage.captured_bytes for stage in own) if captures else 0.0,
            )
        )
    return ranks


# ----------------------------------------------------------------------------------------------------------
# Cost files

FORMAT = "gtddp-costs"
VERSION = 1


@dataclass(frozen=True)
class CostFile:
    """What a cost file says.

    Attributes:
        unit: of all work: counted "operations", or measured "seconds".
        stages: all stages of the network, in order.
    """

    unit: WorkUnit
    stages: tuple[StageCosts, ...]


def write_costs(path: Path, stages: Sequence[StageCosts], unit: WorkUnit) -> None:
    """Writes a cost file, whole or not at all."""
    rows = [{item.name: getattr(stage, item.name) for item in fields(StageCosts)} for stage in stages]
    content = {"format": FORMAT, "version": VERSION, "unit": unit, "stages": rows}
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def read_costs(path: Path) -> CostFile:
    """Reads a cost file strictly.

    Raises:
        UserError: the file cannot be read, is no cost file of this version, or has a key too many, too few, or with a
            value of another kind; names file and key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON: {error}") from error
    top = _mapping(path, content, "the file", ("format", "version", "unit", "stages"))
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if top[key] != expected or isinstance(top[key], bool):
            raise UserError(f"{path}: {key} is {top[key]!r}, expected {expected!r}")
    unit = top["unit"]
    if unit not in ("operations", "seconds"):
        raise UserError(f"{path}: unit is {unit!r}, expected 'operations' or 'seconds'")
    if not isinstance(top["stages"], list) or not top["stages"]:
        raise UserError(f"{path}: stages: expected a list of at least one stage")
    stages = tuple(_stage(path, row, f"stages[{index}]") for index, row in enumerate(top["stages"]))
    if len({stage.samples for stage in stages}) > 1:
        raise UserError(f"{path}: samples: expected the same number in every stage")
    return CostFile(unit, stages)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _mapping(path: Path, value: object, where: str, keys: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where}: expected an object with the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise UserError(f"{path}: {where}: unknown key {key!r}; expected {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise UserError(f"{path}: {where}: missing key {key!r}")
    return cast(Mapping[str, object], value)


def _stage(path: Path, value: object, where: str) -> StageCosts:
    row = _mapping(path, value, where, [item.name for item in fields(StageCosts)])
    for item in fields(StageCosts):
        found = row[item.name]
        kind = {"str": "a text", "int": "a whole number >= 0", "float": "a number >= 0"}[str(item.type)]
        allowed = {"str": str, "int": int, "float": (int, float)}[str(item.type)]
        number = isinstance(found, int | float)
        least = 1 if item.name == "samples" else 0
        if isinstance(found, bool) or not isinstance(found, allowed) or (number and not least <= found < float("inf")):  # type: ignore[operator, arg-type]
            raise UserError(f"{path}: {where}.{item.name} is {found!r}, expected {kind}")
    return StageCosts(**row)  # type: ignore[arg-type]

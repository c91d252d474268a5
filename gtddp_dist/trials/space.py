"""The trials of a sweep: which settings each has, and that all of them are valid. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from ..config import Config, ConfigError, draft
from ..strict_yaml import Value
from .spec import Range, SweepFile, SweepSpec, range_of

DIGITS = 4
"""Significant decimal digits of a number that is drawn: names and tables stay readable, and say what was trained."""
_NAME_LENGTH = 80


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of a sweep."""

    name: str
    """Of its run directory: its number, and what is special about it."""
    label: str
    """Of its curve: the variant, or the optimizer where there are none."""
    values: Mapping[str, Value]
    """What it was given by the sweep's parameters and seeds."""


@dataclasses.dataclass(frozen=True)
class Configured:
    """A trial with its configuration."""

    trial: Trial
    config: Config


def trials_of(sweep: SweepFile) -> list[Configured]:
    """All trials of a sweep, in order. Raises ConfigError with every problem of every trial's configuration."""
    spec = sweep.spec
    base = draft(spec.config).over(_values(spec.set), _origins(sweep, "set", spec.set))
    points = list(_points(spec))
    width = max(3, len(str(len(points) - 1)))
    found: list[Configured] = []
    problems: dict[str, list[str]] = {}
    seen: dict[Config, str] = {}
    for number, (variant, values) in enumerate(points):
        settings = spec.variants.get(variant, {})
        given = base.over(_values(settings), _origins(sweep, f"variants.{variant}", settings))
        given = given.over(
            values, _origins(sweep, "parameters", values) | {"train.seed": sweep.origins.get("seeds", "")}
        )
        name = f"{number:0{width}d}{_short(spec, variant, values)}"
        if wrong := given.problems():
            for problem in wrong:
                problems.setdefault(problem, []).append(name)
            continue
        config = given.build()
        if spec.method == "grid" and config in seen:
            problems.setdefault(f"has the same configuration as {seen[config]}", []).append(name)
        seen[config] = name
        found.append(Configured(Trial(name, variant or config.optimizer.name, values), config))
    if problems:
        raise ConfigError(_told(problems, len(points)))
    return found


def _points(spec: SweepSpec) -> Iterator[tuple[str, dict[str, Value]]]:
    """Variant ("" where there are none) and values of each trial: by variants, then parameters, then seeds."""
    combinations = list(_grid(spec) if spec.method == "grid" else _draws(spec))
    seeds: Sequence[int | None] = spec.seeds or (None,)
    for variant, values, seed in itertools.product(spec.variants or ("",), combinations, seeds):
        yield variant, values if seed is None else {**values, "train.seed": seed}


def _grid(spec: SweepSpec) -> Iterator[dict[str, Value]]:
    lists = [cast(list[Value], values) for values in spec.parameters.values()]
    for chosen in itertools.product(*lists):
        yield dict(zip(spec.parameters, chosen, strict=True))


def _draws(spec: SweepSpec) -> Iterator[dict[str, Value]]:
    """The same draws for every variant; more trials have those of fewer as their first ones."""
    source = random.Random(spec.seed)
    for _ in range(spec.trials or 0):
        yield {key: _drawn(values, source) for key, values in spec.parameters.items()}


def _drawn(values: object, source: random.Random) -> Value:
    if isinstance(values, list):
        return cast(Value, source.choice(values))
    found = range_of(values)
    assert isinstance(found, Range), found  # checked when the sweep was read
    if found.kind == "int":
        return source.randint(int(found.low), int(found.high))
    if found.kind == "uniform":
        number = source.uniform(found.low, found.high)
    else:
        number = math.exp(source.uniform(math.log(found.low), math.log(found.high)))
    return min(max(float(f"{number:.{DIGITS}g}"), found.low), found.high)


def _short(spec: SweepSpec, variant: str, values: Mapping[str, Value]) -> str:
    """What is special about a trial, for the name of its directory."""
    parts = [variant] if variant else []
    for key, value in values.items():
        if key == "train.seed":
            parts += [f"seed{value}"] if len(spec.seeds or ()) > 1 else []
        elif len(cast(Sequence[object], spec.parameters[key])) > 1 or isinstance(spec.parameters[key], dict):
            last = key.rpartition(".")[2]
            parts.append(f"{value}" if last == "name" else f"{last}{show(value)}")
    text = "".join(f"-{re.sub(r'[^A-Za-z0-9._+-]+', '_', part)}" for part in parts)
    return text[:_NAME_LENGTH].rstrip("-._")


def show(value: Value) -> str:
    """A value as tables and names have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(show(item) for item in value) if isinstance(value, list) else str(value)


def _values(settings: Mapping[str, object]) -> dict[str, Value]:
    return cast(dict[str, Value], dict(settings))  # strict_yaml gives no other values


def _origins(sweep: SweepFile, part: str, keys: Mapping[str, object]) -> dict[str, str]:
    return {key: sweep.origins.get(f"{part}.{key}") or sweep.origins.get(part, part) for key in keys}


def _told(problems: Mapping[str, list[str]], count: int) -> str:
    """One message for all problems, each with the trials that have it."""
    lines = []
    for problem, names in problems.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        which = "all trials" if len(names) == count > 1 else f"trial {names[0]}{more}"
        lines.append(f"{which}: {problem}")
    head = "" if len(lines) == 1 else f"{len(lines)} problems in the trials of the sweep:\n  "
    return head + "\n  ".join(lines)

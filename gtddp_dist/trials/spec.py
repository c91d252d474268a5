"""The file of a sweep: its schema, and reading it. No torch.

A key of a configuration stands in it as on the command line, with its dot: `optimizer.lr`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from .. import strict_yaml
from ..config import ConfigError, Draft
from ..registry import nearest, nearest_first

Metric: TypeAlias = Literal["val/accuracy", "val/accuracy_best", "val/loss", "train/loss", "seconds_per_step"]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Bounds = Annotated[tuple[int | float, int | float], Strict(False)]
# What strict_yaml gives; pydantic cannot build a schema of its recursive type.
Settings: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepSpec:
    """A sweep: which trials it has, and what they are compared by."""

    config: Annotated[str, Field(min_length=1)]
    """Shipped config (by name), or a YAML file (by its path from the sweep's file), that all trials start from."""
    method: Literal["grid", "random"] = "grid"
    """grid: all combinations of the parameters' lists; random: `trials` draws of them."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """random: number of draws; each is a trial for every variant and every seed."""
    seed: Seed = 0
    """random: seed of the draws."""
    set: dict[str, object] = field(default_factory=dict)
    """Settings of all trials, over those of the config."""
    variants: dict[str, dict[str, object]] = field(default_factory=dict)
    """Name -> settings that go together, such as an optimizer with its options. A curve each."""
    parameters: dict[str, object] = field(default_factory=dict)
    """Key -> list of values; or, for random, one of {uniform: [low, high]}, {log_uniform: [low, high]} and
    {int: [low, high]} with both ends."""
    seeds: Annotated[tuple[Seed, ...], Strict(False), Field(min_length=1)] | None = None
    """Values of train.seed; null: the config's one."""
    metric: Metric = "val/accuracy"
    """Number of summary.json that trials are sorted by."""
    mode: Literal["max", "min"] | None = None
    """Whether more of it is better; null: of an accuracy it is, of the others less."""

    @property
    def more_is_better(self) -> bool:
        """Whether the largest value of the metric is the best."""
        return (self.mode or ("max" if "accuracy" in self.metric else "min")) == "max"


@dataclasses.dataclass(frozen=True)
class Range:
    """A parameter that is drawn."""

    kind: Literal["uniform", "log_uniform", "int"]
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """A sweep that was read, with the command line over it."""

    name: str
    """Of the file, without its ending."""
    spec: SweepSpec
    origins: Mapping[str, str]
    """Where each part was given, by its dotted path in the file, for messages."""


# Its values are not typed before it has seen them.
_validated: Callable[..., SweepSpec] = SweepSpec
KINDS = ("uniform", "log_uniform", "int")
_KEYS = tuple(item.name for item in dataclasses.fields(SweepSpec))


def shipped_sweeps() -> list[str]:
    """Names of the sweeps that come with the package."""
    folder = resources.files("gtddp_dist").joinpath("configs").joinpath("sweeps")
    return sorted(item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> SweepFile:
    """The sweep that ships under a name, or that is in a YAML file; with `key=value` of the command line over it.

    A key of the command line takes the place of a parameter of that name: it is varied no more. Raises ConfigError
    with all problems of the file itself; those of its trials are found by `gtddp_dist.trials.space`.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and path.name == name_or_path and not os.path.isfile(path):
        if name_or_path not in shipped_sweeps():
            listed = ", ".join(nearest_first(name_or_path, shipped_sweeps()))
            raise ConfigError(
                f"no sweep named {name_or_path!r}. Shipped sweeps: {listed}. For a file of your own give its path, "
                "for example my/sweep.yaml"
            )
        shipped = resources.files("gtddp_dist").joinpath("configs").joinpath("sweeps").joinpath(f"{name_or_path}.yaml")
        text, source, folder = shipped.read_text(encoding="utf-8"), f"shipped sweep {name_or_path}", None
    else:
        try:
            text, source, folder = strict_yaml.read_text(path), name_or_path, path.parent
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the sweep {name_or_path}: {error}") from error
    spec, origins = parse_sweep(text, source)
    if folder is not None and Path(spec.config).suffix in (".yaml", ".yml"):
        spec = dataclasses.replace(spec, config=str((folder / spec.config).resolve()))
    return SweepFile(path.stem, _overridden(spec, origins, overrides), origins)


def parse_sweep(text: str, source: str) -> tuple[SweepSpec, dict[str, str]]:
    """The sweep in a YAML text, and where each of its parts stands. Raises ConfigError with all problems."""
    try:
        document = strict_yaml.parse(text)
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{source}, line {error.line}: {error.message}") from error
    values, problems = document.value, []
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold the keys of a sweep ({', '.join(_KEYS)})")
    origins = {key: f"{source}, line {line}" for key, line in document.lines.items()}
    for key in values:
        if key not in _KEYS:
            close = nearest(key, _KEYS) or _KEYS
            problems.append(f"{key} ({origins[key]}): a sweep has no such key; nearest: {', '.join(close)}")
    known = {key: value for key, value in values.items() if key in _KEYS}
    spec = None
    if "config" not in known:
        problems.append(f"config ({source}): is missing: the name of a shipped config, or the path of a YAML file")
        known["config"] = "?"
    try:
        spec = _validated(**known)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = ".".join(
                str(part) for part in item["loc"] if isinstance(part, str) and part.replace("_", "").isalnum()
            )
            where = origins.get(key) or origins.get(str(item["loc"][0]), source)
            problems.append(f"{key} ({where}): {item['msg']}, got {item['input']!r}"[:200])
    if spec is not None:
        problems.extend(_spec_problems(spec, origins))
    if spec is None or problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems in the sweep:\n  "
        raise ConfigError(count + "\n  ".join(dict.fromkeys(problems)))
    return spec, origins


def range_of(values: object) -> Range | str:
    """A parameter's range, or what is wrong with it."""
    if not isinstance(values, dict) or len(values) != 1 or next(iter(values)) not in KINDS:
        return "expected a list of values, or one of " + ", ".join(f"{{{kind}: [low, high]}}" for kind in KINDS)
    [(kind, bounds)] = values.items()
    numbers = int if kind == "int" else int | float
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(_is_number(bound, numbers) for bound in bounds):
        return f"{kind}: expected [low, high], two {'integers' if kind == 'int' else 'numbers'}"
    low, high = bounds
    if low >= high:
        return f"{kind}: the first number must be the smaller one"
    if kind == "log_uniform" and low <= 0:
        return "log_uniform: expected numbers greater than 0"
    return Range(kind, low, high)


def _is_number(value: object, types: object) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)  # type: ignore[arg-type]


def _spec_problems(spec: SweepSpec, origins: Mapping[str, str]) -> list[str]:
    """What is wrong with a sweep whose parts are of the right types."""
    problems = []

    def problem(key: str, text: str) -> None:
        problems.append(f"{key} ({origins.get(key) or origins.get(key.partition('.')[0], 'the sweep')}): {text}")

    if spec.method == "random" and spec.trials is None:
        problem("trials", "method: random needs a number of draws, such as trials: 20")
    if spec.method == "grid" and spec.trials is not None:
        problem("trials", "a grid has all combinations: leave it out, or take method: random")
    if spec.method == "random" and not spec.parameters:
        problem("parameters", "method: random needs parameters to draw")
    for key, values in spec.parameters.items():
        path = f"parameters.{key}"
        if isinstance(values, list):
            if not values:
                problem(path, "expected at least one value")
            elif any(value in values[:at] for at, value in enumerate(values)):
                problem(path, "a value is given twice")
        elif isinstance(found := range_of(values), str):
            problem(path, found)
        elif spec.method == "grid":
            problem(path, f"a grid needs a list of values; {found.kind} is for method: random")
        if key == "train.seed":
            problem(path, "seeds of a sweep are given as 'seeds: [0, 1, 2]'")
    if spec.seeds is not None and len(set(spec.seeds)) < len(spec.seeds):
        problem("seeds", "a seed is given twice")
    for part, keys in (
        ("set", spec.set),
        ("parameters", spec.parameters),
        *((f"variants.{name}", settings) for name, settings in spec.variants.items()),
    ):
        for key in keys:
            if key == "run.dir" or (key.startswith("launch.") and part != "set"):
                what = "every trial has a directory of its own" if key == "run.dir" else "all trials are launched alike"
                problem(f"{part}.{key}", what)
    return problems


def _overridden(spec: SweepSpec, origins: dict[str, str], overrides: Sequence[str]) -> SweepSpec:
    """The sweep with the command line over it; tells `origins` what comes from there."""
    given = Draft().overridden(overrides)
    problems, fixed = list(given.unread), given.values()
    if "run.dir" in fixed:
        problems.append("run.dir (command line): every trial has a directory of its own; that of the sweep is --dir")
    parameters = {key: values for key, values in spec.parameters.items() if key not in fixed}
    if spec.method == "random" and not parameters:
        problems.append(f"{', '.join(fixed)} (command line): nothing is left to draw: train a single run instead")
    if problems:
        raise ConfigError("\n  ".join(problems))
    origins.update({f"set.{key}": "command line" for key in fixed})
    return dataclasses.replace(
        spec,
        parameters=parameters,
        variants={
            name: {key: value for key, value in settings.items() if key not in fixed}
            for name, settings in spec.variants.items()
        },
        set=spec.set | fixed,
        seeds=None if "train.seed" in fixed else spec.seeds,
    )


def dump_sweep(spec: SweepSpec) -> str:
    """YAML text that `parse_sweep` reads back as an equal sweep."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(spec).items()}
    return strict_yaml.dump({key: values[key] for key in _KEYS})

"""`gtddp bench growth`: a step's time, memory and operations against batch size, depth and width, one at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..config import load_config
from ..config_schema import Config
from ..errors import UserError
from ..models import small_resnet, vit
from ..registry import MODELS, nearest_first
from .memory import step_cost
from .single import check
from .step import Row, distinct, flops_by_phase, measure

Axis = Literal["batch", "depth", "width"]
"""What is varied: samples of a step, blocks of the network, channels (vit: numbers of a token)."""

BATCH_SIZES = (8, 16, 32, 64)
DEPTHS = (1, 2, 4, 8)
WIDTHS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Sizes:
    """A network and batch.

    Attributes:
        batch: samples of a step.
        depth: blocks; None: the network has no such option,
        width: channels, likewise.
    """

    batch: int
    depth: int | None
    width: int | None


@dataclass(frozen=True)
class Point:
    """One contender at one size.

    Attributes:
        axis: what is varied.
        sizes: of which the others are as configured.
        row: what `gtddp bench step` finds there.
        flops_by_phase: operations of a step by phase; they add up to the row's.
    """

    axis: Axis
    sizes: Sizes
    row: Row
    flops_by_phase: Mapping[str, float]

    @property
    def size(self) -> int:
        """The varied one."""
        size = getattr(self.sizes, self.axis)
        assert isinstance(size, int)
        return size


def grown(config: Config) -> Config:
    """The configuration whose network `gtddp bench all` varies: this one, if its network has a depth and a width.

    Else that of the shipped config bench-growth, with its batch, images and optimizer options.
    """
    if _depth_option(config.model.name) and _has_width(config.model.name):
        return config
    own = load_config("bench-growth")
    return dataclasses.replace(
        own,
        train=dataclasses.replace(config.train, batch_size=own.train.batch_size),
        bench=dataclasses.replace(config.bench, image=own.bench.image),
    )


def axes(config: Config) -> dict[Axis, tuple[int, ...]]:
    """The sizes along every axis, in increasing order; axes with an empty list are left out.

    Raises:
        UserError: a network without an option for one of them.
    """
    bench = config.bench
    given = (bench.batch_sizes, bench.depths, bench.widths)
    found: dict[Axis, tuple[int, ...]] = {}
    for axis, sizes, default in zip(get_args(Axis), given, (BATCH_SIZES, DEPTHS, WIDTHS), strict=True):
        wanted = sorted(set(default if sizes is None else sizes))
        lacks = (axis == "depth" and not _depth_option(config.model.name)) or (
            axis == "width" and not _has_width(config.model.name)
        )
        if wanted and lacks:
            able = [name for name in MODELS if _depth_option(name) and _has_width(name)]
            raise UserError(
                f"model.name={config.model.name}: has no {axis} to vary; take bench.{axis}s=[] to leave it out, or "
                f"another network: {', '.join(nearest_first(config.model.name, able))}"
            )
        if wanted:
            found[axis] = tuple(wanted)
    return found


def growth(config: Config, names: Sequence[str]) -> list[Point]:
    """Every contender at every size, axis by axis.

    Raises:
        UserError: a configuration that one process does not measure, a network without an axis, or steps that are
            not finite.
    """
    check(config)
    wanted = axes(config)
    start = configured(config)
    measured: dict[Sizes, list[tuple[Row, Mapping[str, float]]]] = {}  # axes meet where all is as configured
    points = []
    for axis, line in wanted.items():
        for size in line:
            sizes = dataclasses.replace(start, **{axis: size})
            if sizes not in measured:
                measured[sizes] = _measured(resized(config, sizes), names)
            points += [Point(axis, sizes, *each) for each in measured[sizes]]
    return points


def _measured(config: Config, names: Sequence[str]) -> list[tuple[Row, Mapping[str, float]]]:
    cost_of = functools.partial(step_cost, config)
    rows, profiles = measure(config, distinct(config, names), cost_of)
    return [(row, flops_by_phase(profiles, row.optimizer)) for row in rows]


def resized(config: Config, sizes: Sizes) -> Config:
    """The configuration at these sizes; all blocks have the same number of channels."""
    model = config.model
    depth = _depth_option(config.model.name)
    if sizes.depth is not None and depth is not None:
        model = dataclasses.replace(model, **{depth: sizes.depth})  # type: ignore[arg-type]
    if sizes.width is not None:
        model = dataclasses.replace(model, width=sizes.width)
    if sizes.depth is not None and sizes.width is not None and "channels" in MODELS[model.name].options:
        model = dataclasses.replace(model, channels=(sizes.width,) * sizes.depth)
    scope = config.optimizer.scope
    optimizer = dataclasses.replace(
        config.optimizer, scope=min(scope, sizes.batch) if isinstance(scope, int) else scope
    )
    train = dataclasses.replace(config.train, batch_size=sizes.batch)
    return dataclasses.replace(config, model=model, optimizer=optimizer, train=train)


def configured(config: Config) -> Sizes:
    """The sizes that stay as they are while one is varied."""
    depth, width = _depth_option(config.model.name), None
    if _has_width(config.model.name):
        width = config.model.width or (vit.DEFAULT_WIDTH if config.model.name == "vit" else small_resnet.DEFAULT_WIDTH)
    return Sizes(config.train.batch_size, getattr(config.model, depth) if depth else None, width)


def _depth_option(model: str) -> str | None:
    """The option that says how many blocks the network has, all of which can be alike."""
    options = MODELS[model].options
    return "depth" if "depth" in options else "blocks" if "channels" in options else None


def _has_width(model: str) -> bool:
    return "width" in MODELS[model].options

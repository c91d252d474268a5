"""`gtddp bench scaling`: a step on every grid that some number of ranks can make.

Each grid is measured by ranks of its own, started anew: here one after another on this host, in a job by whoever
starts ranks there (slurm/scaling.sbatch). What a grid came to is a file; `scaling_report` joins them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from .. import __version__
from ..checkpoint import JSON
from ..config import load_config
from ..config_schema import Config
from ..environment import describe_environment, prepare_cpu
from ..errors import BAD_INPUT, OK, UserError
from ..files import write_text_atomically
from ..launch import Ranks, StopRequest, discover, launch, local
from ..pipeline.company import company
from ..pipeline.grid import Grid, Shape
from ..results import config_hash
from .scaling_report import FORMAT, Row, join
from .subject import batches, cut, described, place_of

Mode = Literal["strong", "weak"]
"""strong: train.batch_size is the whole batch of every grid. weak: it is that of a replica."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        config_name: the config, and
        overrides: what counts over it.
        ranks: the most ranks of a grid; None: one a core or GPU of this host.
        grid: as pipe=2,data=4: this one alone, on ranks that somebody starts for it; None: all, one after another.
        out: the folder for figures.
    """

    config_name: str
    overrides: tuple[str, ...]
    ranks: int | None
    grid: str | None
    out: Path | None

    def config(self, shape: Shape, mode: Mode) -> Config:
        """The configuration of a grid."""
        words = [*self.overrides, f"parallel.pipe={shape.pipe}", f"parallel.data={shape.data}"]
        if mode == "weak":
            single = load_config(self.config_name, [*self.overrides, "parallel.pipe=1", "parallel.data=1"])
            words.append(f"train.batch_size={single.train.batch_size * shape.data}")
        return load_config(self.config_name, words)


def run_scaling(request: Request, config: Config, *, list_only: bool, as_json: bool) -> int:
    """Measures grids, and joins what they came to; an exit code.

    Args:
        request: which grids of which configuration.
        config: the configuration that it names.
        list_only: print the grids and measure nothing.
        as_json: print JSON in place of a table.

    Raises:
        UserError: a grid that does not exist, or whose batch cannot be shared out; ranks that were started for
            several grids.
    """
    if config.parallel.cuts is not None:
        raise UserError("parallel.cuts: every grid has cuts of its own; leave it out")
    if request.grid is not None:
        return _measure_one(request, _parsed(request.grid))
    limit = request.ranks if request.ranks is not None else _ranks_here()
    shapes = grids(limit, len(described(_one_rank(config)).trajectory.stages))
    if list_only:
        print("\n".join(map(str, shapes)))
        return OK
    if discover() is not None:
        raise UserError(
            "bench scaling starts ranks by itself, one grid after another; where something else starts them, measure "
            "each with --grid on as many ranks, then --join (see slurm/scaling.sbatch)"
        )
    if request.out is not None and any(request.out.glob("grid-*.json")):
        raise UserError(f"--out {request.out}: holds figures of grids already; name another folder, or empty this one")
    # As many threads for a rank of every grid: else few ranks would have more cores each.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // limit)))
    with tempfile.TemporaryDirectory() as folder:
        out = request.out if request.out is not None else Path(folder)
        failed = []
        for shape in shapes:
            code = local.start(_command(request, shape, out), shape.world)
            if code == BAD_INPUT:
                return code
            if code != OK:
                failed.append((shape, code))
        for shape, code in failed:
            print(f"gtddp: grid {shape} was not measured: its ranks ended with exit code {code}", file=sys.stderr)
        joined = join(out, as_json=as_json) if len(failed) < len(shapes) else OK
        return failed[0][1] if failed else joined


def grids(ranks: int, stages: int) -> list[Shape]:
    """Grids of powers of two with at most so many ranks and segments, those of few ranks first."""
    powers = [2**n for n in range(ranks.bit_length())]
    found = [Shape(pipe, data) for pipe in powers for data in powers if pipe * data <= ranks and pipe <= stages]
    return sorted(found, key=lambda shape: (shape.world, shape.pipe))


def _parsed(text: str) -> Shape:
    match = re.fullmatch(r"pipe=([1-9]\d*),data=([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--grid={text!r}: expected a grid such as pipe=2,data=4")
    return Shape(int(match[1]), int(match[2]))


def _ranks_here() -> int:
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _one_rank(config: Config) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pipe=1, data=1))


def _command(request: Request, shape: Shape, out: Path) -> list[str]:
    words = [request.config_name, *request.overrides, "--grid", str(shape), "--out", str(out)]
    return [sys.executable, "-m", "gtddp_dist", "bench", "scaling", *words]


# ----------------------------------------------------------------------------------------------------------
# One grid


def _measure_one(request: Request, shape: Shape) -> int:
    """Measures a grid on the ranks that are there, or on ranks of this host; its figures go to `request.out`."""
    if request.out is None:
        raise UserError("--grid measures one grid for a later --join: say where its figures go with --out DIR")
    out = request.out
    configs = list(_configs(request, shape))

    def work(stop: StopRequest, ranks: Ranks) -> int:
        config = configs[0][1]
        prepare_cpu(config.train.threads)
        trajectory, cuts = cut(config)
        place = place_of(config, ranks, cuts, len(trajectory.stages))
        facts = {
            "gtddp-dist": __version__,
            "torch": torch.__version__,
            "cuts": json.dumps(cuts),
            "configurations": " ".join(config_hash(each) for _, each in configs),
        }
        with company(place, facts, lost_after_s=config.parallel.lost_after_s) as grid:
            rows: list[Row] = []
            for modes, each in configs:
                row = measure(each, grid, cuts)
                rows += [dataclasses.replace(row, mode=mode) for mode in modes]
            if grid.rank == 0:
                _keep(out, request, shape, cuts, rows)
        return OK

    return launch(work, shape.world)


def _configs(request: Request, shape: Shape) -> Iterator[tuple[tuple[Mode, ...], Config]]:
    """What is measured on a grid: with one replica weak and strong scaling are the same."""
    if shape.data == 1:
        yield ("strong", "weak"), request.config(shape, "strong")
        return
    train = request.config(Shape(shape.pipe, 1), "strong").train
    if train.batch_size % (train.micro_batches * shape.data) == 0:
        yield ("strong",), request.config(shape, "strong")
    yield ("weak",), request.config(shape, "weak")


def measure(config: Config, grid: Grid, cuts: Sequence[int]) -> Row:
    """Times steps of the configured optimizer, from all ranks ready to all ranks done."""
    from .contenders import Ours  # imports deepspeed

    engine = Ours(config, config.optimizer.name, grid, cuts).engine
    seconds = []
    for number in range(config.bench.warmup + config.bench.steps):
        if number == config.bench.warmup:
            engine.worker.take_measurements()
        inputs, targets = batches(config, grid, number)
        grid.barrier()
        started = time.perf_counter()
        engine.step(inputs, targets)
        grid.barrier()
        if number >= config.bench.warmup:
            seconds.append(time.perf_counter() - started)
    busy, _, sent = engine.worker.take_measurements()
    every = grid.gather([busy / sum(seconds), sent / config.bench.steps / 1e6])
    return Row(
        pipe=grid.shape.pipe,
        data=grid.shape.data,
        mode="strong",
        batch_size=config.train.batch_size,
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        sent_mb=max(numbers[1] for numbers in every),
        busy=statistics.mean(numbers[0] for numbers in every),
        least_busy=min(numbers[0] for numbers in every),
    )


def _keep(out: Path, request: Request, shape: Shape, cuts: Sequence[int], rows: Sequence[Row]) -> None:
    alone = request.config(Shape(1, 1), "strong")
    content: dict[str, JSON] = {
        "format": FORMAT,
        "version": 1,
        "configuration": config_hash(alone),
        "model": alone.model.name,
        "optimizer": alone.optimizer.name,
        "batch_size": alone.train.batch_size,
        "micro_batches": alone.train.micro_batches,
        "grid": str(shape),
        "cuts": list(cuts),
        "environment": describe_environment(),
        "rows": [asdict(row) for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    name = f"grid-pipe-{shape.pipe}-data-{shape.data}.json"
    write_text_atomically(out / name, json.dumps(content, indent=1) + "\n")

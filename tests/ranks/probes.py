"""What parts of the pipeline do on the ranks of a grid; each writes what it found as JSON."""

from __future__ import annotations

import itertools
import json
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_dist import GTDDP, curvature
from gtddp_dist.capture import MicroBatch
from gtddp_dist.config import ModelConfig
from gtddp_dist.curvature import factors
from gtddp_dist.launch import Ranks
from gtddp_dist.models import resnet, small_resnet
from gtddp_dist.pipeline.company import Place, company
from gtddp_dist.pipeline.costs import Expected
from gtddp_dist.pipeline.grid import Grid, Shape
from gtddp_dist.pipeline.initialize import Engine
from gtddp_dist.pipeline.instructions import Instruction, Op
from gtddp_dist.pipeline.simulate import Link, RankCosts
from gtddp_dist.pipeline.worker import Outcome, Worker
from gtddp_dist.tracing import trace

from .parity import new_engine, own_chunks
from .server import Arguments
from .settings import BAD_STEP, RESNET_CUT, RESNET_SAMPLES, Setting


@contextmanager
def on_grid(ranks: Ranks, pipe: int, data: int) -> Iterator[Grid]:
    """The grid of these ranks."""
    shape = Shape(pipe, data)
    place = Place(ranks, shape, tuple(range(1, pipe)), pipe, torch.device("cpu"), "gloo")
    with company(place, {}, lost_after_s=60.0) as grid:
        yield grid


def _tell(ranks: Ranks, found: object) -> None:
    Path(f"found-{ranks.rank}.json").write_text(json.dumps(found))


# Groups ---------------------------------------------------------------------------------------------------


def groups(ranks: Ranks, arguments: Arguments) -> None:
    """Reductions on a 2 x 2 grid of 10^rank: the digits of a sum say which ranks were in it."""
    with on_grid(ranks, 2, 2) as grid:
        own = torch.tensor([10.0**ranks.rank], dtype=torch.float64)
        count = torch.tensor([[ranks.rank]])
        replicas = grid.sum_over_replicas([own, count, own.float(), 2 * own])
        found = {
            "place": [grid.segment, grid.replica],
            "replicas": [float(t.sum()) for t in replicas],
            "types": [str(t.dtype) for t in replicas],
            "segments": float(grid.sum_over_segments(own)),
            "unchanged": float(own),
            "from 0": [float(t.sum()) for t in grid.from_replica(0, [own, count])],
            "from 1": [float(t.sum()) for t in grid.from_replica(1, [own, count])],
            "any": grid.any(ranks.rank == 3, False, ranks.rank == 0, True),
            "gather": grid.gather([ranks.rank, 0.1 * ranks.rank]),
            "text": grid.gather_text(["", "eins", "zwölf", "日本"][ranks.rank]),
            "nothing": grid.gather_text(""),
        }
        if ranks.rank == 3:
            time.sleep(0.5)
            Path("last").touch()
        grid.any()
        found["any waits"] = Path("last").exists()
    _tell(ranks, found)


# Bytes ----------------------------------------------------------------------------------------------------


def traffic(ranks: Ranks, arguments: Arguments) -> None:
    """Bytes sent by kind of message: a step of ResNet18 on images of 32x32, its first; then steps of small settings."""
    found = {}
    with on_grid(ranks, 2, 1) as grid:
        torch.manual_seed(0)
        model = resnet.build_resnet18(ModelConfig(name="resnet18"), 3, 10, 32)
        engine = Engine(
            model,
            trace(model),
            lambda segment: GTDDP(
                segment, curvature.SGD(lr=0.1), scope="micro_batch", value_hessian="block_diagonal", rollout="linear"
            ),
            F.cross_entropy,
            grid=grid,
            cuts=[RESNET_CUT],
            micro_batch=RESNET_SAMPLES,
            n_micro=2,
        )
        for step in range(2):
            outcome = engine.step([torch.randn(RESNET_SAMPLES, 3, 32, 32)] * 2, [torch.arange(RESNET_SAMPLES)] * 2)
            assert math.isfinite(outcome.loss)
            found[f"resnet18-{step}"] = dict(engine.worker.channels.traffic.bytes_sent)
            engine.worker.take_measurements()
        for setting in map(_setting, cast(list[object], arguments["settings"])):
            engine = new_engine(setting, grid)
            for x, y in replace(setting, steps=2).batches():  # of the first, the layouts go with it
                engine.worker.take_measurements()
                engine.step(own_chunks(setting, grid, x), own_chunks(setting, grid, y))
            found[setting.name] = dict(engine.worker.channels.traffic.bytes_sent)
    _tell(ranks, found)


def _setting(plain: object) -> Setting:
    return Setting(**cast(dict[str, object], plain))  # type: ignore[arg-type]


# Order ----------------------------------------------------------------------------------------------------


def orders(ranks: Ranks, arguments: Arguments) -> None:
    """Steps of small settings whose instructions are put in order by other costs: the order, and the weights."""
    usual = RankCosts(forward=1, backward=1, gram=1, weight=1, cotangent=1)
    others = {
        "none": None,
        "slow links": Expected((usual, usual), Link(1.0, 2.0)),
        "slow second rank": Expected((usual, replace(usual, forward=3, gram=0.1, weight=4)), Link(1.0, 0.1)),
    }
    found = {}
    with on_grid(ranks, 2, 1) as grid:
        for setting in map(_setting, cast(list[object], arguments["settings"])):
            states = []
            for name, expected in others.items():
                engine = new_engine(setting, grid, expected)
                for x, y in setting.batches():
                    engine.step(own_chunks(setting, grid, x), own_chunks(setting, grid, y))
                states.append(_state(engine))
                order = "; ".join(map(str, engine.order))
                found[f"{setting.name} {name}"] = [order, _equal(states[-1], states[0])]
    _tell(ranks, found)


# Decompositions -------------------------------------------------------------------------------------------


def decompositions(ranks: Ranks, arguments: Arguments) -> None:
    """What a replica does in a step of EKFAC: decomposes "a" factor, or has its "exchange" with the other."""
    setting = _setting(arguments["setting"])
    done: list[str] = []
    decompose, exchange = factors.eigenbasis, Grid.from_replica

    def decomposing(factor: Tensor) -> tuple[Tensor, Tensor]:
        done.append("a")
        return decompose(factor)

    def exchanging(grid: Grid, source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        done.append("exchange")
        return exchange(grid, source, tensors)

    patch = pytest.MonkeyPatch()  # of this process, which ends soon
    patch.setattr(factors, "eigenbasis", decomposing)
    patch.setattr(Grid, "from_replica", exchanging)
    with on_grid(ranks, setting.pipe, setting.data) as grid:
        engine = new_engine(setting, grid)
        for x, y in replace(setting, steps=1).batches():
            engine.step(own_chunks(setting, grid, x), own_chunks(setting, grid, y))
    _tell(ranks, done)


# Memory ---------------------------------------------------------------------------------------------------


def held(ranks: Ranks, arguments: Arguments) -> None:
    """Most micro-batches whose captured data are there at a time, in steps of small settings; also by the order."""
    found = {}
    with on_grid(ranks, 2, 1) as grid:
        for setting in map(_setting, cast(list[object], arguments["settings"])):
            engine = new_engine(setting, grid)
            captured: list[weakref.ref[MicroBatch]] = []
            most: list[int] = []
            perform = engine.worker.perform

            def watched(
                instruction: Instruction,
                worker: Worker = engine.worker,
                perform: Callable[[Instruction], None] = perform,
                captured: list[weakref.ref[MicroBatch]] = captured,
                most: list[int] = most,
            ) -> None:
                perform(instruction)
                if instruction.op is Op.FORWARD:
                    captured.append(weakref.ref(worker._work.captured[instruction.unit]))
                most.append(sum(reference() is not None for reference in captured))

            engine.worker.perform = watched  # type: ignore[method-assign]
            for x, y in replace(setting, steps=2).batches():
                engine.step(own_chunks(setting, grid, x), own_chunks(setting, grid, y))
            last = Op.WEIGHT if setting.rho else Op.BACKWARD
            inside = itertools.accumulate((s.op is Op.FORWARD) - (s.op is last) for s in engine.order)
            found[setting.name] = [max(most), max(inside)]
    _tell(ranks, found)


# What is not finite -----------------------------------------------------------------------------------------


def nonfinite(ranks: Ranks, arguments: Arguments) -> None:
    """For each setting and each way to spoil a step on one replica or rank: what becomes of it, and of the next."""
    found = {}
    settings = [_setting(plain) for plain in cast(list[object], arguments["settings"])]
    with on_grid(ranks, settings[0].pipe, settings[0].data) as grid:
        for setting in settings:
            expected = _trained(setting, grid, spoil=None)
            for name, spoil in SPOIL.items():
                found[f"{name}-{setting.name}"] = _trained(setting, grid, spoil)
                found[f"{name}-{setting.name}"]["as if it had not been"] = _equal(
                    cast(dict[str, Tensor], found[f"{name}-{setting.name}"].pop("state")),
                    cast(dict[str, Tensor], expected["state"]),
                )
    _tell(ranks, found)


Spoil = Callable[[Engine, Grid, list[Tensor]], list[Tensor]]
"""(engine, grid, inputs of this replica) -> inputs; or it does something to the engine, for one step."""


def _spoil_input(engine: Engine, grid: Grid, inputs: list[Tensor]) -> list[Tensor]:
    """A NaN in the last micro-batch of the last replica."""
    if grid.replica == grid.shape.data - 1:
        inputs = [x.clone() for x in inputs]
        inputs[-1][0, 0, 0, 0] = math.nan
    return inputs


def _spoil_gradient(*, last: bool) -> Spoil:
    """The gradient of a parameter is infinite on the first or last rank alone; losses and derivatives are finite."""

    def spoil(engine: Engine, grid: Grid, inputs: list[Tensor]) -> list[Tensor]:
        if grid.rank == (grid.world - 1 if last else 0):
            parameter = next(iter(engine.segment.parameters()))

            def once(grad: Tensor) -> Tensor:
                handle.remove()
                return torch.full_like(grad, math.inf)

            handle = parameter.register_hook(once)
        return inputs

    return spoil


SPOIL: dict[str, Spoil] = {
    "input": _spoil_input,
    "gradient of the first rank": _spoil_gradient(last=False),
    "gradient of the last rank": _spoil_gradient(last=True),
}


def _trained(setting: Setting, grid: Grid, spoil: Spoil | None) -> dict[str, object]:
    """Train with one step spoilt, or without that step."""
    engine = new_engine(setting, grid)
    refused, unchanged = [], True
    for step, (x, y) in enumerate(setting.batches()):
        if step == BAD_STEP and spoil is None:
            continue
        inputs, targets = own_chunks(setting, grid, x), own_chunks(setting, grid, y)
        before = _state(engine)
        if step == BAD_STEP and spoil is not None:
            inputs = spoil(engine, grid, inputs)
        outcome: Outcome = engine.step(inputs, targets)
        refused.append(outcome.refused)
        if step == BAD_STEP:
            unchanged = _equal(_state(engine), before)
        else:
            assert not _equal(_state(engine), before)
    return {"refused": refused, "unchanged": unchanged, "state": _state(engine)}


def _state(engine: Engine) -> dict[str, Tensor]:
    """Parameters, buffers, and the state of the optimizer."""
    state = {name: tensor.clone() for name, tensor in engine.segment.state_dict().items()}
    segment: nn.Module = engine.segment
    for name, parameter in segment.named_parameters():
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"{name}/{key}"] = value.clone()
    return state


def _equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


# BatchNorm over replicas ----------------------------------------------------------------------------------


def batch_norm(ranks: Ranks, arguments: Arguments) -> None:
    """Steps with `sync_batch_norm` on two replicas against one process that sees both replicas' samples at once."""
    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 16, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (4, 16), generator=generator)
    bases: dict[str, curvature.Curvature] = {
        "sgd": curvature.SGD(lr=0.1),
        "adam": curvature.Adam(lr=0.01, eps=1e-3),
        "ekfac": curvature.EKFAC(lr=0.03, basis_every=1),
    }
    with on_grid(ranks, 1, 2) as grid:
        for name, base in bases.items():
            # Recursions of 8 of the 16 samples: those of a replica.
            terminal = "sampled" if name == "adam" else "loss_gradient"
            options: Any = {"scope": 8, "gauss_newton_weight": 0.1, "terminal": terminal}
            whole = _with_batch_norm()
            optimizer = GTDDP(whole, base, **options)
            model = _with_batch_norm()
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            engine = Engine(
                model,
                trace(model),
                lambda segment, base=base, options=options: GTDDP(segment, base, **options),  # type: ignore[misc]
                F.cross_entropy,
                grid=grid,
                cuts=(),
                micro_batch=8,
                n_micro=1,
                sync_batch_norm=arguments["synchronised"] is True,
            )
            for x, y in zip(images, labels, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(whole(x), y).backward()
                optimizer.step()
                engine.step([x.chunk(2)[grid.replica]], [y.chunk(2)[grid.replica]])
            ours, theirs = engine.segment.state_dict(), whole.state_dict()
            found[name] = max(_distance(ours[key], theirs[key]) for key in theirs if theirs[key].is_floating_point())
            found[f"{name} moved"] = max(_distance(ours[key], before[key]) for key in before if key in ours)
    _tell(ranks, found)


def _with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return small_resnet.build(ModelConfig(batch_norm=True), 1, 10, 8).double()


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / (theirs.double().norm() + 1e-12))

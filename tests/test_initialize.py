"""A user's own network on a grid of ranks, in a program that somebody else started."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks.own_model import CHUNKS, Order, chunks_of, new_model, new_optimizer
from ranks.server import Job, Server, environment, shared, told
from torch import Tensor
from torch.nn import functional as F

from gtddp_dist.checkpoint import newest_valid

BIN = Path(sys.executable).parent
STEPS, SAVED = 5, 3


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Server:
    return shared(request.config)


@dataclass(frozen=True)
class Trained:
    """The network as one process trains it, without `initialize`.

    Attributes:
        losses: by step.
        state: by step at which it was taken.
        evaluated: loss and accuracy by that step.
    """

    losses: dict[int, float]
    state: dict[int, dict[str, Tensor]]
    evaluated: dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def expected() -> Trained:
    torch.manual_seed(7)
    model = new_model()
    optimizer = new_optimizer(model)
    found = Trained({}, {}, {})
    for step in range(STEPS + 1):
        found.state[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            pairs = [(model.eval()(x), y) for x, y in chunks_of(-1)]
        found.evaluated[step] = {
            "loss": float(sum(F.cross_entropy(out, y) for out, y in pairs)) / CHUNKS,
            "accuracy": sum(float((out.argmax(1) == y).double().mean()) for out, y in pairs) / CHUNKS,
        }
        model.train()
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(x), y) / CHUNKS for x, y in chunks_of(step)]
        for loss in losses:
            loss.backward()
        found.losses[step] = sum(float(loss.detach()) for loss in losses)
        optimizer.step()
    assert all(
        not torch.allclose(found.state[STEPS][name], found.state[SAVED][name], rtol=1e-4) for name in found.state[0]
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the checkpoint of step SAVED that the tests after the first continue from."""
    return tmp_path_factory.mktemp("initialize")


def ran(*command: str, orders: list[Order], cwd: Path) -> None:
    """Run the user's program, alone or by torchrun; it has to end well and quietly."""
    done = subprocess.run(
        [*command, "-m", "ranks.own_model", *map(json.dumps, orders)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def found_in(folder: Path, name: str, world: int) -> tuple[list[dict[str, object]], list[dict[str, Tensor]]]:
    """What every rank found, and its state at the end."""
    told_by = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world)]
    return told_by, [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)]


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-12)


def assert_as_expected(found: dict[str, object], expected: Trained, start: int) -> None:
    """Losses and evaluations of a rank that trained from a step on."""
    losses = found["losses"]
    assert isinstance(losses, dict) and list(losses) == [str(step) for step in range(start, STEPS)]
    assert list(losses.values()) == pytest.approx([expected.losses[step] for step in range(start, STEPS)], rel=1e-10)
    assert found["before"] == pytest.approx(expected.evaluated[start], rel=1e-10)
    assert found["after"] == pytest.approx(expected.evaluated[STEPS], rel=1e-10)


@pytest.fixture(scope="module")
def by_torchrun(folder: Path) -> tuple[list[dict[str, object]], list[dict[str, Tensor]]]:
    order: Order = {"pipe": 2, "data": 1, "steps": STEPS, "save_at": [SAVED], "folder": str(folder), "name": "first"}
    order["load_again"] = True
    ran(str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", orders=[order], cwd=folder)
    return found_in(folder, "first", 2)


def test_two_segments_under_torchrun(
    by_torchrun: tuple[list[dict[str, object]], list[dict[str, Tensor]]], expected: Trained, folder: Path
) -> None:
    told_by, states = by_torchrun
    assert states[0].keys() | states[1].keys() == expected.state[0].keys()
    assert states[0] and states[1] and not states[0].keys() & states[1].keys()
    for found, state in zip(told_by, states, strict=True):
        assert_as_expected(found, expected, 0)
        assert_close(state, expected.state[STEPS])
        # The same engine, put back to its checkpoint.
        assert found["loaded again"] == SAVED and found["state again"] is True
        again = found["losses again"]
        losses = found["losses"]
        assert isinstance(losses, dict) and again == {key: losses[key] for key in map(str, range(SAVED, STEPS))}
        assert found["cuts"] == told_by[0]["cuts"]
    newest, refused = newest_valid(folder / "checkpoints")
    assert newest is not None and newest.step == SAVED and refused == []
    for name, tensor in expected.state[SAVED].items():
        torch.testing.assert_close(newest.tensors[f"model/{name}"], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (1, 1)], ids=["2x1", "1x2", "1x1"])
def test_loading_in_new_processes(
    grid: tuple[int, int],
    by_torchrun: tuple[list[dict[str, object]], list[dict[str, Tensor]]],
    expected: Trained,
    folder: Path,
    server: Server,
) -> None:
    """On the grid that saved: the same to the bit. On another: the same but for rounding."""
    pipe, data = grid
    name = f"loaded-{pipe}x{data}"
    order: Order = {"pipe": pipe, "data": data, "steps": STEPS, "load": True, "folder": str(folder), "name": name}
    (ended,) = server.run(Job("ranks.own_model:work", pipe * data, folder / name, dict(order)))
    assert [rank.code for rank in ended] == [0] * (pipe * data), told(ended)
    told_by, states = found_in(folder, name, pipe * data)
    for rank, (found, state) in enumerate(zip(told_by, states, strict=True)):
        assert found["loaded"] == SAVED
        assert_as_expected(found, expected, SAVED)
        assert_close(state, expected.state[STEPS])
        if grid == (2, 1):
            assert all(torch.equal(state[key], by_torchrun[1][rank][key]) for key in state)


def test_one_process_that_nobody_started(expected: Trained, tmp_path: Path) -> None:
    """Twice in one process: the second continues what the first has saved."""
    first: Order = {"pipe": 1, "data": 1, "steps": SAVED, "save_at": [SAVED], "folder": str(tmp_path), "name": "first"}
    second: Order = {"pipe": 1, "data": 1, "steps": STEPS, "load": True, "folder": str(tmp_path), "name": "second"}
    ran(sys.executable, orders=[first, second], cwd=tmp_path)
    (found,), (state,) = found_in(tmp_path, "first", 1)
    assert_close(state, expected.state[SAVED])
    (found,), (state,) = found_in(tmp_path, "second", 1)
    assert found["loaded"] == SAVED
    assert_as_expected(found, expected, SAVED)
    assert_close(state, expected.state[STEPS])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: one rank of NCCL")
def test_one_rank_of_nccl(expected: Trained, tmp_path: Path) -> None:
    """A start and a few steps; that several ranks of NCCL talk to each other is not tested anywhere."""
    order: Order = {"pipe": 1, "data": 1, "steps": STEPS, "folder": str(tmp_path), "name": "gpu", "device": "cuda"}
    ran(sys.executable, orders=[order], cwd=tmp_path)
    _, (state,) = found_in(tmp_path, "gpu", 1)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected.state[STEPS][name], rtol=1e-7, atol=1e-9)


def test_what_initialize_and_its_engine_refuse(server: Server, tmp_path: Path) -> None:
    (ended,) = server.run(Job("ranks.own_model:refused", 1, tmp_path))
    assert [rank.code for rank in ended] == [0], told(ended)
    said = json.loads((tmp_path / "refused.json").read_text())
    assert "the grid pipe=2,data=1 needs 2 ranks, but 1 was started" in said["ranks"]
    assert "cuts" in said["cuts"] and "7" in said["cuts"]
    assert "depends on training mode at" in said["mode"] and "F.dropout(x, 0.1, training=self.training)" in said["mode"]
    assert "own_model.py:" in said["mode"] and "nn.Dropout" in said["mode"]
    assert "a micro-batch of 3 inputs and 3 targets, initialize was told micro_batch=4" in said["batch"]
    assert "no checkpoint there can be used" in said["load"]
    assert math.isfinite(said["loss after"])

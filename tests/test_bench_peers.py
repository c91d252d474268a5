"""Other libraries' steps beside this package's: they do what they are taken for."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor, nn

from gtddp_dist.bench import names
from gtddp_dist.bench.names import CONTENDERS, chosen
from gtddp_dist.bench.peers import CurvlinopsKFAC, new_contender, prepared
from gtddp_dist.bench.single import Contender, batch
from gtddp_dist.config import load_config
from gtddp_dist.errors import OK

WORDS = (
    "model.name=small-resnet",
    "model.width=4",
    "model.batch_norm=true",
    "bench.image=[1,8,8]",
    "bench.steps=1",
    "bench.warmup=0",
    "train.batch_size=8",
    "optimizer.scope=8",
    "train.device=cpu",
)


def weights(contender: Contender) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in contender.model.parameters()]


def test_deepspeeds_engine_takes_the_steps_of_sgd() -> None:
    """Bitwise, with gradients of a norm above 1, which it clips unless told otherwise."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: cluster)")
    config = load_config("bench-step", [*WORDS, "optimizer.lr=0.1"])
    with prepared(config, ["sgd", "deepspeed-sgd"]):
        ours, theirs = (new_contender(config, name) for name in ("sgd", "deepspeed-sgd"))
        images, labels = batch(config, ours.device, seed=0)
        for _ in range(2):
            before = weights(ours)
            ours.step(images, labels)
            theirs.step(images, labels)
            moved = torch.cat([(a - b).flatten() for a, b in zip(weights(ours), before, strict=True)])
            assert moved.norm() > 0.1  # lr times a norm of 1
            assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))
    assert not torch.distributed.is_initialized()


def test_curvlinops_scales_the_gradient_and_keeps_its_inverse() -> None:
    """With damping far above the factors the inverse is 1 / damping; BatchNorm's parameters move as with SGD."""
    pytest.importorskip("einops", reason="curvlinops is not installed (extra: test)")
    words = ["optimizer.name=kfac", "optimizer.scope=null", "optimizer.capture=null", "optimizer.damping=1e6"]
    config = load_config("bench-step", [*WORDS, *words, "optimizer.lr=1", "train.dtype=float64"])
    contender = new_contender(config, "curvlinops-kfac")
    assert isinstance(contender, CurvlinopsKFAC)
    images, labels = batch(config, contender.device, seed=0)
    twin = Contender(config, "sgd")
    before = weights(twin)
    twin.step(images, labels)
    contender.step(images, labels)
    normed = {id(p) for m in contender.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert normed
    for parameter, start, end in zip(contender.model.parameters(), before, weights(twin), strict=True):
        scale = 1.0 if id(parameter) in normed else 1e-6
        moved = parameter.detach() - start
        assert (moved - scale * (end - start)).norm() < 0.01 * scale * (end - start).norm()
    first = contender.inverse
    plain, factors = contender.kinds
    assert (plain.share, factors.share) == (0.9, 0.1)
    contender.step(images, labels, plain)
    assert contender.inverse is first is not None
    contender.step(images, labels, factors)
    assert contender.inverse is not first


def test_peers_that_are_not_installed_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(package: str) -> ModuleSpec | None:
        return None if package == "curvlinops" else ModuleSpec(package, None)

    monkeypatch.setattr(names.importlib.util, "find_spec", found)
    assert chosen(None) == [name for name in CONTENDERS if name != "curvlinops-kfac"]
    assert capsys.readouterr().err == "gtddp: curvlinops-kfac is left out: curvlinops is not installed\n"
    assert chosen(("adam",)) == ["sgd", "adam"]
    assert not capsys.readouterr().err


def test_peers_are_measured_beside_sgd() -> None:
    for package in ("deepspeed", "einops"):
        pytest.importorskip(package)
    words = [*WORDS, "bench.optimizers=[deepspeed-sgd,curvlinops-kfac]", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "gtddp_dist", "bench", "step", *words],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == OK, done.stderr
    rows = {row["optimizer"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == ["sgd", "deepspeed-sgd", "curvlinops-kfac"]
    assert all(row["time_ratio_to_sgd"] > 0 and row["memory_ratio_to_sgd"] > 0 for row in rows.values())
    assert all(row["flops_over_limit"] == pytest.approx(1) for row in rows.values())
    assert rows["deepspeed-sgd"]["flops"] == rows["sgd"]["flops"] < rows["curvlinops-kfac"]["flops"]
    assert set(rows["curvlinops-kfac"]["seconds_by_kind"]) == {"plain", "factors"}

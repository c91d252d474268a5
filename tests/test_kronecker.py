"""KFAC and EKFAC as optimizers: failures, bad input, saving. Their numbers: test_kronecker_against_oracle.py."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import ALL_NETS, NETS
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.cli import main
from gtddp_dist.curvature import factors
from gtddp_dist.errors import FAILED, CurvatureError, OptionError

NET = NETS["small_resnet"]


def step(model: nn.Module, optimizer: GTDDP, seed: int = 0, net: str = "small_resnet") -> None:
    x, y = ALL_NETS[net].batch(6, seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("kind", [curvature.KFAC, curvature.EKFAC])
@pytest.mark.parametrize("cooperation", ["none", "exact"])
def test_saving_between_two_refreshes_of_the_bases(kind: Any, cooperation: str) -> None:
    """state_dict in the middle of a basis' life: the continued run is the unbroken one, bit by bit."""
    base = kind(lr=0.05, momentum=0.9, basis_every=3, factor_every=2)
    unbroken, model = NET.model(), NET.model()
    options: dict[str, Any] = {"gauss_newton_weight": 0.5, "cooperation": cooperation, "metric": "previous"}
    long, short = GTDDP(unbroken, base, **options), GTDDP(model, base, **options)
    for index in range(9):
        if index == 4:
            saved = copy.deepcopy((model.state_dict(), short.state_dict()))
            model = NET.model(seed=9)
            short = GTDDP(model, base, **options)
            model.load_state_dict(saved[0])
            short.load_state_dict(saved[1])
        step(unbroken, long, index)
        step(model, short, index)
        assert torch.equal(weights(model), weights(unbroken)), index


def test_a_failed_decomposition_keeps_the_basis_is_logged_and_at_last_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = NET.model()
    base = curvature.EKFAC(lr=0.05, basis_every=1, max_basis_failures=2)
    optimizer = GTDDP(model, base, gauss_newton_weight=0.5, cooperation="none")
    step(model, optimizer)
    anchor = model.get_parameter("stem.weight")
    kept = optimizer.state[anchor]["basis_a"].clone()

    def fail(_: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("made to fail")

    monkeypatch.setattr(factors, "eigenbasis", fail)
    with caplog.at_level(logging.WARNING):
        for count in (1, 2):
            before = weights(model)
            step(model, optimizer, count)
            assert torch.equal(optimizer.state[anchor]["basis_a"], kept)
            assert int(optimizer.state[anchor]["basis_failures"]) == count
            assert not torch.equal(weights(model), before)
    assert "module 'stem'" in caplog.text and "previous basis is kept" in caplog.text
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(
        CurvatureError, match=r"module 'head': .* failed \(made to fail\), 3 times in a row \(max_basis_failures=2"
    ):
        step(model, optimizer, 3)
    assert torch.equal(weights(model), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    monkeypatch.undo()
    step(model, optimizer, 4)
    assert int(optimizer.state[anchor]["basis_failures"]) == 0


@pytest.mark.parametrize("options", [{"gauss_newton_weight": 0.0}, {"metric": "previous"}], ids=str)
def test_a_refused_factor_changes_nothing_whenever_it_is_made(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Where statistics are made with the update, those of the last player still come before the first one's update."""
    model = NET.model()
    optimizer = GTDDP(model, curvature.KFAC(basis_every=1, max_basis_failures=0), cooperation="none", **options)
    step(model, optimizer)
    original, last = factors.eigenbasis, optimizer.state[model.get_parameter("head.weight")]["factor_a"].shape

    def fail_at_the_last(factor: Tensor) -> tuple[Tensor, Tensor]:
        if factor.shape == last:
            raise torch.linalg.LinAlgError("made to fail")
        return original(factor)

    monkeypatch.setattr(factors, "eigenbasis", fail_at_the_last)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(CurvatureError, match="module 'head'"):
        step(model, optimizer, 1)
    assert torch.equal(weights(model), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_single_precision_that_does_not_converge_is_done_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.eigh

    def only_double(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("made to fail")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    matrix = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    values, vectors = factors.eigenbasis(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([[1.0, 3.0]]))


def test_factors_that_are_not_finite_are_refused() -> None:
    model = NET.model().float()
    optimizer = GTDDP(model, curvature.KFAC(lr=0.05), gauss_newton_weight=0.5)
    x, y = NET.batch(6)
    before = weights(model)
    optimizer.zero_grad()
    # Finite gradients whose squares overflow single precision.
    (F.cross_entropy(model(x.float()), y) * 1e25).backward()
    with pytest.raises(CurvatureError, match=r"module '.*': factor_b of this step is not finite; nothing was changed"):
        optimizer.step()
    assert torch.equal(weights(model), before) and not any(optimizer.state.values())


@pytest.mark.parametrize(
    ("net", "make", "options", "message"),
    [
        (
            "small_resnet",
            lambda: curvature.KFAC(max_factor_dim=20),
            {},
            r"module 'hidden': its input factor would be 28",
        ),
        ("small_resnet", lambda: curvature.KFAC(max_factor_dim=18), {}, r"'conv1'.*19 x 19.*spatially_uncorrelated"),
        ("small_resnet", lambda: curvature.EKFAC(), {"cooperation": "theorem3"}, "theorem3.*EKFAC"),
        (
            "small_resnet",
            lambda: curvature.KFAC(factors="spatially_uncorrelated"),
            {"cooperation": "exact"},
            "'unfolded' or 'reduced'",
        ),
        ("small_resnet", lambda: curvature.Adam(), {"cooperation": "exact"}, "needs a Kronecker curvature"),
        (
            "projection",
            lambda: curvature.KFAC(),
            {"cooperation": "exact"},
            "has a grouped convolution.*cooperation='none'",
        ),
        (
            "small_resnet",
            lambda: curvature.KFAC(),
            {"cooperation": "exactly"},
            "cooperation='exactly', expected one of",
        ),
        ("small_resnet", lambda: curvature.KFAC(damping=0.0), {}, "damping=0.0"),
        ("small_resnet", lambda: curvature.KFAC(factors="folded"), {}, "factors='folded'"),  # type: ignore[arg-type]
        ("small_resnet", lambda: curvature.EKFAC(basis_every=0), {}, "basis_every=0"),
        (
            "small_resnet",
            lambda: curvature.EKFAC(fisher="sampled"),
            {"statistics": "value"},
            "fisher='sampled' and statistics='value'",
        ),
    ],
)
def test_bad_options_are_named(net: str, make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GTDDP(ALL_NETS[net].model(), make(), **options)


def test_corollary_7_needs_twins() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.KFAC(), cooperation="corollary7")
    before = weights(model)
    with pytest.raises(OptionError, match="same input and the same output derivative"):
        step(model, optimizer)
    assert torch.equal(weights(model), before)


def test_weight_and_bias_must_share_a_group() -> None:
    model = NET.model()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    with pytest.raises(OptionError, match="weight and bias of module 'stem' are in different groups"):
        GTDDP(model, curvature.KFAC(), param_groups=[{"params": others}, {"params": biases, "weight_decay": 0.0}])


def test_the_default_cooperates_where_it_can() -> None:
    assert GTDDP(NET.model(), curvature.KFAC()).curvature.cooperation == "exact"  # type: ignore[attr-defined]
    by_channel = curvature.KFAC(factors="spatially_uncorrelated")
    assert GTDDP(NET.model(), by_channel).curvature.cooperation == "none"  # type: ignore[attr-defined]
    own = GTDDP(NET.model(), curvature.KFAC(cooperation="none")).curvature
    assert own.cooperation == "none"  # type: ignore[attr-defined]
    ends = []
    for cooperation in (None, "none"):  # a grouped convolution cannot
        model = ALL_NETS["grouped_projection"].model()
        optimizer = GTDDP(model, curvature.KFAC(), cooperation=cooperation)
        step(model, optimizer, net="grouped_projection")
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])


def test_a_dead_layer_does_not_stop_training() -> None:
    """All factors of a layer behind dead units are zero: no division by them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # type: ignore[operator]
    for kind in (curvature.KFAC, curvature.EKFAC):
        trained = copy.deepcopy(model)
        optimizer = GTDDP(trained, kind(lr=0.05), gauss_newton_weight=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(trained(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            optimizer.step()
        assert torch.isfinite(weights(trained)).all() and optimizer.steps == 3


def test_a_curvature_that_fails_is_a_failed_run_not_bad_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("made to fail")

    monkeypatch.setattr(factors, "eigenbasis", fail)
    quiet = ["log.progress=false", "log.tensorboard=false", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "digits-ekfac", "train.steps=2", *quiet]) == FAILED
    assert "gtddp: error: module 'classifier'" in capsys.readouterr().err


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "small_resnet"])
def test_against_curvlinops(name: str, approximation: str) -> None:
    """Factors, corrected eigenvalues and the preconditioned gradient against another library's, empirical Fisher.

    EKFAC depends on the choice of a basis where a factor has an eigenvalue twice, as one that is singular in two
    directions has; so there are enough samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # one of its packages compiles with torch.jit
        import curvlinops
    net = ALL_NETS[name]
    x, y = net.batch(40, 0)
    names = [
        f"{n}.{p}"
        for n, m in net.model().named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
        for p in ("weight", "bias")
    ]
    names = [n for n in names if n in dict(net.model().named_parameters())]

    def theirs(kind: str) -> Tensor:
        model = net.model()
        operator = getattr(curvlinops, kind)(
            model,
            nn.CrossEntropyLoss(),
            [model.get_parameter(n) for n in names],
            [(x, y)],
            fisher_type="empirical",
            kfac_approx=approximation,
            separate_weight_and_bias=False,
        )
        matrix: Tensor = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
        return matrix

    def stepped(base: curvature.Curvature) -> tuple[nn.Module, GTDDP, Tensor, Tensor]:
        """The model after a step without feedback, its gradient, and how it moved against the gradient."""
        model = net.model()
        optimizer = GTDDP(model, base, gauss_newton_weight=0.0, cooperation="none")
        F.cross_entropy(model(x), y).backward()
        before = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
        gradient = torch.cat([model.get_parameter(n).grad.flatten() for n in names])  # type: ignore[union-attr]
        optimizer.step()
        after = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
        return model, optimizer, gradient, before - after

    kind: Any = "unfolded" if approximation == "expand" else "reduced"
    options: Any = {"lr": 1.0, "damping": 0.01, "factor_decay": 0.0, "factors": kind}

    expected = theirs("EKFACLinearOperator")
    model, optimizer, gradient, moved = stepped(curvature.EKFAC(**options))
    identity = torch.eye(len(expected), dtype=torch.float64)
    assert distance(moved, torch.linalg.solve(expected + 0.01 * identity, gradient)) < 1e-9
    moments = torch.cat([s["second_moments"].flatten() for s in optimizer.state.values() if "second_moments" in s])
    assert distance(moments.sort()[0], torch.linalg.eigvalsh(expected)) < 1e-9

    expected = theirs("KFACLinearOperator")
    model, optimizer, _, _ = stepped(curvature.KFAC(**options))
    places, total = {}, 0
    for n in names:
        places[n] = total + torch.arange(model.get_parameter(n).numel())
        total += model.get_parameter(n).numel()
    ours = torch.zeros_like(expected)
    for module in dict.fromkeys(n.rpartition(".")[0] for n in names):
        state = optimizer.state[model.get_parameter(f"{module}.weight")]
        a, b = state["factor_a"][0], state["factor_b"][0]
        outputs, inputs = len(b), len(a)
        entries = torch.arange(outputs * inputs).view(outputs, inputs)
        own = [n for n in names if n.rpartition(".")[0] == module]
        bias = f"{module}.bias" in own
        order = torch.cat([entries[:, : inputs - bias].flatten(), *([entries[:, -1]] if bias else [])])
        index = torch.cat([places[n] for n in own])
        ours[index[:, None], index] = torch.kron(b, a)[order[:, None], order]
    assert distance(ours, expected) < 1e-11


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())

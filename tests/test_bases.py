"""When and how bases of Kronecker factors are renewed: by orthogonal iteration, in turn, and in a background thread."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import ALL_NETS, NETS
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.curvature import factors
from gtddp_dist.curvature.decompositions import Ahead, Task
from gtddp_dist.curvature.factors import Layout
from gtddp_dist.curvature.kronecker import KroneckerCurvature, trace_ratio
from gtddp_dist.errors import CurvatureError, OptionError

State = dict[str, Tensor]


def symmetric(n: int, seed: int = 0, groups: int = 1) -> Tensor:
    """A positive factor (groups, n, n), in float64, its eigenvalues over three decades."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(groups, n, n, dtype=torch.float64, generator=generator)).Q
    return (q * torch.logspace(0, -3, n, dtype=torch.float64)) @ q.mT


def step(model: nn.Module, optimizer: GTDDP, net: str, seed: int) -> None:
    x, y = ALL_NETS[net].batch(6, seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def states(optimizer: GTDDP) -> dict[str, State]:
    """What there is of every layer, by module."""
    found = {}
    for name, parameter in optimizer._parameters.items():
        if "basis_b" in optimizer.state[parameter]:
            found[name.rpartition(".")[0]] = dict(optimizer.state[parameter])
    return found


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# ----------------------------------------------------------------------------------------------------------
# Orthogonal iteration


def gram_schmidt(columns: Tensor) -> Tensor:
    """Orthogonal columns of a matrix, the first to the last, each twice so that nothing is left of those before."""
    done: list[Tensor] = []
    for column in columns.T:
        for _ in range(2):
            for other in done:
                column = column - (other @ column) * other
        done.append(column / math.sqrt(float(column @ column)))
    return torch.stack(done, dim=1)


def iterated(factor: Tensor, basis: Tensor) -> Tensor:
    """One iteration by the book: A times every vector, that with the largest Rayleigh quotient first."""
    quotients = [float(e @ factor @ e) for e in basis.T]
    order = sorted(range(len(basis)), key=lambda i: -quotients[i])
    return gram_schmidt(factor @ basis[:, order])


def test_a_step_of_orthogonal_iteration() -> None:
    factor = symmetric(7, groups=2)
    _, former = torch.linalg.eigh(symmetric(7, seed=1, groups=2))
    ours = factors.iterated_basis(factor, former)
    for a, e, got in zip(factor, former, ours, strict=True):
        expected = iterated(a, e)
        torch.testing.assert_close((got.T @ expected).abs(), torch.eye(7).double(), atol=1e-10, rtol=0)


def test_iterations_come_to_the_eigenvectors() -> None:
    factor = symmetric(6)
    _, basis = torch.linalg.eigh(symmetric(6, seed=1))
    for _ in range(60):
        basis = factors.iterated_basis(factor, basis)
    diagonal = basis.mT @ factor @ basis
    expected = torch.linalg.eigvalsh(factor).flip(-1)
    torch.testing.assert_close(diagonal, torch.diag_embed(expected), atol=1e-9, rtol=0)
    # The smallest ones come first from eigh; in that order an iteration loses them.
    _, risen = torch.linalg.eigh(factor)
    torch.testing.assert_close(
        factors.iterated_basis(factor, risen).mT @ factor @ factors.iterated_basis(factor, risen), diagonal
    )


def test_ekfac_by_orthogonal_iteration_against_a_dense_reference() -> None:
    """Weights after steps with two iterations between them, and the second moments carried from basis to basis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    lr, damping, decay = 0.5, 0.05, 0.8
    base = curvature.EKFAC(lr=lr, damping=damping, factor_decay=decay, basis_every=2, basis_method="qr")
    optimizer = GTDDP(model, base, gauss_newton_weight=0.0)

    reference = copy.deepcopy(model)
    kept: dict[str, dict[str, Tensor]] = {"0": {}, "2": {}}
    for t in range(6):
        x, y = torch.randn(20, 3).double(), torch.randint(3, (20,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

        first, last = reference[0], reference[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        with torch.no_grad():
            hidden = torch.tanh(x @ first.weight.T + first.bias)
            output = hidden @ last.weight.T + last.bias
            y_last = torch.softmax(output, 1) - F.one_hot(y, 3)
            y_first = (y_last @ last.weight) * (1 - hidden**2)
            for name, inputs, slopes in (("0", x, y_first), ("2", hidden, y_last)):
                own = kept[name]
                z = torch.cat([inputs, torch.ones(20, 1).double()], 1)
                for key, value in (("A", z.T @ z / 20), ("B", slopes.T @ slopes / 20)):
                    own[key] = decay * own[key] + (1 - decay) * value if key in own else value
                if t == 0:
                    (la, own["EA"]), (lb, own["EB"]) = torch.linalg.eigh(own["A"]), torch.linalg.eigh(own["B"])
                    own["s"] = torch.outer(lb, la)
                elif t % 2 == 0:
                    ea, eb = iterated(own["A"], own["EA"]), iterated(own["B"], own["EB"])
                    # The diagonal of the dense matrix of second moments, in the new basis.
                    old, new = torch.kron(own["EB"], own["EA"]), torch.kron(eb, ea)
                    dense = old @ torch.diag(own["s"].flatten()) @ old.T
                    own["s"] = torch.diag(new.T @ dense @ new).view_as(own["s"])
                    own["EA"], own["EB"] = ea, eb
                in_basis = [
                    own["EB"].T @ torch.outer(slope, zb) @ own["EA"] for slope, zb in zip(slopes, z, strict=True)
                ]
                own["s"] = decay * own["s"] + (1 - decay) * (torch.stack(in_basis) ** 2).mean(0)
                moved = torch.stack(in_basis).mean(0) / (own["s"] + damping)
                update = own["EB"] @ moved @ own["EA"].T
                own["update_w"], own["update_b"] = update[:, :-1], update[:, -1]
            for name, layer in (("0", first), ("2", last)):
                layer.weight.sub_(lr * kept[name]["update_w"])
                layer.bias.sub_(lr * kept[name]["update_b"])
        torch.testing.assert_close(weights(model), weights(reference), atol=1e-10, rtol=0)
    assert not any(key.startswith("values") for key in states(optimizer)["0"])  # they were of the first basis


@pytest.mark.parametrize("kind", ["unfolded", "spatially_uncorrelated"])
def test_second_moments_are_carried_into_a_new_basis(kind: Any) -> None:
    """They are the diagonal, in the new basis, of C as it was; also where a basis is one of channels."""
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    layout = Layout.of(layer)
    base = curvature.EKFAC(factors=kind, basis_method="qr")
    n = layout.channels if kind == "spatially_uncorrelated" else layout.inputs
    former, new = ({"basis_a": basis(n, i), "basis_b": basis(layout.outputs, i + 5)} for i in (0, 1))
    moments = torch.rand(2, layout.outputs, layout.inputs, dtype=torch.float64)
    got = base._carried({**former, "second_moments": moments}, new, layout)
    for g in range(2):
        dense_former, dense_new = (
            torch.kron(each["basis_b"][g], whole(each["basis_a"][g], layout, kind)) for each in (former, new)
        )
        C = dense_former @ torch.diag(moments[g].flatten()) @ dense_former.T
        expected = torch.diag(dense_new.T @ C @ dense_new).view_as(moments[g])
        torch.testing.assert_close(got[g], expected)


def basis(n: int, seed: int) -> Tensor:
    return torch.linalg.eigh(symmetric(n, seed, groups=2)).eigenvectors.contiguous()


def whole(basis_a: Tensor, layout: Layout, kind: str) -> Tensor:
    """A basis over all inputs of a position: of channels, the same for every kernel element, and the bias by itself."""
    if kind == "unfolded":
        return basis_a
    dense = torch.eye(layout.inputs, dtype=torch.float64)
    for i in range(layout.channels):
        for j in range(layout.channels):
            for tap in range(layout.taps):
                dense[i * layout.taps + tap, j * layout.taps + tap] = basis_a[i, j]
    return dense


# ----------------------------------------------------------------------------------------------------------
# When: in turn, and ahead


def changes(optimizer: GTDDP, model: nn.Module, net: str, steps: int) -> dict[str, list[int]]:
    """The steps at which each layer got a new basis; asserts that ages are those of the oldest one."""
    found: dict[str, list[int]] = {}
    before: dict[str, State] = {}
    lag = getattr(optimizer.curvature, "basis_lag", 0)
    for t in range(steps):
        step(model, optimizer, net, t)
        for name, state in states(optimizer).items():
            if name not in before or not torch.equal(state["basis_b"], before[name]["basis_b"]):
                found.setdefault(name, []).append(t)
        before = states(optimizer)
        oldest = max(t - (times[-1] - (lag if len(times) > 1 else 0)) for times in found.values())
        assert optimizer.ages()["basis_age"] == oldest
    return found


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("every", [3, 7])
def test_players_take_their_decompositions_in_turn(every: int, lag: int) -> None:
    net = "small_resnet"
    model = NETS[net].model()
    base = curvature.KFAC(lr=0.05, basis_every=every, basis_spread=True, basis_lag=lag)
    optimizer = GTDDP(model, base, gauss_newton_weight=0.5, metric="previous")
    found = changes(optimizer, model, net, 16)
    players = optimizer.trajectory.players
    assert len(players) == 5
    for number, player in enumerate(players):
        offset = number * every // 5
        expected = [0, *(t + lag for t in range(1, 16) if t % every == offset and t + lag < 16)]
        for name in player.modules:
            assert found[name] == expected, name
    if every == 7:
        assert (
            max(sum(t in times for times in found.values()) for t in range(1, 16)) <= 2
        )  # a player may have two layers


@pytest.mark.parametrize(
    ("net", "base", "cooperation"),
    [
        ("small_resnet", curvature.KFAC(lr=0.05, basis_every=4, basis_lag=3, factor_every=3), "none"),
        ("small_resnet", curvature.KFAC(lr=0.05, basis_every=4, basis_lag=1), "exact"),
        ("small_resnet", curvature.EKFAC(lr=0.05, basis_every=4, basis_lag=2), "exact"),
        ("small_resnet", curvature.EKFAC(lr=0.05, basis_every=4, basis_lag=2, basis_method="qr"), "none"),
        ("twin_conv", curvature.EKFAC(lr=0.05, basis_every=4, basis_lag=2, basis_method="qr"), "corollary7"),
    ],
    ids=["kfac", "kfac-exact", "ekfac-exact", "ekfac-qr", "ekfac-qr-corollary7"],
)
def test_bases_of_one_step_are_used_so_many_steps_later(
    net: str, base: curvature.KFAC | curvature.EKFAC, cooperation: Any
) -> None:
    """Bit by bit: those of the factors at step t, from step t + lag on and not before."""
    model = ALL_NETS[net].model()
    optimizer = GTDDP(model, base, gauss_newton_weight=0.5, cooperation=cooperation)
    rules = optimizer.curvature
    assert isinstance(rules, KroneckerCurvature)
    pair = next((rules.pair(optimizer._controls(p)) for p in optimizer.trajectory.players if p.shortcut), None)
    history: list[dict[str, State]] = []
    for t in range(13):
        step(model, optimizer, net, t)
        history.append(states(optimizer))
    assert len(history[0]) >= 3
    for t in range(1, 13):
        begun, age = t - t % 4, t % 4
        for name, state in history[t].items():
            if begun == 0 or age != base.basis_lag:
                former = history[t - 1][name]
                assert torch.equal(state["basis_a"], former["basis_a"])
                assert torch.equal(state["basis_b"], former["basis_b"])
                continue
            then = history[begun][name]
            if pair is not None and name in pair and cooperation == "exact":
                both = [history[begun][each] for each in pair]
                for side in "ab":
                    u, v = (damped_factor(each, side) for each in both)
                    expected = factors.canonical_bases(u, v, both[0][f"cross_{side}"][0])[pair.index(name)]
                    assert torch.equal(state[f"basis_{side}"][0], expected)
            elif isinstance(base, curvature.EKFAC) and base.basis_method == "qr":
                if pair is not None and name == pair[1]:
                    then = history[begun][pair[0]]  # one basis for both
                for side in "ab":
                    expected = factors.iterated_basis(then[f"factor_{side}"], then[f"basis_{side}"])
                    assert torch.equal(state[f"basis_{side}"], expected)
            else:
                for side in "ab":
                    assert torch.equal(state[f"basis_{side}"], factors.eigenbasis(then[f"factor_{side}"])[1])


def damped_factor(state: State, side: str, damping: float = 0.03) -> Tensor:
    a, b = state["factor_a"][0], state["factor_b"][0]
    pi = trace_ratio(a, b)
    eye_a, eye_b = torch.eye(len(a)).double(), torch.eye(len(b)).double()
    return a + pi * damping**0.5 * eye_a if side == "a" else b + damping**0.5 / pi * eye_b


@pytest.mark.parametrize(
    ("net", "base", "cooperation"),
    [
        ("small_resnet", curvature.KFAC(lr=0.05, momentum=0.9, basis_every=4, basis_lag=3), "exact"),
        ("small_resnet", curvature.EKFAC(lr=0.05, basis_every=4, basis_lag=3, basis_method="qr"), "none"),
        ("small_resnet", curvature.EKFAC(lr=0.05, basis_every=4, basis_lag=2, basis_spread=True), "exact"),
        ("twin_conv", curvature.EKFAC(lr=0.05, basis_every=4, basis_lag=2, basis_method="qr"), "corollary7"),
    ],
    ids=["kfac", "ekfac-qr", "ekfac-spread", "corollary7"],
)
@pytest.mark.parametrize("stop", [5, 6, 7, 8])
def test_saving_while_bases_are_made(
    net: str, base: curvature.KFAC | curvature.EKFAC, cooperation: Any, stop: int
) -> None:
    """A run that goes on from a state_dict without the background's work is the unbroken one, bit by bit."""
    unbroken, model = ALL_NETS[net].model(), ALL_NETS[net].model()
    options: dict[str, Any] = {"gauss_newton_weight": 0.5, "cooperation": cooperation, "metric": "previous"}
    long, short = GTDDP(unbroken, base, **options), GTDDP(model, base, **options)
    for t in range(13):
        if t == stop:
            saved = copy.deepcopy((model.state_dict(), short.state_dict()))
            model = ALL_NETS[net].model(seed=9)
            short = GTDDP(model, base, **options)
            model.load_state_dict(saved[0])
            short.load_state_dict(saved[1])
        step(unbroken, long, net, t)
        step(model, short, net, t)
        assert torch.equal(weights(model), weights(unbroken)), t
        ours, theirs = states(short), states(long)
        assert {n: sorted(s) for n, s in ours.items()} == {n: sorted(s) for n, s in theirs.items()}
    pending = [key for state in states(long).values() for key in state if key.startswith("snapshot")]
    assert pending  # step 12 has begun anew


# ----------------------------------------------------------------------------------------------------------
# In the background


def test_a_decomposition_that_fails_in_the_background_is_reported_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = NETS["small_resnet"].model()
    base = curvature.EKFAC(lr=0.05, basis_every=2, basis_lag=1, max_basis_failures=2)
    optimizer = GTDDP(model, base, gauss_newton_weight=0.5, cooperation="none")
    for t in (0, 1):
        step(model, optimizer, "small_resnet", t)
    kept = states(optimizer)["stem"]["basis_a"]

    def fail(_: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("made to fail")

    monkeypatch.setattr(factors, "eigenbasis", fail)
    with caplog.at_level(logging.WARNING):
        for count in (1, 2):
            step(model, optimizer, "small_resnet", 2 * count)
            assert int(states(optimizer)["stem"].get("basis_failures", torch.zeros(()))) == count - 1
            assert "snapshot_a" in states(optimizer)["stem"]
            step(model, optimizer, "small_resnet", 2 * count + 1)
            assert int(states(optimizer)["stem"]["basis_failures"]) == count
            assert "snapshot_a" not in states(optimizer)["stem"]
            assert torch.equal(states(optimizer)["stem"]["basis_a"], kept)
            assert optimizer.ages()["basis_age"] == 2 * count + 1
    assert "module 'stem'" in caplog.text and "previous basis is kept" in caplog.text
    step(model, optimizer, "small_resnet", 6)
    before = weights(model)
    with pytest.raises(CurvatureError, match=r"failed \(made to fail\), 3 times in a row"):
        step(model, optimizer, "small_resnet", 7)
    assert torch.equal(weights(model), before)
    monkeypatch.undo()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in (7, 8, 9):  # the step that was refused comes again; resumed, it decomposes the snapshot anew
        step(model, optimizer, "small_resnet", t)
    assert int(states(optimizer)["stem"]["basis_failures"]) == 0


def test_any_other_error_of_the_background_is_raised_where_its_bases_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETS["small_resnet"].model()
    base = curvature.KFAC(lr=0.05, basis_every=3, basis_lag=2)
    optimizer = GTDDP(model, base, gauss_newton_weight=0.5)
    for t in range(3):
        step(model, optimizer, "small_resnet", t)

    def fail(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(factors, "eigenbasis", fail)
    step(model, optimizer, "small_resnet", 3)
    step(model, optimizer, "small_resnet", 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer, "small_resnet", 5)


def test_the_background_has_the_bits_of_the_step_and_lets_go_of_what_was_refused() -> None:
    """Also with several threads, and where numbers too small for a normal float32 count as zero."""
    small = symmetric(90).float() * 1e-37
    tasks = [Task("eigenbases", {"a": symmetric(n, seed=n).float(), "b": small}) for n in (200, 300)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for flush in (True, False):
            torch.set_flush_denormal(flush)
            ahead, held = Ahead(), threading.Event()
            for task in tasks:  # of one layer: the step of the first was refused
                ahead.begin("layer", task)
            job = ahead._jobs["layer"]
            assert job.done.wait(60) and not held.is_set()  # so it ran in the background
            got, expected = ahead.result("layer", tasks[1]), tasks[1].run()
            for key, tensor in expected.own.items():
                assert torch.equal(got.own[key], tensor), key
            again = ahead.result("layer", tasks[0])  # not begun, as after a resume
            assert torch.equal(again.own["basis_a"], tasks[0].run().own["basis_a"])
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


EXIT = """
import threading, torch
from gtddp_dist.curvature import factors
from gtddp_dist.curvature.decompositions import Ahead, Task

def slow(factor):
    started.set()
    threading.main_thread().join()  # until the process ends
    print("made", flush=True)
    raise torch.linalg.LinAlgError("late")

started = threading.Event()
factors.eigenbasis = slow
ahead = Ahead()
for number in range(50):
    ahead.begin(str(number), Task("eigenbases", {"a": torch.eye(2)[None], "b": torch.eye(2)[None]}))
started.wait()
print("end", flush=True)
"""


def test_the_end_of_a_process_waits_for_one_decomposition_at_most(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(EXIT)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, ["end", "made"]), ended.stderr


# ----------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: curvature.EKFAC(basis_every=5, basis_lag=5), r"basis_lag=5, .*below basis_every=5; raise basis_every"),
        (lambda: curvature.KFAC(basis_lag=-1), "basis_lag=-1"),
        (lambda: curvature.EKFAC(basis_method="svd"), "basis_method='svd', expected 'eigh' or 'qr'"),  # type: ignore[arg-type]
        (lambda: curvature.KFAC(basis_method="qr"), "basis_method='qr', expected 'eigh' with KFAC .*; use EKFAC"),
    ],
)
def test_bad_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()

"""MSA and E-MSA: closed forms on linear layers, the error estimate, the loss, and runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import CHAIN, MLP, Net
from safetensors.torch import load_file
from torch import Tensor, nn

from gtddp_dist import parts
from gtddp_dist.config import Config, load_config
from gtddp_dist.errors import OK, ConfigError, ModelError, OptionError, StepError
from gtddp_dist.msa import EMSA
from gtddp_dist.train import resume_training, run_training

SAMPLES = 12


def linear_problem(layers: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Linear layers without biases from 3 to 2 numbers, inputs, and targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = [3, *[4] * (layers - 1), 2]
        model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))).double()
        return model, torch.randn(SAMPLES, 3).double(), torch.randn(SAMPLES, 2).double()


def half_square(y: Tensor, target: Tensor) -> Tensor:
    """The mean over samples of |y - target|^2 / 2."""
    return ((y - target) ** 2).sum() / (2 * len(y))


def step(model: nn.Module, optimizer: EMSA, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("r", [0.0, 0.7])
def test_a_step_on_linear_layers_is_the_closed_form(r: float) -> None:
    """The augmented Hamiltonian is quadratic in W: r W E[x x'] + r E[q q'] W + decay W = E[q x'] + r E[.. ..]."""
    model, x, target = linear_problem(2)
    weights = [p.detach().clone() for p in model.parameters()]
    decay = 0.5
    optimizer = EMSA(model, weight=r, weight_decay=decay, iterations=100)
    step(model, optimizer, x, target, half_square)

    h = x @ weights[0].T
    y = h @ weights[1].T
    p_2 = target - y  # of each sample's own loss
    p_1 = p_2 @ weights[1]
    for t, (state, after, p, q) in enumerate([(x, h, None, p_1), (h, y, p_1, p_2)]):
        eye_out, eye_in = torch.eye(q.shape[1]).double(), torch.eye(state.shape[1]).double()
        right = q.T @ state / SAMPLES + r * after.T @ state / SAMPLES
        # (W A) is kron(I, A) on W row by row, and (P W) is kron(P, I).
        left = decay * torch.kron(eye_out, eye_in) + r * torch.kron(eye_out, state.T @ state / SAMPLES)
        if p is not None:
            right = right + r * q.T @ p / SAMPLES
            left = left + r * torch.kron(q.T @ q / SAMPLES, eye_in)
        expected = torch.linalg.solve(left, right.flatten()).view_as(weights[t])
        torch.testing.assert_close(list(model.parameters())[t].detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("r", "decay", "steps"), [(0.0, 4.0, 120), (2.0, 0.1, 120)])
def test_steps_end_at_the_optimum_of_a_linear_quadratic_problem(r: float, decay: float, steps: int) -> None:
    """One layer: J is ridge regression. (MSA converges where the decay is larger than E[x x'].)"""
    model, x, target = linear_problem(1)
    optimizer = EMSA(model, weight=r, weight_decay=decay, iterations=50)
    for _ in range(steps):
        step(model, optimizer, x, target, half_square)
    A = x.T @ x / SAMPLES
    assert r > 0 or float(torch.linalg.eigvalsh(A)[-1]) < decay
    expected = torch.linalg.solve(A + decay * torch.eye(3).double(), x.T @ target / SAMPLES).T
    torch.testing.assert_close(next(model.parameters()).detach(), expected, rtol=1e-7, atol=1e-8)


def test_a_share_of_the_way() -> None:
    moves = []
    for lr in (1.0, 0.25):
        model, x, target = linear_problem(2)
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        step(model, EMSA(model, weight=1.0, iterations=50, lr=lr), x, target, half_square)
        moves.append(nn.utils.parameters_to_vector(model.parameters()).detach() - start)
    torch.testing.assert_close(moves[1], moves[0] / 4, rtol=1e-7, atol=1e-9)


def run_of(net: Net, r: float, steps: int, decay: float = 0.01) -> list[tuple[float, dict[str, float]]]:
    """The change of J in every step on one batch each, and the optimizer's figures of it."""
    model = net.model()
    optimizer = EMSA(model, weight=r, weight_decay=decay)

    def objective(x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            cost = sum(float((p**2).sum()) for p in model.parameters())
            return float(F.cross_entropy(model(x), y)) + decay / 2 * cost

    found = []
    for number in range(steps):
        x, y = net.batch(SAMPLES, number % 4)
        before = objective(x, y)
        step(model, optimizer, x, y, F.cross_entropy)
        found.append((objective(x, y) - before, optimizer.diagnostics()))
    assert optimizer.skipped_steps == 0
    return found


@pytest.mark.parametrize("net", [MLP, CHAIN], ids=lambda net: net.name)
def test_the_error_estimate(net: Net) -> None:
    """J(new) - J(old) <= -sum of gains of H + C (changes of f and of grad_x H), with one C for all steps."""
    steps = [found for r in (0.1, 0.3, 1.0) for found in run_of(net, r, 8)]

    def needed(change: float, told: dict[str, float]) -> float:
        return (change + told["hamiltonian_gain"]) / (told["state_change"] + told["costate_change"])

    C = 1.25 * max(needed(*found) for found in steps[::2])
    assert 0 < C < 1  # else it says nothing
    assert any(change > 0 for change, _ in steps)
    for change, told in steps[1::2]:
        assert told["hamiltonian_gain"] > 0
        assert change <= -told["hamiltonian_gain"] + C * (told["state_change"] + told["costate_change"]) + 1e-12


@pytest.mark.parametrize("net", [MLP, CHAIN], ids=lambda net: net.name)
def test_the_objective_falls_where_the_weight_is_large_enough(net: Net) -> None:
    assert all(change < 0 for change, _ in run_of(net, 10.0, 12))
    assert any(change > 0 for change, _ in run_of(net, 0.01, 12))  # and not because it always does


# --- what is refused, and runs


@pytest.mark.parametrize(
    "options", [{"weight": -1.0}, {"iterations": 0}, {"lr": 0.0}, {"weight_decay": -1.0}, {"weight": 0.0}]
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        EMSA(MLP.model(), **options)  # type: ignore[arg-type]


def test_passes_that_are_no_whole_batch_are_refused() -> None:
    model = MLP.model()
    optimizer = EMSA(model)
    x, y = MLP.batch(SAMPLES)
    with pytest.raises(StepError, match="there were 0 and 0"):
        optimizer.step()
    for half in (slice(0, 6), slice(6, 12)):
        F.cross_entropy(model(x[half]), y[half]).backward()
    with pytest.raises(StepError, match="there were 2 and 2 "):
        optimizer.step()
    optimizer.zero_grad()
    model.eval()(x)  # leaves no trace
    step(model.train(), optimizer, x, y, F.cross_entropy)
    assert optimizer.steps == 1


def test_sizes_that_pass_between_layers_are_refused() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.second, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            size = x.size(0)
            logits: Tensor = self.head(torch.tanh(self.second(self.conv(x))).view(size, -1))
            return logits

    model = Viewed().double()
    x, y = CHAIN.batch(SAMPLES)
    with pytest.raises(ModelError, match=r"behind module 'conv' something else is live .* use flatten\(1\)"):
        step(model, EMSA(model), x, y, F.cross_entropy)


def config(name: str, *more: str) -> Config:
    blank = ["optimizer.lr=null", "optimizer.gauss_newton_weight=null", f"optimizer.name={name}"]
    small = ["model.name=plain-net", "model.width=2", "train.batch_size=16", "optimizer.emsa_iterations=3"]
    return load_config("digits", [*blank, *small, "log.progress=false", *more])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["msa"], "msa needs a weight decay above 0"),
        (["msa", "optimizer.weight_decay=1.0", "optimizer.emsa_weight=1.0"], "msa takes no option emsa_weight"),
        (["emsa", "parallel.pipe=2"], "parallel.pipe"),
        (["emsa", "train.micro_batches=2"], "train.micro_batches"),
    ],
)
def test_configurations_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)


def test_shortcuts_are_refused() -> None:
    with pytest.raises(ModelError, match="emsa takes networks without shortcuts only: before module"):
        parts.build(config("emsa", "model.name=small-resnet"))


@pytest.mark.parametrize("name", ["msa", "emsa"])
def test_a_run_resumes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep=9", f"run.dir={run}", "log.every=1"]
    words += ["optimizer.weight_decay=1.0"] if name == "msa" else []
    assert run_training(config(name, *words), "digits") == OK
    whole = load_file(run / "model.safetensors")
    assert "gtddp/hamiltonian_gain" in (run / "metrics.jsonl").read_text()
    for left in [*run.glob("checkpoints/step-*4"), run / "model.safetensors", run / "summary.json", run / "curves.png"]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert resume_training(run) == OK
    for tensor_name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(tensor, whole[tensor_name]), tensor_name


def test_a_step_that_is_not_finite_is_refused() -> None:
    built = parts.build(config("emsa"))
    images, labels = built.data.train_images[:16].clone(), built.data.train_labels[:16]
    images[0, 0, 0, 0] = float("nan")
    start = nn.utils.parameters_to_vector(built.model.parameters()).detach()
    assert built.step(images, labels).refused
    assert torch.equal(start, nn.utils.parameters_to_vector(built.model.parameters()))
    assert not built.step(built.data.train_images[:16], labels).refused

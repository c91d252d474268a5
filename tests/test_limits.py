"""Limits in which theory says what GT-DDP must equal: its base optimizer, a joint solve, its own other forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.models.torchvision_import import import_torchvision
from gtddp_dist.players import prepare, sample_gradients

BASES: dict[str, tuple[type[torch.optim.Optimizer], type[curvature.Curvature], list[dict[str, Any]]]] = {
    "sgd": (
        torch.optim.SGD,
        curvature.SGD,
        [
            {"lr": 0.1},
            {"lr": 0.1, "weight_decay": 0.01},
            {"lr": 0.05, "momentum": 0.9},
            {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
            {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            {"lr": 0.001, "momentum": 0.9, "maximize": True},
        ],
    ),
    "rmsprop": (
        torch.optim.RMSprop,
        curvature.RMSprop,
        [
            {"lr": 1e-3},
            {"lr": 1e-3, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.01},
            {"lr": 1e-3, "momentum": 0.9},
            {"lr": 1e-3, "centered": True, "momentum": 0.5, "eps": 1e-4},
            {"lr": 1e-4, "maximize": True},
        ],
    ),
    "adam": (
        torch.optim.Adam,
        curvature.Adam,
        [
            {"lr": 1e-2},
            {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
            {"lr": 1e-2, "amsgrad": True},
            {"lr": 1e-4, "maximize": True},
        ],
    ),
    "adamw": (
        torch.optim.AdamW,
        curvature.AdamW,
        [{"lr": 1e-2}, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}, {"lr": 1e-4, "maximize": True}],
    ),
}
SETTINGS = [(name, options) for name, (_, _, all_options) in BASES.items() for options in all_options]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]], micro_batches: int = 1
) -> None:
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (F.cross_entropy(model(x_part), y_part) / micro_batches).backward()
        optimizer.step()


def assert_same_weights(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        difference = (p - q).norm() / q.norm()
        assert difference < tolerance, f"{name}: {difference:.2e}"


def moved(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).norm() / q.norm()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def batches_of(net: Any, count: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    return [net.batch(samples, seed) for seed in range(count)]


@pytest.mark.parametrize("capture", ["gradient", "weighted"])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=lambda value: str(value))
def test_rho_0_is_torchs_own_optimizer(name: str, options: dict[str, Any], capture: str) -> None:
    """Prop. 1 and 4: with no terminal curvature there is no feedback, and the step is the base's."""
    torch_class, curvature_class, _ = BASES[name]
    net = NETS["small_resnet"]
    ours, theirs = net.model(), net.model()
    batches = batches_of(net, 50, 4)
    train(theirs, torch_class(theirs.parameters(), **options), batches)
    train(ours, GTDDP(ours, curvature_class(**options), gauss_newton_weight=0.0, capture=capture), batches)
    assert moved(theirs, net.model()) > 1e-3
    assert_same_weights(ours, theirs, 1e-10)


@pytest.mark.parametrize(
    "mode",
    [
        {"control_hessian": "replace", "value_hessian": "block_diagonal", "rollout": "nonlinear"},
        {"terminal": "sampled", "metric": "previous"},
        {"statistics": "value", "scope": 2},
    ],
    ids=str,
)
def test_feedback_vanishes_with_rho(mode: dict[str, Any]) -> None:
    """The recursion itself, run with a vanishing weight, tends to the base step: nothing else is added to it."""
    net = NETS["projection"]
    batches = batches_of(net, 3, 4)
    distances = []
    for rho in (1e-3, 1e-5):
        ours, theirs = net.model(), net.model()
        train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-2), batches)
        train(ours, GTDDP(ours, curvature.Adam(lr=1e-2), gauss_newton_weight=rho, **mode), batches)
        distances.append(moved(ours, theirs))
    assert 0 < distances[1] < 0.02 * distances[0] < 0.02


def test_micro_batches_sum_up_as_p_grad_does() -> None:
    net = NETS["identity"]
    batches = batches_of(net, 10, 6)
    theirs = net.model()
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), batches, micro_batches=3)
    for capture in ("gradient", "weighted"):
        for scope in ("batch", "micro_batch", 2, 1):
            ours = net.model()
            optimizer = GTDDP(ours, curvature.AdamW(lr=1e-2), gauss_newton_weight=0.0, capture=capture, scope=scope)
            train(ours, optimizer, batches, micro_batches=3)
            assert_same_weights(ours, theirs, 1e-10)


def test_resnet18_of_torchvision_as_it_is() -> None:
    """Two steps at rho = 0, with running statistics, for a stateless and an adaptive base."""
    models = import_torchvision("torchvision.models")
    torch.manual_seed(0)
    start = models.resnet18(num_classes=10).double()
    x, y = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64), torch.randint(10, (2, 6))
    for base, ours_curvature in (
        (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), curvature.SGD(lr=0.05, momentum=0.9)),
        (lambda p: torch.optim.Adam(p, lr=1e-3), curvature.Adam(lr=1e-3)),
    ):
        ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
        train(theirs, base(theirs.parameters()), list(zip(x, y, strict=True)))
        train(ours, GTDDP(ours, ours_curvature, gauss_newton_weight=0.0), list(zip(x, y, strict=True)))
        assert_same_weights(ours, theirs, 1e-11)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_joint_solve_identity() -> None:
    """Proximal, full M, linear: d becomes d - R^-1 S^T (rho/B) (I + (rho/B) H)^-1 S d, H summed over players."""
    net = NETS["small_resnet"]
    lr, rho, samples = 0.3, 0.7, 4
    x, y = net.batch(samples, 0)
    model = net.model()
    seen = _forward_seeing_modules(model, x, y)
    S = torch.cat(
        [
            gradient.flatten(1)
            for module, (inputs, output_grads) in seen.items()
            for gradient in sample_gradients(module, prepare(module, inputs), output_grads, samples)
            .per_sample()
            .values()
        ],
        dim=1,
    )
    order = [p for module in seen for p in module.parameters(recurse=False)]
    before = torch.cat([p.detach().flatten() for p in order])
    d = lr * S.mean(0)
    H = lr * S @ S.mT
    solve = torch.linalg.solve(torch.eye(samples, dtype=H.dtype) + rho / samples * H, S @ d)
    expected = before - (d - lr * S.mT @ solve * rho / samples)

    optimizer = GTDDP(model, curvature.SGD(lr=lr), gauss_newton_weight=rho)
    train(model, optimizer, [(x, y)])
    after = torch.cat([p.detach().flatten() for p in order])
    assert (after - before + d).norm() > 1e-3  # the correction is there
    torch.testing.assert_close(after, expected, rtol=1e-11, atol=1e-12)


def _forward_seeing_modules(model: nn.Module, x: Tensor, y: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                output.register_hook(lambda grad: seen.__setitem__(module, (args[0].detach(), grad)))

            handles.append(module.register_forward_hook(keep))
    F.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return seen


def _one_step(
    make: Callable[[nn.Module], GTDDP], steps: int = 3, micro_batches: int = 1, net: str = "small_resnet"
) -> nn.Module:
    model = NETS[net].model()
    train(model, make(model), batches_of(NETS[net], steps, 4), micro_batches)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": 2},
        {"control_hessian": "replace", "value_hessian": "block_diagonal", "statistics": "value"},
        {"terminal": "sampled", "metric": "previous"},
        {"terminal": "sampled", "scope": 1},
        {"rollout": "nonlinear", "momentum_of": "gradient"},
        {"clip_norm": 0.5, "scope": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "base",
    [
        curvature.SGD(lr=0.1),
        curvature.SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
        curvature.SGD(lr=0.1, momentum=0.9, nesterov=True),
        curvature.SGD(lr=0.1, momentum=0.9, dampening=0.2),
        curvature.RMSprop(lr=0.01, momentum=0.9),
        curvature.Adam(lr=0.01),
        curvature.SGD(lr=0.01, maximize=True),
    ],
    ids=str,
)
def test_weighted_capture_takes_the_same_step(base: curvature.Curvature, options: dict[str, Any]) -> None:
    plain = _one_step(lambda m: GTDDP(m, base, gauss_newton_weight=0.5, **options), micro_batches=2)
    weighted = _one_step(
        lambda m: GTDDP(m, base, gauss_newton_weight=0.5, capture="weighted", **options), micro_batches=2
    )
    assert moved(plain, NETS["small_resnet"].model()) > 1e-3
    assert_same_weights(weighted, plain, 1e-10)


def test_sum_is_mean_with_everything_rescaled() -> None:
    """A sum loss with lr / N and rho takes the steps of a mean loss with lr and rho."""
    mean = _one_step(lambda m: GTDDP(m, curvature.SGD(lr=0.2), gauss_newton_weight=0.5, scope=2))
    model = NETS["small_resnet"].model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.2 / 4), gauss_newton_weight=0.5, scope=2, loss_reduction="sum")
    for x, y in batches_of(NETS["small_resnet"], 3, 4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    assert_same_weights(model, mean, 1e-10)


def test_micro_batches_do_not_matter_to_a_batch_scope() -> None:
    one = _one_step(lambda m: GTDDP(m, curvature.Adam(lr=0.01), gauss_newton_weight=0.5), micro_batches=1)
    for rollout in ("linear", "nonlinear"):
        make = lambda m, rollout=rollout: GTDDP(m, curvature.Adam(lr=0.01), gauss_newton_weight=0.5, rollout=rollout)  # noqa: E731
        assert_same_weights(_one_step(make, micro_batches=4), _one_step(make, micro_batches=1), 1e-10)
    assert moved(one, NETS["small_resnet"].model()) > 1e-3


def test_replica_groups_stand_for_replicas() -> None:
    """Two replicas of two micro-batches each: a group a replica is a scope of half the batch."""
    halves = _one_step(lambda m: GTDDP(m, curvature.Adam(lr=0.01), gauss_newton_weight=0.5, scope=2), micro_batches=2)
    emulated = _one_step(
        lambda m: GTDDP(m, curvature.Adam(lr=0.01), gauss_newton_weight=0.5, replica_groups=2), micro_batches=4
    )
    assert_same_weights(emulated, halves, 1e-10)


def test_linear_and_nonlinear_rollouts_differ_at_second_order() -> None:
    """Shrinking the step ten times shrinks the difference of the two rollouts a hundred times or more."""
    differences = []
    for lr in (1e-2, 1e-3):
        ends = []
        for rollout in ("linear", "nonlinear"):
            make = lambda m, lr=lr, rollout=rollout: GTDDP(  # noqa: E731
                m, curvature.SGD(lr=lr), gauss_newton_weight=1.0, rollout=rollout, value_hessian="block_diagonal"
            )
            ends.append(torch.cat([p.detach().flatten() for p in _one_step(make, steps=1).parameters()]))
        differences.append(float((ends[0] - ends[1]).norm()))
    assert 0 < differences[1] < differences[0] / 90


def test_determinism() -> None:
    make = lambda m: GTDDP(m, curvature.Adam(lr=0.01), terminal="sampled", seed=3)  # noqa: E731
    first, second = _one_step(make), _one_step(make)
    other = _one_step(lambda m: GTDDP(m, curvature.Adam(lr=0.01), terminal="sampled", seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert moved(first, other) > 0

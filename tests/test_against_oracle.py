"""The optimizer against the dense reference: every mode, every base, every network, several steps in a row."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from nets import NETS, Net
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.terminal import sample_labels

STEPS = 3
SAMPLES = 4
TOLERANCE = 1e-10

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.3}),
    "sgd momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "sgd nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.01, "eps": 1e-6}),
    "rmsprop momentum": ("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "centered": True, "eps": 1e-3}),
    "adam": ("Adam", {"lr": 0.02, "weight_decay": 0.01}),
    "adam amsgrad": ("Adam", {"lr": 0.02, "betas": (0.8, 0.9), "amsgrad": True}),
    # With torch's eps of 1e-8 the step itself is ill-conditioned where a gradient is nearly zero: weights changed by
    # 1e-16 then change the reference's own step by 3e-10 on the nested net.
    "adamw": ("AdamW", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}),
}


@dataclass(frozen=True)
class Layout:
    """How the step's samples come, and what that makes of the recursion groups."""

    micro_batches: int
    options: dict[str, Any]
    groups: tuple[range, ...] | None


LAYOUTS = (
    Layout(1, {}, None),
    Layout(1, {"scope": 2}, (range(2), range(2, 4))),
    Layout(2, {"scope": "micro_batch"}, (range(2), range(2, 4))),
    Layout(2, {"scope": "batch"}, None),
    Layout(2, {"scope": 1}, tuple(range(i, i + 1) for i in range(4))),
    Layout(2, {"replica_groups": 2}, (range(2), range(2, 4))),
)

MODES = [
    {
        "control_hessian": control,
        "value_hessian": value,
        "terminal": terminal,
        "rollout": rollout,
        "statistics": statistics,
        "metric": metric,
        "momentum_of": momentum_of,
        "capture": capture,
    }
    for control, value, terminal, rollout, (statistics, metric), momentum_of, capture in itertools.product(
        ("proximal", "replace"),
        ("batch", "block_diagonal"),
        ("loss_gradient", "sampled"),
        ("linear", "nonlinear"),
        (("gradient", "current"), ("gradient", "previous"), ("value", "current")),
        ("step", "gradient"),
        ("gradient", "weighted"),
    )
]


def reference_base(class_name: str, options: dict[str, Any]) -> oracle.Base:
    base: oracle.Base = getattr(oracle, class_name)(**{"mu" if n == "momentum" else n: v for n, v in options.items()})
    return base


def check_steps(
    net: Net,
    base: str,
    layout: Layout,
    mode: dict[str, Any],
    rho: float | str,
    *,
    guard: bool = True,
    inspect: bool = False,
) -> None:
    """STEPS steps of both; asserts equal weights after each, relative to the step's own size."""
    class_name, options = BASES[base]
    ours = getattr(curvature, class_name)(**options)
    check_with(net, ours, reference_base(class_name, options), layout, mode, rho, guard=guard, inspect=inspect)


def check_with(
    net: Net,
    ours: curvature.Curvature,
    theirs: oracle.OptimizerRule,
    layout: Layout,
    mode: dict[str, Any],
    rho: float | str,
    *,
    guard: bool = True,
    inspect: bool = False,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    samples: int = SAMPLES,
) -> None:
    """The same with the two base rules given."""
    model = net.model()
    optimizer = GTDDP(
        model, ours, gauss_newton_weight=rho, replace_guard=guard, inspect=inspect, **mode, **layout.options
    )
    reference_options = oracle.Options(
        theirs,
        gauss_newton_weight=rho,  # type: ignore[arg-type]
        groups=layout.groups,
        replace_guard=guard,
        **{key: value for key, value in mode.items() if key not in ("capture", "projection")},
    )
    drawn = mode["terminal"] == "sampled" or getattr(ours, "fisher", "empirical") == "sampled"
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = oracle.State()
    for step in range(steps):
        x, y = net.batch(samples, step)
        sampled = _sampled_labels(model, x, layout.micro_batches, step) if drawn else None
        result = oracle.oracle_step(net.stages, parameters, state, x, y, reference_options, sampled)

        optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(layout.micro_batches), y.chunk(layout.micro_batches), strict=True):
            (F.cross_entropy(model(x_part), y_part) / layout.micro_batches).backward()
        optimizer.step()

        moved = torch.cat([(p.detach() - parameters[n]).flatten() for n, p in model.named_parameters()])
        expected = torch.cat([(result.parameters[n] - parameters[n]).flatten() for n in parameters])
        error = float((moved - expected).norm() / expected.norm())
        assert error < tolerance, f"step {step}: relative error {error:.2e}"
        if inspect:
            _check_inspected(net, optimizer, result)
        parameters, state = result.parameters, result.state


def _sampled_labels(model: nn.Module, x: Tensor, micro_batches: int, step: int) -> Tensor:
    """The labels that the optimizer will draw: its own function, on probabilities computed here."""
    with torch.no_grad():
        probabilities = model.eval()(x).softmax(1)
    model.train()
    labels = sample_labels(probabilities, seed=0, step=step, first=0)
    parts = probabilities.chunk(micro_batches)
    first = 0
    for part in parts:  # keyed by the sample's place in the step: cutting the batch changes nothing
        assert torch.equal(sample_labels(part, 0, step, first), labels[first : first + len(part)])
        first += len(part)
    return labels


def _check_inspected(net: Net, optimizer: GTDDP, result: oracle.OracleResult) -> None:
    if not result.sweeps:
        return
    for group, sweep in enumerate(result.sweeps):
        B = sweep.samples.stop - sweep.samples.start
        for cut in range(1, len(net.stages) + 1):
            value = optimizer.value(cut, group)
            n = value.gradient.shape[1]
            keep = _columns_with_derivative(sweep, cut)
            V_z = sweep.V_z[cut].reshape(B, -1)[:, keep]
            V_zz = sweep.V_zz[cut].reshape(B, keep.numel(), B, keep.numel())[:, keep][:, :, :, keep]
            assert n == V_z.shape[1] > 0
            torch.testing.assert_close(value.gradient, V_z, rtol=1e-9, atol=1e-10 * float(V_z.norm()))
            torch.testing.assert_close(value.hessian, V_zz, rtol=1e-9, atol=1e-10 * float(V_zz.norm()))
        for player in range(len(net.stages)):
            policy = optimizer.policy(player, group)
            order = torch.cat(
                [torch.arange(policy.controls[n].start, policy.controls[n].stop) for n in net.stages[player].parameters]
            )
            k = sweep.k[player]
            torch.testing.assert_close(policy.open_gain[order], k, rtol=1e-9, atol=1e-10 * float(k.norm()))
            if player:
                keep = _columns_with_derivative(sweep, player)
                K = sweep.K[player].reshape(len(k), B, -1)[:, :, keep]
                scale = max(float(K.norm()), 1e-12)
                torch.testing.assert_close(policy.feedback_gain[order], K, rtol=1e-9, atol=1e-10 * scale)


def _columns_with_derivative(sweep: oracle.GroupSweep, cut: int) -> Tensor:
    """Columns of the oracle's state that the optimizer has derivatives of: all but the model's own input."""
    (x,) = sweep.live[0]
    return torch.cat(
        [torch.full((part[0].numel(),), not torch.equal(part.flatten(), x.flatten())) for part in sweep.live[cut]]
    )


def _rotated(shift: int) -> list[Any]:
    """Every mode once, with network, base and layout changing at their own pace, so that all pairs meet."""
    nets, bases = list(NETS), list(BASES)
    cases = []
    for index, mode in enumerate(MODES):
        turn = index * 7 + shift * 11
        case = (nets[turn % len(nets)], bases[(turn + index // 9) % len(bases)], (turn + index // 5) % len(LAYOUTS))
        cases.append(pytest.param(*case, mode, id=f"{shift}-{index}-{case[0]}-{case[1]}-{case[2]}"))
    return cases


@pytest.mark.parametrize(("net", "base", "layout", "mode"), [*_rotated(0), *_rotated(1)])
def test_steps_equal_the_dense_recursion(net: str, base: str, layout: int, mode: dict[str, Any]) -> None:
    check_steps(NETS[net], base, LAYOUTS[layout], mode, rho=0.5)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("base", BASES)
def test_every_network_with_every_base(net: str, base: str) -> None:
    mode = {
        "terminal": "loss_gradient",
        "rollout": "nonlinear",
        "control_hessian": "proximal",
        "value_hessian": "batch",
    }
    check_steps(NETS[net], base, LAYOUTS[0], mode, rho=2.0)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("control", ["proximal", "replace"])
@pytest.mark.parametrize("value", ["batch", "block_diagonal"])
def test_values_and_policies_in_explicit_form(net: str, control: str, value: str) -> None:
    """Prop. 5 and 6: V_z, V_zz (with the cross-terms of residual states), k and K of every stage."""
    base, layout = ("adam", LAYOUTS[1]) if control == "proximal" else ("sgd momentum", LAYOUTS[0])
    mode = {"terminal": "loss_gradient", "rollout": "nonlinear", "control_hessian": control, "value_hessian": value}
    check_steps(NETS[net], base, layout, mode, rho=0.5, inspect=True)
    mode["terminal"] = "sampled"
    check_steps(NETS[net], base, layout, mode, rho=0.5, inspect=True)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("value", ["batch", "block_diagonal"])
def test_replace_where_it_amplifies(guard: bool, value: str) -> None:
    """At a rate where the spectral radius of M H passes 1: clamping, with and without the guard."""
    mode: dict[str, Any] = {"terminal": "loss_gradient", "control_hessian": "replace", "value_hessian": value}
    net = NETS["small_resnet"]
    BASES["sgd fast"] = ("SGD", {"lr": 3.0})
    try:
        check_steps(net, "sgd fast", LAYOUTS[0], mode, rho=4.0, guard=guard)
    finally:
        del BASES["sgd fast"]
    optimizer = GTDDP(net.model(), curvature.SGD(lr=3.0), gauss_newton_weight=4.0, replace_guard=guard, **mode)
    x, y = net.batch(SAMPLES, 0)
    F.cross_entropy(optimizer._model(x), y).backward()
    optimizer.step()
    assert optimizer.diagnostics()["radius"] > 1


def test_the_papers_own_algorithm() -> None:
    for base in ("sgd momentum", "rmsprop", "adam"):
        class_name, options = BASES[base]
        net = NETS["projection"]
        model = net.model()
        optimizer = GTDDP.paper(model, getattr(curvature, class_name)(**options))
        x, y = net.batch(SAMPLES, 0)
        reference = oracle.oracle_step(
            net.stages,
            {n: p.detach().clone() for n, p in model.named_parameters()},
            oracle.State(),
            x,
            y,
            oracle.Options(
                reference_base(class_name, options),
                gauss_newton_weight="1/B",
                control_hessian="replace",
                value_hessian="block_diagonal",
                rollout="nonlinear",
                statistics="value",
                momentum_of="gradient",
                replace_guard=False,
            ),
        )
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), reference.parameters[name], rtol=1e-10, atol=1e-12)


def test_rates_and_decays_of_parameter_groups() -> None:
    """Different options for weights and biases: the metric is per parameter."""
    net = NETS["identity"]
    model = net.model()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = GTDDP(
        model,
        curvature.SGD(lr=0.2, momentum=0.5, weight_decay=0.01),
        param_groups=[{"params": weights}, {"params": biases, "lr": 0.05, "weight_decay": 0.0, "momentum": 0.9}],
        gauss_newton_weight=1.0,
    )
    slow = oracle.SGD(lr=0.05, mu=0.9)
    options = oracle.Options(
        oracle.SGD(lr=0.2, mu=0.5, weight_decay=0.01),
        overrides={n: slow for n, _ in model.named_parameters() if n.endswith("bias")},
        gauss_newton_weight=1.0,
    )
    parameters, state = {n: p.detach().clone() for n, p in model.named_parameters()}, oracle.State()
    for step in range(STEPS):
        x, y = net.batch(SAMPLES, step)
        result = oracle.oracle_step(net.stages, parameters, state, x, y, options)
        parameters, state = result.parameters, result.state
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), parameters[name], rtol=1e-10, atol=1e-12)

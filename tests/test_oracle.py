"""The dense reference checked against torch, against the theory, and against itself.

The sample-space recursion that the package implements is written once more here, in its shortest form, to
check the theorem that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from nets import ALL_NETS, IDENTITY, MLP, NESTED, NETS, PROJECTION, TOKENS, Live, Net, run_stages
from oracle import (
    SGD,
    Adam,
    AdamW,
    Base,
    Options,
    OracleResult,
    RMSprop,
    State,
    flatten_control,
    flatten_live,
    from_value_matrix,
    mean_gradient,
    oracle_step,
    pull_back,
    stage_jacobians,
    unflatten_live,
    value_block,
    value_matrix,
)
from torch import Tensor, nn
from torch.nn import functional

EVERY_NET = pytest.mark.parametrize("net", ALL_NETS.values(), ids=ALL_NETS.keys())


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


def random_state(net: Net, parameters: dict[str, Tensor], base: Base, steps: int = 2) -> State:
    """The state after some plain steps on other batches, the parameters left where they were."""
    state, moved = State(), dict(parameters)
    for seed in range(steps):
        inputs, labels = net.batch(4, 50 + seed)
        result = oracle_step(net.stages, moved, state, inputs, labels, Options(base, gauss_newton_weight=0.0))
        state, moved = result.state, result.parameters
    return state


# --- the networks -------------------------------------------------------------------------------------------


@EVERY_NET
def test_stages_are_the_module(net: Net) -> None:
    """The stages compute what the module computes, and every parameter belongs to one player."""
    model = net.model()
    parameters = net.parameters(model)
    inputs, labels = net.batch(4)
    assert len(set(labels.tolist())) > 1

    live: Live = (inputs,)
    for stage in net.stages:
        assert len(stage.live) == len(live), stage.name
        live = stage.function(parameters, live)
    assert error(live[0], model(inputs)) < 1e-14
    assert sorted(name for stage in net.stages for name in stage.parameters) == sorted(parameters)


@EVERY_NET
def test_no_sample_is_dead(net: Net) -> None:
    """Every sample has a cotangent at every cut, else its entries of M mean nothing."""
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    live: Live = (inputs,)
    (logits,) = run_stages(net.stages, parameters, live)
    s = logits.softmax(1) - functional.one_hot(labels, net.classes)
    for t, stage in enumerate(net.stages):
        assert pull_back(net.stages[t:], parameters, live, s).norm(dim=1).min() > 1e-3 * s.norm(dim=1).min()
        live = stage.function(parameters, live)


# --- derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [PROJECTION, TOKENS], ids=lambda net: net.name)
def test_jacobians_by_finite_differences(net: Net) -> None:
    """F_z and F_u of a stage (in PROJECTION one with two live tensors) against central differences."""
    t = 2 if net is PROJECTION else 1
    stage = net.stages[t]
    parameters = net.parameters(net.model())
    inputs, _ = net.batch(3)
    live = run_stages(net.stages[:t], parameters, (inputs,))
    F_z, F_u = stage_jacobians(stage, parameters, live)
    generator = torch.Generator().manual_seed(0)
    h = 1e-5

    def after(z: Tensor, of_parameters: dict[str, Tensor]) -> Tensor:
        return flatten_live(stage.function(of_parameters, unflatten_live(z, live)))

    z = flatten_live(live)
    along = torch.randn(z.shape, dtype=z.dtype, generator=generator)
    difference = (after(z + h * along, parameters) - after(z - h * along, parameters)) / (2 * h)
    assert error(torch.einsum("bxz,bz->bx", F_z, along), difference) < 1e-8

    turn = {n: torch.randn(parameters[n].shape, dtype=z.dtype, generator=generator) for n in stage.parameters}
    plus, minus = (after(z, parameters | {n: parameters[n] + sign * h * turn[n] for n in turn}) for sign in (1, -1))
    assert error(F_u @ flatten_control(stage, turn.__getitem__), (plus - minus) / (2 * h)) < 1e-8


# --- rho = 0 is the base optimizer --------------------------------------------------------------------------

BASES: list[tuple[Base, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]]] = [
    (SGD(0.1), lambda u: torch.optim.SGD(u, lr=0.1)),
    (SGD(0.1, 0.01, mu=0.9), lambda u: torch.optim.SGD(u, lr=0.1, momentum=0.9, weight_decay=0.01)),
    (
        SGD(0.1, 0.01, mu=0.9, dampening=0.3),
        lambda u: torch.optim.SGD(u, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    ),
    (SGD(0.1, mu=0.9, nesterov=True), lambda u: torch.optim.SGD(u, lr=0.1, momentum=0.9, nesterov=True)),
    (RMSprop(0.01, alpha=0.9), lambda u: torch.optim.RMSprop(u, lr=0.01, alpha=0.9)),
    (
        RMSprop(0.01, 0.02, alpha=0.9, eps=1e-4, mu=0.8, centered=True),
        lambda u: torch.optim.RMSprop(u, lr=0.01, alpha=0.9, eps=1e-4, momentum=0.8, centered=True, weight_decay=0.02),
    ),
    (Adam(0.01), lambda u: torch.optim.Adam(u, lr=0.01)),
    (
        Adam(0.01, 0.02, betas=(0.8, 0.9), eps=1e-5, amsgrad=True),
        lambda u: torch.optim.Adam(u, lr=0.01, betas=(0.8, 0.9), eps=1e-5, amsgrad=True, weight_decay=0.02),
    ),
    (AdamW(0.01, 0.1), lambda u: torch.optim.AdamW(u, lr=0.01, weight_decay=0.1)),
    (
        AdamW(0.01, 0.1, amsgrad=True),
        lambda u: torch.optim.AdamW(u, lr=0.01, weight_decay=0.1, amsgrad=True),
    ),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"control_hessian": "replace", "rollout": "nonlinear", "statistics": "value"},
        {"metric": "previous", "groups": (range(3), range(3, 4)), "momentum_of": "gradient"},
    ],
    ids=["default", "replace-nonlinear-value", "previous-groups"],
)
@pytest.mark.parametrize("case", BASES, ids=lambda case: repr(case[0]))
def test_without_gauss_newton_term_it_is_the_base(
    case: tuple[Base, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]], options: dict[str, object]
) -> None:
    """Prop. 1 and 4: five steps equal torch's, in parameters and buffers."""
    base, build = case
    model = MLP.model()
    optimizer = build(model.parameters())
    parameters, state = MLP.parameters(model), State()
    for seed in range(5):
        inputs, labels = MLP.batch(4, seed)
        result = oracle_step(
            MLP.stages,
            parameters,
            state,
            inputs,
            labels,
            with_options(base, gauss_newton_weight=0.0, **options),
        )
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-13)
        parameters, state = result.parameters, result.state
        for name, parameter in model.named_parameters():
            assert error(parameters[name], parameter.detach()) < 1e-12
            for key, buffer in state.buffers[name].items():
                assert error(buffer, optimizer.state[parameter][key]) < 1e-12, (name, key)
    assert state.step == 5


def with_options(base: Base, **options: object) -> Options:
    """Options from a dictionary (the values are checked by `Options` itself)."""
    return Options(base, **options)  # type: ignore[arg-type]


# --- the sample-space theorem -------------------------------------------------------------------------------


@dataclass
class SampleSpace:
    """The same recursion carried by c [B] and M [B, B]. Lists over cuts T + 1, over stages T."""

    c: list[Tensor]
    M: list[Tensor]
    delta_u: list[Tensor]
    correction: list[Tensor]
    S_u: list[Tensor]


def sample_gradients(net: Net, parameters: dict[str, Tensor], inputs: Tensor, s: Tensor) -> list[Tensor]:
    """S_t [B, m_t]: each sample's gradient of <s, output>, s held fixed, by back-propagation alone."""

    def output(own: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        (logits,) = run_stages(net.stages, own, (x[None],))
        return (logits[0] * cotangent).sum()

    rows = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0, 0))(parameters, inputs, s)
    return [torch.cat([rows[name].flatten(1) for name in stage.parameters], 1) for stage in net.stages]


def sample_space(
    S: list[Tensor], R: list[Tensor], p: list[Tensor], M: Tensor, replace_mode: bool, diagonal: bool, rows: int = 1
) -> SampleSpace:
    """The general form of the recursion and its linear rollout, for given metrics R [m_t, m_t] and directions p.

    rows: curvature cotangents of each sample; S_t [B rows, m_t], M [B rows, B rows].
    """
    eye = torch.eye(len(M), dtype=M.dtype)
    same_sample = torch.kron(eye[: len(M) // rows, : len(M) // rows], torch.ones(rows, rows, dtype=M.dtype))
    c = torch.zeros(len(M), dtype=M.dtype)
    cs, Ms = [c], [M]
    stored: list[tuple[Tensor, ...]] = []
    for t in reversed(range(len(S))):
        across = torch.linalg.solve(R[t], S[t].T).T  # S R^-1
        H, q = across @ S[t].T, across @ p[t]
        N = eye if replace_mode else torch.linalg.inv(eye + H @ M)
        a = N @ (q + H @ c)
        stored.insert(0, (c, M, N, H, q))
        c, M = c - M @ a, M - M @ N @ H @ M
        M = (M + M.T) / 2
        M = M * same_sample if diagonal else M
        cs.insert(0, c)
        Ms.insert(0, M)
    delta_u, corrections = [], []
    phi = torch.zeros_like(c)
    for t, (c, M, N, H, q) in enumerate(stored):
        e = -N @ (q + H @ (c + M @ phi))
        v = c + M @ phi if replace_mode else c + M @ (phi + e)
        corrections.append(S[t].T @ v)
        delta_u.append(-torch.linalg.solve(R[t], p[t] + S[t].T @ v))
        phi = phi + e
    return SampleSpace(cs, Ms, delta_u, corrections, S)


THEOREM_BASES = [
    SGD(0.3),
    SGD(0.2, 0.01, mu=0.9),
    Adam(0.01, 0.02, eps=1e-3),
    RMSprop(0.01, mu=0.9, eps=1e-3),
]


@pytest.mark.parametrize("terminal", ["loss_gradient", "sampled"])
@pytest.mark.parametrize("value_hessian", ["batch", "block_diagonal"])
@pytest.mark.parametrize("control_hessian", ["proximal", "replace"])
@pytest.mark.parametrize(
    ("net", "base"),
    [(net, THEOREM_BASES[i % len(THEOREM_BASES)]) for i, net in enumerate(NETS.values())],
    ids=lambda value: value.name if isinstance(value, Net) else type(value).__name__,
)
def test_the_recursion_lives_in_sample_space(
    net: Net,
    base: Base,
    control_hessian: Literal["proximal", "replace"],
    value_hessian: Literal["batch", "block_diagonal"],
    terminal: Literal["loss_gradient", "sampled"],
) -> None:
    """V_z = g_z / B + c s_z and V_zz = S_z^T M S_z at every cut, and the controls follow from c and M."""
    B, rho = 3, 0.4
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(B)
    drawn = (labels + 1) % net.classes
    state = random_state(net, parameters, base)
    options = Options(
        base,
        gauss_newton_weight=rho,
        control_hessian=control_hessian,
        value_hessian=value_hessian,
        terminal=terminal,
        replace_guard=False,
    )
    result = oracle_step(net.stages, parameters, state, inputs, labels, options, drawn)
    (sweep,) = result.sweeps

    (logits,) = run_stages(net.stages, parameters, (inputs,))
    phi_z = logits.softmax(1) - functional.one_hot(labels, net.classes)
    s = phi_z if terminal == "loss_gradient" else logits.softmax(1) - functional.one_hot(drawn, net.classes)
    S = sample_gradients(net, parameters, inputs, s)
    p = [
        -R @ flatten_control(stage, plain_step(net, parameters, state, inputs, labels, base).__getitem__)
        for stage, R in zip(net.stages, result.metric, strict=True)
    ]
    M = rho / B * torch.eye(B, dtype=s.dtype)
    expected = sample_space(S, result.metric, p, M, control_hessian == "replace", value_hessian == "block_diagonal")
    if control_hessian == "replace":  # the theorem is of the recursion without its positivity rule
        assert all(torch.linalg.eigvalsh((M + M.T) / 2).min() >= 0 for M in expected.M)

    assert error(expected.c[0], torch.zeros(B, dtype=s.dtype)) > 1e-3  # else nothing was checked
    for t in range(len(net.stages) + 1):
        s_z = pull_back(net.stages[t:], parameters, sweep.live[t], s) if t < len(net.stages) else s
        g_z = pull_back(net.stages[t:], parameters, sweep.live[t], phi_z) if t < len(net.stages) else phi_z
        V_z = g_z / B + expected.c[t][:, None] * s_z
        assert error(sweep.V_z[t], V_z.flatten()) < 1e-10
        assert error(sweep.V_zz[t], from_value_matrix(expected.M[t], s_z)) < 1e-10
        assert error(value_matrix(sweep.V_zz[t], s_z), expected.M[t]) < 1e-10
    for t in range(len(net.stages)):
        assert error(sweep.delta_u[t], expected.delta_u[t]) < 1e-10
        assert error(result.correction[t], expected.correction[t]) < 1e-10
        applied = flatten_control(net.stages[t], result.delta_u.__getitem__)
        assert error(applied, expected.delta_u[t]) < 1e-10


def plain_step(
    net: Net, parameters: dict[str, Tensor], state: State, inputs: Tensor, labels: Tensor, base: Base
) -> dict[str, Tensor]:
    """The base optimizer's own step by parameter name."""
    return oracle_step(net.stages, parameters, state, inputs, labels, Options(base, gauss_newton_weight=0.0)).delta_u


@EVERY_NET
def test_joint_solve(net: Net) -> None:
    """Proximal, whole batch, linear: one Gauss-Newton step of all parameters, in both of its forms."""
    B, rho, lr = 4, 3.0, 0.5
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(B)
    result = oracle_step(net.stages, parameters, State(), inputs, labels, Options(SGD(lr), gauss_newton_weight=rho))
    (logits,) = run_stages(net.stages, parameters, (inputs,))
    phi_z = logits.softmax(1) - functional.one_hot(labels, net.classes)
    G = torch.cat(sample_gradients(net, parameters, inputs, phi_z), 1)  # of all players, [B, m]
    delta_u = torch.cat([flatten_control(stage, result.delta_u.__getitem__) for stage in net.stages])

    in_parameters = torch.eye(G.shape[1], dtype=G.dtype) / lr + rho / B * G.T @ G
    assert error(delta_u, -torch.linalg.solve(in_parameters, G.mean(0))) < 1e-10
    w = torch.linalg.inv(torch.eye(B, dtype=G.dtype) + rho / B * lr * G @ G.T).sum(1) / B
    assert error(delta_u, -lr * G.T @ w) < 1e-10


# --- residual blocks: Prop. 5 and 6 -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "cut"), [(IDENTITY, 2), (NESTED, 3), (PROJECTION, 2)], ids=lambda v: getattr(v, "name", v)
)
def test_value_hessian_blocks_are_outer_products(net: Net, cut: int) -> None:
    """V_xx, V_{x x_r}, V_{x_r x_r} inside a block are outer products of Prop. 5 and 6's vectors.

    They are carried back as in the paper, one for each sample, z <- sqrt(1 - q_u^T Q_uu^-1 q_u) F_z^T z with
    q_u = F_u^T z; the live tensors of the block are its parts. (Block-diagonal, "replace", as there.)
    """
    B, lr, rho = 3, 0.5, 0.5
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(B)
    options = Options(SGD(lr), gauss_newton_weight=rho, control_hessian="replace", value_hessian="block_diagonal")
    result = oracle_step(net.stages, parameters, State(), inputs, labels, options)
    (sweep,) = result.sweeps
    assert all(radius is not None and radius < 1 for radius in sweep.radius)  # so neither guard nor clamp acted

    (logits,) = sweep.live[-1]
    z = (rho / B) ** 0.5 * (logits.softmax(1) - functional.one_hot(labels, net.classes))
    for t in reversed(range(cut, len(net.stages))):
        F_z, F_u = stage_jacobians(net.stages[t], parameters, sweep.live[t])
        q_u = torch.einsum("bxu,bx->bu", F_u, z)
        shrink = (1 - lr * (q_u**2).sum(1)).sqrt()
        assert shrink.max() < 0.9999
        z = shrink[:, None] * torch.einsum("bxz,bx->bz", F_z, z)

    parts = unflatten_live(z, sweep.live[cut])
    assert len(parts) == len(net.stages[cut].live) > 1
    for sample in range(B):
        for i, first in enumerate(parts):
            for j, second in enumerate(parts):
                block = value_block(sweep.V_zz[cut], sweep.live[cut], (sample, i), (sample, j))
                outer = torch.outer(first[sample].flatten(), second[sample].flatten())
                assert block.norm() > 0
                assert error(block, outer) < 1e-10
        other = (sample + 1) % B
        assert value_block(sweep.V_zz[cut], sweep.live[cut], (sample, 0), (other, 1)).norm() == 0


# --- rollouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SGD(0.4, 0.01, mu=0.9), AdamW(0.02, 0.5)], ids=["SGD", "AdamW"])
def test_nonlinear_rollout_feeds_back_what_the_module_does(base: Base) -> None:
    """The last player's deviation is that of its module's input under the other players' new weights.

    With two groups these are averaged, which in the current metric is the average of the groups' controls.
    """
    net = NESTED
    model = net.model()
    parameters = net.parameters(model)
    inputs, labels = net.batch(3)
    options = Options(base, gauss_newton_weight=2.0, rollout="nonlinear", groups=(range(2), range(2, 3)))
    result = oracle_step(net.stages, parameters, random_state(net, parameters, base), inputs, labels, options)

    seen: list[Tensor] = []
    head = model.get_submodule("head")
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    model(inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(result.parameters[name])
    model(inputs)
    handle.remove()
    expected = torch.zeros_like(result.correction[-1])
    for share, sweep in zip((2 / 3, 1 / 3), result.sweeps, strict=True):
        deviation = (seen[1] - seen[0])[sweep.samples].flatten()
        assert deviation.abs().max() > 1e-4
        assert error(sweep.delta_z[-1], deviation) < 1e-11
        expected += share * (sweep.k[-1] + sweep.K[-1] @ deviation)
    assert error(flatten_control(net.stages[-1], result.delta_u.__getitem__), expected) < 1e-11


def test_rollouts_differ_at_second_order() -> None:
    """The deviations differ by O(lr^2): halving the rate quarters the difference."""
    parameters = PROJECTION.parameters(PROJECTION.model())
    inputs, labels = PROJECTION.batch(3)
    differences = []
    for lr in (1e-3, 5e-4):
        linear, nonlinear = (
            oracle_step(
                PROJECTION.stages,
                parameters,
                State(),
                inputs,
                labels,
                Options(SGD(lr), gauss_newton_weight=1.0, rollout=rollout),
            )
            for rollout in ("linear", "nonlinear")
        )
        differences.append((linear.sweeps[0].delta_z[-1] - nonlinear.sweeps[0].delta_z[-1]).norm())
    assert float(differences[0] / differences[1]) == pytest.approx(4, rel=0.02)


def test_linear_rollout_is_the_directional_derivative() -> None:
    """The deviation at the last cut is the derivative along all earlier controls, taken at once."""
    net, h = IDENTITY, 1e-5
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(3)
    options = Options(SGD(0.5), gauss_newton_weight=2.0)
    result = oracle_step(net.stages, parameters, State(), inputs, labels, options)

    def features(along: float) -> Tensor:
        moved = {name: u + along * result.delta_u[name] for name, u in parameters.items()}
        return flatten_live(run_stages(net.stages[:-1], moved, (inputs,)))

    difference = (features(h) - features(-h)) / (2 * h)
    assert error(result.sweeps[0].delta_z[-1], difference.flatten()) < 1e-8


# --- recursion groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.5, "1/B"])
def test_groups_are_averaged(weight: float | Literal["1/B"]) -> None:
    """In SGD's constant metric, a step with groups is the mean of the groups' own steps, by their sizes."""
    net, base = PROJECTION, SGD(0.3, 0.01, mu=0.9, nesterov=True)
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    state = random_state(net, parameters, base)
    options = Options(base, gauss_newton_weight=weight, control_hessian="replace", replace_guard=False)
    groups = (range(3), range(3, 4))
    whole = oracle_step(net.stages, parameters, state, inputs, labels, replace(options, groups=groups))
    alone = []
    for g in groups:
        own = replace(options, gauss_newton_weight=1 / len(g) if weight == "1/B" else weight)
        alone.append(oracle_step(net.stages, parameters, state, inputs[list(g)], labels[list(g)], own))
    for name in parameters:
        mean = sum(len(g) / 4 * part.parameters[name] for g, part in zip(groups, alone, strict=True))
        assert isinstance(mean, Tensor)
        assert error(whole.parameters[name], mean) < 1e-12
        mean = sum(
            len(g) / 4 * part.state.buffers[name]["momentum_buffer"] for g, part in zip(groups, alone, strict=True)
        )
        assert isinstance(mean, Tensor)
        assert error(whole.state.buffers[name]["momentum_buffer"], mean) < 1e-12
    one = oracle_step(net.stages, parameters, state, inputs, labels, options)
    assert max(error(whole.delta_u[name], one.delta_u[name]) for name in parameters) > 1e-4


# --- base rules with a correction ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        SGD(0.1, mu=0.9),
        SGD(0.1, 0.01, mu=0.9, dampening=0.4),
        RMSprop(0.01, mu=0.9, centered=True, eps=1e-4),
        Adam(0.01, amsgrad=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("metric", ["current", "previous"])
def test_momentum_of_the_step(base: Base, metric: Literal["current", "previous"]) -> None:
    """The buffer keeps what was done: read as a plain step's buffer, it gives the applied control."""
    net = MLP
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    state = random_state(net, parameters, base)
    options = Options(base, gauss_newton_weight=3.0, metric=metric)
    kept = oracle_step(net.stages, parameters, state, inputs, labels, options)
    raw = oracle_step(net.stages, parameters, state, inputs, labels, replace(options, momentum_of="gradient"))
    plain = oracle_step(net.stages, parameters, state, inputs, labels, replace(options, gauss_newton_weight=0.0))
    for name in parameters:
        buffers = kept.state.buffers[name]
        if isinstance(base, Adam):
            C = (buffers["max_exp_avg_sq"] / (1 - base.betas[1] ** 3)).sqrt() + base.eps
            done = -base.lr / C * buffers["exp_avg"] / (1 - base.betas[0] ** 3)
        else:
            done = -base.lr * buffers["momentum_buffer"]
        assert error(kept.delta_u[name], done) < 1e-11
        assert error(kept.delta_u[name], raw.delta_u[name]) == 0
        assert error(kept.delta_u[name], plain.delta_u[name]) > 1e-6
        for key, buffer in raw.state.buffers[name].items():
            assert error(buffer, plain.state.buffers[name][key]) < 1e-13


@pytest.mark.parametrize(
    "base",
    [Adam(0.02, 0.01, eps=1e-3, amsgrad=True), RMSprop(0.02, 0.01, alpha=0.9, mu=0.9, eps=1e-3)],
    ids=repr,
)
def test_previous_metric(base: Adam | RMSprop) -> None:
    """Adaptive bases first sweep nothing, then in the metric of the step before; they step in that of now."""
    net = PROJECTION
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(3)
    options = Options(base, gauss_newton_weight=2.0, metric="previous")
    first = oracle_step(net.stages, parameters, State(), inputs, labels, options)
    plain = plain_step(net, parameters, State(), inputs, labels, base)
    assert first.sweeps == []
    assert all(error(first.delta_u[name], plain[name]) < 1e-13 for name in parameters)

    parameters, state = first.parameters, first.state
    second = oracle_step(net.stages, parameters, state, inputs, labels, options)
    gradient = mean_gradient(net.stages, parameters, inputs, labels)

    def rules(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R of the sweep and R of now, p in each, written out."""
        old = state.buffers[name]
        g = gradient[name] + base.weight_decay * parameters[name]
        if isinstance(base, Adam):
            b1, b2 = base.betas
            v = b2 * old["exp_avg_sq"] + (1 - b2) * g**2
            before = (old["max_exp_avg_sq"] / (1 - b2)).sqrt() + base.eps
            now = (torch.maximum(v, old["max_exp_avg_sq"]) / (1 - b2**2)).sqrt() + base.eps
            p = (b1 * old["exp_avg"] + (1 - b1) * g) / (1 - b1**2)
            return before / base.lr, now / base.lr, p, p
        before = old["square_avg"].sqrt() + base.eps
        now = (base.alpha * old["square_avg"] + (1 - base.alpha) * g**2).sqrt() + base.eps
        m = base.mu * old["momentum_buffer"]
        return before / base.lr, now / base.lr, before * m + g, now * m + g

    def of_players(which: int) -> list[Tensor]:
        return [flatten_control(stage, lambda name: rules(name)[which]) for stage in net.stages]

    R, R_now, p, p_now = (of_players(which) for which in range(4))
    (logits,) = run_stages(net.stages, parameters, (inputs,))
    S = sample_gradients(net, parameters, inputs, logits.softmax(1) - functional.one_hot(labels, net.classes))
    dense = [torch.diag(metric) for metric in R]
    expected = sample_space(S, dense, p, 2.0 / 3 * torch.eye(3, dtype=inputs.dtype), False, False)
    for t, stage in enumerate(net.stages):
        assert error(R[t], R_now[t]) > 1e-3
        assert error(second.correction[t], expected.correction[t]) < 1e-10
        applied = -(p_now[t] + expected.correction[t]) / R_now[t]
        assert error(flatten_control(stage, second.delta_u.__getitem__), applied) < 1e-10


def test_metrics_agree_for_sgd() -> None:
    """SGD's metric is constant, so it sweeps from the first step on and "previous" changes nothing."""
    parameters = MLP.parameters(MLP.model())
    inputs, labels = MLP.batch(4)
    results = [
        oracle_step(MLP.stages, parameters, State(), inputs, labels, Options(SGD(0.3, mu=0.9), metric=metric))
        for metric in ("current", "previous")
    ]
    assert results[1].sweeps
    assert all(error(results[0].delta_u[n], results[1].delta_u[n]) == 0 for n in parameters)


@pytest.mark.parametrize(
    "base",
    [Adam(0.02, 0.1), RMSprop(0.02, 0.1, mu=0.9, centered=True), AdamW(0.02, 0.1)],
    ids=repr,
)
def test_value_statistics(base: Adam | RMSprop) -> None:
    """Second moments are made of the groups' mean of F_u^T V_z', first moments of the gradient."""
    net = IDENTITY
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    groups = (range(3), range(3, 4))
    result = oracle_step(
        net.stages,
        parameters,
        State(),
        inputs,
        labels,
        Options(base, gauss_newton_weight=2.0, statistics="value", groups=groups, momentum_of="gradient"),
    )
    gradient = mean_gradient(net.stages, parameters, inputs, labels)
    decay = 0.0 if isinstance(base, AdamW) else base.weight_decay
    forget = base.betas[1] if isinstance(base, Adam) else base.alpha
    key = "exp_avg_sq" if isinstance(base, Adam) else "square_avg"
    live: Live = (inputs,)
    for t, stage in enumerate(net.stages):
        _, F_u = stage_jacobians(stage, parameters, live)
        live = stage.function(parameters, live)
        value_gradient = torch.zeros(F_u.shape[2], dtype=F_u.dtype)
        for group, sweep in zip(groups, result.sweeps, strict=True):
            rows = sweep.V_z[t + 1].view(len(group), -1)
            value_gradient += len(group) / 4 * torch.einsum("bxu,bx->u", F_u[list(group)], rows)
        u = flatten_control(stage, parameters.__getitem__)
        g = value_gradient + decay * u
        square = flatten_control(stage, lambda name: result.state.buffers[name][key])
        assert error(square, (1 - forget) * g**2) < 1e-12
        if isinstance(base, RMSprop):
            mean = flatten_control(stage, lambda name: result.state.buffers[name]["grad_avg"])
            assert error(mean, (1 - forget) * g) < 1e-12
        else:
            mean = flatten_control(stage, lambda name: result.state.buffers[name]["exp_avg"])
            plain = flatten_control(stage, gradient.__getitem__) + decay * u
            assert error(mean, (1 - base.betas[0]) * plain) < 1e-12
        if t + 1 < len(net.stages):  # at the last player the value still is the loss
            assert error(value_gradient, flatten_control(stage, gradient.__getitem__)) > 1e-4


def test_overrides() -> None:
    """Parameters of one player may have different rates and decays, as torch's parameter groups."""
    net = MLP
    model = net.model()
    parameters, state = net.parameters(model), State()
    biases = {name: AdamW(0.003, 0.0) for name in parameters if name.endswith("bias")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n not in biases], "weight_decay": 0.3},
            {
                "params": [p for n, p in model.named_parameters() if n in biases],
                "weight_decay": 0,
                "lr": 0.003,
            },
        ],
        lr=0.01,
    )
    for seed in range(3):
        inputs, labels = net.batch(4, seed)
        options = Options(AdamW(0.01, 0.3), overrides=biases, gauss_newton_weight=0.0)
        result = oracle_step(net.stages, parameters, state, inputs, labels, options)
        parameters, state = result.parameters, result.state
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        assert all(error(parameters[n], p.detach()) < 1e-12 for n, p in model.named_parameters())


# --- "replace": positivity and guard ------------------------------------------------------------------------


def replace_step(
    value_hessian: Literal["batch", "block_diagonal"], guard: bool, lr: float
) -> tuple[OracleResult, list[Tensor], list[Tensor]]:
    """A step in "replace" mode, the curvature cotangents s_z at every cut and S_t of every player."""
    net = NESTED
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    options = Options(
        SGD(lr),
        gauss_newton_weight=1.0,
        control_hessian="replace",
        value_hessian=value_hessian,
        replace_guard=guard,
    )
    result = oracle_step(net.stages, parameters, State(), inputs, labels, options)
    (logits,) = run_stages(net.stages, parameters, (inputs,))
    s = logits.softmax(1) - functional.one_hot(labels, net.classes)
    live = result.sweeps[0].live
    s_z = [pull_back(net.stages[t:], parameters, live[t], s) for t in range(len(net.stages))] + [s]
    return result, s_z, sample_gradients(net, parameters, inputs, s)


@pytest.mark.parametrize("value_hessian", ["batch", "block_diagonal"])
def test_replace_keeps_the_value_hessian_positive(value_hessian: Literal["batch", "block_diagonal"]) -> None:
    """At a high rate M - M H M is indefinite; its negative part is dropped and nothing else is changed."""
    lr = 3.0
    result, s_z, S = replace_step(value_hessian, guard=False, lr=lr)
    (sweep,) = result.sweeps
    assert sweep.radius == [None] * len(S)
    dropped = 0
    for t in reversed(range(len(S))):
        after, M = (value_matrix(sweep.V_zz[i], s_z[i]) for i in (t, t + 1))
        expected = M - M @ (lr * S[t] @ S[t].T) @ M
        if value_hessian == "block_diagonal":
            dropped += int((expected.diagonal() < 0).sum())
            expected = torch.diag(expected.diagonal().clamp(min=0))
        else:
            values, vectors = torch.linalg.eigh((expected + expected.T) / 2)
            dropped += int((values < -1e-12).sum())
            expected = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
        assert error(after, expected) < 1e-9
        assert float(torch.linalg.eigvalsh(sweep.V_zz[t]).min()) > -1e-12
    assert dropped > 0


@pytest.mark.parametrize("value_hessian", ["batch", "block_diagonal"])
def test_replace_guard(value_hessian: Literal["batch", "block_diagonal"]) -> None:
    """Where the spectral radius of M H would pass 1, V_zz is scaled to make it 1 before the stage."""
    lr = 3.0
    guarded, s_z, S = replace_step(value_hessian, guard=True, lr=lr)
    (sweep,) = guarded.sweeps
    free = replace_step(value_hessian, guard=False, lr=lr)[0].sweeps[0]
    acted = 0
    for t in reversed(range(len(S))):
        # The symmetric form has the same spectrum: M^1/2 H M^1/2.
        values, vectors = torch.linalg.eigh(value_matrix(sweep.V_zz[t + 1], s_z[t + 1]))
        root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        radius = float(torch.linalg.eigvalsh(root @ (lr * S[t] @ S[t].T) @ root).max())
        recorded = sweep.radius[t]
        assert recorded is not None
        assert radius == pytest.approx(min(recorded, 1), rel=1e-9)
        if recorded > 1:
            acted += 1
            if acted == 1:
                assert error(recorded * sweep.V_zz[t + 1], free.V_zz[t + 1]) < 1e-12
    assert acted > 0


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    """What the reference cannot answer is refused."""
    parameters = MLP.parameters(MLP.model())
    inputs, labels = MLP.batch(4)
    options = Options(SGD(0.1))

    def step(options: Options, inputs: Tensor = inputs) -> None:
        oracle_step(MLP.stages, parameters, State(), inputs, labels, options)

    with pytest.raises(TypeError, match="float64"):
        step(options, inputs.float())
    for groups in ((range(3),), (range(2), range(1, 4)), (range(2, 4), range(2))):
        with pytest.raises(ValueError, match="groups"):
            step(replace(options, groups=groups))
    with pytest.raises(ValueError, match="sampled_labels"):
        step(replace(options, terminal="sampled"))
    with pytest.raises(ValueError, match="needs metric"):
        replace(options, statistics="value", metric="previous")
    with pytest.raises(ValueError, match="value_hessian is 'full'"):
        with_options(SGD(0.1), value_hessian="full")
    with pytest.raises(FloatingPointError):
        step(options, inputs * float("nan"))

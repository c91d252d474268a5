"""The dense Kronecker reference checked against loops, closed forms, curvlinops, and the sample-space theorem."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from nets import (
    ALL_NETS,
    GROUPED_PROJECTION,
    IDENTITY,
    MLP,
    NORMED_PROJECTION,
    PRENORM,
    PROJECTION,
    SMALL_RESNET,
    TOKENS,
    TWIN_CONV,
    TWIN_LINEAR,
    AffineCall,
    Live,
    Net,
    run_stages,
)
from oracle import (
    SGD,
    Buffers,
    Evidence,
    Options,
    OracleResult,
    State,
    flatten_control,
    from_value_matrix,
    mean_gradient,
    oracle_step,
    pull_back,
    stage_jacobians,
    value_matrix,
)
from oracle_kronecker import (
    EKFAC,
    KFAC,
    Block,
    FactorKind,
    Factors,
    Kronecker,
    KroneckerRule,
    block_samples,
    canonical,
    cross_factors,
    damped,
    joint,
    kron,
    patches,
    theorem3_inverse,
)
from test_oracle import error, sample_gradients, sample_space
from torch import Tensor, nn
from torch.nn import functional

KINDS: tuple[FactorKind, ...] = ("unfolded", "reduced", "spatially_uncorrelated")
Cooperation = Literal["none", "exact", "theorem3", "corollary7"]


def loss_cotangent(net: Net, parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """phi_z [N, C] of each sample's own loss."""
    (logits,) = run_stages(net.stages, parameters, (inputs,))
    return logits.softmax(1) - functional.one_hot(labels, net.classes)


def rules_of(
    net: Net, base: Kronecker, cooperation: Cooperation = "none", samples: int = 4, seed: int = 0
) -> list[tuple[KroneckerRule, Evidence]]:
    """Each player's rule and evidence at the net's first weights."""
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(samples, seed)
    phi_z = loss_cotangent(net, parameters, inputs, labels)
    options = Options(base, cooperation=cooperation)
    live: list[Live] = [(inputs,)]
    for stage in net.stages:
        live.append(stage.function(parameters, live[-1]))
    result = []
    for t, stage in enumerate(net.stages):
        rule = base.of_player(stage, parameters, live[t], options)
        assert isinstance(rule, KroneckerRule)
        last = t + 1 == len(net.stages)
        cotangent = phi_z if last else pull_back(net.stages[t + 1 :], parameters, live[t + 1], phi_z)
        _, F_u = stage_jacobians(stage, parameters, live[t])
        result.append((rule, Evidence(F_u, cotangent, None)))
    return result


def statistics_of(rule: KroneckerRule, evidence: Evidence, old: Buffers | None = None, step: int = 1) -> Buffers:
    """The player's statistics after a step."""
    before = {} if old is None else {rule.stage.name: old}
    return dict(rule.statistics(before, rule.lr, evidence, step))[rule.stage.name]


def sample_rows(evidence: Evidence, block: Block) -> Tensor:
    """Per-sample gradients [N, O I] of a block, from the dense Jacobian."""
    return torch.einsum("nxu,nx->nu", evidence.F_u, evidence.cotangent)[:, block.index]


# --- inputs and output derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("net", ALL_NETS.values(), ids=ALL_NETS.keys())
def test_inputs_and_output_derivatives_make_the_gradients(net: Net) -> None:
    """sum_p y x^T is the per-sample gradient of [weight | bias] of every channel group of every module."""
    blocks = 0
    for rule, evidence in rules_of(net, KFAC(0.1)):
        covered = list(rule.scalars.values())
        for call, of_module, y in zip(
            rule.calls, rule.blocks, rule.output_derivatives(evidence.cotangent), strict=True
        ):
            for block, data in zip(of_module, block_samples(call, y, "unfolded"), strict=True):
                assert data.x is not None
                g = torch.einsum("npo,npi->noi", data.y, data.x)
                assert error(g.flatten(1), sample_rows(evidence, block)) < 1e-12
                covered.append(block.index)
                blocks += 1
        assert sorted(torch.cat(covered).tolist()) == list(range(rule.size))
    modules = [m for m in net.model().modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    assert blocks == sum(getattr(module, "groups", 1) for module in modules)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [((3, 2), 1, 0, 1), ((3, 3), 2, 1, 1), ((2, 3), 3, 2, 2)]
)
def test_patches_are_torchs_unfold(kernel: tuple[int, int], stride: int, padding: int, dilation: int) -> None:
    """Channels first, then kernel positions, as torch.nn.functional.unfold (which knows images only)."""
    x = torch.arange(2 * 3 * 7 * 6, dtype=torch.float64).view(2, 3, 7, 6)
    expected = functional.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    assert torch.equal(patches(x, kernel, stride, padding, dilation), expected)
    line = patches(x[:, :, :, 0], kernel[:1], stride, padding, dilation)
    unit = functional.unfold(x[:, :, :, :1], (kernel[0], 1), (dilation, 1), (padding, 0), (stride, 1))
    assert torch.equal(line, unit.transpose(1, 2))


# --- factors ------------------------------------------------------------------------------------------------


def loop_factors(call: AffineCall, y: Tensor, kind: FactorKind) -> list[Factors]:
    """The factors of every block by loops over samples and positions, for Linear and Conv2d."""
    x, N = call.input.detach(), len(call.input)
    bias = call.bias is not None
    result = []
    for k in range(call.groups):
        rows = slice(k * len(call.weight) // call.groups, (k + 1) * len(call.weight) // call.groups)
        inputs: list[list[Tensor]] = []  # of each sample, each position
        derivatives: list[list[Tensor]] = []
        pixels: list[Tensor] = []
        for b in range(N):
            inputs.append([])
            derivatives.append([])
            if call.kind == "linear":
                for token, y_token in zip(x[b].reshape(-1, x.shape[-1]), y[b].reshape(-1, y.shape[-1]), strict=True):
                    inputs[b].append(token)
                    derivatives[b].append(y_token)
                    pixels.append(token)
                continue
            channels = range(k * x.shape[1] // call.groups, (k + 1) * x.shape[1] // call.groups)
            for h, w in torch.cartesian_prod(torch.arange(x.shape[2]), torch.arange(x.shape[3])).tolist():
                pixels.append(x[b, list(channels), h, w])
            for h, w in torch.cartesian_prod(torch.arange(y.shape[2]), torch.arange(y.shape[3])).tolist():
                patch = []
                for c in channels:
                    for i in range(call.weight.shape[2]):
                        for j in range(call.weight.shape[3]):
                            row = h * call.stride + i * call.dilation - call.padding
                            column = w * call.stride + j * call.dilation - call.padding
                            inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
                            patch.append(x[b, c, row, column] if inside else torch.zeros((), dtype=x.dtype))
                inputs[b].append(torch.stack(patch))
                derivatives[b].append(y[b, rows, h, w])
        L = len(inputs[0])
        one = torch.ones(1, dtype=x.dtype)
        if bias and kind != "spatially_uncorrelated":
            inputs = [[torch.cat([column, one]) for column in of_sample] for of_sample in inputs]
        if kind == "reduced":
            means = [torch.stack(of_sample).sum(0) / L for of_sample in inputs]
            sums = [torch.stack(of_sample).sum(0) for of_sample in derivatives]
            A = torch.stack([torch.outer(mean, mean) for mean in means]).sum(0) / N
            B = torch.stack([torch.outer(total, total) for total in sums]).sum(0) / N
            result.append(Factors(A, B))
            continue
        B = torch.stack([torch.outer(y, y) for of_sample in derivatives for y in of_sample]).sum(0) / (N * L)
        if kind == "unfolded":
            A = torch.stack([torch.outer(x, x) for of_sample in inputs for x in of_sample]).sum(0) / N
            result.append(Factors(A, B))
            continue
        strides = call.stride**2 if call.kind == "conv" else 1
        A = torch.stack([torch.outer(pixel, pixel) for pixel in pixels]).sum(0) / (N * strides)
        result.append(Factors(A, B))
        if bias:
            result.append(Factors(torch.full((1, 1), float(L), dtype=x.dtype), B))
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", [IDENTITY, PROJECTION, TOKENS, MLP], ids=lambda net: net.name)
def test_factors_by_loops(net: Net, kind: FactorKind) -> None:
    """Strides, padding, dilation, channel groups, tokens, with and without a bias."""
    for rule, evidence in rules_of(net, KFAC(0.1, factors=kind), samples=3):
        own = statistics_of(rule, evidence)
        for call, blocks, y in zip(rule.calls, rule.blocks, rule.output_derivatives(evidence.cotangent), strict=True):
            for block, expected in zip(blocks, loop_factors(call, y, kind), strict=True):
                assert error(own[f"{block.name}:A"], expected.A) < 1e-12
                assert error(own[f"{block.name}:B"], expected.B) < 1e-12
                assert block.positions.shape == (len(expected.B), len(expected.A) * block.taps)


@pytest.mark.parametrize("kind", ["unfolded", "reduced"])
def test_cross_factors_by_loops(kind: Literal["unfolded", "reduced"]) -> None:
    """A_uv and B_uv of a 3x3 and a 1x1 convolution of stride 2."""
    base = KFAC(0.1, factors=kind)
    rule, evidence = rules_of(SMALL_RESNET, base, "exact", samples=3)[2]
    own = statistics_of(rule, evidence)
    (u,), (v,) = (
        block_samples(call, y, "unfolded")
        for call, y in zip(rule.calls, rule.output_derivatives(evidence.cotangent), strict=True)
    )
    assert u.x is not None and v.x is not None and u.x.shape == (3, 9, 19) and v.x.shape == (3, 9, 3)
    A, B = torch.zeros(19, 3, dtype=u.x.dtype), torch.zeros(3, 3, dtype=u.x.dtype)
    for b in range(3):
        if kind == "reduced":
            A += torch.outer(u.x[b].mean(0), v.x[b].mean(0)) / 3
            B += torch.outer(u.y[b].sum(0), v.y[b].sum(0)) / 3
            continue
        for p in range(9):
            A += torch.outer(u.x[b, p], v.x[b, p]) / 3
            B += torch.outer(u.y[b, p], v.y[b, p]) / (3 * 9)
    assert error(own["conv2.0|shortcut.0:A"], A) < 1e-12
    assert error(own["conv2.0|shortcut.0:B"], B) < 1e-12
    # Nothing stands between the two convolutions and the sum: their outputs have one derivative.
    assert error(own["conv2.0|shortcut.0:B"], own["conv2.0:B"]) < 1e-12


def test_spatially_uncorrelated_factors_are_exact_for_a_1x1_kernel() -> None:
    """A 1x1 convolution of stride 1 without a bias sees each pixel once: both kinds agree."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, n, 4, 4, dtype=torch.float64, generator=generator) for n in (2, 5))
    weight = torch.zeros(5, 2, 1, 1, dtype=torch.float64)
    call = AffineCall("c", "conv", weight, None, x, y)
    (unfolded,), (spatial,) = (block_samples(call, y, kind) for kind in ("unfolded", "spatially_uncorrelated"))
    assert error(spatial.factors.A, unfolded.factors.A) < 1e-13
    assert error(spatial.factors.B, unfolded.factors.B) < 1e-13


# --- curvatures of one block --------------------------------------------------------------------------------


def test_kfac_of_a_linear_layer_without_positions() -> None:
    """Undamped, C is E[x x^T] (x) E[y y^T] on (weight, bias); damped, it is the issue's formula."""
    for rule, evidence in rules_of(MLP, KFAC(0.1, damping=1e-300), samples=8):
        (call,) = rule.calls
        (y,) = rule.output_derivatives(evidence.cotangent)
        x, N = call.input.detach(), len(y)
        size = call.weight.numel()
        C = rule.curvature({rule.stage.name: statistics_of(rule, evidence)}, 1)
        xx, yy = x.T @ x / N, y.T @ y / N
        weights = torch.einsum("ij,op->oipj", xx, yy).reshape(size, size)
        assert error(C[:size, :size], weights) < 1e-12
        if call.bias is not None:
            assert error(C[size:, size:], yy) < 1e-12
            assert error(C[:size, size:], torch.einsum("i,op->oip", x.mean(0), yy).reshape(size, -1)) < 1e-12

    for (rule, evidence), (undamped, _) in zip(
        rules_of(MLP, KFAC(0.1, damping=0.04)), rules_of(MLP, KFAC(0.1, damping=1e-300)), strict=True
    ):
        own = statistics_of(rule, evidence)
        (block,) = rule.blocks[0]
        A, B = own[f"{block.name}:A"], own[f"{block.name}:B"]
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
        eye_A, eye_B = torch.eye(len(A), dtype=A.dtype), torch.eye(len(B), dtype=B.dtype)
        expected = kron(Factors(A, B)) + kron(Factors(0.2 / pi * A, eye_B)) + kron(Factors(0.2 * pi * eye_A, B))
        assert error(rule.block_curvature(own, block), expected + 0.04 * kron(Factors(eye_A, eye_B))) < 1e-12
        assert error(undamped.block_curvature(own, block), kron(Factors(A, B))) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", [IDENTITY, TOKENS, GROUPED_PROJECTION], ids=lambda net: net.name)
def test_ekfac_eigenvalues_are_second_moments(net: Net, kind: FactorKind) -> None:
    """s = decay lambda_B lambda_A^T + (1 - decay) diag(U^T E[g g^T] U), and C has them in an orthonormal basis."""
    for rule, evidence in rules_of(net, EKFAC(0.1, factors=kind, factor_decay=0.7)):
        own = statistics_of(rule, evidence)
        for block in (block for blocks in rule.blocks for block in blocks):
            U_A, U_B, A, B = (own[f"{block.name}:{key}"] for key in ("U_A", "U_B", "A", "B"))
            U = torch.kron(U_B.contiguous(), torch.kron(U_A.contiguous(), torch.eye(block.taps, dtype=A.dtype)))
            assert error(U.T @ U, torch.eye(len(U), dtype=U.dtype)) < 1e-12
            of_factors = torch.kron(B, torch.kron(A, torch.eye(block.taps, dtype=A.dtype)))
            diagonal = U.T @ of_factors @ U
            assert error(diagonal, torch.diag(diagonal.diagonal())) < 1e-12
            g = sample_rows(evidence, block)
            moments = (U.T @ (g.T @ g / len(g)) @ U).diagonal()
            s = 0.7 * diagonal.diagonal() + 0.3 * moments
            assert error(own[f"{block.name}:s"].flatten(), s) < 1e-12
            C = rule.block_curvature(own, block)
            assert error(U.T @ C @ U, torch.diag(s + 0.03)) < 1e-12


def test_normalisation_parameters_have_a_damped_diagonal() -> None:
    """d = E[g^2] of the scale's and shift's per-sample gradients, in the player of the layer before or their own."""
    seen = []
    for net in (TOKENS, PRENORM, NORMED_PROJECTION):
        for rule, evidence in rules_of(net, EKFAC(0.1, damping=0.2)):
            C = rule.curvature({rule.stage.name: statistics_of(rule, evidence)}, 1)
            g = torch.einsum("nxu,nx->nu", evidence.F_u, evidence.cotangent)
            for name, index in rule.scalars.items():
                seen.append(name)
                assert error(C[index[:, None], index], torch.diag((g[:, index] ** 2).mean(0) + 0.2)) < 1e-12
                others = torch.ones(rule.size, dtype=torch.bool)
                others[index] = False
                assert C[index][:, others].count_nonzero() == 0
    assert len(seen) == 12 and all("norm" in name for name in seen)


# --- running averages and refreshes -------------------------------------------------------------------------


@pytest.mark.parametrize("base", [KFAC(0.1), EKFAC(0.1)], ids=lambda base: type(base).__name__)
def test_intervals(base: Kronecker) -> None:
    """Factors every 2 steps, bases every 3, written as a loop; a skipped step leaves the statistics as they are."""
    base = replace(base, factor_every=2, basis_every=3, factor_decay=0.8, damping=0.1)
    own: Buffers | None = None
    expected: dict[str, Tensor] = {}
    for t in range(7):
        rule, evidence = rules_of(NORMED_PROJECTION, base, "exact", samples=5, seed=t)[2]
        before, own = own, statistics_of(rule, evidence, own, t + 1)
        u, v = (blocks[0] for blocks in rule.blocks)
        g = {block.name: sample_rows(evidence, block) for block in (u, v)}
        batch = statistics_of(rule, evidence)  # what a first step makes of this batch
        if t % 2 == 0:
            for key in (
                *(f"{n}:{k}" for n in ("conv2.0", "project.0", "conv2.0|project.0") for k in "AB"),
                "norm2.bias:d",
            ):
                expected[key] = 0.8 * expected[key] + 0.2 * batch[key] if t else batch[key]
        if t % 3 == 0:
            used = {key: expected[key] for key in expected if key[-1] in "AB"}
            expected |= {f"{key}_used": value for key, value in used.items() if not key.endswith("_used")}
        if base.corrected and t % 3 == 0:
            for block in (u, v):
                expected[f"{block.name}:s"] = torch.outer(
                    torch.linalg.eigvalsh(expected[f"{block.name}:B"]),
                    torch.linalg.eigvalsh(expected[f"{block.name}:A"]),
                )
        if base.corrected and t % 2 == 0:
            for block in (u, v):
                U_A, U_B = own[f"{block.name}:U_A"], own[f"{block.name}:U_B"]
                squares = [(U_B.T @ row.view(block.positions.shape) @ U_A) ** 2 for row in g[block.name]]
                expected[f"{block.name}:s"] = 0.8 * expected[f"{block.name}:s"] + 0.2 * torch.stack(squares).mean(0)
        for key, value in expected.items():
            assert error(own[key], value) < 1e-11, (t, key)
        if before is not None and t % 2 and t % 3:
            assert all(torch.equal(own[key], before[key]) for key in before)
        if before is not None and t % 3:
            assert all(
                torch.equal(own[k], before[k]) for k in before if k.endswith("_used") or ":U_" in k or ":E_" in k
            )
            if not base.corrected:  # what is used is as of the last refresh
                assert torch.equal(rule.pair_curvature(own, u, v), rule.pair_curvature(before, u, v))
                assert torch.equal(rule.block_curvature(own, u), rule.block_curvature(before, u))


# --- cooperation --------------------------------------------------------------------------------------------

PAIRS = [
    (SMALL_RESNET, 2, "unfolded"),  # u is larger than v, one output derivative
    (SMALL_RESNET, 2, "reduced"),
    (NORMED_PROJECTION, 2, "unfolded"),  # different output derivatives, no bias
    (GROUPED_PROJECTION, 2, "unfolded"),  # two channel groups
    (TWIN_LINEAR, 1, "unfolded"),
    (TWIN_CONV, 1, "unfolded"),
]
EVERY_PAIR = pytest.mark.parametrize(
    ("net", "t", "kind"), PAIRS, ids=lambda v: v.name if isinstance(v, Net) else str(v)
)


def closed_form_inverse(uu: Factors, vv: Factors, uv: Factors, theorem3: bool) -> Tensor:
    """C^-1 in canonical coordinates: pairs [[1, -sigma], [-sigma, 1]] / (1 - sa^2 sb^2), sigma = sa_i sb_j.

    Theorem 3 has 1 / ((1 - sa^2) (1 - sb^2)) instead; a coordinate of u or v whose i (or j) has no partner has
    sa_i = 0 (or sb_j = 0) in it, so with Theorem 3 it still has the other one.
    """
    of_A, of_B = canonical(uu.A, vv.A, uv.A), canonical(uu.B, vv.B, uv.B)
    E = torch.block_diag(kron(Factors(of_A.E_u, of_B.E_u)), kron(Factors(of_A.E_v, of_B.E_v)))
    shapes = [(len(uu.B), len(uu.A)), (len(vv.B), len(vv.A))]
    size = shapes[0][0] * shapes[0][1]
    D = torch.zeros(len(E), len(E), dtype=E.dtype)

    def sigma(values: Tensor, i: int) -> float:
        return float(values[i]) if i < len(values) else 0.0

    for which, (rows, columns) in enumerate(shapes):
        for j in range(rows):
            for i in range(columns):
                sa, sb = sigma(of_A.sigma, i), sigma(of_B.sigma, j)
                scale = 1 / ((1 - sa**2) * (1 - sb**2)) if theorem3 else 1 / (1 - sa**2 * sb**2)
                at = which * size + j * columns + i
                D[at, at] = scale
                if i < len(of_A.sigma) and j < len(of_B.sigma):
                    other = (1 - which) * size + j * shapes[1 - which][1] + i
                    D[at, other] = -sa * sb * scale
    return E @ D @ E.T


@EVERY_PAIR
@pytest.mark.parametrize("cooperation", ["exact", "theorem3"])
def test_cooperative_inverses_in_canonical_coordinates(
    net: Net, t: int, kind: FactorKind, cooperation: Literal["exact", "theorem3"]
) -> None:
    """The joint inverse has the closed form, is positive, and is what its definition says."""
    rule, evidence = rules_of(net, KFAC(0.1, damping=0.01, factors=kind), cooperation, samples=8)[t]
    own = statistics_of(rule, evidence)
    assert rule.pairs
    for u, v in rule.pairs:
        C = rule.pair_curvature(own, u, v)
        uu, vv = (damped(Factors(own[f"{b.name}:A"], own[f"{b.name}:B"]), 0.01) for b in (u, v))
        uv = Factors(own[f"{u.name}|{v.name}:A"], own[f"{u.name}|{v.name}:B"])
        closed = closed_form_inverse(uu, vv, uv, cooperation == "theorem3")
        assert error(closed, torch.linalg.inv(C)) < 1e-10
        assert torch.linalg.eigvalsh(C).min() > 0
        other = closed_form_inverse(uu, vv, uv, cooperation != "theorem3")
        assert error(other, closed) > 1e-3  # the two differ, or nothing was tested
        if cooperation == "exact":
            size = u.index.numel()
            assert error(C[:size, :size], kron(uu)) < 1e-12
            assert error(C[size:, size:], kron(vv)) < 1e-12
            assert error(C[:size, size:], kron(uv)) < 1e-12


@pytest.mark.parametrize("net", [SMALL_RESNET, NORMED_PROJECTION], ids=lambda net: net.name)
def test_theorem3_gains(net: Net) -> None:
    """-C^-1 p is the pair of gains that Theorem 3 gives, written for matrices instead of vectors."""
    rule, evidence = rules_of(net, KFAC(0.1, damping=0.05), "theorem3", samples=8)[2]
    own = statistics_of(rule, evidence)
    ((u, v),) = rule.pairs
    uu, vv = (damped(Factors(own[f"{b.name}:A"], own[f"{b.name}:B"]), 0.05) for b in (u, v))
    uv = Factors(own[f"{u.name}|{v.name}:A"], own[f"{u.name}|{v.name}:B"])
    generator = torch.Generator().manual_seed(0)
    p_u, p_v = (torch.randn(b.positions.shape, dtype=torch.float64, generator=generator) for b in (u, v))
    inv = torch.linalg.inv

    A_uu = uu.A - uv.A @ inv(vv.A) @ uv.A.T
    B_uu = uu.B - uv.B @ inv(vv.B) @ uv.B.T
    A_vv = vv.A - uv.A.T @ inv(uu.A) @ uv.A
    B_vv = vv.B - uv.B.T @ inv(uu.B) @ uv.B
    I_v, I_u = -inv(vv.B) @ p_v @ inv(vv.A), -inv(uu.B) @ p_u @ inv(uu.A)
    k_u = -inv(B_uu) @ (p_u + uv.B @ I_v @ uv.A.T) @ inv(A_uu)
    k_v = -inv(B_vv) @ (p_v + uv.B.T @ I_u @ uv.A) @ inv(A_vv)
    gains = -torch.linalg.solve(rule.pair_curvature(own, u, v), torch.cat([p_u.flatten(), p_v.flatten()]))
    assert error(gains, torch.cat([k_u.flatten(), k_v.flatten()])) < 1e-10


def test_theorem3_refuses_what_is_no_inverse() -> None:
    """The symmetry that makes the gains a metric is checked, not assumed."""
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="symmetric"):
        theorem3_inverse(
            Factors(eye + torch.tensor([[0, 1], [0, 0]]), eye), Factors(eye, eye), Factors(eye / 2, eye / 2)
        )


@pytest.mark.parametrize("net", [TWIN_LINEAR, TWIN_CONV], ids=lambda net: net.name)
@pytest.mark.parametrize("base", [KFAC(0.1), EKFAC(0.1)], ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_corollary7(net: Net, base: Kronecker, kind: FactorKind) -> None:
    """The cooperative (Schur) matrix of u has u's eigenbasis, and eigenvalues (l + g) - l^2 / (l + g)."""
    g = 0.05
    rule, evidence = rules_of(net, replace(base, damping=g, factors=kind), "corollary7", samples=6)[1]
    own = statistics_of(rule, evidence)
    assert len(rule.pairs) == (2 if kind == "spatially_uncorrelated" else 1)
    for u, v in rule.pairs:
        C = rule.pair_curvature(own, u, v)
        size = u.index.numel()
        uu, cross, vv = C[:size, :size], C[:size, size:], C[size:, size:]
        schur = uu - cross @ torch.linalg.inv(vv) @ cross.T
        plain = uu - g * torch.eye(size, dtype=uu.dtype)
        own_value, U = torch.linalg.eigh(plain)
        expected = (own_value + g) - own_value**2 / (own_value + g)
        assert error(U.T @ schur @ U, torch.diag(expected)) < 1e-10
        if not base.corrected:
            unit = torch.eye(u.taps, dtype=uu.dtype)
            A, B = own[f"{u.name}:A"], own[f"{u.name}:B"]
            assert error(plain, torch.kron(B, torch.kron(A, unit))) < 1e-11
            assert error(cross, plain) < 1e-11
        assert error(own[f"{u.name}:A"], own[f"{v.name}:A"]) < 1e-14
        assert error(own[f"{u.name}:B"], own[f"{v.name}:B"]) < 1e-14
        if base.corrected:
            assert error(own[f"{u.name}:s"], own[f"{v.name}:s"]) < 1e-12


@EVERY_PAIR
def test_ekfac_in_canonical_coordinates(net: Net, t: int, kind: FactorKind) -> None:
    """E^T C^-1-coordinates: C is E^-T D E^-1 with the pairs' damped second moments, from per-sample gradients."""
    damping, decay = 0.01, 0.9
    base = EKFAC(0.1, damping=damping, factors=kind, factor_decay=decay)
    rule, evidence = rules_of(net, base, "exact", samples=8)[t]
    own = statistics_of(rule, evidence)
    for u, v in rule.pairs:
        pair = f"{u.name}|{v.name}"
        E_Au, E_Av, E_Bu, E_Bv = (own[f"{pair}:E_{which}"] for which in ("Au", "Av", "Bu", "Bv"))
        uu, vv = (damped(Factors(own[f"{b.name}:A"], own[f"{b.name}:B"]), damping) for b in (u, v))
        for E, factor in ((E_Au, uu.A), (E_Bu, uu.B), (E_Av, vv.A), (E_Bv, vv.B)):
            assert error(E.T @ factor @ E, torch.eye(len(E), dtype=E.dtype)) < 1e-11
        sa = (E_Au.T @ own[f"{pair}:A"] @ E_Av).diagonal()
        sb = (E_Bu.T @ own[f"{pair}:B"] @ E_Bv).diagonal()
        assert bool((sa > -1e-12).all() and (sa < 1).all() and (sb > -1e-12).all() and (sb < 1).all())

        pairs = []
        for g_u, g_v in zip(sample_rows(evidence, u), sample_rows(evidence, v), strict=True):
            pairs.append((E_Bu.T @ g_u.view(u.positions.shape) @ E_Au, E_Bv.T @ g_v.view(v.positions.shape) @ E_Av))
        rows, columns = len(sb), len(sa)
        N = len(pairs)
        m_uu = decay + (1 - decay) * sum((a**2 for a, _ in pairs), torch.zeros(())) / N
        m_vv = decay + (1 - decay) * sum((b**2 for _, b in pairs), torch.zeros(())) / N
        moments = sum((a[:rows, :columns] * b[:rows, :columns] for a, b in pairs), torch.zeros(())) / N
        m_uv = decay * torch.outer(sb, sa) + (1 - decay) * moments
        for key, value in (("m_uu", m_uu), ("m_vv", m_vv), ("m_uv", m_uv)):
            assert error(own[f"{pair}:{key}"], value) < 1e-11

        # One gradient, coordinate by coordinate.
        generator = torch.Generator().manual_seed(0)
        g_u, g_v = (torch.randn(b.positions.shape, dtype=torch.float64, generator=generator) for b in (u, v))
        c_u, c_v = E_Bu.T @ g_u @ E_Au, E_Bv.T @ g_v @ E_Av
        out_u, out_v = c_u / (m_uu + damping), c_v / (m_vv + damping)
        for j in range(rows):
            for i in range(columns):
                matrix = torch.stack([m_uu[j, i] + damping, m_uv[j, i], m_uv[j, i], m_vv[j, i] + damping]).view(2, 2)
                out_u[j, i], out_v[j, i] = torch.linalg.solve(matrix, torch.stack([c_u[j, i], c_v[j, i]]))
        expected = torch.cat([(E_Bu @ out_u @ E_Au.T).flatten(), (E_Bv @ out_v @ E_Av.T).flatten()])
        C = rule.pair_curvature(own, u, v)
        assert torch.linalg.eigvalsh(C).min() > 0
        assert error(torch.linalg.solve(C, torch.cat([g_u.flatten(), g_v.flatten()])), expected) < 1e-10


def test_without_correction_ekfac_exact_is_kfac_exact() -> None:
    """With factor_decay 1 the moments stay KFAC's own; undamped in the coordinates, the two are one matrix."""
    rule, evidence = rules_of(SMALL_RESNET, EKFAC(0.1, damping=0.02, factor_decay=1.0), "exact")[2]
    own = statistics_of(rule, evidence)
    ((u, v),) = rule.pairs
    pair = f"{u.name}|{v.name}"
    kfac, _ = rules_of(SMALL_RESNET, KFAC(0.1, damping=0.02), "exact")[2]
    own |= {f"{pair}:m_{which}": own[f"{pair}:m_{which}"] - 0.02 for which in ("uu", "vv")}
    assert error(rule.pair_curvature(own, u, v), kfac.pair_curvature(own, u, v)) < 1e-11


# --- whole steps --------------------------------------------------------------------------------------------

BASES: list[Kronecker] = [
    KFAC(0.1, 0.01, mu=0.9, basis_every=2),
    EKFAC(0.1, mu=0.5, basis_every=1, factor_every=1),
    KFAC(0.1, factors="reduced", factor_every=2),
    EKFAC(0.1, factors="spatially_uncorrelated", basis_every=2),
]


def identify(value: object) -> str:
    if isinstance(value, Net):
        return value.name
    return f"{type(value).__name__}-{value.factors}" if isinstance(value, Kronecker) else str(value)


@pytest.mark.parametrize("cooperation", ["none", "exact", "theorem3", "corollary7"])
@pytest.mark.parametrize("base", BASES, ids=identify)
def test_without_gauss_newton_term(base: Kronecker, cooperation: Cooperation) -> None:
    """rho = 0: buf <- mu buf + C^-1 g, u <- (1 - lr wd) u - lr buf, every player by itself."""
    net = TWIN_CONV
    if cooperation != "none" and cooperation != "corollary7" and base.factors == "spatially_uncorrelated":
        return
    if cooperation == "theorem3" and base.corrected:
        return
    parameters, state = net.parameters(net.model()), State()
    buffers = {name: torch.zeros_like(value) for name, value in parameters.items()}
    cooperative = 0
    for seed in range(3):
        inputs, labels = net.batch(4, seed)
        options = Options(base, gauss_newton_weight=0.0, cooperation=cooperation)
        result = oracle_step(net.stages, parameters, state, inputs, labels, options)
        gradient = mean_gradient(net.stages, parameters, inputs, labels)
        for t, stage in enumerate(net.stages):
            C = base.lr * result.metric[t]
            cooperative += int(C[: len(C) // 2, len(C) // 2 :].count_nonzero() > 0 and t == 1)
            step = torch.linalg.solve(C, flatten_control(stage, gradient.__getitem__))
            start = 0
            for name in stage.parameters:
                part = step[start : start + parameters[name].numel()].view_as(parameters[name])
                start += parameters[name].numel()
                buffers[name] = base.mu * buffers[name] + part
                u = (1 - base.lr * base.weight_decay) * parameters[name] - base.lr * buffers[name]
                assert error(result.parameters[name], u) < 1e-11
                if base.mu:
                    assert error(result.state.buffers[name]["momentum_buffer"], buffers[name]) < 1e-11
                else:
                    assert result.state.buffers[name] == {}
        parameters, state = result.parameters, result.state
    assert cooperative == (0 if cooperation == "none" else 3)


def run_two_steps(net: Net, options: Options) -> tuple[dict[str, Tensor], State, OracleResult]:
    """Weights and state after a first step, and the second step."""
    parameters, state = net.parameters(net.model()), State()
    inputs, labels = net.batch(4, 0)
    first = oracle_step(net.stages, parameters, state, inputs, labels, options)
    inputs, labels = net.batch(4, 1)
    second = oracle_step(net.stages, first.parameters, first.state, inputs, labels, options)
    return first.parameters, first.state, second


SPACE: list[Any] = [
    pytest.param(net, base, cooperation, metric, id=f"{net.name}-{identify(base)}-{cooperation}-{metric}")
    for net, base, cooperation, metric in [
        (SMALL_RESNET, BASES[0], "exact", "current"),
        (SMALL_RESNET, BASES[1], "exact", "previous"),
        (NORMED_PROJECTION, replace(BASES[0], basis_every=1), "theorem3", "previous"),
        (TWIN_CONV, BASES[1], "corollary7", "current"),
        (TOKENS, BASES[1], "none", "current"),
        (PROJECTION, SGD(0.3, mu=0.9), "none", "current"),
    ]
]


@pytest.mark.parametrize("terminal", ["loss_gradient", "exact"])
@pytest.mark.parametrize("control_hessian", ["proximal", "replace"])
@pytest.mark.parametrize("value_hessian", ["batch", "block_diagonal"])
@pytest.mark.parametrize(("net", "base", "cooperation", "metric"), SPACE)
def test_the_recursion_lives_in_sample_space(
    net: Net,
    base: Kronecker | SGD,
    cooperation: Cooperation,
    metric: Literal["current", "previous"],
    terminal: Literal["loss_gradient", "exact"],
    control_hessian: Literal["proximal", "replace"],
    value_hessian: Literal["batch", "block_diagonal"],
) -> None:
    """With dense metrics and with C cotangents a sample: V_z = g_z / B + S_z^T c, V_zz = S_z^T M S_z, and controls."""
    B, rho = 4, 0.3
    options = Options(
        base,
        gauss_newton_weight=rho,
        control_hessian=control_hessian,
        value_hessian=value_hessian,
        terminal=terminal,
        metric=metric,
        cooperation=cooperation,
        replace_guard=False,
    )
    parameters, state, result = run_two_steps(net, options)
    (sweep,) = result.sweeps
    if metric == "previous":  # the sweep's metric is that of the first step, which swept nothing
        start = net.parameters(net.model())
        first = oracle_step(net.stages, start, State(), *net.batch(B, 0), replace(options, metric="current"))
        now = oracle_step(net.stages, parameters, state, *net.batch(B, 1), replace(options, metric="current"))
        for R, before, later in zip(result.metric, first.metric, now.metric, strict=True):
            assert error(R, before) < 1e-12
            assert error(R, later) > 1e-5
    inputs, labels = net.batch(B, 1)
    phi_z = loss_cotangent(net, parameters, inputs, labels)
    p_softmax = sweep.live[-1][0].softmax(1)
    s = phi_z[:, None]
    if terminal == "exact":
        unit = torch.eye(net.classes, dtype=phi_z.dtype)
        s = torch.stack([p_softmax[:, c, None].sqrt() * (p_softmax - unit[c]) for c in range(net.classes)], 1)
    K = s.shape[1]
    rows = [
        torch.stack(parts, 1).flatten(0, 1)
        for parts in zip(*(sample_gradients(net, parameters, inputs, row) for row in s.unbind(1)), strict=True)
    ]
    gradient = mean_gradient(net.stages, parameters, inputs, labels)

    p = []
    for stage, R in zip(net.stages, result.metric, strict=True):
        g = flatten_control(stage, gradient.__getitem__)
        old = flatten_control(stage, lambda n: state.buffers[n].get("momentum_buffer", torch.zeros_like(parameters[n])))
        p.append(g + (base.mu * old if isinstance(base, SGD) else base.lr * R @ (base.mu * old)))
    M = rho / B * torch.eye(B * K, dtype=phi_z.dtype)
    replaced, blocks = control_hessian == "replace", value_hessian == "block_diagonal"
    expected = sample_space(rows, result.metric, p, M, replaced, blocks, K)
    if replaced:  # the theorem is of the recursion without its positivity rule
        assert all(torch.linalg.eigvalsh((M + M.T) / 2).min() > -1e-12 for M in expected.M)

    assert expected.c[0].abs().max() > 1e-4
    for t in range(len(net.stages) + 1):
        last = t == len(net.stages)

        def at_cut(cotangent: Tensor, t: int = t, last: bool = last) -> Tensor:
            return cotangent if last else pull_back(net.stages[t:], parameters, sweep.live[t], cotangent)

        s_z = torch.stack([at_cut(row) for row in s.unbind(1)], 1)
        V_z = at_cut(phi_z) / B + torch.einsum("bk,bkx->bx", expected.c[t].view(B, K), s_z)
        assert error(sweep.V_z[t], V_z.flatten()) < 1e-9
        assert error(sweep.V_zz[t], from_value_matrix(expected.M[t], s_z)) < 1e-9
        assert error(from_value_matrix(value_matrix(sweep.V_zz[t], s_z), s_z), sweep.V_zz[t]) < 1e-9
    for t in range(len(net.stages)):
        assert error(sweep.delta_u[t], expected.delta_u[t]) < 1e-9
        assert error(result.correction[t], expected.correction[t]) < 1e-9


@pytest.mark.parametrize("net", [TWIN_LINEAR, NORMED_PROJECTION], ids=lambda net: net.name)
def test_momentum_keeps_the_step(net: Net) -> None:
    """buf += C^-1 c: read as a plain step's buffer it gives the applied control, in the current metric."""
    for base, metric in ((BASES[0], "current"), (BASES[1], "previous")):
        options = Options(base, gauss_newton_weight=2.0, metric=metric, cooperation="exact")  # type: ignore[arg-type]
        parameters, _, second = run_two_steps(net, options)
        assert second.correction[0].abs().max() > 1e-4
        for name in parameters:
            assert error(second.delta_u[name], -base.lr * second.state.buffers[name]["momentum_buffer"]) < 1e-10
        raw = run_two_steps(net, replace(options, momentum_of="gradient"))[2].state.buffers
        kept = second.state.buffers
        assert max(error(raw[n]["momentum_buffer"], kept[n]["momentum_buffer"]) for n in parameters) > 1e-4


@pytest.mark.parametrize("terminal", ["loss_gradient", "sampled"])
@pytest.mark.parametrize("net", [NORMED_PROJECTION, TOKENS], ids=lambda net: net.name)
def test_value_statistics(net: Net, terminal: Literal["loss_gradient", "sampled"]) -> None:
    """Output factors, eigenvalues and diagonals of V_h / omega are those of y_g + B c y_s, c read off V_z.

    Two groups, with c and 1/B of each; the derivative by h passes the normalisation behind the module.
    """
    groups = (range(3), range(3, 4))
    for base in (KFAC(0.1), EKFAC(0.1)):
        options = Options(base, gauss_newton_weight=2.0, statistics="value", terminal=terminal, groups=groups)
        parameters = net.parameters(net.model())
        inputs, labels = net.batch(4)
        drawn = (labels + 1) % net.classes
        result = oracle_step(net.stages, parameters, State(), inputs, labels, options, drawn)
        g_end = loss_cotangent(net, parameters, inputs, labels)
        s_end = g_end if terminal == "loss_gradient" else loss_cotangent(net, parameters, inputs, drawn)
        live: list[Live] = [(inputs,)]
        for stage in net.stages:
            live.append(stage.function(parameters, live[-1]))
        largest = 0.0
        for t, stage in enumerate(net.stages):
            last = t + 1 == len(net.stages)
            after = [z if last else pull_back(net.stages[t + 1 :], parameters, live[t + 1], z) for z in (g_end, s_end)]
            c_times_B = []
            for sweep in result.sweeps:
                B = sweep.samples.stop - sweep.samples.start
                g_z, s_z = (rows[sweep.samples] for rows in after)
                rest = B * sweep.V_z[t + 1].view(B, -1) - g_z  # = B c s_z
                c_times_B.append((rest * s_z).sum(1) / (s_z**2).sum(1))
                assert error(c_times_B[-1][:, None] * s_z, rest) < 1e-9 or rest.abs().max() < 1e-12
            weight = torch.cat(c_times_B)
            largest = max(largest, float(weight.abs().max()))
            rule = base.of_player(stage, parameters, live[t], options)
            assert isinstance(rule, KroneckerRule)
            _, F_u = stage_jacobians(stage, parameters, live[t])
            g, s = (torch.einsum("nxu,nx->nu", F_u, rows) for rows in after)
            rows = g + weight[:, None] * s
            own = result.state.buffers[stage.name]
            y_g, y_s = (rule.output_derivatives(rows) for rows in after)
            for call, blocks, of_g, of_s in zip(rule.calls, rule.blocks, y_g, y_s, strict=True):
                y = of_g + weight.view(-1, *[1] * (of_s.ndim - 1)) * of_s
                for block, data in zip(blocks, block_samples(call, y, base.factors), strict=True):
                    assert error(own[f"{block.name}:B"], data.factors.B) < 1e-11
                    assert error(own[f"{block.name}:A"], data.factors.A) < 1e-13
                    if base.corrected:
                        U_A, U_B = own[f"{block.name}:U_A"], own[f"{block.name}:U_B"]
                        of_block = rows[:, block.index].view(-1, *block.positions.shape)
                        moments = torch.einsum("op,noi,ij->npj", U_B, of_block, U_A)
                        s_old = torch.outer(
                            torch.linalg.eigvalsh(data.factors.B), torch.linalg.eigvalsh(data.factors.A)
                        )
                        assert error(own[f"{block.name}:s"], 0.95 * s_old + 0.05 * (moments**2).mean(0)) < 1e-10
            for name, index in rule.scalars.items():
                assert error(own[f"{name}:d"], (rows[:, index] ** 2).mean(0)) < 1e-11
        assert largest > 1e-2


def test_sampled_fisher() -> None:
    """fisher="sampled" is the empirical one for the sampled labels; the sweep is another matter."""
    net, base = NORMED_PROJECTION, EKFAC(0.1)
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    drawn = (labels + 1) % net.classes
    options = Options(replace(base, fisher="sampled"), gauss_newton_weight=1.0)
    sampled = oracle_step(net.stages, parameters, State(), inputs, labels, options, drawn)
    as_if = oracle_step(net.stages, parameters, State(), inputs, drawn, Options(base))
    plain = oracle_step(net.stages, parameters, State(), inputs, labels, Options(base))
    for stage in net.stages:
        own, expected, other = (r.state.buffers[stage.name] for r in (sampled, as_if, plain))
        assert own.keys() == expected.keys()
        assert all(error(own[key], expected[key]) < 1e-13 for key in own)
        assert any(error(own[key], other[key]) > 1e-2 for key in own)
    assert error(sampled.sweeps[0].V_z[-1], plain.sweeps[0].V_z[-1]) == 0


def test_parameter_groups() -> None:
    """Biases without decay; a rate of its own for a whole player."""
    net, base = TWIN_LINEAR, KFAC(0.1, 0.1, mu=0.9)
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    overrides = {name: replace(base, weight_decay=0.0) for name in parameters if name.endswith("bias")}
    slow = {"head.weight": replace(base, lr=0.01), "head.bias": replace(base, lr=0.01, weight_decay=0.0)}
    result = oracle_step(net.stages, parameters, State(), inputs, labels, Options(base, overrides | slow))
    for name, u in parameters.items():
        decay = 0.0 if name.endswith("bias") else (0.01 if name == "head.weight" else 0.1) * 0.1
        assert error(result.parameters[name], (1 - decay) * u + result.delta_u[name]) < 1e-14
    fast = oracle_step(net.stages, parameters, State(), inputs, labels, Options(base, overrides))
    assert error(result.metric[-1], 10 * fast.metric[-1]) < 1e-13
    with pytest.raises(ValueError, match=r"head.bias: within a player"):
        options = Options(base, {"head.bias": replace(base, lr=0.01)})
        oracle_step(net.stages, parameters, State(), inputs, labels, options)


# --- terminal "exact" ---------------------------------------------------------------------------------------


def test_exact_terminal_is_the_softmax_hessian() -> None:
    """V_zz at the output is rho / B times the Hessian of each sample's cross-entropy, and 0 between samples."""
    net, rho = SMALL_RESNET, 0.7
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(4)
    options = Options(SGD(0.1), gauss_newton_weight=rho, terminal="exact", groups=(range(3), range(3, 4)))
    result = oracle_step(net.stages, parameters, State(), inputs, labels, options)
    for sweep in result.sweeps:
        (logits,) = sweep.live[-1]
        B = len(logits)
        hessians = [
            torch.func.hessian(lambda z, label: functional.cross_entropy(z[None], label[None]))(z, label)
            for z, label in zip(logits, labels[sweep.samples], strict=True)
        ]
        assert error(sweep.V_zz[-1], rho / B * torch.block_diag(*hessians)) < 1e-13


def test_exact_joint_solve_is_the_gauss_newton_step() -> None:
    """Proximal, whole batch, linear: (I / lr + rho G) delta = -g with the true Gauss-Newton matrix G of J."""
    net, lr, rho = IDENTITY, 0.5, 1.0
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(3)
    options = Options(SGD(lr), gauss_newton_weight=rho, terminal="exact")
    result = oracle_step(net.stages, parameters, State(), inputs, labels, options)
    names = [name for stage in net.stages for name in stage.parameters]

    def logits(*values: Tensor) -> Tensor:
        return run_stages(net.stages, dict(zip(names, values, strict=True)), (inputs,))[0]

    values = tuple(parameters[name] for name in names)
    blocks = torch.func.jacrev(logits, argnums=tuple(range(len(names))))(*values)
    J = torch.cat([block.flatten(2) for block in blocks], 2)  # [B, C, m]
    hessian = torch.func.hessian(lambda z: functional.cross_entropy(z, labels))(logits(*values))  # of the mean
    G = torch.einsum("bcm,bcde,den->mn", J, hessian, J)
    g = torch.cat([v.flatten() for v in mean_gradient(net.stages, parameters, inputs, labels).values()])
    expected = -torch.linalg.solve(torch.eye(len(G), dtype=G.dtype) / lr + rho * G, g)
    assert error(torch.cat([result.delta_u[name].flatten() for name in names]), expected) < 1e-10


@pytest.mark.parametrize("value_hessian", ["batch", "block_diagonal"])
@pytest.mark.parametrize("guard", [True, False])
def test_exact_terminal_in_replace_mode(value_hessian: Literal["batch", "block_diagonal"], guard: bool) -> None:
    """Clamping and guard act on M's C x C blocks (or all of it) as they would on the M that sample space carries.

    V_zz says nothing of M along sqrt(p), where the cotangents vanish; carried by hand it stays positive there.
    """
    net, lr, rho, B = TOKENS, 2.0, 4.0, 4
    parameters = net.parameters(net.model())
    inputs, labels = net.batch(B)
    options = Options(
        SGD(lr),
        gauss_newton_weight=rho,
        terminal="exact",
        control_hessian="replace",
        value_hessian=value_hessian,
        replace_guard=guard,
    )
    result = oracle_step(net.stages, parameters, State(), inputs, labels, options)
    (sweep,) = result.sweeps
    p = sweep.live[-1][0].softmax(1)
    K = net.classes
    s = p.sqrt()[:, :, None] * (p[:, None, :] - torch.eye(K, dtype=p.dtype))
    assert (p.sqrt()[:, :, None] * s).sum(1).abs().max() < 1e-15  # the direction that no cotangent sees
    S = [
        torch.stack(parts, 1).flatten(0, 1)
        for parts in zip(*(sample_gradients(net, parameters, inputs, row) for row in s.unbind(1)), strict=True)
    ]
    M = rho / B * torch.eye(B * K, dtype=p.dtype)
    clamped = scaled = 0
    for t in reversed(range(len(S))):
        H = lr * S[t] @ S[t].T
        if guard:
            radius = float(torch.linalg.eigvals(M @ H).abs().max())
            assert sweep.radius[t] == pytest.approx(radius, rel=1e-8)
            scaled += radius > 1
            M = M / max(1.0, radius)
        M = M - M @ H @ M
        blocks = [M[b * K :, b * K :][:K, :K] for b in range(B)] if value_hessian == "block_diagonal" else [M]
        positive = []
        for block in blocks:
            values, vectors = torch.linalg.eigh((block + block.T) / 2)
            clamped += int((values < -1e-9).sum())
            positive.append(vectors @ torch.diag(values.clamp(min=0)) @ vectors.T)
        M = torch.block_diag(*positive)
        s_z = torch.stack([pull_back(net.stages[t:], parameters, sweep.live[t], row) for row in s.unbind(1)], 1)
        if t:  # the guard scales the matrix that is recorded at a cut
            next_radius = sweep.radius[t - 1]
            kept = M / max(1.0, next_radius) if guard and next_radius is not None else M
        else:
            kept = M
        difference = (sweep.V_zz[t] - from_value_matrix(kept, s_z)).abs().max()
        assert difference < 1e-10 * rho / B * s_z.abs().max() ** 2
    assert scaled > 0 if guard else clamped > 0


# --- curvlinops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("net", [MLP, PRENORM, SMALL_RESNET], ids=lambda net: net.name)
def test_against_curvlinops(net: Net, approximation: Literal["expand", "reduce"]) -> None:
    """KFAC's product A (x) B and EKFAC in full, empirical Fisher: linear layers, tokens, convolutions.

    Its A is ours over L and its B ours times L. EKFAC depends on the choice of a basis where a factor has an
    eigenvalue twice, as one that is singular in two directions; so there are enough samples, and no GroupNorm of
    two groups (behind one, the positions' sum of y vanishes in two directions).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # one of its packages compiles with torch.jit
        curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed (extra: test)")
    samples = 40
    model = net.model()
    batch = net.batch(samples)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    names = [f"{n}.{kind}" for n, m in modules.items() for kind, p in m.named_parameters()]

    def theirs(name: str) -> Tensor:
        operator = getattr(curvlinops, name)(
            model,
            nn.CrossEntropyLoss(),
            [model.get_parameter(name) for name in names],
            [batch],
            fisher_type="empirical",
            kfac_approx=approximation,
            separate_weight_and_bias=False,
        )
        matrix: Tensor = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
        return matrix

    def ours(base: Kronecker) -> Tensor:
        place, total = {}, 0
        for name in names:
            place[name] = total + torch.arange(model.get_parameter(name).numel())
            total += model.get_parameter(name).numel()
        matrix = torch.zeros(total, total, dtype=torch.float64)
        for rule, evidence in rules_of(net, base, samples=samples):
            if not rule.calls:
                continue
            C = rule.curvature({rule.stage.name: statistics_of(rule, evidence)}, 1)
            sizes = [(name, model.get_parameter(name).numel()) for name in rule.stage.parameters]
            own = torch.cat([torch.full((size,), name in place) for name, size in sizes])
            index = torch.cat([place[name] for name, _ in sizes if name in place])
            matrix[index[:, None], index] = C[own][:, own]
        return matrix

    kind: FactorKind = "unfolded" if approximation == "expand" else "reduced"
    kfac, ekfac = KFAC(0.1, damping=1e-300, factors=kind), EKFAC(0.1, damping=0.0, factor_decay=0.0, factors=kind)
    assert error(ours(kfac), theirs("KFACLinearOperator")) < 1e-11
    assert error(ours(ekfac), theirs("EKFACLinearOperator")) < 1e-9
    assert error(ours(kfac), ours(ekfac)) > 1e-3


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    """What is not defined is refused, with the reason."""

    def step(net: Net, base: Kronecker | SGD, **options: Any) -> None:
        inputs, labels = net.batch(4)
        oracle_step(net.stages, net.parameters(net.model()), State(), inputs, labels, Options(base, **options))

    with pytest.raises(ValueError, match="not defined for EKFAC"):
        step(SMALL_RESNET, EKFAC(0.1), cooperation="theorem3")
    with pytest.raises(ValueError, match="no spatially uncorrelated cross"):
        step(SMALL_RESNET, KFAC(0.1, factors="spatially_uncorrelated"), cooperation="exact")
    with pytest.raises(ValueError, match="same channel groups"):
        step(PROJECTION, KFAC(0.1), cooperation="exact")
    with pytest.raises(ValueError, match="corollary7 needs the same input"):
        step(SMALL_RESNET, KFAC(0.1), cooperation="corollary7")
    with pytest.raises(ValueError, match="needs Kronecker"):
        step(SMALL_RESNET, SGD(0.1), cooperation="exact")
    with pytest.raises(ValueError, match="exclude each other"):
        step(MLP, KFAC(0.1, fisher="sampled"), statistics="value")
    with pytest.raises(ValueError, match="needs sampled_labels"):
        step(MLP, KFAC(0.1, fisher="sampled"))
    with pytest.raises(ValueError, match="cooperation is 'schur'"):
        step(MLP, KFAC(0.1), cooperation="schur")
    with pytest.raises(TypeError, match="not element-wise"):
        step(MLP, SGD(0.1), overrides={"0.bias": KFAC(0.1)})
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="same positions"):
        cross_factors(x, x, x[:, :2], x[:, :2], "unfolded")
    zero = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="factor is zero"):
        damped(Factors(zero, zero + torch.eye(2)), 0.1)
    assert joint(zero, zero, zero).shape == (4, 4)

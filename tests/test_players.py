"""Per-sample gradients, weighted gradients, inner products and every Gram path against torch.func."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gtddp_dist.players import (
    FormedGradients,
    GramPath,
    Scale,
    is_affine,
    prepare,
    sample_gradients,
)
from gtddp_dist.players.affine import AffineGradients
from gtddp_dist.players.blocks import BLOCK_NUMBERS

B = 5
FACTOR = 3.0


def conv(*args: object, dimensions: int = 2, **kwargs: object) -> Callable[[], nn.Module]:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return lambda: kind(*args, **kwargs)  # type: ignore[arg-type]


conv1d = partial(conv, dimensions=1)
conv3d = partial(conv, dimensions=3)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (7, 6)),
    "linear on a grid of tokens": (lambda: nn.Linear(6, 4), (3, 2, 6)),
    "conv": (conv(3, 4, 3), (3, 6, 6)),
    "conv without bias": (conv(3, 4, 3, bias=False), (3, 6, 6)),
    "conv stride": (conv(3, 4, 3, stride=2, padding=1), (3, 6, 6)),
    "conv stride that leaves a border": (conv(3, 4, 3, stride=2), (3, 8, 8)),
    "conv 1x1": (conv(3, 4, 1, stride=2), (3, 5, 5)),
    "conv rectangular": (conv(3, 4, (3, 2), stride=(1, 2), padding=(1, 0)), (3, 6, 5)),
    "conv dilation": (conv(3, 4, 3, dilation=2, padding=2), (3, 6, 6)),
    "conv groups": (conv(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "conv depthwise": (conv(4, 8, 3, groups=4), (4, 5, 5)),
    "conv padding same": (conv(3, 4, 3, padding="same"), (3, 6, 6)),
    "conv padding same, even kernel": (conv(3, 4, (2, 4), padding="same", dilation=(1, 2)), (3, 8, 8)),
    "conv padding valid": (conv(3, 4, 3, padding="valid"), (3, 6, 6)),
    "conv reflect": (conv(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (3, 6, 6)),
    "conv circular same": (conv(3, 4, 3, padding="same", padding_mode="circular"), (3, 6, 6)),
    "conv replicate, groups": (conv(4, 4, 3, padding=1, groups=2, padding_mode="replicate"), (4, 6, 6)),
    "conv1d": (conv1d(3, 4, 3), (3, 7)),
    "conv1d without bias": (conv1d(3, 4, 2, bias=False), (3, 6)),
    "conv1d stride that leaves a border": (conv1d(3, 4, 3, stride=2, padding=1), (3, 8)),
    "conv1d dilation": (conv1d(3, 4, 3, dilation=2, padding=2), (3, 7)),
    "conv1d groups": (conv1d(4, 6, 3, groups=2, stride=2, padding=1), (4, 7)),
    "conv1d depthwise": (conv1d(4, 8, 3, groups=4), (4, 6)),
    "conv1d padding same, even kernel": (conv1d(3, 4, 4, padding="same", dilation=3), (3, 11)),
    "conv1d padding valid": (conv1d(3, 4, 3, padding="valid", stride=2), (3, 6)),
    "conv1d reflect": (conv1d(3, 4, 3, padding=2, padding_mode="reflect", stride=2), (3, 6)),
    "conv1d circular same": (conv1d(3, 4, 2, padding="same", padding_mode="circular"), (3, 6)),
    "conv1d replicate, groups": (conv1d(4, 4, 3, padding=1, groups=2, padding_mode="replicate"), (4, 6)),
    "conv3d": (conv3d(2, 3, 2), (2, 3, 4, 3)),
    "conv3d without bias": (conv3d(2, 3, 2, bias=False), (2, 3, 3, 3)),
    "conv3d box, stride that leaves a border": (
        conv3d(2, 3, (1, 3, 2), stride=(1, 2, 2), padding=(0, 1, 0)),
        (2, 3, 4, 5),
    ),
    "conv3d dilation": (conv3d(2, 3, (2, 3, 2), dilation=(1, 2, 3), padding=(0, 2, 1)), (2, 2, 4, 4)),
    "conv3d groups": (conv3d(4, 6, 2, groups=2, padding=1, stride=2), (4, 3, 3, 4)),
    "conv3d depthwise": (conv3d(2, 4, 2, groups=2), (2, 3, 3, 3)),
    "conv3d padding same, even kernel": (conv3d(2, 3, (2, 3, 4), padding="same", dilation=(2, 1, 1)), (2, 3, 3, 4)),
    "conv3d padding valid": (conv3d(2, 3, 2, padding="valid"), (2, 3, 3, 3)),
    "conv3d reflect": (conv3d(2, 3, 3, padding=(2, 1, 0), padding_mode="reflect"), (2, 3, 3, 4)),
    "conv3d circular same": (conv3d(2, 3, (3, 2, 2), padding="same", padding_mode="circular"), (2, 3, 3, 3)),
    "conv3d replicate, groups": (conv3d(2, 4, 2, padding=1, groups=2, padding_mode="replicate"), (2, 2, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm on tokens": (lambda: nn.LayerNorm(6), (7, 6)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((2, 6)), (3, 2, 6)),
    "layer norm without shift": (lambda: nn.LayerNorm(6, bias=False), (7, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 3)),
    "group norm on vectors": (lambda: nn.GroupNorm(3, 6), (6,)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch norm 1d on sequences": (lambda: nn.BatchNorm1d(6), (6, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(6), (6, 3, 3)),
    "batch norm 2d in evaluation mode": (lambda: nn.BatchNorm2d(6).eval(), (6, 3, 3)),
    "batch norm 2d without running statistics": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(),
        (6, 3, 3),
    ),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 3)),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def build(name: str, freeze: str | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    module = make().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    if freeze is not None:
        getattr(module, freeze).requires_grad_(False)
    x = torch.randn(B, *shape, dtype=torch.float64)
    y = torch.randn_like(module(x))
    return module, x, y


def reference(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """torch.func's per-sample gradients of <f(x), FACTOR y>; BatchNorm: scale and shift expanded to B copies."""
    controls = {n: p for n, p in module.named_parameters() if p.requires_grad}
    y = y * FACTOR
    if isinstance(module, NORMS):
        per_channel = (B, module.num_features) + (1,) * (x.ndim - 2)
        copies = {n: p.detach().expand(B, -1).clone() for n, p in controls.items()}
        batch = module.training or module.running_mean is None
        mean = None if batch else module.running_mean
        var = None if batch else module.running_var

        def loss(scales: dict[str, Tensor]) -> Tensor:
            # The statistics depend on the input alone, so the library's own normalisation may come first.
            x_hat = nn.functional.batch_norm(x, mean, var, training=batch, eps=module.eps)
            out = x_hat * scales["weight"].reshape(per_channel) + scales["bias"].reshape(per_channel)
            return (out * y).sum()

        return grad(loss)(copies)

    def one(parameters: dict[str, Tensor], x_b: Tensor, y_b: Tensor) -> Tensor:
        return (functional_call(module, parameters, (x_b[None],))[0] * y_b).sum()

    detached = {n: p.detach() for n, p in controls.items()}
    return vmap(grad(one), (None, 0, 0))(detached, x, y)


def rows(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(B, -1) for g in grads.values()], dim=1)


def flat(values: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([values[n].flatten() for n in names])


def rotated_channels(samples: AffineGradients) -> tuple[Tensor, Tensor]:
    """Any matrices for the channels of every group's input and output."""
    groups = int(getattr(samples.module, "groups", 1))
    weight = samples.module.get_parameter("weight")
    C, O = weight.shape[1], weight.shape[0] // groups  # noqa: E741
    return torch.randn(groups, C, C, dtype=torch.float64), torch.randn(groups, O, O, dtype=torch.float64)


def rotate(S: dict[str, Tensor], module: nn.Module, inputs_GCC: Tensor, outputs_GOO: Tensor) -> dict[str, Tensor]:
    """E_B^T g E_A, group by group and kernel element by kernel element; a bias has no input side."""
    turned = {}
    for name, grads in S.items():
        g_BGO = grads.unflatten(1, (len(outputs_GOO), -1))
        if name == "bias":
            turned[name] = torch.einsum("bgo,gop->bgp", g_BGO, outputs_GOO).flatten(1)
        else:
            by_output = torch.einsum("bgoc...,gop->bgpc...", g_BGO, outputs_GOO)
            turned[name] = torch.einsum("bgpc...,gcd->bgpd...", by_output, inputs_GCC).flatten(1, 2)
    return turned


@pytest.mark.parametrize("block", [None, 1, 100], ids=["whole", "blocks of 1", "blocks of 100"])
@pytest.mark.parametrize("name", CASES)
def test_all_products_agree_with_torch_func(name: str, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where S is too large to be formed as a whole, and what is formed of it takes so many numbers at a time."""
    if block is not None:
        monkeypatch.setattr("gtddp_dist.players.affine.FORMED_LIMIT", 0)
        monkeypatch.setitem(BLOCK_NUMBERS, "cpu", block)
    module, x, y = build(name)
    S = reference(module, x, y)
    names = list(S)
    samples = sample_gradients(module, prepare(module, x), y, FACTOR)
    torch.testing.assert_close(samples.per_sample(), S, rtol=1e-11, atol=1e-11)

    weights = torch.randn(B, dtype=torch.float64)
    expected = rows(S).mT @ weights
    torch.testing.assert_close(flat(samples.weighted(weights), names), expected, rtol=1e-11, atol=1e-11)

    direction = {n: torch.randn_like(g[0]) for n, g in S.items()}
    expected = rows(S) @ flat(direction, names)
    torch.testing.assert_close(samples.inner(direction), expected, rtol=1e-11, atol=1e-11)

    if isinstance(samples, AffineGradients):
        squares = {n: (g**2).mean(0) for n, g in S.items()}
        torch.testing.assert_close(samples.mean_square(), squares, rtol=1e-11, atol=1e-10)
        rotations = rotated_channels(samples)
        turned = rotate(S, module, *rotations)
        torch.testing.assert_close(samples.rotated(*rotations).per_sample(), turned, rtol=1e-11, atol=1e-10)

    scalar: dict[str, Scale] = {n: 0.5 + i for i, n in enumerate(names)}
    diagonal: dict[str, Scale] = {n: torch.rand_like(g[0]) for n, g in S.items()}
    mixed = {n: diagonal[n] if i else scalar[n] for i, n in enumerate(names)}
    for metric in (scalar, diagonal, mixed):
        expected = sum(((S[n] * metric[n]).flatten(1) @ S[n].flatten(1).mT for n in names), torch.zeros(B, B))
        torch.testing.assert_close(samples.gram(metric), expected, rtol=1e-11, atol=1e-10)
        if metric is scalar and isinstance(samples, AffineGradients):
            paths: tuple[GramPath, ...] = ("materialise", "positions")
            for path in (*paths, "pixels") if name.startswith("conv") else paths:
                torch.testing.assert_close(samples.gram(metric, path), expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["linear on tokens", "conv groups", "conv1d groups", "conv3d groups", "group norm", "batch norm 2d"]
)
@pytest.mark.parametrize("freeze", ["weight", "bias"])
def test_a_frozen_parameter_is_no_control(name: str, freeze: str) -> None:
    module, x, y = build(name, freeze)
    full, _, _ = build(name)
    S = reference(full, x, y)
    del S[freeze]
    (kept,) = S
    samples = sample_gradients(module, prepare(module, x), y, FACTOR)
    torch.testing.assert_close(samples.per_sample(), S, rtol=1e-11, atol=1e-11)
    weights = torch.randn(B, dtype=torch.float64)
    assert samples.weighted(weights).keys() == {kept}
    torch.testing.assert_close(flat(samples.weighted(weights), [kept]), rows(S).mT @ weights, rtol=1e-11, atol=1e-11)
    direction = {kept: torch.randn_like(S[kept][0])}
    torch.testing.assert_close(samples.inner(direction), rows(S) @ direction[kept].flatten(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(samples.gram({kept: 2.0}), 2 * rows(S) @ rows(S).mT, rtol=1e-11, atol=1e-10)


def test_weighted_gradient_is_autograds_own() -> None:
    """With weights 1 the weighted gradient is what backward() would put into p.grad."""
    for name in CASES:
        module, x, y = build(name)
        module.zero_grad()
        (module(x) * y * FACTOR).sum().backward()
        weighted = sample_gradients(module, prepare(module, x), y, FACTOR).weighted(torch.ones(B))
        for parameter_name, parameter in module.named_parameters():
            torch.testing.assert_close(weighted[parameter_name], parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 200, 10**6])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("conv")])
def test_shifted_views_make_per_sample_gradients(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, y = build(name)
    part = sample_gradients(module, prepare(module, x), y, FACTOR)
    monkeypatch.setattr("gtddp_dist.players.conv.SHIFTED_POSITIONS", 10**9)
    by_products = part.per_sample()
    monkeypatch.setattr("gtddp_dist.players.conv.SHIFTED_POSITIONS", 0)
    monkeypatch.setattr("gtddp_dist.players.conv.SHIFTED_CHANNELS", 0)
    monkeypatch.setitem(BLOCK_NUMBERS, "cpu", block)
    found = part.per_sample()
    assert found.keys() == by_products.keys()
    for key, expected in by_products.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("limit", [0, 10**9])
def test_formed_gradients_have_the_same_products(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtddp_dist.players.affine.FORMED_LIMIT", limit)
    module, x, y = build(name)
    part = sample_gradients(module, prepare(module, x), y, FACTOR)
    scales: dict[str, Scale] = {n: torch.rand_like(p) for n, p in part.controls.items()}
    formed = part.formed(True, B)
    assert isinstance(formed, FormedGradients) is (limit > 0 or not is_affine(module))
    weights, rows = torch.randn(B, dtype=torch.float64), slice(1, 4)
    torch.testing.assert_close(formed.gram(scales), part.gram(scales), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(formed.rows(rows).gram(scales), part.gram(scales)[rows, rows], rtol=1e-12, atol=1e-12)
    for key, expected in part.weighted(weights).items():
        torch.testing.assert_close(formed.weighted(weights)[key], expected, rtol=1e-12, atol=1e-12)
    direction = {n: torch.randn_like(p) for n, p in part.controls.items()}
    torch.testing.assert_close(formed.inner(direction), part.inner(direction), rtol=1e-12, atol=1e-12)
    assert formed.formed(True, B) is formed

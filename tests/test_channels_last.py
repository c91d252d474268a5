"""`train.channels_last`: another layout in memory, the same numbers by every way."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from bench_net import BENCH_RESNET
from torch import Tensor, nn

from gtddp_dist.bench.single import Contender, batch
from gtddp_dist.config import load_config
from gtddp_dist.errors import ConfigError
from gtddp_dist.players import AffineGradients, GramPath, sample_gradients
from gtddp_dist.players.conv import SHIFTED_CHANNELS, SHIFTED_POSITIONS

LAST = torch.channels_last

CONVOLUTIONS = {
    "shifted": (nn.Conv2d(SHIFTED_CHANNELS, 6, 3, padding=1), 12),
    "unfolded": (nn.Conv2d(SHIFTED_CHANNELS, 6, 3, stride=2, padding=1), 12),
    "groups": (nn.Conv2d(2 * SHIFTED_CHANNELS, 6, 3, groups=2, bias=False), 14),
    "few positions": (nn.Conv2d(3, 6, 3, dilation=2, padding=1), 6),
    "pointwise": (nn.Conv2d(3, 6, 1), 6),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True)], ids=str)
def test_products_of_per_sample_gradients(name: str, last: tuple[bool, bool]) -> None:
    module, size = CONVOLUTIONS[name]
    module = module.double()
    torch.manual_seed(0)
    x = torch.randn(4, module.in_channels, size, size, dtype=torch.float64)
    y = torch.randn_like(module(x)).detach()
    if name in ("shifted", "groups"):
        assert y[0, 0].numel() >= SHIFTED_POSITIONS
    laid = [z.contiguous(memory_format=LAST) if each else z for z, each in zip((x, y), last, strict=True)]
    one, other = (cast(AffineGradients, sample_gradients(module, *each, 0.5)) for each in ((x, y), (laid[0], laid[1])))
    weights = torch.randn(4, dtype=torch.float64)
    direction = {n: torch.randn_like(p.detach()) for n, p in one.controls.items()}
    diagonal = {n: torch.rand_like(p.detach()) for n, p in one.controls.items()}
    paths: tuple[GramPath, ...] = ("materialise", "positions", "pixels")
    numbers = dict.fromkeys(one.controls, 0.3)
    pairs = [
        *((one.gram(numbers, path), other.gram(numbers, path)) for path in paths),
        (one.gram(diagonal), other.gram(diagonal)),
        (one.inner(direction), other.inner(direction)),
    ]
    for made in ("per_sample", "mean_square"):
        pairs += [(getattr(one, made)()[n], getattr(other, made)()[n]) for n in one.controls]
    pairs += [(one.weighted(weights)[n], other.weighted(weights)[n]) for n in one.controls]
    formed = other.formed(True, 4)
    pairs += [(one.gram(diagonal), formed.gram(diagonal)), (one.inner(direction), formed.inner(direction))]
    pairs += [(one.weighted(weights)[n], formed.weighted(weights)[n]) for n in one.controls]
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def trained(name: str, channels_last: bool, *options: str) -> Tensor:
    config = load_config(
        "bench-step",
        [
            *BENCH_RESNET,
            "optimizer.lr=0.1",
            "optimizer.scope=4",
            "train.dtype=float64",
            "train.batch_size=8",
            "train.device=cpu",
            f"train.channels_last={str(channels_last).lower()}",
            *options,
        ],
    )
    contender = Contender(config, name)
    layouts: set[bool] = set()
    for module in contender.model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            module.register_forward_hook(lambda m, args, output: layouts.add(output.is_contiguous(memory_format=LAST)))
    images, labels = batch(config, contender.device, seed=0)
    for _ in range(3):
        contender.step(images, labels)
    assert layouts == {channels_last}
    convolutions = [m for m in contender.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(conv.weight.is_contiguous(memory_format=LAST) == channels_last for conv in convolutions)
    return torch.cat([p.detach().flatten() for p in contender.model.parameters()])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gtddp-sgd", ()),
        ("gtddp-sgd", ("optimizer.recompute=true", "optimizer.gram_memory=1.0")),
        ("gtddp-sgd-nonlinear", ()),
        ("gtddp-adam", ()),
        ("ekfac", ()),
        ("gtddp-ekfac", ()),
        ("gtddp-ekfac-unfolded", ()),
    ],
)
def test_steps(name: str, options: tuple[str, ...]) -> None:
    expected, found = (trained(name, last, *options) for last in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_not_on_ranks() -> None:
    with pytest.raises(ConfigError, match=r"take train\.channels_last=false on ranks"):
        load_config("digits", ["train.channels_last=true", "parallel.data=2"])

"""Networks: shapes, names, tracing, and how torchvision is imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gtddp_dist.config import ModelConfig
from gtddp_dist.models import coop_net, nested_resnet, vit
from gtddp_dist.models.nested_resnet import NestedBlock
from gtddp_dist.models.resnet import build_resnet18, build_resnet34, build_resnet50
from gtddp_dist.models.small_resnet import ACTIVATIONS, ResidualBlock, SmallResNet, build, default_channels


def digits_network() -> SmallResNet:
    return build(ModelConfig(), in_channels=1, classes=10, image_size=8)


def test_small_resnet_of_digits_has_the_expected_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in digits_network().named_parameters()}
    assert shapes == {
        "stem.conv.weight": (16, 1, 3, 3),
        "stem.conv.bias": (16,),
        "blocks.0.first.conv.weight": (16, 16, 3, 3),
        "blocks.0.first.conv.bias": (16,),
        "blocks.0.second.conv.weight": (32, 16, 3, 3),
        "blocks.0.second.conv.bias": (32,),
        "blocks.0.shortcut.conv.weight": (32, 16, 1, 1),
        "blocks.0.shortcut.conv.bias": (32,),
        "hidden.weight": (64, 32 * 16),
        "hidden.bias": (64,),
        "classifier.weight": (10, 64),
        "classifier.bias": (10,),
    }


def test_small_resnet_computes_what_its_description_says() -> None:
    model = digits_network().double()
    p = dict(model.named_parameters())
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def conv(name: str, h: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(h, p[f"{name}.conv.weight"], p[f"{name}.conv.bias"], stride, padding)

    h = conv("stem", x).relu()
    main = conv("blocks.0.second", conv("blocks.0.first", h).relu(), stride=2)
    h = (main + conv("blocks.0.shortcut", h, stride=2, padding=0)).relu()
    assert h.shape == (3, 32, 4, 4)  # nothing to pool
    h = F.linear(h.flatten(1), p["hidden.weight"], p["hidden.bias"]).relu()
    expected = F.linear(h, p["classifier.weight"], p["classifier.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_larger_maps_are_averaged_to_4x4() -> None:
    model = build(ModelConfig(width=4), in_channels=3, classes=5, image_size=32)
    maps: list[Tensor] = []
    model.pool.register_forward_hook(lambda _, inputs, output: maps.extend([inputs[0], output]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    before, after = maps
    assert before.shape == (2, 8, 16, 16)
    torch.testing.assert_close(after, F.avg_pool2d(before, 4))


def test_a_block_that_keeps_its_channels_has_an_identity_shortcut() -> None:
    model = build(ModelConfig(width=8, blocks=2, channels=(8, 16)), in_channels=1, classes=10, image_size=8)
    first, second = model.blocks
    assert isinstance(first, ResidualBlock) and isinstance(second, ResidualBlock)
    assert isinstance(first.shortcut, nn.Identity)
    assert isinstance(second.shortcut, nn.Sequential)
    h = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(first(h), (first.second(first.first(h).relu()) + h).relu())
    assert second(h).shape == (2, 16, 4, 4)


def test_default_channels() -> None:
    assert default_channels(16, 1) == (32,)
    assert default_channels(16, 3) == (16, 32, 64)
    built = build(ModelConfig(width=4, blocks=3), in_channels=1, classes=10, image_size=8)
    assert built.hidden.in_features == 16 * 16


def test_batch_norm_follows_every_convolution_and_takes_its_bias() -> None:
    model = build(ModelConfig(width=4, batch_norm=True), in_channels=1, classes=10, image_size=8)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(convolutions) == len(norms) == 4
    assert all(module.bias is None for module in convolutions)
    assert "blocks.0.shortcut.norm.running_mean" in model.state_dict()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_of_the_schema_exists_and_is_used(activation: str) -> None:
    model = build(ModelConfig(width=4, activation=activation), in_channels=1, classes=10, image_size=8)  # type: ignore[arg-type]
    used = [module for module in model.modules() if type(module) is ACTIVATIONS[activation]]
    assert len(used) == 4  # one instance a place, so that hooks can tell them apart


@pytest.mark.parametrize("batch_norm", [False, True])
def test_small_resnet_can_be_traced(batch_norm: bool) -> None:
    config = ModelConfig(width=4, blocks=2, batch_norm=batch_norm)
    model = build(config, in_channels=3, classes=10, image_size=16)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


def test_resnet18_with_both_stems() -> None:
    cifar: Any = build_resnet18(ModelConfig(name="resnet18", stem="cifar"), in_channels=3, classes=10, image_size=32)
    assert isinstance(cifar.maxpool, nn.Identity)
    assert (cifar.conv1.kernel_size, cifar.conv1.stride) == ((3, 3), (1, 1))
    maps: list[Tensor] = []
    cifar.layer4.register_forward_hook(lambda _, inputs, output: maps.append(output))
    assert cifar.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert maps[0].shape == (1, 512, 4, 4)

    imagenet: Any = build_resnet18(
        ModelConfig(name="resnet18", stem="imagenet"), in_channels=3, classes=10, image_size=32
    )
    assert (imagenet.conv1.kernel_size, imagenet.conv1.stride) == ((7, 7), (2, 2))
    assert sum(p.numel() for p in imagenet.parameters()) == 11_181_642  # torchvision's, with ten classes
    fx.symbolic_trace(imagenet)

    grey: Any = build_resnet18(ModelConfig(name="resnet18", stem="imagenet"), in_channels=1, classes=10, image_size=8)
    assert grey.conv1.weight.shape == (64, 1, 7, 7)


@pytest.mark.parametrize(
    ("build_resnet", "parameters"),
    [(build_resnet34, 21_289_802), (build_resnet50, 23_528_522)],
)
def test_larger_resnets_with_both_stems(build_resnet: Any, parameters: int) -> None:
    with torch.device("meta"):
        imagenet = build_resnet(ModelConfig(name="resnet34", stem="imagenet"), 3, classes=10, image_size=224)
        cifar = build_resnet(ModelConfig(name="resnet34"), 1, classes=10, image_size=32)
    assert sum(p.numel() for p in imagenet.parameters()) == parameters  # torchvision's, with ten classes
    assert cifar.conv1.weight.shape == (64, 1, 3, 3)


def test_coop_net_is_that_of_the_paper() -> None:
    model = coop_net.build(ModelConfig(name="coop-net"), in_channels=1, classes=10, image_size=8).double()
    p = dict(model.named_parameters())
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def conv(name: str, h: Tensor, stride: int) -> Tensor:
        return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], stride, padding=1)

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

    h = conv("stem", x, 1).tanh()
    assert h.shape == (3, 16, 8, 8)
    h = (conv("blocks.0.first", h, 2) + conv("blocks.0.second", h, 2)).tanh()
    assert h.shape == (3, 16, 4, 4)
    h = (conv("blocks.1.first", h, 2) + conv("blocks.1.second", h, 2)).tanh()
    assert h.shape == (3, 32, 2, 2)
    h = (linear("hidden.first", h.flatten(1)) + linear("hidden.second", h.flatten(1))).tanh()
    assert h.shape == (3, 64)
    torch.testing.assert_close(model(x), linear("classifier", h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("image_size", [5, 8, 14, 28, 32])
def test_coop_net_takes_images_of_any_size(image_size: int) -> None:
    config = ModelConfig(name="coop-net", width=2, activation="relu")
    model = coop_net.build(config, in_channels=3, classes=4, image_size=image_size)
    assert type(model.stem_activation) is nn.ReLU
    assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, 4)


def test_nested_blocks_compute_what_their_description_says() -> None:
    config = ModelConfig(name="nested-resnet", width=4, blocks=2)
    model = nested_resnet.build(config, in_channels=1, classes=10, image_size=8)
    first, second = model.blocks
    assert isinstance(first, NestedBlock) and isinstance(second, NestedBlock)
    h = torch.randn(2, 4, 8, 8)
    y = first.first(h).relu()
    y = (first.inner.second(first.inner.first(y).relu()) + y).relu()
    torch.testing.assert_close(first(h), (first.second(y) + h).relu())
    assert isinstance(first.shortcut, nn.Identity) and isinstance(first.inner.shortcut, nn.Identity)
    assert second(h).shape == (2, 8, 4, 4)


@pytest.mark.parametrize(("image_size", "in_channels", "patch", "tokens"), [(8, 1, 2, 16), (32, 3, 4, 64)])
def test_vit_of_small_images(image_size: int, in_channels: int, patch: int, tokens: int) -> None:
    model: Any = vit.build(ModelConfig(name="vit"), in_channels=in_channels, classes=10, image_size=image_size)
    assert model.conv_proj.weight.shape == (64, in_channels, patch, patch)
    assert model.encoder.pos_embedding.shape == (1, tokens + 1, 64)
    assert len(model.encoder.layers) == 4
    block = model.encoder.layers[0]
    assert block.self_attention.num_heads == 4
    assert block.mlp[0].out_features == 128
    assert model(torch.randn(2, in_channels, image_size, image_size)).shape == (2, 10)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    # As torchvision starts it: a variance of one over the inputs of a patch, cut off at two deviations or more.
    spread = model.conv_proj.weight.std().item()
    assert spread == pytest.approx((in_channels * patch**2) ** -0.5, rel=0.15)
    assert not model.conv_proj.bias.any()


def test_the_seed_alone_decides_the_initial_weights() -> None:
    def weights() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return digits_network().state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_torchvision_imports_in_a_fresh_process_and_other_errors_are_seen() -> None:
    # In a process of its own: in this one, torchvision may have been imported already.
    program = """
import importlib, sys
from gtddp_dist.models import torchvision_import as t
models = t.import_torchvision("torchvision.models")
assert models.resnet18 is t.import_torchvision("torchvision.models").resnet18
assert t.import_torchvision().transforms
assert len(t._declared) <= 1
def broken(name):
    raise RuntimeError("some other trouble")
importlib.import_module = broken
try:
    t.import_torchvision()
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "some other trouble"

"""Every kind of network under GT-DDP: its players and live tensors by hand, its training, and its base optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature, parts
from gtddp_dist.build import plain_parts
from gtddp_dist.config import Config, ModelConfig, load_config
from gtddp_dist.data.digits import load as load_digits
from gtddp_dist.errors import ConfigError
from gtddp_dist.models import vit
from gtddp_dist.models.torchvision_import import import_torchvision
from gtddp_dist.registry import MODELS, load_object
from gtddp_dist.tracing import trace
from gtddp_dist.trajectory import PlainParts

CLASSES = 3
SAMPLES = 6


class Conv1dNet(nn.Module):
    """A sequence of 8: convolution, a residual block of stride 2 with a projection, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4)
        self.first = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)
        self.project = nn.Conv1d(4, 6, 1, stride=2, bias=False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = torch.tanh(self.second(torch.tanh(self.first(x))) + self.project(x))
        logits: Tensor = self.head(x.mean(2))
        return logits


class Conv3dNet(nn.Module):
    """A volume of 4x4x4: convolution, a residual block with an identity shortcut, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 3, 3, stride=(1, 2, 2), padding=1)
        self.first, self.norm = nn.Conv3d(3, 4, (3, 1, 1), padding="same", bias=False), nn.BatchNorm3d(4)
        self.second = nn.Conv3d(4, 3, (1, 2, 3), padding="same")
        self.shortcut = nn.Identity()
        self.head = nn.Linear(3 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))) + self.shortcut(x))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def registered(**options: Any) -> Callable[[], nn.Module]:
    """The network of a configuration for images of 8x8 with one channel."""
    config = ModelConfig(**options)
    build: Any = load_object(MODELS[config.name].builder)
    return lambda: build(config, in_channels=1, classes=CLASSES, image_size=8)


def nothing(model: nn.Module) -> PlainParts:
    return {"plain_modules": [], "plain_parameters": []}


@dataclass(frozen=True)
class Case:
    """A network, and what a reader of the method would write down for it.

    players: names of each player's modules, in the order of their stages.
    live: number of live tensors at the cut before each stage.
    rate: a learning rate that suits Adam.
    """

    build: Callable[[], nn.Module]
    players: list[list[str]]
    live: list[int]
    shape: tuple[int, ...] = (1, 8, 8)
    plain: Callable[[nn.Module], PlainParts] = nothing
    rate: float = 0.03

    def model(self) -> nn.Module:
        """In float64; the last layer, which torchvision's transformer starts at zero, starts elsewhere."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().double()
            *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
            nn.init.normal_(last.weight, std=0.3)
        return model

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SAMPLES, *self.shape, dtype=torch.float64, generator=generator)
        return x, torch.arange(SAMPLES) % CLASSES


NESTED = [
    ["stem.conv"],
    ["blocks.0.first.conv"],
    ["blocks.0.inner.first.conv"],
    ["blocks.0.inner.second.conv"],
    ["blocks.0.second.conv", "blocks.0.shortcut.conv"],
    ["hidden"],
    ["classifier"],
]
BLOCK = "encoder.layers.encoder_layer_0"
CASES: dict[str, Case] = {
    "coop-net": Case(
        registered(name="coop-net", width=4),
        [
            ["stem"],
            ["blocks.0.first", "blocks.0.second"],
            ["blocks.1.first", "blocks.1.second"],
            ["hidden.first", "hidden.second"],
            ["classifier"],
        ],
        [1, 1, 1, 1, 1],  # both layers of a block read the one state
    ),
    "plain-net": Case(
        registered(name="plain-net", width=4, activation="tanh"),
        [["stem.conv"], ["blocks.0.first.conv"], ["blocks.0.second.conv"], ["hidden"], ["classifier"]],
        [1, 1, 1, 1, 1],
    ),
    "nested-resnet": Case(
        registered(name="nested-resnet", width=4, activation="tanh"),
        NESTED,
        [1, 1, 2, 3, 2, 1, 1],  # the outer residual state from the second stage of a block on, the inner within it
    ),
    "nested-resnet with batch norm": Case(
        registered(name="nested-resnet", width=4, batch_norm=True),
        [[f"{name[:-4]}{kind}" for name in names for kind in ("conv", "norm")] for names in NESTED[:5]] + NESTED[5:],
        [1, 1, 2, 3, 2, 1, 1],
    ),
    "vit": Case(
        registered(name="vit", width=8, heads=2, depth=1),
        [
            ["conv_proj"],
            [f"{BLOCK}.ln_1"],
            [f"{BLOCK}.ln_2"],
            [f"{BLOCK}.mlp.0"],
            [f"{BLOCK}.mlp.3"],
            ["encoder.ln"],
            ["heads.head"],
        ],
        # The attention and its residual sum follow the first normalisation in one stage.
        [1, 1, 1, 2, 2, 1, 1],
        plain=vit.plain_parts,
        rate=0.005,
    ),
    "conv1d": Case(Conv1dNet, [["stem", "norm"], ["first"], ["second", "project"], ["head"]], [1, 1, 2, 1], (2, 8)),
    "conv3d": Case(Conv3dNet, [["stem"], ["first", "norm"], ["second"], ["head"]], [1, 1, 2, 1], (1, 4, 4, 4)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@EVERY_CASE
def test_players_and_live_tensors_are_those_a_reader_would_write(case: Case) -> None:
    model = case.model()
    trajectory = trace(model, **case.plain(model))
    assert [list(player.modules) for player in trajectory.players] == case.players
    assert [len(stage.live_before) for stage in trajectory.stages] == case.live
    known = {name for player in trajectory.players for name in player.controls()}
    assert known | set(trajectory.plain_parameters) == {name for name, _ in model.named_parameters()}


@EVERY_CASE
def test_running_the_stages_is_running_the_model(case: Case) -> None:
    model = case.model()
    trajectory = trace(model, **case.plain(model))
    x, _ = case.batch()
    values = trajectory.bind(x)
    for stage in trajectory.stages:
        values = stage.run(values)
    torch.testing.assert_close(trajectory.assemble(values), model(x), rtol=0, atol=0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@EVERY_CASE
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_the_loss_of_a_batch_falls(case: Case, rollout: str) -> None:
    model = case.model()
    base = curvature.Adam(lr=case.rate)
    optimizer = GTDDP(model, base, gauss_newton_weight=0.03, rollout=rollout, **case.plain(model))
    losses = train(model, optimizer, [case.batch()] * 10)
    assert optimizer.skipped_steps == 0
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@EVERY_CASE
@pytest.mark.parametrize("capture", ["gradient", "weighted"])
def test_without_feedback_it_is_sgd(case: Case, capture: str) -> None:
    ours = case.model()
    theirs = copy.deepcopy(ours)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    batches = [case.batch(seed) for seed in range(3)]
    optimizer = GTDDP(ours, curvature.SGD(**options), gauss_newton_weight=0.0, capture=capture, **case.plain(ours))
    before = [p.detach().clone() for p in ours.parameters()]
    losses = train(ours, optimizer, batches)
    reference = torch.optim.SGD(theirs.parameters(), **options)
    assert losses == pytest.approx(train(theirs, reference, batches), rel=1e-10)
    for a, b, start in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@EVERY_CASE
def test_kronecker_curvature_takes_it(case: Case) -> None:
    model = case.model()
    plain = case.plain(model)
    base = curvature.EKFAC(lr=0.01 if plain["plain_modules"] else 0.03, damping=0.1)
    optimizer = GTDDP(model, base, gauss_newton_weight=0.1, **plain)
    losses = train(model, optimizer, [case.batch()] * 20)
    assert optimizer.skipped_steps == 0
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["coop-net", "nested-resnet", "vit", "conv1d", "conv3d"])
def test_rollouts_differ_at_second_order(name: str) -> None:
    """What feedback changes in a step is proportional to the rate, and so is the rollouts' share of disagreement.

    Of parameters that belong to no player the linear rollout knows nothing, so these are frozen, and BatchNorm takes
    its running statistics (in training mode a sample moves the others, which the recursion leaves out).
    """
    case = CASES[name]

    def step(lr: float, rho: float, rollout: str) -> Tensor:
        model = case.model()
        plain = trace(model, **case.plain(model)).plain_parameters
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name not in plain)
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d))
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = GTDDP(model, curvature.SGD(lr=lr), gauss_newton_weight=rho, rollout=rollout, **case.plain(model))
        x, y = case.batch()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach() - start

    disagreements = []
    for lr in (1e-2, 1e-3):
        linear, nonlinear, base = step(lr, 1.0, "linear"), step(lr, 1.0, "nonlinear"), step(lr, 0.0, "linear")
        assert not torch.equal(linear, nonlinear)
        disagreements.append(float((nonlinear - linear).norm() / (linear - base).norm()))
    assert disagreements[0] < 0.2
    assert disagreements[1] == pytest.approx(disagreements[0] / 10, rel=0.5)


def test_plain_parts_of_another_vision_transformer() -> None:
    model = import_torchvision("torchvision.models").VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )
    trajectory = trace(model, **vit.plain_parts(model))
    assert len(trajectory.stages) == 3 + 4 * 3
    plain = [name for name in trajectory.plain_parameters if "self_attention" not in name]
    assert plain == ["class_token", "encoder.pos_embedding"]


def config(*overrides: str) -> Config:
    return load_config("digits", ["train.batch_size=8", "train.threads=1", "optimizer.lr=0.001", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=vit", "model.depth=1"],
        ["model.name=vit", "model.depth=1", "train.dtype=bfloat16", "optimizer.rollout=nonlinear"],
        ["model.name=coop-net", "optimizer.projection=separate"],
        ["model.name=nested-resnet", "model.blocks=2"],
        ["model.name=nested-resnet", "model.batch_norm=true", "optimizer.capture=weighted"],
    ],
    ids=" ".join,
)
def test_a_configuration_trains_every_registered_network(overrides: list[str]) -> None:
    built = parts.build(config(*overrides))
    images, labels = built.data.train_images[:8], built.data.train_labels[:8]
    results = [built.step(images, labels) for _ in range(3)]
    assert not any(result.refused for result in results)
    assert results[-1].loss < results[0].loss
    assert isinstance(built.optimizer, GTDDP)
    separate = "optimizer.projection=separate" in overrides
    if "model.name=coop-net" in overrides:
        assert len(built.optimizer.trajectory.stages) == (8 if separate else 5)


def test_only_networks_that_need_them_have_plain_parts() -> None:
    for name, entry in MODELS.items():
        build: Any = load_object(entry.builder)
        with torch.device("meta"):
            model = build(ModelConfig(name=name), in_channels=3, classes=10, image_size=32)
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
        trajectory = trace(model, **plain_parts(model, config(f"model.name={name}")))
        assert bool(trajectory.plain_parameters) == (name == "vit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.heads=3"], r"model\.heads: 3 heads cannot share out a width of 64"),
        (["model.patch_size=3"], r"model\.patch_size: patches of 3 x 3 pixels do not fill images of 8 x 8"),
    ],
)
def test_transformers_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts.build(config("model.name=vit", *overrides))


def test_images_that_are_not_square_are_refused() -> None:
    built = parts.build(config())
    digits = load_digits(built.config.data)
    flat = replace(
        digits, train_images=digits.train_images[..., :6], validation_images=digits.validation_images[..., :6]
    )
    with pytest.raises(ConfigError, match=r"images of 'digits' have 8 x 6 pixels; networks take square images"):
        parts.build_model(built.config, flat, built.precision)

"""Settings of the optimizer on a grid, what one process makes of each, and which of them are tested.

A setting says everything about a few training steps on random data. One process takes them with emulated replicas
(`reference`); ranks have to come to the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypedDict, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gtddp_dist import GTDDP, curvature
from gtddp_dist.config import ModelConfig
from gtddp_dist.curvature import Curvature
from gtddp_dist.models import small_resnet, vit
from gtddp_dist.trajectory import PlainParts

STEPS = 12
SAMPLES = 16
"""Of a step, over all replicas."""
BATCHES = 4
"""Different ones; then the first comes again."""
TORCH = ("torch-sgd", "torch-adam", "torch-adam-zero")
"""Bases that are optimizers of torch.optim; the last with DeepSpeed's ZeRO-1."""

RESNET_CUT = 8
"""Of ResNet18, where bytes are counted; inside a block."""
RESNET_SAMPLES = 4
BAD_STEP = 2
"""The step that is spoilt where it is tested what becomes of one that is not finite; from 0."""

Net = Literal["digits", "blocks", "vit"]

CUTS: Mapping[Net, Mapping[int, tuple[int, ...]]] = {
    # stem | first | second and projection | hidden | classifier
    "digits": {1: (), 2: (2,), 4: (1, 2, 3)},
    # stem, first | second, first | second and projection | hidden, classifier: 2 is in a block with an identity
    # shortcut, 4 in one with a projection.
    "blocks": {1: (), 2: (2,), 4: (2, 4, 5)},
    "vit": {1: (), 2: (2,), 4: (1, 2, 4)},
}
"""Where each net is cut for so many segments: inside residual blocks."""


@dataclass(frozen=True)
class Setting:
    """A grid, a net, and an optimizer with all of its options."""

    pipe: int = 1
    data: int = 1
    n_micro: int = 1
    net: Net = "digits"
    base: str = "sgd"
    rho: float = 0.1
    scope: str | int = "batch"
    rollout: str = "linear"
    value_hessian: str = "batch"
    terminal: str = "loss_gradient"
    metric: str = "current"
    """current, previous, or value: the current one, of value statistics."""
    control_hessian: str = "proximal"
    capture: str = "gradient"
    clip_norm: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    dtype: str = "float64"
    steps: int = STEPS

    @property
    def valid(self) -> bool:
        """Whether the optimizer takes these together."""
        if self.base in TORCH:
            same = Setting(capture=self.capture, metric=self.metric)
            recursion = ("rho", "scope", "rollout", "value_hessian", "terminal", "control_hessian")
            return all(getattr(self, name) == getattr(same, name) for name in recursion)
        if self.base == "adam" and self.momentum:  # of that kind it has none
            return False
        return not (self.base == "kfac-sampled" and self.metric == "value")

    @property
    def name(self) -> str:
        """The grid and net, and what is not as by default."""
        plain = Setting()
        words = [f"{self.pipe}x{self.data}x{self.n_micro}", self.net, self.base]
        for item in fields(self)[5:]:
            value = getattr(self, item.name)
            if value != getattr(plain, item.name):
                words.append(value if isinstance(value, str) else f"{item.name}={value}")
        return "-".join(words)

    @property
    def micro_batch(self) -> int:
        return SAMPLES // (self.data * self.n_micro)

    @property
    def chunks(self) -> int:
        """Micro-batches of all replicas."""
        return self.data * self.n_micro

    @property
    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    # What is trained

    def new_model(self) -> tuple[nn.Module, PlainParts]:
        torch.manual_seed(3)
        plain: PlainParts = {"plain_modules": [], "plain_parameters": []}
        model: nn.Module
        match self.net:
            case "digits":
                model = small_resnet.build(ModelConfig(width=4), 1, 10, 8)
            case "blocks":
                model = small_resnet.build(ModelConfig(width=4, blocks=2, batch_norm=True), 1, 10, 8)
            case "vit":
                config = ModelConfig(name="vit", width=8, depth=1, heads=2, patch_size=4)
                model = vit.build(config, 1, 10, 8)
                with torch.no_grad():  # torchvision starts with a head of zeros, through which nothing goes back
                    cast(nn.Linear, model.get_submodule("heads.head")).weight.normal_(std=0.3)
                plain = vit.plain_parts(model)
        return model.to(self.torch_dtype), plain

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of every step, of all replicas."""
        numbers = torch.Generator().manual_seed(5)
        made = [
            (
                torch.randn(SAMPLES, 1, 8, 8, generator=numbers, dtype=torch.float64).to(self.torch_dtype),
                torch.randint(0, 10, (SAMPLES,), generator=numbers),
            )
            for _ in range(BATCHES)
        ]
        yield from itertools.islice(itertools.cycle(made), self.steps)

    def _curvature(self) -> Curvature:
        momentum, decay = self.momentum, self.weight_decay
        match self.base:
            case "sgd":
                return curvature.SGD(lr=0.1, momentum=momentum, weight_decay=decay)
            case "rmsprop":
                return curvature.RMSprop(lr=0.01, eps=1e-3, momentum=momentum, weight_decay=decay)
            case "adam":
                return curvature.Adam(lr=0.01, eps=1e-3, weight_decay=decay)
            case "kfac":
                return curvature.KFAC(lr=0.03, basis_every=1, momentum=momentum, weight_decay=decay)
            case "kfac-sampled":
                return curvature.KFAC(lr=0.03, basis_every=1, fisher="sampled", momentum=momentum, weight_decay=decay)
            case "ekfac":
                return curvature.EKFAC(lr=0.03, basis_every=1, momentum=momentum, weight_decay=decay)
            case "ekfac-in-turn":
                return curvature.EKFAC(lr=0.03, basis_every=4, basis_spread=True, basis_method="qr")
            case "ekfac-ahead":
                return curvature.EKFAC(lr=0.03, basis_every=3, basis_lag=2)
        raise ValueError(self.base)

    def new_optimizer(self, model: nn.Module, *, replica_groups: int = 1, plain: PlainParts | None = None) -> Optimizer:
        """For a model, or for a segment of one."""
        if self.base == "torch-sgd":
            decay = self.weight_decay
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=self.momentum, weight_decay=decay)
        if self.base in TORCH:
            return torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3, weight_decay=self.weight_decay)
        value = self.metric == "value"
        return GTDDP(
            model,
            self._curvature(),
            replica_groups=replica_groups,
            **(plain or {"plain_modules": [], "plain_parameters": []}),
            gauss_newton_weight=self.rho,
            scope=self.scope,
            rollout=self.rollout,
            value_hessian=self.value_hessian,
            terminal=self.terminal,
            metric="current" if value else self.metric,
            statistics="value" if value else "gradient",
            control_hessian=self.control_hessian,
            capture=self.capture,
            clip_norm=self.clip_norm,
        )

    @property
    def reference(self) -> Setting:
        """The setting without what one process does not know of: those that share it have the same reference."""
        return replace(self, pipe=1, base="torch-adam" if self.base == "torch-adam-zero" else self.base)


class Finding(TypedDict):
    """What a rank found of a setting."""

    names: list[str]
    """Of the parameters and buffers that it has."""
    parameters: float
    """The largest distance of one from the reference, as a share of that one's norm."""
    buffers: float
    losses: list[float]


@dataclass(frozen=True)
class Reference:
    """What one process came to.

    Attributes:
        file: parameters and buffers after the last step, by name.
        losses: mean loss of every step, before it.
        moved: for the parameter that moved least, by what share of its norm.
    """

    file: Path
    losses: list[float]
    moved: float


def run_reference(setting: Setting, folder: Path) -> Reference:
    """Take a setting's steps in one process, with as many emulated replicas."""
    model, plain = setting.new_model()
    optimizer = setting.new_optimizer(model, replica_groups=setting.data, plain=plain)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    losses = []
    for x, y in setting.batches():
        optimizer.zero_grad()
        total = 0.0
        before = {name: b.clone() for name, b in model.named_buffers()}
        after: list[dict[str, Tensor]] = []
        chunks = list(zip(x.chunk(setting.chunks), y.chunk(setting.chunks), strict=True))
        for replica in range(setting.data):
            # Every replica sees its own samples alone; the mean of the running statistics goes on.
            _set_buffers(model, before)
            for own_x, own_y in chunks[replica * setting.n_micro : (replica + 1) * setting.n_micro]:
                loss = F.cross_entropy(model(own_x), own_y) / setting.chunks
                loss.backward()
                total += float(loss.detach())
            after.append({name: b.clone() for name, b in model.named_buffers()})
        _set_buffers(model, {name: _mean([own[name] for own in after]) for name in before})
        if setting.base in TORCH and setting.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip_norm)
        optimizer.step()
        losses.append(total)
    moved = [
        float((p.detach() - start[n]).norm() / start[n].norm().clamp(min=1e-3)) for n, p in model.named_parameters()
    ]
    file = folder / f"{setting.name}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return Reference(file, losses, min(moved))


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    return torch.stack(list(tensors)).mean(0) if first.is_floating_point() else first


@torch.no_grad()
def _set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(values[name])


# ----------------------------------------------------------------------------------------------------------
# Which settings are tested

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2))

LEVELS: Mapping[str, Sequence[object]] = {
    "grid": GRIDS,
    "n_micro": (1, 4),
    "base": ("sgd", "rmsprop", "adam", "kfac", "ekfac", "kfac-sampled"),
    "scope": ("batch", "micro_batch", 2),
    "rollout": ("linear", "nonlinear"),
    "value_hessian": ("batch", "block_diagonal"),
    "terminal": ("loss_gradient", "sampled", "exact"),
    "metric": ("current", "previous", "value"),
    "net": ("digits", "blocks"),
    "control_hessian": ("proximal", "replace"),
    "capture": ("gradient", "weighted"),
    "clip_norm": (None, 0.5),
    "momentum": (0.0, 0.9),
    "weight_decay": (0.0, 0.01),
}
"""Every option, and its values."""

PRODUCT = ("grid", "n_micro", "base", "scope", "rollout", "value_hessian", "terminal", "metric")
"""The options whose full product can be tested; the others take turns in it."""


def setting_of(levels: Mapping[str, object]) -> Setting:
    """A setting from values of `LEVELS`."""
    pipe, data = cast(tuple[int, int], levels["grid"])
    rest = {name: value for name, value in levels.items() if name != "grid"}
    return replace(Setting(pipe, data), **rest)  # type: ignore[arg-type]


def all_pairs(levels: Mapping[str, Sequence[object]]) -> list[Setting]:
    """Valid settings in which every two values of different options meet; a function of the levels alone.

    Greedy: each setting takes the first pair that is missing, and for the other options what brings most missing pairs;
    where that leaves a choice, a seeded generator's.
    """
    choice = random.Random(1)
    names = list(levels)
    values = [(name, i) for name in names for i in range(len(levels[name]))]
    missing = dict.fromkeys((a, b) for a in values for b in values if names.index(a[0]) < names.index(b[0]))
    first = {name: options[0] for name, options in levels.items()}
    chosen: list[Setting] = []
    while missing:
        pair = next(iter(missing))
        picked = dict(pair)
        if not setting_of(first | {name: levels[name][i] for name, i in picked.items()}).valid:
            del missing[pair]
            continue
        for name in names:
            if name in picked:
                continue

            def gain(i: int, name: str = name, picked: dict[str, int] = picked) -> int:
                new = {**picked, name: i}
                if not setting_of(first | {n: levels[n][k] for n, k in new.items()}).valid:
                    return -1
                return sum(_pair(names, (name, i), other) in missing for other in picked.items())

            gains = [gain(i) for i in range(len(levels[name]))]
            picked[name] = choice.choice([i for i, found in enumerate(gains) if found == max(gains)])
        for a, b in itertools.combinations(picked.items(), 2):
            missing.pop(_pair(names, a, b), None)
        chosen.append(setting_of({name: levels[name][i] for name, i in picked.items()}))
    return chosen


def _pair(names: Sequence[str], a: tuple[str, int], b: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)


def full_product() -> list[Setting]:
    """Every valid combination of `PRODUCT`; the other options go through their own combinations beside it."""
    others = [name for name in LEVELS if name not in PRODUCT]
    turns = itertools.cycle(itertools.product(*(LEVELS[name] for name in others)))
    found = []
    for values in itertools.product(*(LEVELS[name] for name in PRODUCT)):
        setting = setting_of(dict(zip(PRODUCT, values, strict=True)) | dict(zip(others, next(turns), strict=True)))
        if setting.base == "adam":
            setting = replace(setting, momentum=0.0)
        if setting.valid:
            found.append(setting)
    return found


def singled_out() -> list[Setting]:
    """What is tested besides: torch's optimizers, no feedback, a net with plain parameters, and float32."""
    return [
        Setting(1, 2, 1, "blocks", "torch-sgd", momentum=0.9, clip_norm=0.5, weight_decay=0.01),
        Setting(2, 1, 4, "blocks", "torch-adam", clip_norm=0.5, weight_decay=0.01),
        Setting(2, 2, 4, "digits", "torch-sgd", momentum=0.9, clip_norm=0.5, weight_decay=0.01),
        Setting(4, 1, 4, "blocks", "torch-sgd", momentum=0.9),
        Setting(4, 2, 4, "blocks", "torch-adam", clip_norm=0.5, weight_decay=0.01),
        Setting(1, 2, 4, "blocks", "torch-adam-zero", weight_decay=0.01),
        Setting(2, 2, 4, "blocks", "torch-adam-zero", clip_norm=0.5, weight_decay=0.01),
        Setting(2, 2, 4, "blocks", "adam", rho=0.0, clip_norm=0.5),
        Setting(2, 1, 4, "blocks", "ekfac", rho=0.0, momentum=0.9),
        Setting(2, 2, 4, "blocks", "adam", rho=0.0, capture="weighted"),
        Setting(2, 1, 4, "digits", "sgd", rho=0.0, capture="weighted", momentum=0.9, weight_decay=0.01),
        Setting(2, 2, 4, "blocks", "rmsprop", scope=2, metric="previous", capture="weighted", momentum=0.9),
        Setting(4, 1, 4, "digits", "sgd", scope="micro_batch", capture="weighted", terminal="sampled"),
        Setting(2, 2, 2, "vit", "adam", scope="micro_batch", clip_norm=0.5),
        Setting(4, 1, 2, "vit", "sgd", rollout="nonlinear", momentum=0.9),
        Setting(2, 1, 4, "digits", "sgd", momentum=0.9, dtype="float32"),
        Setting(2, 2, 4, "blocks", "adam", scope="micro_batch", metric="previous", dtype="float32"),
        Setting(4, 1, 4, "blocks", "kfac", dtype="float32"),
        # Bases that outlast a step: none of this net's factors has directions that a batch leaves out.
        Setting(2, 1, 4, "vit", "ekfac-in-turn"),
        Setting(2, 2, 2, "vit", "ekfac-in-turn", metric="previous"),
        Setting(1, 2, 1, "vit", "ekfac-ahead"),
        Setting(2, 2, 2, "vit", "ekfac-ahead", metric="previous"),
    ]

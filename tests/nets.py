"""Small networks without BatchNorm, each with its stages written out by hand.

Every network is an ordinary `nn.Module` and, beside it, the list of stages that a reader of the method would
write down for it: which parameters are one player, which live tensors a stage reads and which it leaves. The
dense reference (`oracle.py`) runs on the stages; the optimizer under test is given the modules.

Rules the lists follow:

* a player is one Conv or Linear with its bias and with the scale and shift of a normalisation layer that
  directly follows it; a normalisation layer that follows none is its own player; the projection of a shortcut
  belongs to the player of the last convolution on the main path and acts at that stage, wherever `forward`
  computes it (in `SEPARATE_NETS` it is a player of its own, where `forward` computes it);
* a stage is one player and the parameter-free operations that follow it (operations before the first player
  belong to the first stage);
* the live tensors of a cut are all tensors that later stages still read, in the order of their creation, the
  model's input first.

Everything is float64, and samples are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Parameters = Mapping[str, Tensor]
Live = tuple[Tensor, ...]


@dataclass(frozen=True)
class Stage:
    """One player and the operations that follow it.

    name: the player's name, that of its (first) module.
    parameters: the model's names of the player's parameters; their order is that of the control vector.
    live: names of the live tensors the stage reads (those of the cut before it), for messages and tables.
    function: (all parameters by name, live tensors before) -> live tensors after; the samples are the first
        dimension of each live tensor.
    """

    name: str
    parameters: tuple[str, ...]
    live: tuple[str, ...]
    function: Callable[[Parameters, Live], Live]


@dataclass(frozen=True)
class Net:
    """A network: its module, its stages, and the size of its input (one sample) and output."""

    name: str
    build: Callable[[], nn.Module]
    stages: tuple[Stage, ...]
    input_shape: tuple[int, ...]
    classes: int

    def model(self, seed: int = 0) -> nn.Module:
        """The module in float64 with seeded weights; the global random state is left as it was.

        Normalisation layers get scales and shifts away from 1 and 0, where a mistake in them would not show.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double()
            for module in model.modules():
                if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
        return model

    def batch(self, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Normal inputs [samples, *input_shape] in float64 and labels [samples] that go round all classes."""
        generator = torch.Generator().manual_seed(1000 + seed)
        inputs = torch.randn(samples, *self.input_shape, dtype=torch.float64, generator=generator)
        labels = (torch.randint(self.classes, (), generator=generator) + torch.arange(samples)) % self.classes
        return inputs, labels

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Detached copies of the model's parameters by name: the reference's first argument."""
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run_stages(stages: tuple[Stage, ...], parameters: Parameters, live: Live) -> Live:
    """The live tensors after the given stages."""
    for stage in stages:
        live = stage.function(parameters, live)
    return live


@dataclass(frozen=True)
class AffineCall:
    """One Conv or Linear as it was computed: its options, its input and its output (samples first)."""

    module: str
    kind: Literal["conv", "linear"]
    weight: Tensor
    bias: Tensor | None
    input: Tensor
    output: Tensor
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


class Recorder(dict[str, Tensor]):
    """Parameters by name that note in `calls` every Conv and Linear a stage computes with them, in that order."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.calls: list[AffineCall] = []


def _conv(
    p: Parameters,
    name: str,
    x: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[weight.ndim]
    h: Tensor = convolve(x, weight, bias, stride, padding, dilation, groups)
    if isinstance(p, Recorder):
        p.calls.append(AffineCall(name, "conv", weight, bias, x, h, stride, padding, dilation, groups))
    return h


def _linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    h = functional.linear(x, weight, bias)
    if isinstance(p, Recorder):
        p.calls.append(AffineCall(name, "linear", weight, bias, x, h))
    return h


def _layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def _group_norm(p: Parameters, name: str, x: Tensor, groups: int) -> Tensor:
    return functional.group_norm(x, groups, p[f"{name}.weight"], p[f"{name}.bias"])


def _both(*modules: str) -> tuple[str, ...]:
    """Names of weight and bias of each module."""
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


# --- sequential networks -----------------------------------------------------------------------------------

MLP = Net(
    "mlp",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
    (
        Stage("0", _both("0"), ("x",), lambda p, z: (torch.tanh(_linear(p, "0", z[0])),)),
        Stage("2", ("2.weight",), ("h1",), lambda p, z: (torch.tanh(_linear(p, "2", z[0])),)),
        Stage("4", _both("4"), ("h2",), lambda p, z: (_linear(p, "4", z[0]),)),
    ),
    input_shape=(5,),
    classes=3,
)


CHAIN = Net(
    "chain",
    lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
    (
        Stage("0", _both("0"), ("x",), lambda p, z: (torch.tanh(_conv(p, "0", z[0], padding=1)),)),
        Stage("2", _both("2"), ("h1",), lambda p, z: (functional.softplus(_conv(p, "2", z[0], stride=2, padding=1)),)),
        Stage("5", _both("5"), ("h2",), lambda p, z: (_linear(p, "5", z[0].flatten(1)),)),
    ),
    input_shape=(1, 4, 4),
    classes=3,
)


# --- a shortcut from the model's input ----------------------------------------------------------------------


class InputShortcut(nn.Module):
    """The input is flattened, and added again behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(torch.flatten(x, 1)))
        h = functional.silu(self.second(h) + torch.flatten(x, 1))
        logits: Tensor = self.head(h)
        return logits


def _input_shortcut_stages() -> tuple[Stage, ...]:
    def first(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, torch.tanh(_linear(p, "first", x.flatten(1)))

    def second(p: Parameters, z: Live) -> Live:
        x, h = z
        return (functional.silu(_linear(p, "second", h) + x.flatten(1)),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("first", _both("first"), ("x",), first),
        Stage("second", _both("second"), ("x", "h"), second),
        Stage("head", _both("head"), ("h",), head),
    )


INPUT_SHORTCUT = Net("input_shortcut", InputShortcut, _input_shortcut_stages(), input_shape=(2, 3), classes=3)


# --- an identity shortcut -----------------------------------------------------------------------------------


class Identity(nn.Module):
    """Stem, one block with an identity shortcut (a grouped and a dilated convolution), pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        h = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(h) + x)
        logits: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return logits


def _identity_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def conv1(p: Parameters, z: Live) -> Live:
        (x,) = z  # the shortcut opens here: x is the state and the residual state
        return x, torch.tanh(_conv(p, "conv1", x, padding=1, groups=2))

    def conv2(p: Parameters, z: Live) -> Live:
        x_r, h = z
        x = torch.tanh(_conv(p, "conv2", h, padding=2, dilation=2) + x_r)
        return (functional.avg_pool2d(x, 2).flatten(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("conv1", _both("conv1"), ("x",), conv1),
        Stage("conv2", ("conv2.weight",), ("x_r", "h"), conv2),
        Stage("head", _both("head"), ("features",), head),
    )


IDENTITY = Net("identity", Identity, _identity_stages(), input_shape=(2, 4, 4), classes=3)


# --- nested identity shortcuts ------------------------------------------------------------------------------


class Nested(nn.Module):
    """An identity shortcut within an identity shortcut: three live tensors in the inner block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.outer1 = nn.Conv2d(2, 2, 3, padding=1)
        self.inner1 = nn.Conv2d(2, 2, 3, padding=1)
        self.inner2 = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.outer2 = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        y = torch.tanh(self.outer1(x))
        h = torch.tanh(self.inner1(y))
        y = torch.tanh(self.inner2(h) + y)
        x = torch.tanh(self.outer2(y) + x)
        logits: Tensor = self.head(torch.flatten(x, 1))
        return logits


def _nested_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def outer1(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, torch.tanh(_conv(p, "outer1", x, padding=1))

    def inner1(p: Parameters, z: Live) -> Live:
        x_r, y = z
        return x_r, y, torch.tanh(_conv(p, "inner1", y, padding=1))

    def inner2(p: Parameters, z: Live) -> Live:
        x_r, y_r, h = z
        return x_r, torch.tanh(_conv(p, "inner2", h, padding=1) + y_r)

    def outer2(p: Parameters, z: Live) -> Live:
        x_r, y = z
        return (torch.tanh(_conv(p, "outer2", y, padding=1) + x_r).flatten(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("outer1", _both("outer1"), ("x",), outer1),
        Stage("inner1", _both("inner1"), ("x_r", "y"), inner1),
        Stage("inner2", ("inner2.weight",), ("x_r", "y_r", "h"), inner2),
        Stage("outer2", _both("outer2"), ("x_r", "y"), outer2),
        Stage("head", _both("head"), ("features",), head),
    )


NESTED = Net("nested", Nested, _nested_stages(), input_shape=(1, 4, 4), classes=4)


# --- projection shortcuts -----------------------------------------------------------------------------------


class Projection(nn.Module):
    """A block of stride 2 whose shortcut has a 1x1 convolution, computed behind or before the main path."""

    def __init__(self, shortcut_first: bool) -> None:
        super().__init__()
        self.shortcut_first = shortcut_first
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2)
        self.project = nn.Conv2d(2, 4, 1, stride=2, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.shortcut_first:
            shortcut = self.project(x)
            main = self.conv2(torch.tanh(self.conv1(x)))
        else:
            main = self.conv2(torch.tanh(self.conv1(x)))
            shortcut = self.project(x)
        logits: Tensor = self.head(torch.flatten(torch.tanh(main + shortcut), 1))
        return logits


def _projection_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def conv1(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, torch.tanh(_conv(p, "conv1", x, padding=1))

    def conv2(p: Parameters, z: Live) -> Live:
        x_r, h = z
        main = _conv(p, "conv2", h, padding=1, stride=2, groups=2)
        return (torch.tanh(main + _conv(p, "project", x_r, stride=2)).flatten(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("conv1", ("conv1.weight",), ("x",), conv1),
        Stage("conv2", (*_both("conv2"), "project.weight"), ("x_r", "h"), conv2),
        Stage("head", _both("head"), ("features",), head),
    )


PROJECTION = Net("projection", lambda: Projection(False), _projection_stages(), input_shape=(1, 4, 4), classes=3)
PROJECTION_FIRST = Net(
    "projection_first", lambda: Projection(True), PROJECTION.stages, input_shape=(1, 4, 4), classes=3
)


def _separate_stages(shortcut_first: bool) -> tuple[Stage, ...]:
    """The same block with its projection as a player of its own, at its place in `forward`."""

    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def conv2(p: Parameters, h: Tensor) -> Tensor:
        return _conv(p, "conv2", h, padding=1, stride=2, groups=2)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    first = Stage("stem", _both("stem"), ("x",), stem)
    last = Stage("head", _both("head"), ("features",), head)
    conv1, project = ("conv1.weight",), ("project.weight",)
    if shortcut_first:
        middle = (
            Stage("project", project, ("x",), lambda p, z: (z[0], _conv(p, "project", z[0], stride=2))),
            Stage(
                "conv1", conv1, ("x", "shortcut"), lambda p, z: (z[1], torch.tanh(_conv(p, "conv1", z[0], padding=1)))
            ),
            Stage(
                "conv2", _both("conv2"), ("shortcut", "h"), lambda p, z: (torch.tanh(conv2(p, z[1]) + z[0]).flatten(1),)
            ),
        )
    else:
        middle = (
            Stage("conv1", conv1, ("x",), lambda p, z: (z[0], torch.tanh(_conv(p, "conv1", z[0], padding=1)))),
            Stage("conv2", _both("conv2"), ("x_r", "h"), lambda p, z: (z[0], conv2(p, z[1]))),
            Stage(
                "project",
                project,
                ("x_r", "main"),
                lambda p, z: (torch.tanh(z[1] + _conv(p, "project", z[0], stride=2)).flatten(1),),
            ),
        )
    return first, *middle, last


PROJECTION_SEPARATE = Net(
    "projection_separate", lambda: Projection(False), _separate_stages(False), input_shape=(1, 4, 4), classes=3
)
PROJECTION_FIRST_SEPARATE = Net(
    "projection_first_separate", lambda: Projection(True), _separate_stages(True), input_shape=(1, 4, 4), classes=3
)


class NormedProjection(nn.Module):
    """A projection block as residual networks have it: a normalisation behind each of the two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False)
        self.norm2 = nn.GroupNorm(2, 4)
        self.project = nn.Conv2d(2, 4, 1, stride=2, bias=False)
        self.project_norm = nn.GroupNorm(1, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        main = self.norm2(self.conv2(torch.tanh(self.conv1(x))))
        x = torch.tanh(main + self.project_norm(self.project(x)))
        logits: Tensor = self.head(torch.flatten(x, 1))
        return logits


def _normed_projection_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def conv1(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, torch.tanh(_conv(p, "conv1", x, padding=1))

    def conv2(p: Parameters, z: Live) -> Live:
        x_r, h = z
        main = _group_norm(p, "norm2", _conv(p, "conv2", h, padding=1, stride=2), 2)
        shortcut = _group_norm(p, "project_norm", _conv(p, "project", x_r, stride=2), 1)
        return (torch.tanh(main + shortcut).flatten(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    controls = ("conv2.weight", *_both("norm2"), "project.weight", *_both("project_norm"))
    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("conv1", _both("conv1"), ("x",), conv1),
        Stage("conv2", controls, ("x_r", "h"), conv2),
        Stage("head", _both("head"), ("features",), head),
    )


NORMED_PROJECTION = Net(
    "normed_projection", NormedProjection, _normed_projection_stages(), input_shape=(1, 4, 4), classes=3
)


class GroupedProjection(nn.Module):
    """A projection block both of whose convolutions have two channel groups; tokens of a sequence (Conv1d)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, padding=1)
        self.conv1 = nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.conv2 = nn.Conv1d(4, 6, 3, padding=1, stride=2, groups=2)
        self.project = nn.Conv1d(4, 6, 1, stride=2, groups=2)
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        main = self.conv2(torch.tanh(self.conv1(x)))
        logits: Tensor = self.head(torch.flatten(torch.tanh(main + self.project(x)), 1))
        return logits


def _grouped_projection_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def conv1(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, torch.tanh(_conv(p, "conv1", x, padding=2, dilation=2, groups=4))

    def conv2(p: Parameters, z: Live) -> Live:
        x_r, h = z
        main = _conv(p, "conv2", h, padding=1, stride=2, groups=2)
        return (torch.tanh(main + _conv(p, "project", x_r, stride=2, groups=2)).flatten(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("conv1", _both("conv1"), ("x",), conv1),
        Stage("conv2", (*_both("conv2"), *_both("project")), ("x_r", "h"), conv2),
        Stage("head", _both("head"), ("features",), head),
    )


GROUPED_PROJECTION = Net(
    "grouped_projection", GroupedProjection, _grouped_projection_stages(), input_shape=(2, 5), classes=3
)


class SmallResnet(nn.Module):
    """The shape of the `small-resnet` that the package trains, with ReLU, for 6x6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1 = nn.Conv2d(2, 2, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.shortcut = nn.Conv2d(2, 3, 1, stride=2)
        self.hidden = nn.Linear(27, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        h = functional.relu(self.conv1(x))
        x = functional.relu(self.conv2(h) + self.shortcut(x))
        h = functional.relu(self.hidden(torch.flatten(x, 1)))
        logits: Tensor = self.head(h)
        return logits


def _small_resnet_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (functional.relu(_conv(p, "stem", z[0], padding=1)),)

    def conv1(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, functional.relu(_conv(p, "conv1", x, padding=1))

    def conv2(p: Parameters, z: Live) -> Live:
        x_r, h = z
        main = _conv(p, "conv2", h, padding=1, stride=2)
        return (functional.relu(main + _conv(p, "shortcut", x_r, stride=2)).flatten(1),)

    def hidden(p: Parameters, z: Live) -> Live:
        return (functional.relu(_linear(p, "hidden", z[0])),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("conv1", _both("conv1"), ("x",), conv1),
        Stage("conv2", _both("conv2", "shortcut"), ("x_r", "h"), conv2),
        Stage("hidden", _both("hidden"), ("features",), hidden),
        Stage("head", _both("head"), ("h",), head),
    )


SMALL_RESNET = Net("small_resnet", SmallResnet, _small_resnet_stages(), input_shape=(1, 6, 6), classes=4)


# --- two modules that read the same and are added (the paper's Fig. 7a) --------------------------------------


class TwinLinear(nn.Module):
    """Two linear layers of equal shape read the same features; their outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        logits: Tensor = self.head(torch.tanh(self.first(x) + self.second(x)))
        return logits


def _twin_linear_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_linear(p, "stem", z[0])),)

    def twins(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_linear(p, "first", z[0]) + _linear(p, "second", z[0])),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("first", _both("first", "second"), ("h",), twins),
        Stage("head", _both("head"), ("h2",), head),
    )


TWIN_LINEAR = Net("twin_linear", TwinLinear, _twin_linear_stages(), input_shape=(4,), classes=3)


class TwinConv(nn.Module):
    """Two convolutions of equal shape read the same image; their outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.first = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.second = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.first(x) + self.second(x))
        logits: Tensor = self.head(torch.flatten(x, 1))
        return logits


def _twin_conv_stages() -> tuple[Stage, ...]:
    def stem(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_conv(p, "stem", z[0], padding=1)),)

    def twins(p: Parameters, z: Live) -> Live:
        (x,) = z
        added = _conv(p, "first", x, padding=1, stride=2) + _conv(p, "second", x, padding=1, stride=2)
        return (torch.tanh(added).flatten(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("stem", _both("stem"), ("x",), stem),
        Stage("first", _both("first", "second"), ("x",), twins),
        Stage("head", _both("head"), ("features",), head),
    )


TWIN_CONV = Net("twin_conv", TwinConv, _twin_conv_stages(), input_shape=(1, 4, 4), classes=3)


# --- normalisation and tokens -------------------------------------------------------------------------------


class Tokens(nn.Module):
    """GroupNorm behind a convolution, LayerNorm behind a linear layer, linear layers on tokens [B, L, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 2, stride=2, bias=False)
        self.patch_norm = nn.GroupNorm(2, 4)
        self.embed = nn.Linear(4, 5)
        self.embed_norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.patch_norm(self.patch(x)))
        x = x.flatten(2).transpose(1, 2)
        x = torch.tanh(self.embed_norm(self.embed(x)))
        x = functional.gelu(self.mix(x) + x)
        logits: Tensor = self.head(x.mean(1))
        return logits


def _tokens_stages() -> tuple[Stage, ...]:
    def patch(p: Parameters, z: Live) -> Live:
        x = torch.tanh(_group_norm(p, "patch_norm", _conv(p, "patch", z[0], stride=2), 2))
        return (x.flatten(2).transpose(1, 2),)

    def embed(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_layer_norm(p, "embed_norm", _linear(p, "embed", z[0]))),)

    def mix(p: Parameters, z: Live) -> Live:
        (x,) = z  # a shortcut around one stage: no cut lies inside it
        return (functional.gelu(_linear(p, "mix", x) + x).mean(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("patch", ("patch.weight", *_both("patch_norm")), ("x",), patch),
        Stage("embed", _both("embed", "embed_norm"), ("tokens",), embed),
        Stage("mix", _both("mix"), ("tokens",), mix),
        Stage("head", _both("head"), ("features",), head),
    )


TOKENS = Net("tokens", Tokens, _tokens_stages(), input_shape=(1, 4, 4), classes=3)


class Prenorm(nn.Module):
    """A residual block that starts with its normalisation, as in a transformer: LayerNorms are players."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.last_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        logits: Tensor = self.head(self.last_norm(x).mean(1))
        return logits


def _prenorm_stages() -> tuple[Stage, ...]:
    def embed(p: Parameters, z: Live) -> Live:
        return (torch.tanh(_linear(p, "embed", z[0])),)

    def norm(p: Parameters, z: Live) -> Live:
        (x,) = z
        return x, _layer_norm(p, "norm", x)

    def up(p: Parameters, z: Live) -> Live:
        x_r, h = z
        return x_r, functional.gelu(_linear(p, "up", h))

    def down(p: Parameters, z: Live) -> Live:
        x_r, h = z
        return (x_r + _linear(p, "down", h),)

    def last_norm(p: Parameters, z: Live) -> Live:
        return (_layer_norm(p, "last_norm", z[0]).mean(1),)

    def head(p: Parameters, z: Live) -> Live:
        return (_linear(p, "head", z[0]),)

    return (
        Stage("embed", _both("embed"), ("x",), embed),
        Stage("norm", _both("norm"), ("x",), norm),
        Stage("up", _both("up"), ("x_r", "h"), up),
        Stage("down", ("down.weight",), ("x_r", "h"), down),
        Stage("last_norm", _both("last_norm"), ("x",), last_norm),
        Stage("head", _both("head"), ("features",), head),
    )


PRENORM = Net("prenorm", Prenorm, _prenorm_stages(), input_shape=(4, 3), classes=3)


NETS: dict[str, Net] = {
    net.name: net
    for net in (
        MLP,
        INPUT_SHORTCUT,
        IDENTITY,
        NESTED,
        PROJECTION,
        PROJECTION_FIRST,
        SMALL_RESNET,
        TOKENS,
        PRENORM,
    )
}
"""The core's networks by name."""

COOPERATIVE_NETS: dict[str, Net] = {
    net.name: net for net in (NORMED_PROJECTION, GROUPED_PROJECTION, TWIN_LINEAR, TWIN_CONV)
}
"""More networks with players of two affine modules."""

SEPARATE_NETS: dict[str, Net] = {net.name: net for net in (PROJECTION_SEPARATE, PROJECTION_FIRST_SEPARATE)}
"""Networks whose projections are players of their own."""

PLAIN_NETS: dict[str, Net] = {net.name: net for net in (MLP, CHAIN)}
"""Networks without shortcuts."""

ALL_NETS = NETS | COOPERATIVE_NETS | SEPARATE_NETS
"""Every network by name."""

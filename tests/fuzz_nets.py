"""Random small networks, each with the stages that the rules of `nets.py` give it, and networks to be refused.

A network is drawn as a list of instructions. Its `forward` runs them one after another; the stages are made from the
same list by the rules alone, with `torch.func.functional_call`. The reliability campaign draws more than tests do.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import oracle
import torch
import torch.nn.functional as F
from nets import Live, Net, Parameters, Stage
from torch import Tensor, nn
from torch.func import functional_call

from gtddp_dist import GTDDP, curvature
from gtddp_dist.errors import ModelError

NETWORKS = int(os.environ.get("GTDDP_FUZZ_NETWORKS", "25"))
"""How many networks a test draws; the first so many seeds."""

CLASSES = 3
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
}
CONVOLUTIONS: Mapping[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS: Mapping[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class Instruction:
    """`out = operation(*inputs)`; module: its name where it is one, and player: of which number."""

    out: int
    inputs: tuple[int, ...]
    operation: Callable[..., Tensor] | None = None
    module: str | None = None
    player: int | None = None


class RandomNetwork(nn.Module):
    """Runs instructions; value 0 is the input, the last one's the logits."""

    def __init__(self, modules: Mapping[str, nn.Module], instructions: list[Instruction]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.instructions = instructions

    def forward(self, x: Tensor) -> Tensor:
        values = {0: x}
        for each in self.instructions:
            operation = each.operation or self.get_submodule(str(each.module))
            values[each.out] = operation(*(values[index] for index in each.inputs))
        return values[self.instructions[-1].out]


class Draw:
    """Draws one network from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.modules: dict[str, nn.Module] = {}
        self.instructions: list[Instruction] = []
        self.dead: list[str] = []
        """Modules that are to have no gradient: their ReLU is at zero for every input."""
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.players = 0
        self.dimensions = self.random.choice((0, 0, 1, 2, 2, 2, 3))
        top = {0: 0, 1: 9, 2: 6, 3: 3}[self.dimensions]
        sizes = tuple(self.random.randint(min(3, top), top) for _ in range(self.dimensions))
        self.widths = (1, 2) if self.dimensions == 3 else (1, 2, 3, 4)
        self.shapes[0] = (self.random.choice(self.widths) + (self.dimensions == 0), *sizes)

    def network(self) -> None:
        """Draws instructions from the input to the logits."""
        value = 0
        for _ in range(self.random.randint(1, 3)):
            value = self._unit(value, depth=0)
        if self.random.random() < 0.15:  # computed, and used by nobody
            self._layer(value, activate=False)
        if self.dimensions:
            value = self._apply(lambda x: x.flatten(1), value)
        if self.random.random() < 0.3:
            value = self._activate(self._call(value, nn.Linear(self._features(value), 3), self._player()))
        self._call(value, nn.Linear(self._features(value), CLASSES, bias=self._coin()), self._player())

    def stages(self) -> tuple[Stage, ...]:
        """The stages by the rules of `nets.py`, from the list of instructions."""
        stage_of = {0: 0}  # value -> the stage that makes it
        for each in self.instructions:
            earliest = max(stage_of[index] for index in each.inputs)
            stage_of[each.out] = earliest if each.player is None else each.player
            assert stage_of[each.out] >= earliest
        last = self.instructions[-1].out
        used_until = {value: stage for value, stage in stage_of.items()}
        for each in self.instructions:
            for index in each.inputs:
                used_until[index] = max(used_until[index], stage_of[each.out])
        used_until[last] = self.players

        def live_before(stage: int) -> list[int]:
            made = [v for v, at in stage_of.items() if at < stage and used_until[v] >= stage]
            return [0] if stage == 0 else sorted(made)

        stages = []
        for number in range(self.players):
            inside = [each for each in self.instructions if stage_of[each.out] == number]
            before = live_before(number)
            after = live_before(number + 1)
            if number > 0 and used_until[0] >= number and 0 not in before:
                before = [0, *before]
            names = [each.module for each in inside if each.module is not None]
            parameters = tuple(f"{name}.{p}" for name in names for p, _ in self.modules[name].named_parameters())
            function = _stage_function(dict(self.modules), inside, before, after)
            stages.append(Stage(names[0], parameters, tuple(map(str, before)), function))
        return tuple(stages)

    # --- parts of a network

    def _unit(self, value: int, depth: int) -> int:
        kind = self.random.random()
        if depth < 2 and kind < 0.55 - 0.2 * depth:
            return self._residual(value, depth)
        if kind < 0.65 and value and depth == 0 and self._can_be_normalised(value):
            made_by = self.instructions[-1]
            assert made_by.out == value
            # By the rules it joins the layer that it directly follows.
            follows = made_by.player is not None and not str(made_by.module).startswith(("layernorm", "groupnorm"))
            return self._norm(value, cast(int, made_by.player) if follows else self._player())
        return self._layer(value, activate=True)

    def _residual(self, fork: int, depth: int) -> int:
        """A block of one to three units with an identity or a projection as its shortcut, on either side of the sum."""
        first = self._coin()  # whether the shortcut is computed before the main path
        start = len(self.instructions)
        value = fork
        for _ in range(self.random.randint(1, 2 if depth else 3) - 1):
            value = self._unit(value, depth + 1)
        value = self._layer(value, activate=False)
        main, joined = value, self.players - 1
        shortcut = fork
        if self.shapes[main] != self.shapes[fork] or self.random.random() < 0.2:
            own = len(self.instructions)
            shortcut = self._projection(fork, self.shapes[main], joined)
            if first:  # the player acts with the last layer of the main path, wherever `forward` computes it
                moved = self.instructions[own:]
                del self.instructions[own:]
                self.instructions[start:start] = moved
        pair = (main, shortcut) if self._coin() else (shortcut, main)
        out = self._apply(torch.add, *pair)
        return self._activate(out) if self._coin() else out

    def _projection(self, fork: int, shape: tuple[int, ...], player: int) -> int:
        """A layer from the shape of `fork` to another."""
        before = self.shapes[fork]
        if self.dimensions == 0:
            value = self._call(fork, nn.Linear(before[0], shape[0], bias=self._coin()), player)
            return self._norm(value, player) if self._coin() and self._can_be_normalised(value) else value
        stride = tuple(max(1, -(-a // b)) for a, b in zip(before[1:], shape[1:], strict=True))
        kernel, padding = [], []
        for a, b, step in zip(before[1:], shape[1:], stride, strict=True):
            # The smallest kernel and padding that give exactly b positions.
            pad = max(0, -(-((b - 1) * step + 1 - a) // 2))
            kernel.append(a + 2 * pad - (b - 1) * step)
            padding.append(pad)
        bias = self._coin()
        convolution = CONVOLUTIONS[self.dimensions]
        module = convolution(before[0], shape[0], tuple(kernel), stride, tuple(padding), bias=bias)  # type: ignore[arg-type]
        value = self._call(fork, module, player)
        assert self.shapes[value] == shape, (self.shapes[value], shape)
        return self._norm(value, player) if self.random.random() < 0.3 and self._can_be_normalised(value) else value

    def _layer(self, value: int, *, activate: bool) -> int:
        """A Linear or a convolution, with or without a norm and an activation behind it."""
        player, before = self._player(), self.shapes[value]
        width = self.random.choice(self.widths)
        if self.dimensions == 0:
            module: nn.Module = nn.Linear(before[0], width + 1, bias=self._coin())
        else:
            groups = self.random.choice([g for g in range(1, before[0] + 1) if before[0] % g == 0])
            small = min(before[1:])
            dilation = 2 if small >= 5 and self.random.random() < 0.2 else 1
            kernel = self.random.choice([k for k in (1, 2, 3) if dilation * (k - 1) < small])
            padding: Any = self.random.choice([0, kernel // 2, "same"])
            stride = 1 if padding == "same" else self.random.choice((1, 1, 2, 3))
            mode = "circular" if padding != "same" and 0 < padding <= small and self.random.random() < 0.2 else "zeros"
            module = CONVOLUTIONS[self.dimensions](
                before[0],
                groups * self.random.choice((1, 2)) if groups > 1 else width,
                kernel,
                stride,
                padding,
                dilation,
                groups,
                self._coin(),
                mode,  # type: ignore[arg-type]
            )
        out = self._call(value, module, player)
        name = self.instructions[-1].module
        if self.random.random() < 0.3 and self._can_be_normalised(out):
            return self._activate(self._norm(out, player))
        if activate and self.random.random() < 0.06 and module.bias is not None and name is not None:
            self.dead.append(name)
            return self._apply(F.relu, out)
        out = self._activate(out) if activate and self.random.random() < 0.85 else out
        if activate and self.dimensions and min(self.shapes[out][1:]) > 2 and self.random.random() < 0.2:
            pool = POOLS[self.dimensions]
            return self._apply(lambda x: pool(x, 2), out)
        return out

    def _can_be_normalised(self, value: int) -> bool:
        """A single number less its mean is always zero, and torch refuses it."""
        return math.prod(self.shapes[value]) > 1

    def _norm(self, value: int, player: int) -> int:
        shape, positions = self.shapes[value], math.prod(self.shapes[value][1:])
        if self.dimensions == 0 or self._coin():
            return self._call(value, nn.LayerNorm(shape), player)
        groups = self.random.choice([g for g in range(1, shape[0] + 1) if shape[0] % g == 0])
        return self._call(value, nn.GroupNorm(1 if positions == 1 else groups, shape[0]), player)

    def _activate(self, value: int) -> int:
        return self._apply(ACTIVATIONS[self.random.choice(sorted(ACTIVATIONS))], value)

    # --- instructions

    def _player(self) -> int:
        self.players += 1
        return self.players - 1

    def _call(self, value: int, module: nn.Module, player: int) -> int:
        name = f"{type(module).__name__.lower()}_{len(self.modules)}"
        self.modules[name] = module
        return self._append(Instruction(len(self.shapes), (value,), module=name, player=player), module)

    def _apply(self, operation: Callable[..., Tensor], *values: int) -> int:
        return self._append(Instruction(len(self.shapes), values, operation=operation), operation)

    def _append(self, instruction: Instruction, operation: Callable[..., Tensor]) -> int:
        with torch.no_grad():
            shape = operation(*(torch.zeros(2, *self.shapes[index]) for index in instruction.inputs)).shape[1:]
        self.instructions.append(instruction)
        self.shapes[instruction.out] = tuple(shape)
        return instruction.out

    def _features(self, value: int) -> int:
        return self.shapes[value][0]

    def _coin(self) -> bool:
        return self.random.random() < 0.5


def _stage_function(
    modules: Mapping[str, nn.Module], inside: list[Instruction], before: list[int], after: list[int]
) -> Callable[[Parameters, Live], Live]:
    def run(parameters: Parameters, live: Live) -> Live:
        values = dict(zip(before, live, strict=True))
        for each in inside:
            inputs = tuple(values[index] for index in each.inputs)
            if each.module is None:
                assert each.operation is not None
                values[each.out] = each.operation(*inputs)
            else:
                module = modules[each.module]
                own = {name: parameters[f"{each.module}.{name}"] for name, _ in module.named_parameters()}
                values[each.out] = functional_call(module, own, inputs)
        return tuple(values[index] for index in after)

    return run


def random_net(seed: int) -> Net:
    """The network of a seed, for `oracle.py`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw = Draw(seed)
        draw.network()

    def build() -> nn.Module:
        network = RandomNetwork(draw.modules, draw.instructions)
        for name in draw.dead:
            bias = network.get_submodule(name).bias
            assert isinstance(bias, Tensor)
            nn.init.constant_(bias, -100.0)
        return network

    return Net(f"random {seed}", build, draw.stages(), draw.shapes[0], CLASSES)


def described(net: Net) -> str:
    """The modules of a network and what reads what, for messages."""
    network = net.build()
    assert isinstance(network, RandomNetwork)
    lines = [
        f"{each.out} = {each.module or getattr(each.operation, '__name__', each.operation)}{each.inputs}"
        for each in network.instructions
    ]
    return "\n".join([f"{net.name}: input {net.input_shape}", str(network), *lines])


# --- a step beside the dense reference

TOLERANCE = 1e-9
STEPS = 2
BASES: Mapping[str, Mapping[str, Any]] = {
    # A gradient that is nearly zero would make the step of the last two ill-conditioned with torch's own eps.
    "SGD": {"lr": 0.1},
    "Momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "eps": 1e-3},
    "RMSprop": {"lr": 0.01, "eps": 1e-3},
}


def check_network(seed: int) -> None:
    """Takes steps with the network of a seed, options drawn with it; asserts that the weights are the reference's."""
    net, chance = random_net(seed), random.Random(-1 - seed)
    base = chance.choice(sorted(BASES))
    name, rule = "SGD" if base == "Momentum" else base, dict(BASES[base])
    mode: dict[str, Any] = {
        "rollout": chance.choice(("linear", "nonlinear")),
        "control_hessian": chance.choice(("proximal", "proximal", "replace")),
        "value_hessian": chance.choice(("batch", "block_diagonal")),
        "momentum_of": chance.choice(("step", "gradient")),
    }
    rho, samples = chance.choice((0.03, 0.5, 2.0)), chance.choice((1, 1, 2, 3))
    capture = chance.choice(("gradient", "weighted"))
    model = net.model(seed)
    used = _used(model, net.batch(1)[0])
    optimizer = GTDDP(model, getattr(curvature, name)(**rule), gauss_newton_weight=rho, capture=capture, **mode)
    assert len(optimizer.trajectory.stages) == len(net.stages)
    reference = getattr(oracle, name)(**{"mu" if key == "momentum" else key: value for key, value in rule.items()})
    options = oracle.Options(reference, gauss_newton_weight=rho, **mode)
    start = parameters = net.parameters(model)
    state = oracle.State()
    for step in range(STEPS):
        x, y = net.batch(samples, step)
        result = oracle.oracle_step(net.stages, parameters, state, x, y, options)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert optimizer.skipped_steps == 0
        # Of a layer that nobody uses there is no gradient: as with torch's optimizers it stays, undecayed.
        unused = [name for name, p in model.named_parameters() if name not in used]
        assert all(torch.equal(model.get_parameter(name), start[name]) for name in unused)
        ours, before, theirs = (
            torch.cat([values[name].detach().flatten() for name in used])
            for values in (dict(model.named_parameters()), parameters, result.parameters)
        )
        error, size = float((ours - theirs).norm()), float((theirs - before).norm())
        # Rounding is relative to the weights; all of a network may be dead, and its step zero.
        assert error <= TOLERANCE * size + 1e-14 * float(theirs.norm()), (
            f"step {step}: {error:.2e} of {size:.2e}, {mode}"
        )
        parameters, state = result.parameters, result.state


def _used(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the parameters that the output depends on."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).sum(), list(parameters.values()), allow_unused=True)
    return [name for name, grad in zip(parameters, grads, strict=True) if grad is not None]


# --- networks that are to be refused


class _Scaled(nn.Module):
    """Multiplies by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Branching(nn.Module):
    """Looks at the numbers to know what to do."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else -x


class _Twice(nn.Module):
    """Calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(torch.tanh(self.layer(x))))


class _Tied(nn.Module):
    """Two layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.layer.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(torch.tanh(self.first(x))))


class _Subclass(nn.Linear):
    """Computes something else than a Linear does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "a parameter of no layer": (_Scaled, "bad.scale"),
    "an activation with a parameter": (nn.PReLU, "module 'bad'"),
    "a branch on numbers": (_Branching, "module 'bad'"),
    "a layer called twice": (_Twice, "module 'bad.layer'"),
    "tied weights": (_Tied, "bad.layer.weight"),
    "a subclass of a layer": (lambda: _Subclass(CLASSES, CLASSES), "module 'bad'"),
    "a recurrent layer": (lambda: nn.GRUCell(CLASSES, CLASSES), "module 'bad'"),
}
"""What is wrong -> a module behind the logits, and how a message names it."""


class _WithSomethingWrong(nn.Module):
    def __init__(self, network: nn.Module, bad: nn.Module) -> None:
        super().__init__()
        self.network, self.bad = network, bad

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bad(self.network(x)))


def check_refused(seed: int, what: str) -> None:
    """Asserts that the network of a seed with something wrong in it is refused, by name, and left as it was."""
    bad, named = REFUSED[what]
    model = _WithSomethingWrong(random_net(seed).model(seed), bad().double())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attributes = set(vars(model))
    try:
        GTDDP(model, curvature.SGD(lr=0.1))
    except ModelError as error:
        assert named in str(error), f"the message does not name it: {error}"
    else:
        raise AssertionError(f"{what}: taken")
    assert set(vars(model)) == attributes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

"""From an ordinary nn.Module to a trajectory: stages, players, and cuts with their live tensors.

Layers are time steps. A *player* is a set of parametric modules that decide together: one convolution or linear
layer with its bias and the normalisation layer that directly follows it; a projection shortcut joins the last player
of the main path it is added to, unless it is asked to be a player of its own. A *stage* is one player plus the
parameter-free operations that follow it. A *cut* is the point between two stages; its *live tensors* are all tensors
that later stages still read, so inside a residual block there are two, the state and the residual state
(arXiv 2007.08880, Sec. 3.1, "augmented state").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol, TypedDict

from tabulate import tabulate
from torch import Tensor, fx, nn

from .errors import ModelError
from .players import is_supported

LiveValue = object
"""What lives at a cut: tensors, and now and then a size or another plain value that a later stage reads."""


class PlainParts(TypedDict):
    """What of a model gets the base update without feedback, as the keywords that GTDDP and ``trace`` take."""

    plain_modules: list[str]
    plain_parameters: list[str]


@dataclass(frozen=True)
class Player:
    """The modules that decide together, in the order in which they run.

    Attributes:
        index: position among the players, 0 first.
        modules: qualified module name -> module.
        shortcut: names of the modules that form a projection shortcut, a subset of ``modules``; empty where the
            shortcut is a player of its own.
        turn: its place in the whole network, from 0 up to 1: of a segment's players, too. What players do in turn goes
            by it.
    """

    index: int
    modules: Mapping[str, nn.Module]
    shortcut: tuple[str, ...] = ()
    turn: Fraction = Fraction(0)

    @property
    def name(self) -> str:
        """The qualified names joined by ``+``."""
        return "+".join(self.modules)

    def controls(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by qualified name."""
        return {
            f"{module_name}.{name}" if module_name else name: parameter
            for module_name, module in self.modules.items()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }


class StageFunction(Protocol):
    """The dynamics of a stage: live values before -> live values after, at the modules' present parameters."""

    def __call__(self, live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]: ...


@dataclass(frozen=True)
class Stage:
    """One player and the parameter-free operations that follow it.

    Attributes:
        player: who decides here.
        live_before: names of the live values of the cut before the stage.
        live_after: names of those after it.
        run: the stage's dynamics.
        reads: names, in the model, of the modules, parameters and buffers that it uses.
    """

    player: Player
    live_before: tuple[str, ...]
    live_after: tuple[str, ...]
    run: StageFunction
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Trajectory:
    """The stages of a model, in the order in which a forward sweep meets them.

    Attributes:
        stages: one per player; cut t lies before stage t, cut T at the output.
        plain_parameters: names of the trainable parameters that belong to no player (base update, no feedback).
        bind: the model's call arguments -> live values at cut 0.
        assemble: live values at the last cut -> what the model's forward returns.
        first: whether cut 0 is the model's input; not so of a later segment.
        last: whether the last cut is the model's output.
        only_training: the place at which the model's forward pass in evaluation mode is another than these stages run,
            which were traced in training mode; empty where they serve for both.
    """

    stages: tuple[Stage, ...]
    plain_parameters: tuple[str, ...]
    bind: Callable[..., tuple[LiveValue, ...]] = field(repr=False)
    assemble: Callable[[tuple[LiveValue, ...]], object] = field(repr=False)
    first: bool = True
    last: bool = True
    only_training: str = ""

    @property
    def players(self) -> tuple[Player, ...]:
        return tuple(stage.player for stage in self.stages)

    def __str__(self) -> str:
        rows = []
        for index, stage in enumerate(self.stages):
            player = stage.player
            controls = sum(p.numel() for p in player.controls().values())
            rows.append(
                (
                    index,
                    "\n".join(player.modules),
                    "\n".join(type(module).__name__ for module in player.modules.values()),
                    f"{controls:,}",
                    ", ".join(stage.live_before),
                    ", ".join(player.shortcut) or "",
                )
            )
        headers = ("stage", "player", "modules", "controls", "live tensors before", "projection shortcut")
        table = tabulate(rows, headers, tablefmt="simple_grid")
        if self.plain_parameters:
            table += "\nbase update without feedback: " + ", ".join(self.plain_parameters)
        return table


def refuse_shortcuts(trajectory: Trajectory, optimizer: str) -> None:
    """Refuse a network in which more than one tensor crosses a cut, for an optimizer whose state is one tensor.

    Raises:
        ModelError: names the first module before which that is so.
    """
    for stage in trajectory.stages:
        if len(stage.live_before) > 1:
            module = next(iter(stage.player.modules))
            raise ModelError(
                f"{optimizer} takes networks without shortcuts only: before module '{module}' "
                f"{len(stage.live_before)} tensors are live ({', '.join(stage.live_before)}); take gtddp-* for this "
                "network, or a network such as model.name=plain-net"
            )


class Traced(nn.Module):
    """A module whose forward pass runs a trajectory that is known already: a rank's segment of a model."""

    trajectory: Trajectory


def floating_tensors(live: Iterable[LiveValue]) -> list[tuple[int, Tensor]]:
    """Position and tensor of those live values that can carry a derivative."""
    return [(i, v) for i, v in enumerate(live) if isinstance(v, Tensor) and v.is_floating_point()]


def from_stages(
    model: nn.Module,
    stages: Sequence[nn.Module],
    plain_modules: Collection[str] = (),
    plain_parameters: Collection[str] = (),
) -> Trajectory:
    """The trajectory of a model whose stages are given by hand.

    Args:
        model: the model; calling it must be the same as calling the stages one after another.
        stages: modules that take and return a tensor, or the tuple of live tensors. Each one's supported modules
            are its player; they must be modules of ``model``.
        plain_modules: names of modules whose parameters get the base update without feedback.
        plain_parameters: names of single parameters that do, while their module runs as usual.

    Raises:
        ModelError: a stage has no trainable supported module, or has one that is not the model's or not its own.
    """
    check_parameters(model, plain_modules, plain_parameters)
    names = {module: name for name, module in model.named_modules()}
    names_of = {tensor: name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    plain = modules_under(model, plain_modules)
    built: list[Stage] = []
    seen: set[nn.Module] = set()
    for index, stage in enumerate(stages):
        found: dict[str, nn.Module] = {}
        for module in stage.modules():
            if module in plain or not is_supported(module) or not is_trainable(module):
                continue
            if module not in names:
                raise ModelError(
                    f"stages[{index}]: its {type(module).__name__} is not a module of the model; "
                    "build the stages from the model's own modules"
                )
            if module in seen:
                raise ModelError(f"stages[{index}]: module '{names[module]}' is in an earlier stage too")
            seen.add(module)
            found[names[module]] = module
        if not found:
            raise ModelError(
                f"stages[{index}] ({type(stage).__name__}) has no trainable Linear, convolution or normalisation "
                "layer; join it with the stage before it"
            )
        before = ("input",) if index == 0 else (f"z{index}",)
        after = ("output",) if index == len(stages) - 1 else (f"z{index + 1}",)
        reads = [names[module] for module in stage.modules() if module in names]
        reads += [names_of[p] for p in (*stage.parameters(), *stage.buffers()) if p in names_of]
        player = Player(index, found, turn=Fraction(index, len(stages)))
        built.append(Stage(player, before, after, ModuleStage(stage), tuple(reads)))
    missing = [
        name
        for name, module in model.named_modules()
        if is_supported(module) and is_trainable(module) and module not in seen and module not in plain
    ]
    if missing:
        raise ModelError(f"no stage holds module '{missing[0]}'; add it to a stage or to plain_modules")

    def bind(*args: LiveValue) -> tuple[LiveValue, ...]:
        return args

    def assemble(live: tuple[LiveValue, ...]) -> object:
        return live[0] if len(live) == 1 else live

    return Trajectory(tuple(built), without_feedback(model, seen), bind, assemble)


class ModuleStage:
    """Runs a stage that was given as a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]:
        result = self.module(live[0] if len(live) == 1 else live)
        return result if isinstance(result, tuple) else (result,)


def check_parameters(model: nn.Module, plain_modules: Collection[str], plain_parameters: Collection[str] = ()) -> None:
    """Refuse what cannot be trained: unknown names, shared or foreign parameters, nothing to train."""
    for attribute, wrapper in (("_orig_mod", "torch.compile"), ("module", type(model).__name__)):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and (attribute == "_orig_mod" or "DataParallel" in wrapper):
            raise ModelError(f"the model is wrapped ({wrapper}); give GTDDP the plain model, model.{attribute}")
    if is_supported(model):
        raise ModelError(f"the model is itself one {type(model).__name__}; put it into nn.Sequential(...)")
    modules = dict(model.named_modules())
    plain = _checked_plain(model, plain_modules, plain_parameters)
    owners: dict[nn.Parameter, str] = {}
    foreign: list[tuple[str, str]] = []
    players = 0
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            where = f"{module_name}.{name}" if module_name else name
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ModelError(f"parameter '{where}' is not initialised yet; run the lazy model once first")
            if not parameter.requires_grad:
                continue
            if parameter in owners:
                raise ModelError(
                    f"parameter '{where}' is the same tensor as '{owners[parameter]}' (weight tying): a control "
                    "can belong to one player only; untie them, or freeze it"
                )
            owners[parameter] = where
            if module in plain:
                continue
            if is_supported(module):
                players += 1
            elif where not in plain_parameters:
                foreign.append((where, module_name))
    if foreign:
        raise ModelError(_no_player(model, foreign))
    if not players:
        raise ModelError("the model has no trainable Linear, convolution or normalisation layer: nothing to train")


def _checked_plain(
    model: nn.Module, plain_modules: Collection[str], plain_parameters: Collection[str]
) -> set[nn.Module]:
    """The plain modules and everything below them, once both lists have been found to name what they may."""
    modules = dict(model.named_modules())
    for option, names in (("plain_modules", plain_modules), ("plain_parameters", plain_parameters)):
        if isinstance(names, str):
            raise ModelError(f"{option}={names!r} is one name; give a list of names, [{names!r}]")
    for name in plain_modules:
        if name not in modules:
            raise ModelError(f"plain_modules: the model has no module '{name}'")
        if not name:
            raise ModelError(
                "plain_modules: '' is the whole model; name its own parameters in plain_parameters=[...], and the "
                "modules that are to get no feedback by their names"
            )
    plain = modules_under(model, plain_modules)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in plain_parameters:
        if name not in parameters:
            raise ModelError(f"plain_parameters: the model has no parameter '{name}'")
        owner = name.rpartition(".")[0]
        if is_supported(modules[owner]) and modules[owner] not in plain:
            raise ModelError(
                f"plain_parameters: '{name}' is a control of {_described(model, owner)}, whose parameters decide "
                f"together; plain_modules=['{owner}'] takes the whole module as it is"
            )
    return plain


def _no_player(model: nn.Module, foreign: Sequence[tuple[str, str]]) -> str:
    """What is wrong with trainable parameters of unsupported modules, and the arguments that mend it at once.

    A module that torch.fx steps into is better left to it, so that the players inside stay players.
    """
    parameter, owner = foreign[0]
    modules: list[str] = []
    parameters: list[str] = []
    for where, name in foreign:
        module = model.get_submodule(name)
        if any(name == taken or name.startswith(f"{taken}.") for taken in modules):
            continue
        inside = next(module.children(), None) is not None and not fx.Tracer().is_leaf_module(module, name)
        if inside or not name:
            parameters.append(where)
        else:
            modules.append(name)
    named = ", ".join(
        f"{option}={names!r}"
        for option, names in (("plain_modules", modules), ("plain_parameters", parameters))
        if names
    )
    others = f"; {len(foreign) - 1} more parameters have no player either" if len(foreign) > 1 else ""
    return (
        f"trainable parameter '{parameter}' belongs to {_described(model, owner)}, which is no supported player "
        f"(Linear, Conv1d, Conv2d, Conv3d, BatchNorm, LayerNorm, GroupNorm){others}; "
        f"{named} gives {'them' if others else 'it'} the base update without feedback"
    )


def _described(model: nn.Module, name: str) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f"module '{name}' ({kind})" if name else f"the model itself ({kind})"


def modules_under(model: nn.Module, plain_modules: Collection[str]) -> set[nn.Module]:
    """The plain modules and everything below them."""
    return {module for name in plain_modules for module in model.get_submodule(name).modules()}


def is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def without_feedback(model: nn.Module, players: Collection[nn.Module]) -> tuple[str, ...]:
    """Names of the trainable parameters that belong to no player."""
    controls = {parameter for module in players for parameter in module.parameters(recurse=False)}
    return tuple(name for name, p in model.named_parameters() if p.requires_grad and p not in controls)

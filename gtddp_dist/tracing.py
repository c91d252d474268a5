"""Tracing an ordinary model with torch.fx: which modules decide together, and where the cuts lie."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import fx, nn

from .errors import ModelError, OptionError
from .players import is_affine, is_supported
from .trajectory import LiveValue, Player, Stage, Trajectory, check_parameters, is_trainable, without_feedback

Projection = Literal["cooperative", "separate"]
"""Whether a projection shortcut decides together with the last player of the main path, or by itself."""


def trace(
    model: nn.Module,
    plain_modules: Collection[str] = (),
    plain_parameters: Collection[str] = (),
    projection: Projection = "cooperative",
) -> Trajectory:
    """Trace an ordinary model with torch.fx and cut it into stages.

    Args:
        model: any module that torch.fx can trace in training mode.
        plain_modules: names of modules to take as they are: their parameters get the base update without feedback.
        plain_parameters: names of parameters that do so while their module is traced through: a class token, the
            position embedding of a transformer, a scale that is no layer of its own.
        projection: "cooperative": the modules of a projection shortcut join the last player of the main path they
            are added to (Sec. 3.3); "separate": they are a player and a stage of their own.

    Raises:
        OptionError: ``projection`` is neither.
        ModelError: the model cannot be traced; a module is used twice; a trainable parameter belongs to no supported
            module; there is nothing to train.
    """
    if projection not in get_args(Projection):
        choices = ", ".join(map(repr, get_args(Projection)))
        raise OptionError(f"projection={projection!r}, expected one of {choices}")
    check_parameters(model, plain_modules, plain_parameters)
    graph = _traced_graph(model, plain_modules, training=True).graph
    modules = dict(model.named_modules())
    anchors = _player_nodes(graph, modules, plain_modules)
    group = _with_normalisation(anchors)
    fixed = _of_parameters_alone(graph, model)
    shortcuts = _join_projections(graph, anchors, group, fixed) if projection == "cooperative" else set()
    groups = list({id(members): members for members in group.values()}.values())
    trajectory = _cut_into_stages(model, graph, groups, shortcuts, fixed)
    return replace(trajectory, only_training=_mode_dependence(model, plain_modules, graph))


# ----------------------------------------------------------------------------------------------------------
# Tracing


class _Tracer(fx.Tracer):
    """Stops at supported modules, plain modules and torch.nn's own; remembers where it is, for errors."""

    # Else operations on buffers would run while tracing, once and for all: a counter would count the trace, and a
    # value made from a buffer would be frozen, as a tensor left on the user's model.
    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, leaves: Collection[nn.Module], *, keep_places: bool) -> None:
        super().__init__()
        self.model, self.leaves = model, leaves
        self.inside: list[str] = []
        self.places: dict[fx.Node, str] | None = {} if keep_places else None
        """Node -> the line of the user's that made it, and its module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or is_supported(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:  # type: ignore[type-arg]
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not reached on an error, which is how the error knows its module
        return result

    def create_node(self, *args: object, **kwargs: object) -> fx.Node:
        node = super().create_node(*args, **kwargs)  # type: ignore[arg-type]
        if self.places is not None:
            self.places[node] = f"{_user_line(traceback.extract_stack())} in {self.where}"
        return node

    @property
    def where(self) -> str:
        """The module that is being traced."""
        name = self.inside[-1] if self.inside else ""
        kind = type(self.model.get_submodule(name)).__name__
        return f"module '{name}' ({kind})" if name else f"the model ({kind})"


def _traced_graph(
    model: nn.Module, plain_modules: Collection[str], *, training: bool, keep_places: bool = False
) -> _Tracer:
    """The tracer, with the graph of the forward pass in training or in evaluation mode."""
    modules = dict(model.named_modules())
    tracer = _Tracer(model, {modules[name] for name in plain_modules}, keep_places=keep_places)
    # Flags with defaults (say, return_features=False) are fixed at their default; tensors stay symbolic.
    fixed = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    was_training = [module.training for module in model.modules()]
    try:
        model.train(training)
        tracer.trace(model, concrete_args=fixed or None)
    except Exception as error:
        where = tracer.inside[-1] if tracer.inside else ""
        raise ModelError(
            f"torch.fx stopped in {tracer.where} at {_user_line(traceback.extract_tb(error.__traceback__))}: {error}\n"
            "Either take that module as it is, with the base update and no feedback for its parameters "
            f"(plain_modules=['{where or '...'}']), or give the stages by hand: "
            "GTDDP(model, stages=[stage_1, stage_2, ...]), modules that take and return the live tensors."
        ) from error
    finally:
        for module, training_before in zip(model.modules(), was_training, strict=True):
            module.training = training_before
    return tracer


def _user_line(frames: traceback.StackSummary) -> str:
    """File and line of the last frame that is not torch's own."""
    torch_folder = str(Path(torch.__file__).parent)
    own = [f for f in frames if not f.filename.startswith(torch_folder) and f.filename != __file__]
    return f"{own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else "an unknown line"


def _mode_dependence(model: nn.Module, plain_modules: Collection[str], graph: fx.Graph) -> str:
    """Where the forward pass in evaluation mode is another than `graph`, that in training mode; empty: nowhere.

    Modules that the tracing stops at do not count: they know the mode themselves whenever they run.
    """
    attributes = set(vars(model))
    try:
        different = _first_difference(model, graph, _traced_graph(model, plain_modules, training=False).graph)
        if different is None:
            return ""
        places = [
            list((_traced_graph(model, plain_modules, training=training, keep_places=True).places or {}).values())
            for training in (True, False)
        ]
    except ModelError as error:
        return f"in evaluation mode {str(error).splitlines()[0]}"
    finally:
        for name in set(vars(model)) - attributes:  # constants of these traces
            delattr(model, name)
    return max(places, key=len)[different]  # the one that has something more


def _first_difference(model: nn.Module, one: fx.Graph, other: fx.Graph) -> int | None:
    """The number of the first node in which two graphs of a model differ."""
    numbers = {node: number for graph in (one, other) for number, node in enumerate(graph.nodes)}

    def described(node: fx.Node | None) -> object:
        if node is None:
            return None
        if node.op == "get_attr":  # a constant gets another name in every trace
            target: object = operator.attrgetter(str(node.target))(model)
            if isinstance(target, torch.Tensor) and str(node.target).startswith("_tensor_constant"):
                target = (target.dtype, target.tolist())
        else:
            target = node.target
        inputs = fx.node.map_arg((node.args, node.kwargs), lambda n: f"node {numbers[n]}")
        return node.op, id(target) if isinstance(target, torch.Tensor) else repr(target), repr(inputs)

    pairs = zip_longest(one.nodes, other.nodes)
    return next((n for n, (a, b) in enumerate(pairs) if described(a) != described(b)), None)


# ----------------------------------------------------------------------------------------------------------
# Players

_SUMS = (operator.add, operator.iadd, torch.add)
_OUT_OF_PLACE: dict[object, object] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
}


def _player_nodes(
    graph: fx.Graph, modules: Mapping[str, nn.Module], plain_modules: Collection[str]
) -> dict[fx.Node, nn.Module]:
    """The graph's nodes that call a trainable supported module, in order."""
    anchors: dict[fx.Node, nn.Module] = {}
    for node in graph.nodes:
        if node.op != "call_module" or node.target in plain_modules:
            continue
        module = modules[str(node.target)]
        if is_supported(module) and is_trainable(module):
            if module in anchors.values():
                raise ModelError(
                    f"module '{node.target}' is called twice in one forward (weight tying), but a player acts "
                    f"once; make two modules of it, or name it in plain_modules=['{node.target}']"
                )
            anchors[node] = module
    return anchors


def _with_normalisation(anchors: Mapping[fx.Node, nn.Module]) -> dict[fx.Node, list[fx.Node]]:
    """Player nodes by player: a normalisation layer joins the affine module it directly follows."""
    group: dict[fx.Node, list[fx.Node]] = {}
    for node, module in anchors.items():
        source = node.all_input_nodes[0]
        if not is_affine(module) and source in anchors and is_affine(anchors[source]):
            group[source].append(node)
            group[node] = group[source]
        else:
            group[node] = [node]
    return group


def _join_projections(
    graph: fx.Graph,
    anchors: Mapping[fx.Node, nn.Module],
    group: dict[fx.Node, list[fx.Node]],
    fixed: Collection[fx.Node],
) -> set[fx.Node]:
    """Let projection shortcuts join the last player of their main path, in ``group``; returns their nodes."""
    ancestors = _ancestors(graph)
    shortcuts: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_sum(node):
            continue
        for branch, main in (node.args[::-1], node.args):
            fork, on_branch = _walk_to_fork(branch, anchors, group, fixed)
            inside = [n for n in anchors if n in ancestors[main] | {main} and n not in ancestors[fork] | {fork}]
            if len(on_branch) == 1 and is_affine(anchors[on_branch[0][0]]) and fork in ancestors[main] and inside:
                u, v = group[inside[-1]], on_branch[0]
                if u is not v:
                    shortcuts.update(v)
                    u.extend(v)
                    for member in v:
                        group[member] = u
                break
    return shortcuts


def _is_sum(node: fx.Node) -> bool:
    summing = (node.op == "call_function" and node.target in _SUMS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return summing and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)


def _walk_to_fork(
    end: fx.Node,
    anchors: Mapping[fx.Node, nn.Module],
    group: Mapping[fx.Node, list[fx.Node]],
    fixed: Collection[fx.Node],
) -> tuple[fx.Node, list[list[fx.Node]]]:
    """Walk from a summand back to where its branch opens; also the players met on the way, last first."""
    met: list[list[fx.Node]] = []
    node = end
    while len(node.users) == 1 and len(reads := [n for n in node.all_input_nodes if n not in fixed]) == 1:
        if node in anchors and all(members is not group[node] for members in met):
            met.append(group[node])
        node = reads[0]
    return node, met


def _ancestors(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        ancestors[node] = set(node.all_input_nodes).union(*(ancestors[n] for n in node.all_input_nodes))
    return ancestors


def _ordered(groups: list[list[fx.Node]], graph: fx.Graph) -> list[list[fx.Node]]:
    """Players such that each comes after those it depends on; else in the order in which they finish."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    ancestors = _ancestors(graph)
    of_node = {node: index for index, members in enumerate(groups) for node in members}
    needs = [
        {of_node[a] for node in members for a in ancestors[node] if a in of_node} - {index}
        for index, members in enumerate(groups)
    ]
    done: list[int] = []
    while len(done) < len(groups):
        ready = [i for i in range(len(groups)) if i not in done and needs[i] <= set(done)]
        if not ready:
            raise ModelError("players depend on each other in a circle; give the stages by hand: GTDDP(stages=[...])")
        done.append(min(ready, key=lambda i: max(position[node] for node in groups[i])))
    return [sorted(groups[i], key=lambda node: position[node]) for i in done]


# ----------------------------------------------------------------------------------------------------------
# Stages


def _cut_into_stages(
    model: nn.Module,
    graph: fx.Graph,
    groups: list[list[fx.Node]],
    shortcuts: Collection[fx.Node],
    fixed: Collection[fx.Node],
) -> Trajectory:
    groups = _ordered(groups, graph)
    last = len(groups)
    stage_of: dict[fx.Node, int] = {node: index for index, members in enumerate(groups) for node in members}
    for node in graph.nodes:
        if node.op == "placeholder":
            stage_of[node] = -1
        elif node.op == "output":
            stage_of[node] = last
        elif node not in fixed and node not in stage_of:
            reads = [n for n in node.all_input_nodes if n not in fixed]
            if _changes_its_input(node, model):  # not before those who read the old value...
                reads += [user for user in node.all_input_nodes[0].users if user in stage_of]
            # ...and those who read the new value not before it
            reads += [
                u for n in reads for u in n.users if u in stage_of and _changes_its_input(u, model) and u is not n
            ]
            stage_of[node] = max((stage_of[n] for n in reads), default=0)
            stage_of[node] = max(stage_of[node], 0)  # what precedes the first player belongs to its stage
    for node in reversed(graph.nodes):
        # An identity shortcut is its input by another name: as late as can be, or that tensor would be live twice.
        if _is_identity(node, model) and node.users and not any(_changes_its_input(u, model) for u in node.users):
            stage_of[node] = min(last - 1, *(stage_of[user] for user in node.users))

    def live(cut: int) -> list[fx.Node]:
        return [
            node
            for node in graph.nodes
            if node not in fixed and stage_of[node] < cut and any(stage_of[user] >= cut for user in node.users)
        ]

    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    cuts = [inputs] + [live(cut) for cut in range(1, last + 1)]
    stages = []
    for index, members in enumerate(groups):
        names = {str(node.target): model.get_submodule(str(node.target)) for node in members}
        shortcut = tuple(str(n.target) for n in members if n in shortcuts)
        player = Player(index, names, shortcut, Fraction(index, len(groups)))
        nodes = _with_fixed({node for node in graph.nodes if stage_of.get(node) == index}, fixed)
        run = _GraphStage(model, cuts[index], [node for node in graph.nodes if node in nodes], cuts[index + 1])
        used = tuple(str(node.target) for node in run.nodes if node.op in ("call_module", "get_attr"))
        stages.append(Stage(player, _tensor_names(cuts[index]), _tensor_names(cuts[index + 1]), run, used))

    signature = inspect.signature(model.forward)
    output = next(node for node in graph.nodes if node.op == "output")
    returned = _with_fixed({output}, fixed) - {output}

    def bind(*args: LiveValue, **kwargs: LiveValue) -> tuple[LiveValue, ...]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    def assemble(values: tuple[LiveValue, ...]) -> object:
        env = dict(zip(cuts[last], values, strict=True))
        _run(model, [node for node in graph.nodes if node in returned], env)
        return fx.node.map_arg(output.args[0], lambda node: cast(fx.node.Argument, env[node]))

    modules = [module for stage in stages for module in stage.player.modules.values()]
    return Trajectory(tuple(stages), without_feedback(model, modules), bind, assemble)


def _is_identity(node: fx.Node, model: nn.Module) -> bool:
    return node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.Identity


def _of_parameters_alone(graph: fx.Graph, model: nn.Module) -> set[fx.Node]:
    """Nodes that read parameters and buffers and nothing else: no samples, so no place among the live tensors.

    Every stage that needs one computes it itself. What changes in place, or is changed, keeps its place and time.
    """
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        known = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
        changed = [n for n in node.users if _changes_its_input(n, model) and n.all_input_nodes[0] is node]
        known &= not changed and not _changes_its_input(node, model) and fixed.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or known:
            fixed.add(node)
    return fixed


def _with_fixed(nodes: set[fx.Node], fixed: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes and, of the fixed ones, those that they need."""
    needed, reading = set(nodes), list(nodes)
    while reading:
        found = [n for n in reading.pop().all_input_nodes if n in fixed and n not in needed]
        needed.update(found)
        reading += found
    return needed


def _changes_its_input(node: fx.Node, model: nn.Module) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.target in _OUT_OF_PLACE or bool(node.kwargs.get("inplace", False))


def _is_last_reader(node: fx.Node) -> bool:
    """Whether nobody reads the node's first input after it: then changing it in place makes no difference.

    The next forward pass reads buffers again, so a change to one always does.
    """
    first = node.args[0] if node.args else None
    return isinstance(first, fx.Node) and all(user <= node for user in first.users) and not _is_of_buffers(first)


def _is_of_buffers(node: fx.Node) -> bool:
    reads = node.all_input_nodes
    return node.op == "get_attr" or (bool(reads) and all(_is_of_buffers(n) for n in reads))


class _GraphStage:
    """Runs one stage's nodes. In-place sums become out of place: the states at the cuts are still needed."""

    def __init__(
        self, root: nn.Module, before: Iterable[fx.Node], nodes: Sequence[fx.Node], after: Iterable[fx.Node]
    ) -> None:
        self.root, self.before, self.nodes, self.after = root, tuple(before), tuple(nodes), tuple(after)

    def __call__(self, live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]:
        env: dict[fx.Node, LiveValue] = dict(zip(self.before, live, strict=True))
        _run(self.root, self.nodes, env)
        return tuple(env[node] for node in self.after)


def _run(root: nn.Module, nodes: Iterable[fx.Node], env: dict[fx.Node, LiveValue]) -> None:
    """Run nodes in order; ``env`` holds the values they read, and then theirs."""

    def value(node: fx.Node) -> fx.node.Argument:
        return cast(fx.node.Argument, env[node])

    for node in nodes:
        args = fx.node.map_arg(node.args, value)
        kwargs = fx.node.map_arg(node.kwargs, value)
        if node.op == "get_attr":
            env[node] = operator.attrgetter(str(node.target))(root)
        elif node.op == "call_module":
            env[node] = root.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_function":
            function = _OUT_OF_PLACE.get(node.target, node.target) if _is_last_reader(node) else node.target
            env[node] = function(*args, **kwargs)  # type: ignore[operator]
        else:
            method = str(node.target)
            if method in ("add_", "mul_", "sub_") and _is_last_reader(node):
                method = method.removesuffix("_")
            env[node] = getattr(args[0], method)(*args[1:], **kwargs)


_SIZES = ("size", "dim", "numel", "ndimension")


def _tensor_names(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """The names of a cut's live tensors: all live values but sizes and what is computed from them."""

    def is_size(node: fx.Node) -> bool:
        if node.op == "call_method" and node.target in _SIZES:
            return True
        if node.target is getattr:
            return node.args[1] in ("shape", "ndim", "dtype", "device")
        return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))

    return tuple(node.name for node in nodes if not is_size(node))

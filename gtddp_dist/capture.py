"""What one step needs to remember of its forward and backward passes, by module hooks on the user's own model.

Every forward pass in training mode opens a micro-batch. For each player's module it keeps the input (which autograd
keeps anyway) and, on the way back, the derivative of the loss with respect to the module's output. Where the states
at the cuts are needed (nonlinear rollout, inspection), the model's forward runs stage by stage and keeps these too.
With `recompute` it runs in runs of stages, and inputs are made anew, a run at a time, whenever they are needed.

A micro-batch counts once a backward pass has reached it; a forward without one leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from .buffers import copy_buffers
from .errors import ModelError
from .phases import phase
from .players import Budget, SampleGradients, prepare, sample_gradients, within
from .recompute import Anew, runs_of
from .trajectory import LiveValue, Trajectory, floating_tensors

Cotangents = Callable[[Tensor, int], Tensor]
"""(model output (B, C), index of its first sample in the step) -> cotangents at the output, (K, B, C)."""
Stream = Literal["gradient", "sampled", "exact"]
"""Which derivative: of the loss, or vector-Jacobian products of curvature cotangents."""
Place = nn.Module | tuple[int, int]
"""Where a derivative was taken: a module's output, or (cut, position among its live values)."""


@dataclass
class MicroBatch:
    """One forward pass and its backward pass.

    Attributes:
        samples: how many samples it had.
        inputs: module -> its input, detached; only sums over each row where it was let go.
        derivatives: for each stream, place -> derivative; its rows are the samples, or K of them for each sample.
        formed: for each stream, module -> S by parameter name, but for the loss's factor, where it was formed at once.
            Of the module's derivative only sums over each row are kept then: they tell whether all was finite.
        let_go: modules whose input was let go for good.
        live: cut -> its live values, detached: of all cuts where states are kept, of those between runs where these are
            recomputed (and of those inside the run that the step is at, where both are so).
        versions: cut -> the version counters of its live tensors when they were kept.
        anew: module -> its input, of those of the run that was made anew last.
        run: number of the run that the step has made anew last; None for none.
        contexts: with `recompute`, of the start of every run.
        buffers: with `recompute`, what the model's buffers were at the start.
        context: autocast and random state of the forward pass, to run it again; None unless states are kept.
        edges: where in the graph curvature cotangents are to be known, until they are.
    """

    samples: int
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    derivatives: dict[Stream, dict[Place, Tensor]] = field(default_factory=lambda: {"gradient": {}})
    formed: dict[Stream, dict[nn.Module, dict[str, Tensor]]] = field(default_factory=dict)
    let_go: set[nn.Module] = field(default_factory=set)
    live: dict[int, tuple[LiveValue, ...]] = field(default_factory=dict)
    versions: dict[int, list[int]] = field(default_factory=dict)
    context: ForwardContext | None = None
    edges: dict[Place, GradientEdge] = field(default_factory=dict)
    anew: dict[nn.Module, Tensor] = field(default_factory=dict)
    run: int | None = None
    contexts: list[ForwardContext] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)


@dataclass
class ForwardContext:
    """Autocast settings and random state at the start of a forward pass; advances as it is used."""

    device: torch.device
    autocast: bool
    autocast_dtype: torch.dtype
    cpu_state: Tensor
    device_state: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> ForwardContext:
        return cls(
            device,
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Run a part of the forward pass once more: same masks, same precision; the outer random state is kept."""
        devices = [self.device] if self.device_state is not None else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast),
        ):
            torch.set_rng_state(self.cpu_state)
            if self.device_state is not None:
                torch.cuda.set_rng_state(self.device_state, self.device)
            yield
            self.cpu_state = torch.get_rng_state()
            if self.device_state is not None:
                self.device_state = torch.cuda.get_rng_state(self.device)


_active: WeakKeyDictionary[nn.Module, Capture] = WeakKeyDictionary()


class Capture:
    """Hooks on a model. At most one is attached to a model at a time: attaching detaches the one before.

    Args:
        model: the model.
        trajectory: its stages.
        keep_states: run the forward stage by stage and keep live values and their derivatives.
        recompute: run it in runs of stages, and make what they have made anew where it is needed.
        skip_weight_grads: players' parameters get no ``grad`` (their weighted gradient is formed later, once).
        cotangents: streams besides the loss gradient: what makes their cotangents from the model's output.
        gram_memory: megabytes that forming S may take; None: as many as it takes.
        forms: whether S of a module is formed as soon as its derivative is there.
    """

    def __init__(
        self,
        model: nn.Module,
        trajectory: Trajectory,
        *,
        keep_states: bool,
        recompute: bool,
        skip_weight_grads: bool,
        cotangents: Mapping[Stream, Cotangents],
        gram_memory: float | None,
        forms: Callable[[SampleGradients], bool],
    ) -> None:
        self.model = model
        self.trajectory = trajectory
        self.keep_states = keep_states
        self.skip_weight_grads = skip_weight_grads
        self.cotangents = cotangents
        self.gram_memory = gram_memory
        self._forms = forms
        self._player_of = {m: player for player in trajectory.players for m in player.modules.values()}
        self.names = {m: n for player in trajectory.players for n, m in player.modules.items()}
        self.runs = runs_of(len(trajectory.stages)) if recompute else []
        self._last_cut = len(trajectory.stages)
        kept = {run.start for run in self.runs} if recompute else set(range(self._last_cut if keep_states else 0))
        self._kept_cuts = kept | ({self._last_cut} if keep_states else set())
        self._run_of = {
            module: number
            for number, run in enumerate(self.runs)
            for stage in run
            for module in trajectory.stages[stage].player.modules.values()
        }
        self.attached = False
        self._micro_batches: list[MicroBatch] = []
        self._open: MicroBatch | None = None
        self._anew: MicroBatch | None = None
        """That of a run which is being made anew."""
        self.latest: MicroBatch | None = None
        """That of the latest forward pass that counts."""
        self._samples_seen = 0
        self._in_cotangent_pass = False
        self._hidden: dict[nn.Module, list[nn.Parameter]] = {}
        self._handles: list[RemovableHandle] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def attach(self) -> None:
        """Put the hooks on the model."""
        if self.model in _active:
            _active[self.model].detach()
        _active[self.model] = self
        self._handles.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for module in self.names:
            if self.skip_weight_grads:
                self._handles.append(module.register_forward_pre_hook(self._hide_parameters))
            self._handles.append(module.register_forward_hook(self._after_module))
        self._handles.append(self.model.register_forward_hook(self._after_forward, always_call=True))
        if self.keep_states or self.runs:
            self.model.forward = self._staged_forward
        self.attached = True

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.keep_states or self.runs:
            self.model.__dict__.pop("forward", None)
        self.attached = False
        self.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Capture:
        # A copy of the model (for averaging, say) must not feed this optimizer: its hooks do nothing.
        copied = Capture(
            copy.deepcopy(self.model, memo),
            self.trajectory,
            keep_states=False,
            recompute=False,
            skip_weight_grads=False,
            cotangents={},
            gram_memory=None,
            forms=self._forms,
        )
        copied.names = {}
        return copied

    def new_budget(self) -> Budget | None:
        """An unused one."""
        return None if self.gram_memory is None else Budget(self.gram_memory)

    def take(self) -> list[MicroBatch]:
        """The micro-batches since the last call, in order of their backward passes; forgets them."""
        taken = self._micro_batches
        self._forget_anew(taken)
        self.clear()
        return taken

    def forget(self, micro_batch: MicroBatch) -> None:
        """Forget one of them."""
        self._micro_batches = [known for known in self._micro_batches if known is not micro_batch]
        if self.latest is micro_batch:
            self.latest = None

    def clear(self) -> None:
        """Forget everything captured."""
        self._micro_batches = []
        self._samples_seen = 0
        self.latest = None

    # ------------------------------------------------------------------------------------------------------
    # Forward

    def _before_forward(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._open = None
        self._forget_anew(self._micro_batches)
        if not (self.attached and model.training and torch.is_grad_enabled()):
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            raise ModelError("the model was called without a tensor argument: the number of samples is unknown")
        self.latest = self._open = MicroBatch(tensors[0].shape[0])
        if self.runs:
            self._open.buffers = copy_buffers(model)
        if self.keep_states:
            self._open.context = ForwardContext.now(tensors[0].device)
        elif self.cotangents and not self.trajectory.first:
            for position, tensor in floating_tensors(args):
                self._open.edges[0, position] = get_gradient_edge(tensor)

    def _hide_parameters(self, module: nn.Module, args: object) -> None:
        """The module's weight gradient is formed later, weighted: autograd need not form the plain one."""
        if self._open is not None or self._anew is not None:
            self._hidden[module] = [p for p in module.parameters(recurse=False) if p.requires_grad]
            for parameter in self._hidden[module]:
                parameter.requires_grad_(False)

    def _show_parameters(self, module: nn.Module) -> None:
        for parameter in self._hidden.pop(module, ()):
            parameter.requires_grad_(True)

    def _after_module(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        self._show_parameters(module)
        if self._anew is not None:
            self._keep_anew(self._anew, module, args[0])
            required = self.skip_weight_grads and torch.is_grad_enabled() and not output.requires_grad
            return self._requiring(output) if required else None  # as in the forward pass
        micro_batch = self._open
        if micro_batch is None:
            return None
        name = self.names[module]
        if module in micro_batch.inputs:
            raise ModelError(
                f"module '{name}' was called twice in one forward (weight tying): a player acts once; "
                f"make two modules of it, or name it in plain_modules=['{name}']"
            )
        if output.shape[0] != micro_batch.samples:
            raise ModelError(
                f"module '{name}' saw {output.shape[0]} rows where the batch has {micro_batch.samples} samples: "
                f"samples must stay in dimension 0; else name it in plain_modules=['{name}']"
            )
        micro_batch.inputs[module] = _row_sums(args[0]) if self.runs else args[0].detach()
        if not output.requires_grad:
            if not self.skip_weight_grads:
                return None  # a frozen control; the step says so
            output = self._requiring(output)
        self._watch(micro_batch, module, output)
        return output

    def _requiring(self, output: Tensor) -> Tensor:
        required: Tensor = _Require.apply(output, self._anchor.to(output.device))
        return required

    def _watch(self, micro_batch: MicroBatch, place: Place, tensor: Tensor) -> None:
        def keep(grad: Tensor) -> None:
            if self._in_cotangent_pass:
                return
            if all(known is not micro_batch for known in self._micro_batches):
                self._micro_batches.append(micro_batch)
            if isinstance(place, nn.Module):
                grad = self._form(micro_batch, "gradient", place, grad)
                micro_batch.anew.pop(place, None)  # another backward pass makes it anew
                if not self.cotangents and place in micro_batch.formed.get("gradient", {}):
                    self._let_go(micro_batch, place)
            derivatives = micro_batch.derivatives["gradient"]
            derivatives[place] = derivatives[place] + grad if place in derivatives else grad.detach()

        tensor.register_hook(keep)
        if self.cotangents:
            # Now: an in-place activation after the module will make `tensor` another node of the graph.
            micro_batch.edges[place] = get_gradient_edge(tensor)

    def _form(self, micro_batch: MicroBatch, stream: Stream, module: nn.Module, grad: Tensor) -> Tensor:
        """Form S of a module where that is best done now; what is kept of the derivative."""
        if self.runs and module not in micro_batch.anew:
            return grad  # nothing behind it has had autograd make the run anew yet
        inputs = micro_batch.anew[module] if self.runs else micro_batch.inputs[module]
        if module in micro_batch.let_go:
            raise ModelError(
                f"a second backward pass reached module '{self.names[module]}', whose data were let go after the "
                "first: call the first one with retain_graph=True, or add up the losses"
            )
        with within(self.new_budget()):
            if not self._forms(sample_gradients(module, inputs, grad)):
                return grad
        dtype = next(module.parameters(recurse=False)).dtype
        with (
            torch.no_grad(),
            torch.autocast(grad.device.type, enabled=False),
            phase("gram", self._player_of[module]),
        ):
            x, y = prepare(module, inputs.to(dtype)), grad.to(dtype)
            with within(self.new_budget()):
                made = sample_gradients(module, x, y).formed_at_once()
            known = micro_batch.formed.setdefault(stream, {}).get(module)
            if known is not None:
                made = {name: known[name] + each for name, each in made.items()}
            micro_batch.formed[stream][module] = made
            return _row_sums(y)

    def _let_go(self, micro_batch: MicroBatch, module: nn.Module) -> None:
        """Free a module's input, unless there may be another backward pass through the same graph."""
        if not self.runs and not torch._C._autograd._get_current_graph_task_keep_graph():
            micro_batch.inputs[module] = _row_sums(micro_batch.inputs[module])
            micro_batch.let_go.add(module)

    def _after_forward(self, model: nn.Module, args: object, output: object) -> None:
        for module in list(self._hidden):  # the forward stopped half-way with an error
            self._show_parameters(module)
        micro_batch, self._open = self._open, None
        if micro_batch is None or output is None:
            return
        self._check_versions(micro_batch)
        if self.trajectory.last and self.cotangents:
            for stream, make in self.cotangents.items():
                if not isinstance(output, Tensor) or output.ndim != 2:
                    raise ModelError(
                        f"terminal='{stream}' needs a model that returns logits of shape (samples, classes)"
                    )
                with torch.autocast(output.device.type, enabled=False):
                    made = make(output.detach(), self._samples_seen).to(output.dtype)
                self.pull_back(micro_batch, stream, [output], [[cotangent] for cotangent in made])
            micro_batch.edges.clear()
        self._samples_seen += micro_batch.samples

    def pull_back(
        self,
        micro_batch: MicroBatch,
        stream: Stream,
        outputs: Sequence[Tensor],
        cotangents: Iterable[Sequence[Tensor]],
    ) -> None:
        """Vector-Jacobian products of curvature cotangents: backward passes that form no weight gradient.

        Args:
            micro_batch: whose.
            stream: the stream that they are of.
            outputs: the tensors at the end of the trajectory, with their graph.
            cotangents: K times a cotangent for each of these.
        """
        products: dict[Place, list[Tensor]] = {}
        self._in_cotangent_pass = True
        try:
            with torch.autocast(outputs[0].device.type, enabled=False):
                for cotangent in cotangents:
                    pulled = torch.autograd.grad(
                        outputs, list(micro_batch.edges.values()), cotangent, retain_graph=True, allow_unused=True
                    )
                    for place, product in zip(micro_batch.edges, pulled, strict=True):
                        if product is not None:
                            products.setdefault(place, []).append(product.detach())
        finally:
            self._in_cotangent_pass = False
        micro_batch.derivatives[stream] = {
            place: rows[0] if len(rows) == 1 else torch.stack(rows, dim=1).flatten(0, 1)
            for place, rows in products.items()
        }

    # ------------------------------------------------------------------------------------------------------
    # Stage by stage

    def _staged_forward(self, *args: LiveValue, **kwargs: LiveValue) -> object:
        if self._open is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        if self.trajectory.only_training and not all(module.training for module in self.model.modules()):
            raise ModelError(
                f"the forward pass depends on training mode at {self.trajectory.only_training}, and a part of "
                "the model is in evaluation mode: the nonlinear rollout and recompute run what was traced in training "
                "mode. Use a module there that knows its mode by itself, such as nn.Dropout"
            )
        micro_batch, live = self._open, self.trajectory.bind(*args, **kwargs)
        for run in self.runs or [range(self._last_cut)]:
            live = self._arrived(micro_batch, run.start, live)
            live = self._checkpointed(micro_batch, run, live) if self.runs else self._through(micro_batch, run, *live)
        return self.trajectory.assemble(self._arrived(micro_batch, self._last_cut, live))

    def _checkpointed(self, micro_batch: MicroBatch, run: range, live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]:
        """A run in the forward pass, of which autograd keeps nothing but what goes in."""
        again = self._again(micro_batch)
        micro_batch.contexts.append(ForwardContext.now(next(self.model.parameters()).device))
        after: tuple[LiveValue, ...] = checkpoint(
            self._through,
            micro_batch,
            run,
            *live,
            use_reentrant=False,
            early_stop=False,  # a layer's input is known when the layer has run, not when autograd has all it wants
            context_fn=lambda: (contextlib.nullcontext(), again),
        )
        return after

    def _through(self, micro_batch: MicroBatch, run: range, *live: LiveValue) -> tuple[LiveValue, ...]:
        """The stages of a run, in the forward pass or anew."""
        for cut in run:
            live = live if cut == run.start else self._arrived(micro_batch, cut, live)
            live = self.trajectory.stages[cut].run(live)
        return live

    def _arrived(self, micro_batch: MicroBatch, cut: int, live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]:
        """At a cut: what is kept of it; the live values that go on."""
        if self._anew is None:
            live = self._watched(micro_batch, cut, live) if self.keep_states else live
            keeps = cut in self._kept_cuts
        else:
            keeps = self.keep_states and not torch.is_grad_enabled()  # for the step, not for autograd
        if keeps:
            micro_batch.live[cut] = tuple(v.detach() if isinstance(v, Tensor) else v for v in live)
            micro_batch.versions[cut] = [tensor._version for _, tensor in floating_tensors(live)]
        return live

    def _watched(self, micro_batch: MicroBatch, cut: int, live: tuple[LiveValue, ...]) -> tuple[LiveValue, ...]:
        """Live values of which the derivatives to come are those of later stages alone."""
        passed = list(live)
        for position, tensor in floating_tensors(live):
            if tensor.requires_grad:
                if tensor.shape[:1] != (micro_batch.samples,):
                    raise ModelError(
                        f"live tensor '{self._live_name(cut, position)}' at cut {cut} has shape {tuple(tensor.shape)}: "
                        f"the {micro_batch.samples} samples must stay in dimension 0"
                    )
                # An identity of its own: earlier readers of the tensor keep the old node.
                identity = tensor.view_as(tensor)
                self._watch(micro_batch, (cut, position), identity)
                passed[position] = identity
        return tuple(passed)

    def _check_versions(self, micro_batch: MicroBatch) -> None:
        for cut, versions in micro_batch.versions.items():
            for (position, tensor), version in zip(floating_tensors(micro_batch.live[cut]), versions, strict=True):
                if tensor._version != version:
                    raise ModelError(
                        f"live tensor '{self._live_name(cut, position)}' at cut {cut} was changed in place by a later "
                        "stage; the nonlinear rollout, or recompute, still needs it: use inplace=False there"
                    )

    # ------------------------------------------------------------------------------------------------------
    # Runs made anew

    def inputs(self, micro_batches: Sequence[MicroBatch], module: nn.Module) -> list[Tensor]:
        """The module's input in each; with `recompute`, its whole run is made anew, and the one before is let go."""
        self.recall(micro_batches, module)
        return [(m.anew if self.runs else m.inputs)[module] for m in micro_batches]

    def recall(self, micro_batches: Sequence[MicroBatch], module: nn.Module) -> None:
        """With `recompute`, have the inputs, and where states are kept the live values, of the module's run there: as
        far as the step needs them, and before any control of the run changes."""
        number = self._run_of.get(module)
        if number is None:
            return
        modules = [module for module, run in self._run_of.items() if run == number]
        stale = [
            m
            for m in micro_batches
            if m.run != number and (self.keep_states or any(self._lacks(m, o) for o in modules))
        ]
        self._forget_anew(stale)  # of all of them first
        for micro_batch in stale:
            run, context = self.runs[number], copy.copy(micro_batch.contexts[number])
            with phase("recompute"), torch.no_grad(), context.again(), self._again(micro_batch):
                self._through(micro_batch, run, *micro_batch.live[run.start])
            micro_batch.run = number
            self._check_versions(micro_batch)

    def _again(self, micro_batch: MicroBatch) -> Anew:
        def enter() -> None:
            self._forget_anew([micro_batch])
            self._anew = micro_batch

        def leave() -> None:
            self._anew = None
            for module in list(self._hidden):  # it stopped half-way with an error
                self._show_parameters(module)

        return Anew(self.model, micro_batch.buffers, enter, leave)

    def _keep_anew(self, micro_batch: MicroBatch, module: nn.Module, inputs: Tensor) -> None:
        if torch.is_grad_enabled() or self._lacks(micro_batch, module):
            micro_batch.anew[module] = inputs.detach()

    def _lacks(self, micro_batch: MicroBatch, module: nn.Module) -> bool:
        """Whether the step needs the module's input, S not being formed already."""
        return bool(self.cotangents) or module not in micro_batch.formed.get("gradient", {})

    def _forget_anew(self, micro_batches: Sequence[MicroBatch]) -> None:
        for micro_batch in micro_batches:
            micro_batch.anew.clear()
            if micro_batch.run is not None:
                for cut in self.runs[micro_batch.run]:
                    if cut not in self._kept_cuts:
                        micro_batch.live.pop(cut, None)
                        micro_batch.versions.pop(cut, None)
            micro_batch.run = None

    def _live_name(self, cut: int, position: int) -> str:
        stages = self.trajectory.stages
        names = stages[cut].live_before if cut < len(stages) else stages[-1].live_after
        return names[position] if position < len(names) else f"value {position}"


def _row_sums(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(1).sum(1)


class _Require(torch.autograd.Function):
    """Makes the first module's output require a gradient although neither its input nor its parameters do."""

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.mark_dirty(output)  # no copy: "changed in place", by nothing
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:  # type: ignore[no-untyped-def]
        return None, None

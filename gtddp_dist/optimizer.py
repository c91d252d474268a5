"""GTDDP: the optimizer. One step: capture -> Gram matrices -> backward sweep -> forward sweep -> update."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Literal, cast

import torch
from torch import Tensor, nn

from . import nonfinite
from .capture import Capture, Cotangents, MicroBatch, Stream
from .collectives import ALONE, Collectives
from .curvature import Controls, Curvature
from .diagnostics import StepFacts, figures
from .errors import OptionError, StepError
from .groups import RecursionGroup, StepSamples, recursion_groups
from .inspection import ExplicitPolicy, ExplicitValue, Inspector
from .nonfinite import Source
from .options import PAPER, Options
from .phases import in_phase
from .players import SampleGradients, is_affine
from .step import Grads, Step
from .sweep import Value
from .terminal import exact_cotangents, sampled_cotangents
from .tracing import Projection, trace
from .trajectory import Player, Traced, from_stages


class GTDDP(torch.optim.Optimizer):
    """Differential dynamic programming as a re-weighting of per-sample gradients (arXiv 2007.08880).

    Use it as any torch optimizer::

        opt = GTDDP(model, curvature=curvature.Adam(lr=1e-3), gauss_newton_weight=0.03)
        for x, y in loader:
            opt.zero_grad(); F.cross_entropy(model(x), y).backward(); opt.step()

    With ``gauss_newton_weight=0`` it is the base optimizer.

    Args:
        model: an ordinary module; torch.fx finds its stages (``print(opt.trajectory)``).
        curvature: the base optimizer: ``curvature.SGD``, ``RMSprop``, ``Adam``, ``AdamW``.
        param_groups: as torch's; every trainable parameter of the model in exactly one. None: one group.
        stages: the stages by hand, for a model that cannot be traced: modules that take and return live tensors.
        plain_modules: names of modules whose parameters get the base update without feedback.
        plain_parameters: names of single parameters that do, while their module is traced through.
        projection: "cooperative": a projection shortcut joins the last player of its main path; "separate": it is a
            player and a stage of its own.
        grad_scaler: the GradScaler, needed only if ``unscale_`` is called before the step.
        inspect: keep what :meth:`value` and :meth:`policy` need (small nets).
        options: see :class:`gtddp_dist.options.Options`.

    Raises:
        ModelError: the model cannot be taken; the message names the module.
        OptionError: a bad option, or options that do not go together.
    """

    # GradScaler then leaves the unscaling to step(), which also knows the captured derivatives.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        *,
        param_groups: Iterable[dict[str, object]] | None = None,
        stages: Sequence[nn.Module] | None = None,
        plain_modules: Collection[str] = (),
        plain_parameters: Collection[str] = (),
        projection: Projection = "cooperative",
        grad_scaler: torch.amp.GradScaler | None = None,
        inspect: bool = False,
        **options: object,
    ) -> None:
        try:
            self.options = Options(**options)  # type: ignore[arg-type]
        except TypeError as error:
            raise OptionError(f"{error}; the options are {', '.join(Options.__dataclass_fields__)}") from None
        self.options = self.options.on_base(curvature.gauss_newton_weight)
        self.curvature = curvature.cooperating(self.options.cooperation)
        if self.curvature.stream != "gradient" and self.options.statistics == "value":
            raise OptionError(
                "fisher='sampled' and statistics='value' exclude each other: factors are made of sampled labels or of "
                "the value function"
            )
        if isinstance(model, Traced):
            if stages is not None or plain_modules or plain_parameters or projection != "cooperative":
                raise OptionError(
                    "stages, plain_modules, plain_parameters and projection say how a model is traced; this segment "
                    "is traced already: give them to gtddp_dist.initialize"
                )
            self.trajectory = model.trajectory
        elif stages is None:
            self.trajectory = trace(model, plain_modules, plain_parameters, projection)
        elif projection != "cooperative":
            raise OptionError(f"projection={projection!r} with stages=[...]: the stages say who decides together")
        else:
            self.trajectory = from_stages(model, stages, plain_modules, plain_parameters)
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = {p: name for name, p in self._parameters.items()}
        trainable = list(self._parameters.values())
        groups = [{"params": trainable}] if param_groups is None else list(param_groups)
        super().__init__(groups, curvature.defaults())
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        missing = [name for name, p in self._parameters.items() if p not in self._group_of]
        if missing:
            raise OptionError(f"param_groups: trainable parameter '{missing[0]}' is in none; add it, or freeze it")
        if len({group.get("maximize", False) for group in self.param_groups}) > 1:
            raise OptionError("param_groups: maximize must be the same in all of them")
        self.steps = 0
        """Steps taken."""
        self.skipped_steps = 0
        """Steps refused for a non-finite gradient, in all."""
        self.skipped_in_a_row = 0
        """Steps refused since the last one taken."""
        self.source: Source | None = None
        """What the last refused step had made that was not finite, as far as it was found."""
        self.first_sample = 0
        """Index, within the step, of this process's first sample: it keys the sampled labels."""
        self.forms_early: Literal["all", "norms", "none"] = "all"
        """Of which modules per-sample gradients are formed in the backward pass, where that takes less memory and no
        more time. Ranks form those of norms alone: others wait for their backward passes."""
        self._check_recompute(inspect)
        if self.options.gram_memory is not None and self.curvature.needs_samples:
            raise OptionError(
                f"gram_memory={self.options.gram_memory!r} is for SGD, RMSprop, Adam and AdamW: "
                f"{type(self.curvature).__name__} needs all of a layer's inputs, rotated; take gram_memory=None and a "
                "smaller scope"
            )
        self._grad_scaler = grad_scaler
        self._inspect = inspect
        self._inspector: Inspector | None = None
        self._facts = StepFacts()
        self._device = trainable[0].device
        self._capture = Capture(
            model,
            self.trajectory,
            keep_states=inspect or (self.options.feedback and self.options.rollout == "nonlinear"),
            recompute=self.options.recompute,
            skip_weight_grads=self.options.capture == "weighted",
            cotangents=self._cotangents(),
            gram_memory=self.options.gram_memory,
            forms=self._forms,
        )
        for player in self.trajectory.players:
            self.curvature.check(self._controls(player))
        self._smallest_first = sorted(
            self.trajectory.players, key=lambda player: sum(p.numel() for p in player.controls().values())
        )
        self._capture.attach()

    def _check_recompute(self, inspect: bool) -> None:
        if not self.options.recompute:
            return
        if inspect:
            raise OptionError(
                "recompute=True and inspect=True: value functions and policies are looked at after the step, with "
                "what its samples were made of, which recompute lets go; take recompute=False"
            )
        plain = self.trajectory.plain_parameters
        if plain and self.options.feedback and self.options.rollout == "nonlinear":
            raise OptionError(
                f"recompute=True and rollout='nonlinear': parameter '{plain[0]}' belongs to no player and takes its "
                "step before the rollout, so that nothing can be made anew as it was; take recompute=False or "
                "rollout='linear'"
            )

    def _forms(self, samples: SampleGradients) -> bool:
        """Whether a module's per-sample gradients are formed during the backward pass."""
        affine = is_affine(samples.module)
        if not self.options.feedback or self.forms_early == "none" or (affine and self.forms_early == "norms"):
            return False
        scope = self.options.scope
        return self.curvature.forms(samples, scope if isinstance(scope, int) else len(samples.inputs))

    def _cotangents(self) -> dict[Stream, Cotangents]:
        """Streams besides the loss gradient that the sweep or the curvature needs."""
        make: dict[Stream, Cotangents] = {
            "sampled": lambda logits, first: sampled_cotangents(
                logits, self.options.seed, self.steps, self.first_sample + first
            ),
            "exact": lambda logits, first: exact_cotangents(logits),
        }
        needed = {self.options.stream} if self.options.feedback else set()
        if self.curvature.needs_samples:
            needed.add(self.curvature.stream)
        return {stream: make[stream] for stream in make if stream in needed}

    @classmethod
    def paper(cls, model: nn.Module, curvature: Curvature, **options: object) -> GTDDP:
        """The paper's own algorithm (options.PAPER); ``options`` override it, and take the constructor's others."""
        return cls(model, curvature, **{**PAPER, "cooperation": curvature.of_paper, **options})  # type: ignore[arg-type]

    def detach(self) -> None:
        """Take the hooks off the model; the optimizer cannot step afterwards."""
        self._capture.detach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also forgets what backward passes left since the last step."""
        super().zero_grad(set_to_none)
        self._capture.clear()

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """As torch's, at construction only: the players are fixed from then on."""
        if hasattr(self, "_group_of"):
            raise OptionError("parameters cannot be added to a built GTDDP; build a new one")
        super().add_param_group(param_group)
        for parameter in cast(list[nn.Parameter], self.param_groups[-1]["params"]):
            if parameter not in self._names:
                raise OptionError("param_groups: holds a tensor that is no trainable parameter of the model")

    # ------------------------------------------------------------------------------------------------------
    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the backward passes since the last one.

        A step whose gradient is not finite is refused: nothing changes, ``skipped_steps`` counts it.

        Args:
            closure: as torch's: clears gradients, computes the loss and its gradient, returns the loss.

        Raises:
            StepError: there was no backward pass, a control was frozen or lost its gradient, the micro-batches do
                not divide into recursion groups, GradScaler was used in a way that hides the scale. Nothing changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        micro_batches = self._capture.take()
        self.check(micro_batches)
        loss_scale = self._loss_scale()
        sizes = [m.samples for m in micro_batches]
        groups = recursion_groups(sizes, self.options.scope, self.options.replica_groups, self.options.loss_reduction)
        samples = sum(sizes) if self.options.loss_reduction == "mean" else 1
        work = self.new_step(micro_batches, groups, samples, loss_scale)
        self.fill_gradients(work)
        finite = self.finite(work)
        # Decompositions of factors fail on what is not finite. All else takes it, and the device is waited for once.
        if (not self.options.feedback or self.curvature.needs_samples) and not bool(finite):
            return self.refuse(loss, work)
        if self.options.feedback and not bool(finite & values_finite(work.backward())):
            return self.refuse(loss, work)
        work.forward()
        self.finish(work)
        return loss

    # ------------------------------------------------------------------------------------------------------
    # Its parts, which a rank of several calls by itself

    @property
    def capture(self) -> Capture:
        """What the hooks remember."""
        return self._capture

    def new_step(
        self,
        micro_batches: Sequence[MicroBatch],
        groups: list[RecursionGroup],
        samples: int,
        loss_scale: float | Tensor = 1.0,
        ranks: Collectives = ALONE,
    ) -> Step:
        """The working data of a step.

        Args:
            micro_batches: what was captured, of the whole step or of a part of it.
            groups: their recursion groups.
            samples: by how many the loss of a sample was divided, over all ranks and micro-batches.
            loss_scale: by what it was multiplied.
            ranks: the other replicas and segments.
        """
        return Step(
            self._model,
            self.trajectory,
            self.options,
            self.curvature,
            self._controls,
            StepSamples(micro_batches, samples * self._sign / loss_scale, self._capture),
            groups,
            self._device,
            ranks,
            inspect=self._inspect,
            budget=self._capture.new_budget(),
        )

    @property
    def _sign(self) -> float:
        return -1.0 if self.param_groups[0].get("maximize", False) else 1.0

    def finite(self, work: Step) -> Tensor:
        """Whether all that was captured, and the gradient, is finite, and GradScaler has found nothing else; true or
        false on the device."""
        finite = all_finite([*derivatives(work.samples.micro_batches), *work.grads.values()])
        return finite & (self.found_inf == 0).to(finite.device) if hasattr(self, "found_inf") else finite

    def refuse(self, loss: float | None = None, work: Step | None = None) -> float | None:
        """Count a step that was not taken, and look in ``work`` for why; returns ``loss``."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.source = None if work is None else self.source_in(work.samples.micro_batches, (), [work.facts])
        return loss

    def source_in(
        self, micro_batches: Iterable[MicroBatch], losses: Iterable[Tensor], facts: Sequence[StepFacts]
    ) -> Source | None:
        """What a step has made that is not finite."""
        return nonfinite.in_step(self._model, self._capture.names, micro_batches, losses, facts)

    def finish(self, work: Step) -> None:
        """Count a step that was taken, and keep what can be asked of it."""
        self.steps += 1
        self.skipped_in_a_row = 0
        self._facts = work.facts
        if self._inspect:
            self._inspector = Inspector(
                self.trajectory,
                work.samples,
                work.groups,
                work.policies,
                work.values,
                work.base_steps,
                work.stream,
            )

    def check(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Refuse a step that cannot be taken (see :meth:`step`)."""
        if not self._capture.attached:
            raise StepError("step() of a GTDDP whose hooks are off: a newer GTDDP was built on the same model")
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                raise StepError(f"parameter '{name}' was frozen after this GTDDP was built; build a new one")
        if not micro_batches:
            raise StepError(
                "step() without a backward pass since the last step() or zero_grad(): nothing was captured. Call the "
                "model itself, in training mode and not under no_grad, then loss.backward(), then step()"
            )
        if self.options.capture == "weighted":
            return
        for player in self.trajectory.players:
            for name, parameter in player.controls().items():
                module = player.modules[name.rpartition(".")[0]]
                if parameter.grad is None and any(module in m.derivatives["gradient"] for m in micro_batches):
                    raise StepError(
                        f"parameter '{name}' has no gradient, though a backward pass reached its module: call "
                        "loss.backward() on the whole graph, and clear gradients with zero_grad() alone"
                    )

    def _loss_scale(self) -> float | Tensor:
        """The GradScaler's scale of the captured derivatives; 1 without one. Unscales ``p.grad``."""
        if not hasattr(self, "found_inf"):
            return 1.0
        if self.options.capture == "weighted":
            raise StepError("GradScaler looks for overflow in p.grad, which capture='weighted' does not fill")
        scale = cast(Tensor | None, getattr(self, "grad_scale", None))
        if scale is not None:
            torch._foreach_div_([p.grad for p in self._parameters.values() if p.grad is not None], scale)
            return scale
        if self._grad_scaler is None:
            raise StepError("GradScaler.unscale_ was called before step(): give GTDDP(grad_scaler=scaler)")
        return self._grad_scaler.get_scale()

    @in_phase("weight-gradient")
    def mean_gradient(self, work: Step, player: Player) -> Grads:
        """A player's part in the mean gradient with capture="weighted", of the samples of ``work``; nothing where it is
        formed with the correction."""
        samples = None if work.absorbs(player) else work.samples.of(player, "gradient")
        if samples is None:
            return {}
        if self.options.feedback and work.stream == "gradient":
            samples = work.form(player, samples)
        return samples.weighted(work.mean_weights())

    @in_phase("weight-gradient")
    def fill_gradients(self, work: Step, formed: Mapping[int, Grads] | None = None) -> None:
        """The step's mean gradient by parameter name, clipped; left out where it is formed with the correction.

        With several ranks the gradient is summed over replicas, and clipped by its norm over all segments.

        Args:
            work: the step.
            formed: with capture="weighted", :meth:`mean_gradient` of every player as far as it was formed before.
        """
        grads: dict[str, Tensor] = {}
        weighted = self.options.capture == "weighted"
        for name in self.trajectory.plain_parameters if weighted else self._parameters:
            grad = self._parameters[name].grad
            if grad is not None:
                grads[name] = grad if self._sign > 0 else -grad
        if weighted:
            for player in self.trajectory.players:
                grads.update(self.mean_gradient(work, player) if formed is None else formed.get(player.index, {}))
        if not weighted and len(work.groups) > 1 and self.options.feedback and work.ranks is ALONE:
            work.clip = self._user_factor(work, grads)
        if work.ranks.replicas > 1:
            grads = dict(zip(grads, work.ranks.sum_over_replicas(list(grads.values())), strict=True))
        if self.options.clip_norm is not None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
            if work.ranks is not ALONE:
                norm = work.ranks.sum_over_segments(norm.double() ** 2).sqrt().to(norm.dtype)
            factor = (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
            grads = {name: grad * factor for name, grad in grads.items()}
            work.clip = work.clip * factor
        work.grads = grads

    def _user_factor(self, work: Step, grads: Mapping[str, Tensor]) -> float:
        """By what common factor ``p.grad`` was changed since the backward passes (1: not at all).

        Only several recursion groups need to know: their own gradients come from what was captured.

        Raises:
            StepError: it was changed in another way, which the groups' gradients cannot follow.
        """
        for player in self._smallest_first:
            samples = work.samples.of(player, "gradient")
            captured = {} if samples is None else samples.weighted(work.mean_weights())
            ours = [captured[name].flatten().double() for name in captured]
            theirs = [grads[name].flatten().double() for name in captured]
            if not ours or not bool(torch.cat(ours).any()):
                continue  # nothing reached it: look at the next
            expected, found = torch.cat(ours), torch.cat(theirs)
            factor = float(expected @ found / (expected @ expected))
            if float((found - factor * expected).norm()) > 0.02 * float(found.norm()):  # bfloat16 rounds at 0.004
                raise StepError(
                    f"p.grad of player '{player.name}' is no multiple of what the backward passes left; with several "
                    "recursion groups (scope, replica_groups) it may be scaled as a whole only, as by clip_grad_norm_"
                )
            return factor if abs(factor - 1) > 1e-4 else 1.0
        return 1.0

    def _controls(self, player: Player | None) -> Controls:
        parameters = (
            {name: self._parameters[name] for name in self.trajectory.plain_parameters}
            if player is None
            else player.controls()
        )
        return Controls(
            parameters,
            {name: self.state[p] for name, p in parameters.items()},
            {name: self._group_of[p] for name, p in parameters.items()},
            player,
        )

    # ------------------------------------------------------------------------------------------------------
    # Looking at it

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step: see :func:`gtddp_dist.diagnostics.figures`. Waits for the device."""
        return {**figures(self._facts.totals()), **self.ages(), "skipped_steps": float(self.skipped_steps)}

    def ages(self) -> dict[str, float]:
        """Oldest age, in steps, of curvature factors and bases; nothing where there are none."""
        oldest: dict[str, float] = {}
        for player in self.trajectory.players:
            for name, age in self.curvature.ages(self._controls(player)).items():
                oldest[name] = max(age, oldest.get(name, 0.0))
        return oldest

    def value(self, cut: int, group: int = 0) -> ExplicitValue:
        """V_z and V_zz at a cut in the last step, in explicit form (needs ``inspect=True``; small nets)."""
        return self._inspected().value(cut, group)

    def sample_value(self, cut: int, group: int = 0) -> Value:
        """The same as the sweep carries it, in sample space: c and M (needs ``inspect=True``; nets of any size)."""
        return self._inspected().sample_value(cut, group)

    def policy(self, player: int, group: int = 0) -> ExplicitPolicy:
        """k and K of a player in the last step, in explicit form (needs ``inspect=True``; small nets)."""
        return self._inspected().policy(player, group)

    def _inspected(self) -> Inspector:
        if self._inspector is None:
            raise OptionError("nothing to inspect: build GTDDP(inspect=True) and take a step with feedback first")
        return self._inspector

    # ------------------------------------------------------------------------------------------------------
    # Saving it

    def extra_state(self) -> dict[str, int]:
        """What the state holds besides tensors by parameter: counters."""
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_extra_state(self, state: Mapping[str, int]) -> None:
        """Restore :meth:`extra_state`."""
        self.steps = state["steps"]
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def state_dict(self) -> dict[str, object]:
        """torch's, with the counters under ``"gtddp"``."""
        return {**super().state_dict(), "gtddp": self.extra_state()}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """As torch's; also takes a base optimizer's own state_dict."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "gtddp"})
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        if "gtddp" in state_dict:
            self.load_extra_state(cast(dict[str, int], state_dict["gtddp"]))

    def __repr__(self) -> str:
        return f"GTDDP({self.curvature!r}, {asdict(self.options)}, players={len(self.trajectory.stages)})"


def values_finite(values: Sequence[Value]) -> Tensor:
    """Whether value functions are; where those at the first cut are, all were. True or false on the device."""
    return all_finite([v.curvature.sum() + v.slope.sum() for v in values])


def derivatives(micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
    """All that was captured on the way back."""
    return [d for m in micro_batches for stream in m.derivatives.values() for d in stream.values()]


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all of them are, without a look at the device: one number, true or false."""
    if not tensors:
        return torch.ones((), dtype=torch.bool)

    def finite(order: float) -> Tensor:
        norms = torch._foreach_norm(list(tensors), order)
        return torch.isfinite(torch.stack([n.to(norms[0].device, torch.float64) for n in norms])).all()

    # On a CPU, where a look costs nothing, the sum of squares is ten times as fast; it overflows where values do not.
    if all(tensor.device.type == "cpu" for tensor in tensors) and (found := finite(2.0)):
        return found
    return finite(math.inf)

"""GTDDP: the optimizer. One step: capture -> Gram matrices -> backward sweep -> forward sweep -> update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .capture import Capture, MicroBatch, Stream
from .curvature import Curvature
from .curvature.base import State
from .diagnostics import Gains, StepFacts
from .errors import OptionError, StepError
from .groups import PlayerSamples, RecursionGroup, StepSamples, recursion_groups
from .inspection import BaseStep, ExplicitPolicy, ExplicitValue, Inspector
from .options import PAPER, Options
from .players import Scale
from .sweep import Policy, Value, backward_stage, forward_stage, terminal_value
from .terminal import sampled_cotangent
from .tracing import trace
from .trajectory import LiveValue, Player, floating_tensors, from_stages

Grads = dict[str, Tensor]
"""Something for every control of a player (or every parameter), by qualified name."""


@dataclass
class _Step:
    """One step's working data. Nothing here outlives the step, unless it is inspected.

    Attributes:
        samples: the captured micro-batches, player by player.
        groups: the recursion groups.
        clip: factor by which the gradient was clipped.
        statistics: new curvature statistics by parameter name, not yet in force.
        policies: player index -> one policy a group.
        values: for each cut, one value a group.
        facts: what diagnostics are made of.
        base_steps: player index -> R^-1 p and R^-1 of each group; only for inspection.
    """

    samples: StepSamples
    groups: list[RecursionGroup]
    clip: float | Tensor = 1.0
    statistics: dict[str, State] = field(default_factory=dict)
    policies: dict[int, list[Policy]] = field(default_factory=dict)
    values: dict[int, list[Value]] = field(default_factory=dict)
    facts: StepFacts = field(default_factory=StepFacts)
    base_steps: dict[int, list[BaseStep]] = field(default_factory=dict)


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
        grad_scaler: torch.amp.GradScaler | None = None,
        inspect: bool = False,
        **options: object,
    ) -> None:
        try:
            self.options = Options(**options)  # type: ignore[arg-type]
        except TypeError as error:
            raise OptionError(f"{error}; the options are {', '.join(Options.__dataclass_fields__)}") from None
        self.curvature = curvature
        self.trajectory = trace(model, plain_modules) if stages is None else from_stages(model, stages, plain_modules)
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
        if len({group["maximize"] for group in self.param_groups}) > 1:
            raise OptionError("param_groups: maximize must be the same in all of them")
        self.steps = 0
        """Steps taken."""
        self.skipped_steps = 0
        """Steps refused for a non-finite gradient, in all."""
        self.skipped_in_a_row = 0
        """Steps refused since the last one taken."""
        self._grad_scaler = grad_scaler
        self._inspect = inspect
        self._inspector: Inspector | None = None
        self._facts = StepFacts()
        self._stream: Stream = "gradient" if self.options.terminal == "loss_gradient" else "cotangent"
        self._feedback = self.options.gauss_newton_weight != 0
        self._device = trainable[0].device
        self._capture = Capture(
            model,
            self.trajectory,
            keep_states=inspect or (self._feedback and self.options.rollout == "nonlinear"),
            skip_weight_grads=self.options.capture == "weighted",
            cotangent=self._cotangent if self._feedback and self._stream == "cotangent" else None,
        )
        self._capture.attach()

    @classmethod
    def paper(cls, model: nn.Module, curvature: Curvature, **options: object) -> GTDDP:
        """The paper's own algorithm (options.PAPER); ``options`` override it, and take the constructor's others."""
        return cls(model, curvature, **{**PAPER, **options})  # type: ignore[arg-type]

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
        self._check(micro_batches)
        loss_scale = self._loss_scale()
        sizes = [m.samples for m in micro_batches]
        groups = recursion_groups(sizes, self.options.scope, self.options.replica_groups, self.options.loss_reduction)
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        per_sample = (sum(sizes) if self.options.loss_reduction == "mean" else 1.0) * sign
        work = _Step(StepSamples(micro_batches, per_sample / loss_scale), groups)
        grads = self._gradients(work, sign, loss_scale)
        if not self._finite(micro_batches, grads):
            return self._refuse(loss)
        if self._feedback:
            self._backward_sweep(work, grads)
            if not _all_finite([v.curvature.sum() + v.slope.sum() for v in work.values.get(0, [])]):
                return self._refuse(loss)
        self._forward_sweep(work, grads)
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
                self._stream,
            )
        return loss

    def _check(self, micro_batches: Sequence[MicroBatch]) -> None:
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

    def _gradients(self, work: _Step, sign: float, loss_scale: float | Tensor) -> Grads:
        """The step's mean gradient by parameter name, clipped; left out where the correction will hold it."""
        grads: Grads = {}
        weighted = self.options.capture == "weighted"
        for name in self.trajectory.plain_parameters if weighted else self._parameters:
            grad = self._parameters[name].grad
            if grad is not None:
                grads[name] = grad if sign > 0 else -grad
        if not weighted:
            for player in self.trajectory.players:
                for name in player.controls().keys() - grads.keys():
                    module = player.modules[name.rpartition(".")[0]]
                    if any(module in m.derivatives["gradient"] for m in work.samples.micro_batches):
                        raise StepError(
                            f"parameter '{name}' has no gradient, though a backward pass reached its module: call "
                            "loss.backward() on the whole graph, and clear gradients with zero_grad() alone"
                        )
        if weighted:
            weights_N = torch.cat([self._weights(group) for group in work.groups])
            for player in self.trajectory.players:
                samples = work.samples.of(player, "gradient")
                if samples is not None and not self._absorbs(player):
                    grads.update(samples.weighted(weights_N))
        if self.options.clip_norm is not None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
            work.clip = (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
            grads = {name: grad * work.clip for name, grad in grads.items()}
        return grads

    def _weights(self, group: RecursionGroup) -> Tensor:
        """What the group's samples weigh in the step's mean gradient, shape (B,)."""
        return torch.full((group.samples,), group.share * group.weight, dtype=torch.float64, device=self._device)

    def _absorbs(self, player: Player) -> bool:
        """Whether one weighted gradient serves the base step and the correction of this player."""
        return (
            self.options.capture == "weighted"
            and self.options.clip_norm is None
            and (self._stream == "gradient" or not self._feedback)
            and all(
                self.curvature.absorbs_correction(self._group_of[p], self.options.momentum_of)
                for p in player.controls().values()
            )
        )

    def _finite(self, micro_batches: Sequence[MicroBatch], grads: Grads) -> bool:
        if hasattr(self, "found_inf") and bool(self.found_inf):
            return False
        derivatives = [d for m in micro_batches for stream in m.derivatives.values() for d in stream.values()]
        return _all_finite([*derivatives, *grads.values()])

    def _refuse(self, loss: float | None) -> float | None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        return loss

    # ------------------------------------------------------------------------------------------------------
    # Backward

    def _backward_sweep(self, work: _Step, grads: Grads) -> None:
        """Value functions from the output to the input, a policy for every player on the way (Eq. 13-19)."""
        options = self.options
        like = torch.zeros((), dtype=torch.float64, device=self._device)
        block_diagonal = options.value_hessian == "block_diagonal"
        values = [
            terminal_value(g.samples, g.weight, options.rho(g.samples), block_diagonal, like) for g in work.groups
        ]
        work.values[len(self.trajectory.stages)] = values
        for player in reversed(self.trajectory.players):
            samples = work.samples.of(player, self._stream)
            metric = self._sweep_metric(work, grads, player, samples, values)
            if samples is not None and metric is not None:
                steps = []
                for group, value in zip(work.groups, values, strict=True):
                    gains = self._gains(work, grads, player, samples.rows(group.rows), group, metric)
                    policy, value, report = backward_stage(
                        value,
                        gains.gram,
                        gains.response,
                        proximal=options.control_hessian == "proximal",
                        guard=options.replace_guard,
                    )
                    steps.append((policy, value))
                    work.facts.add(player.index, gains, report, group)
                work.policies[player.index] = [policy for policy, _ in steps]
                values = [value for _, value in steps]
            work.values[player.index] = values

    def _sweep_metric(
        self, work: _Step, grads: Grads, player: Player, samples: PlayerSamples | None, values: list[Value]
    ) -> dict[str, tuple[Mapping[str, Tensor], Scale]] | None:
        """For every control the statistics of the sweep's metric, and R^-1; None where there are none yet."""
        if self.options.metric == "current" and self.curvature.adaptive:
            statistics_of = {name: grads[name] for name in player.controls() if name in grads}
            if self.options.statistics == "value" and samples is not None:
                # Q_u of Eq. 14 without the control cost: the mean gradient plus what V_z' holds beyond it.
                slopes_N = torch.cat([g.share * v.slope for g, v in zip(work.groups, values, strict=True)])
                beyond = samples.weighted(slopes_N)
                statistics_of = {name: grad + beyond[name] for name, grad in statistics_of.items()}
            self._new_statistics(work, statistics_of)
        metric: dict[str, tuple[Mapping[str, Tensor], Scale]] = {}
        for name, parameter in player.controls().items():
            statistics = work.statistics.get(name, self.state[parameter])
            inverse = self.curvature.inverse_metric(statistics, self._group_of[parameter])
            if inverse is None:
                return None
            metric[name] = (statistics, inverse)
        return metric

    def _new_statistics(self, work: _Step, grads: Mapping[str, Tensor]) -> None:
        for name, grad in grads.items():
            parameter = self._parameters[name]
            work.statistics[name] = self.curvature.statistics(
                parameter, grad, self.state[parameter], self._group_of[parameter]
            )

    def _gains(
        self,
        work: _Step,
        grads: Grads,
        player: Player,
        samples: PlayerSamples,
        group: RecursionGroup,
        metric: Mapping[str, tuple[Mapping[str, Tensor], Scale]],
    ) -> Gains:
        """H = S R^-1 S^T, q = S R^-1 p and p^T R^-1 p of one group, p = a g + e its own direction."""
        inverse = {name: scale for name, (_, scale) in metric.items()}
        gram = samples.gram(inverse)
        controls = player.controls()
        affine = {
            name: self.curvature.direction(p, self.state[p], self._group_of[p], metric[name][0])
            for name, p in controls.items()
        }
        shares = {a for a, _ in affine.values()}
        formed = len(work.groups) == 1 and controls.keys() <= grads.keys()
        if not formed and self._stream == "gradient" and len(shares) == 1 and not self._inspect:
            # g = G^T omega 1 and S = G: the group's own gradient need not be formed.
            ones = torch.full_like(gram[0], group.weight * shares.pop()) * work.clip
            response, along = gram @ ones, ones @ gram @ ones
            if any(e is not None for _, e in affine.values()):
                rest = {n: torch.zeros_like(controls[n]) if e is None else e for n, (_, e) in affine.items()}
                scaled = {name: inverse[name] * e for name, e in rest.items()}
                of_rest = samples.inner(scaled)
                response, along = response + of_rest, along + 2 * (ones @ of_rest) + _dot(rest, scaled)
            return Gains(gram, response, along)
        if not formed:
            own = work.samples.of(player, "gradient")
            if own is None:
                raise StepError(f"player '{player.name}': the curvature cotangent reached it, the loss did not")
            weights = torch.full_like(gram[0], group.weight) * work.clip
            grads = own.rows(group.rows).weighted(weights)
        direction = {name: a * grads[name] if e is None else e + a * grads[name] for name, (a, e) in affine.items()}
        scaled = {name: inverse[name] * p for name, p in direction.items()}
        if self._inspect:
            work.base_steps.setdefault(player.index, []).append(BaseStep(scaled, inverse))
        return Gains(gram, samples.inner(scaled), _dot(direction, scaled))

    # ------------------------------------------------------------------------------------------------------
    # Forward

    def _forward_sweep(self, work: _Step, grads: Grads) -> None:
        """Controls from the input to the output (Eq. 20), each applied as soon as it is known."""
        self._update(work, self.trajectory.plain_parameters, grads, {})
        nonlinear = self._feedback and self.options.rollout == "nonlinear"
        phis = [torch.zeros(g.samples, dtype=torch.float64, device=self._device) for g in work.groups]
        with self._second_forward() if nonlinear else contextlib.nullcontext():
            lives = [m.live[0] for m in work.samples.micro_batches] if nonlinear else []
            for player, stage in zip(self.trajectory.players, self.trajectory.stages, strict=True):
                weights = []
                for index, policy in enumerate(work.policies.get(player.index, ())):
                    v, moved = forward_stage(policy, phis[index])
                    weights.append(v)
                    work.facts.apply(player.index, index, v, forward_stage(policy, torch.zeros_like(moved))[0])
                    if not nonlinear:
                        phis[index] = phis[index] + moved
                self._update_player(work, player, grads, weights)
                if nonlinear:
                    for index, micro_batch in enumerate(work.samples.micro_batches):
                        assert micro_batch.context is not None
                        with micro_batch.context.again():
                            lives[index] = stage.run(lives[index])
                    phis = self._real_feedback(work, player.index + 1, lives)
        work.facts.finish(work.groups, phis, self.options, self._stream)

    def _update_player(self, work: _Step, player: Player, grads: Grads, weights: list[Tensor]) -> None:
        controls = tuple(player.controls())
        if self._absorbs(player):
            samples = work.samples.of(player, "gradient")
            if samples is not None:
                combined = [
                    self._weights(g) + (g.share * weights[i] if weights else 0.0) for i, g in enumerate(work.groups)
                ]
                self._update(work, controls, samples.weighted(torch.cat(combined)), {})
            return
        correction: Grads = {}
        if weights:
            samples = work.samples.of(player, self._stream)
            assert samples is not None
            correction = samples.weighted(torch.cat([g.share * v for g, v in zip(work.groups, weights, strict=True)]))
        self._update(work, controls, grads, correction)

    def _update(self, work: _Step, names: Collection[str], grads: Grads, correction: Grads) -> None:
        """The base step of some parameters; those that no gradient reached stay, as with torch.optim."""
        names = [name for name in names if name in grads]
        self._new_statistics(work, {name: grads[name] for name in names if name not in work.statistics})
        for name in names:
            parameter = self._parameters[name]
            self.curvature.update(
                parameter,
                grads[name],
                correction.get(name),
                self.state[parameter],
                self._group_of[parameter],
                work.statistics.pop(name),
                self.options.momentum_of,
            )

    def _real_feedback(self, work: _Step, cut: int, lives: list[tuple[LiveValue, ...]]) -> list[Tensor]:
        """phi^b = <s_z^b, zhat^b - z^b>, summed over the live tensors of a cut, for every group."""
        parts = []
        for micro_batch, live in zip(work.samples.micro_batches, lives, strict=True):
            phi = torch.zeros(micro_batch.samples, dtype=torch.float64, device=self._device)
            derivatives = micro_batch.derivatives[self._stream]
            for position, moved in floating_tensors(live):
                slope = derivatives.get((cut, position))
                if slope is not None:
                    kept = cast(Tensor, micro_batch.live[cut][position])
                    change = moved.float() - kept.float() if moved.dtype.itemsize < 4 else moved - kept
                    phi = phi + (change * slope).flatten(1).sum(1).double()
            parts.append(phi * work.samples.factors[self._stream])
        phi_N = torch.cat(parts)
        return [phi_N[group.rows] for group in work.groups]

    @contextlib.contextmanager
    def _second_forward(self) -> Iterator[None]:
        """A forward pass that leaves the model's buffers (running statistics) as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        try:
            yield
        finally:
            for buffer, kept in buffers:
                buffer.copy_(kept)

    def _cotangent(self, logits: Tensor, first: int) -> Tensor:
        return sampled_cotangent(logits, self.options.seed, self.steps, first)

    # ------------------------------------------------------------------------------------------------------
    # Looking at it

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step: see :meth:`gtddp_dist.diagnostics.StepFacts.figures`. Waits for the device."""
        return {**self._facts.figures(), "skipped_steps": float(self.skipped_steps)}

    def value(self, cut: int, group: int = 0) -> ExplicitValue:
        """V_z and V_zz at a cut in the last step, in explicit form (needs ``inspect=True``; small nets)."""
        return self._inspected().value(cut, group)

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


def _dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(x[name] * y[name]).sum().double() for name in x]).sum()


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """One look at the device for all of them."""
    if not tensors:
        return True
    norms = torch._foreach_norm(list(tensors))
    return bool(torch.isfinite(torch.stack([n.to(norms[0].device, torch.float64) for n in norms])).all())

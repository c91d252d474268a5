"""One GT-DDP step: Gram matrices, backward sweep, forward sweep, update, player by player.

The recursion itself is in `sweep`; here it meets the players' samples, metrics and controls. A :class:`Step` holds
one step's working data; nothing of it outlives the step, unless it is inspected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .buffers import unchanged_buffers
from .capture import Stream
from .collectives import ALONE, Collectives
from .curvature import Controls, Curvature, Evidence, Metric
from .curvature.base import Begun, State, Statistics
from .diagnostics import Gains, StepFacts
from .errors import StepError
from .groups import RecursionGroup, StepSamples
from .options import Options
from .phases import in_phase, phase
from .players import Budget, PlayerSamples, within
from .sweep import Policy, Value, backward_stage, forward_stage, terminal_value
from .trajectory import LiveValue, Player, Trajectory, floating_tensors

Grads = dict[str, Tensor]


@dataclass
class Step:
    """One step's working data on one rank: of its micro-batches, or of one of them.

    In one process :meth:`backward` and :meth:`forward` are the step. A rank of several takes them apart: value
    functions and feedback come from its neighbours, and the parts run when their messages are there.

    Attributes:
        model: whose buffers a second forward pass must leave alone.
        trajectory, options, curvature: the optimizer's.
        controls_of: a player's controls, or with None those of the parameters that belong to none.
        samples: the captured micro-batches, player by player.
        groups: the recursion groups.
        ranks: the other replicas and segments.
        grads: the step's mean gradient by parameter name, clipped; of some players it is formed with the correction.
        clip: factor by which the gradient was clipped.
        inspect: keep what explicit policies need.
        statistics: new curvature statistics by parameter name, not yet in force.
        gains: player index -> what it brings to each group's recursion, where that is known before the sweep.
        policies: player index -> one policy a group.
        values: for each cut, one value a group.
        weights: player index -> every group's v, one after another, to be averaged over the groups.
        base_steps: player index -> each group's R^-1 p and metric (only for inspection).
        facts: what diagnostics are made of.
        budget: of memory, for forming S and Gram matrices.
    """

    model: nn.Module
    trajectory: Trajectory
    options: Options
    curvature: Curvature
    controls_of: Callable[[Player | None], Controls]
    samples: StepSamples
    groups: list[RecursionGroup]
    device: torch.device
    ranks: Collectives = ALONE
    grads: Grads = field(default_factory=dict)
    clip: float | Tensor = 1.0
    inspect: bool = False
    statistics: dict[str, State] = field(default_factory=dict)
    gains: dict[int, list[Gains]] = field(default_factory=dict)
    policies: dict[int, list[Policy]] = field(default_factory=dict)
    values: dict[int, list[Value]] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    base_steps: dict[int, list[BaseStep]] = field(default_factory=dict)
    facts: StepFacts = field(default_factory=StepFacts)
    budget: Budget | None = None

    @property
    def stream(self) -> Stream:
        """The stream whose derivatives are the rows of S."""
        return self.options.stream

    @property
    def rows(self) -> int:
        """Rows of S that a sample has."""
        return self.samples.rows_per_sample(self.stream) if self.options.feedback else 1

    @property
    def one_group(self) -> bool:
        """Whether one recursion goes over all samples of the step, those of other ranks and micro-batches included."""
        return len(self.groups) == 1 and self.groups[0].share == 1

    def absorbs(self, player: Player) -> bool:
        """Whether one weighted gradient serves the base step and the correction of this player."""
        return (
            self.options.capture == "weighted"
            and self.options.clip_norm is None
            and (self.stream == "gradient" or not self.options.feedback)
            and self.curvature.absorbs_correction(self.controls_of(player), self.options.momentum_of)
        )

    def mean_weights(self) -> Tensor:
        """What every sample weighs in the step's mean gradient, shape (N,)."""
        return torch.cat(
            [torch.full((g.samples,), g.share * g.weight, dtype=torch.float64, device=self.device) for g in self.groups]
        )

    # ------------------------------------------------------------------------------------------------------
    # Backward

    def terminal(self) -> list[Value]:
        """The value function at the output, for every group (Prop. 5 and 6)."""
        like = torch.zeros((), dtype=torch.float64, device=self.device)
        diagonal = self._by_sample and self.rows == 1
        return [
            terminal_value(g.samples * self.rows, g.weight, self.options.rho(g.samples), diagonal, like)
            for g in self.groups
        ]

    @in_phase("gram")
    def prepare(self) -> None:
        """Gram matrices of all players, where the sweep's metric does not depend on this step."""
        for player in self.trajectory.players:
            samples = self.samples.of(player, self.stream)
            controls = self.controls_of(player)
            metric = self.curvature.metric(controls, self._latest(controls))
            if samples is not None and metric is not None:
                self.gains[player.index] = self._of_groups(player, samples, metric)

    @in_phase("sweep")
    def backward(self, after: list[Value] | None = None) -> list[Value]:
        """Value functions from the last cut to the first, a policy for every player on the way (Eq. 13-19).

        Args:
            after: the value function at the last cut, for every group; None where that is the output.

        Returns:
            That at the first cut.
        """
        values = self.terminal() if after is None else after
        self.values[len(self.trajectory.stages)] = values
        for player in reversed(self.trajectory.players):
            values = self._swept(player, values)
            self.values[player.index] = values
        return values

    @in_phase("sweep")
    def _swept(self, player: Player, values: list[Value]) -> list[Value]:
        gains = self.gains.get(player.index)
        if gains is None:
            samples = self.samples.of(player, self.stream)
            metric = self._sweep_metric(player, samples, values)
            if samples is None or metric is None:
                return values
            gains = self._of_groups(player, samples, metric)
        policies, before = [], []
        for group, value, own in zip(self.groups, values, gains, strict=True):
            policy, value_before, report = backward_stage(
                value,
                own.gram,
                own.response,
                proximal=self.options.control_hessian == "proximal",
                guard=self.options.replace_guard,
                block=self.rows if self._by_sample else None,
            )
            policies.append(policy)
            before.append(value_before)
            self.facts.add(player.index, own, report, group)
        self.policies[player.index] = policies
        return before

    @property
    def _by_sample(self) -> bool:
        return self.options.value_hessian == "block_diagonal"

    @in_phase("gram")
    def _of_groups(self, player: Player, samples: PlayerSamples, metric: Metric) -> list[Gains]:
        samples = self.form(player, samples)
        with within(self.budget):
            return [self._gains(player, self._fitting(player, samples, g), g, metric) for g in self.groups]

    def _fitting(self, player: Player, samples: PlayerSamples, group: RecursionGroup) -> PlayerSamples:
        """A group's samples, whose Gram matrix the budget has room for.

        Raises:
            StepError: it has not; how much all players need.
        """
        rows = group.rows_of(self.rows)
        own = samples.rows(rows)
        if self.budget is not None and own.least_memory() > self.budget.half:
            others = [self.samples.of(each, self.stream) for each in self.trajectory.players]
            least = max(each.rows(rows).least_memory() for each in others if each is not None)
            raise StepError(
                f"gram_memory={self.options.gram_memory} megabytes are too few for a recursion of {group.samples} "
                f"samples (player '{player.name}'): {math.ceil(2 * least / 1e4) / 100} are the fewest; take as many, "
                "or a smaller scope"
            )
        return own

    @in_phase("gram")
    def form(self, player: Player, samples: PlayerSamples) -> PlayerSamples:
        """S of a player where forming it pays: for the Gram matrices, and kept for all S^T w of the step."""
        if self.options.recompute:
            return samples
        rows = max(group.samples for group in self.groups) * self.rows
        with within(self.budget):
            formed = self.curvature.formed(samples, rows)
        return self.samples.keep_formed(player, self.stream, formed)

    @in_phase("curvature")
    def _sweep_metric(self, player: Player, samples: PlayerSamples | None, values: list[Value]) -> Metric | None:
        """The metric of the sweep at one player; None where there are no statistics yet."""
        controls = self.controls_of(player)
        if self.options.metric == "current" and self.curvature.adaptive:
            self._new_statistics(player, samples, values)
        return self.curvature.metric(controls, self._latest(controls))

    def _latest(self, controls: Controls) -> Statistics:
        """Statistics as far as they are known: of this step, else of the steps before."""
        return {name: self.statistics.get(name, controls.state[name]) for name in controls.parameters}

    @in_phase("curvature")
    def _new_statistics(
        self, player: Player, samples: PlayerSamples | None = None, values: list[Value] | None = None
    ) -> None:
        """This step's curvature statistics of a player; with ``values``, of the value function where options say so."""
        evidence = self._evidence(player, samples, values)
        if evidence is not None:
            self.statistics.update(self.curvature.statistics(self.controls_of(player), evidence))

    def _evidence(
        self, player: Player, samples: PlayerSamples | None = None, values: list[Value] | None = None
    ) -> Evidence | None:
        """What they are made of; None where no gradient reached the player."""
        controls = self.controls_of(player)
        gradient = {name: self.grads[name] for name in controls.parameters if name in self.grads}
        of_value = self.options.statistics == "value" and values is not None and samples is not None
        if of_value:
            # Q_u of Eq. 14 without the control cost: the mean gradient plus what V_z' holds beyond it.
            slopes = torch.cat([g.share * v.slope for g, v in zip(self.groups, values or (), strict=True)])
            beyond = self._summed(cast(PlayerSamples, samples).weighted(slopes))
            gradient = {name: grad + beyond[name] for name, grad in gradient.items()}
        by_sample = None  # with an absorbed correction there is no gradient yet, and curvatures of samples need none
        if self.curvature.needs_samples and (gradient or self.absorbs(player)):
            by_sample = self.samples.of(player, self.curvature.stream)
            if of_value and by_sample is not None:
                ratios = torch.cat([v.slope / g.weight for g, v in zip(self.groups, values or (), strict=True)])
                by_sample = by_sample.plus(cast(PlayerSamples, samples), ratios)
        reached = bool(gradient) or by_sample is not None
        return Evidence(gradient, by_sample, self.ranks) if reached else None

    def _gains(self, player: Player, samples: PlayerSamples, group: RecursionGroup, metric: Metric) -> Gains:
        """H = S R^-1 S^T, q = S R^-1 p and p^T R^-1 p of one group, p = a g + e its own direction."""
        controls = self.controls_of(player)
        gram = metric.gram(samples)
        direction = self.curvature.direction(controls, self._latest(controls))
        shares = set(direction.fresh.values())
        formed = self.one_group and controls.parameters.keys() <= self.grads.keys()
        if not formed and self.stream == "gradient" and len(shares) == 1 and not self.inspect:
            # g = G^T omega 1 and S = G: the group's own gradient need not be formed.
            ones = torch.full_like(gram[0], group.weight * shares.pop()) * self.clip
            response, along = gram @ ones, ones @ gram @ ones
            if direction.rest:
                rest = {n: direction.rest.get(n, torch.zeros_like(p)) for n, p in controls.parameters.items()}
                scaled = metric.solve(rest)
                of_rest = samples.inner(scaled)
                response, along = response + of_rest, along + 2 * (ones @ of_rest) + _dot(rest, scaled)
            return Gains(gram, response, along)
        p = direction.of(self.grads if formed else self._group_gradient(player, group))
        scaled = metric.solve(p)
        if self.inspect:
            self.base_steps.setdefault(player.index, []).append(BaseStep(scaled, metric))
        return Gains(gram, samples.inner(scaled), _dot(p, scaled))

    def _group_gradient(self, player: Player, group: RecursionGroup) -> Grads:
        samples = self.samples.of(player, "gradient")
        if samples is None:
            raise StepError(f"player '{player.name}': the curvature cotangent reached it, the loss did not")
        weights = torch.full((group.samples,), group.weight, dtype=torch.float64, device=self.device)
        return samples.rows(group.rows).weighted(weights * self.clip)

    # ------------------------------------------------------------------------------------------------------
    # Forward

    def forward(self) -> None:
        """Controls from the input to the output (Eq. 20)."""
        self.complete_statistics()
        phis = [torch.zeros(g.samples * self.rows, dtype=torch.float64, device=self.device) for g in self.groups]
        if self.options.feedback and self.options.rollout == "nonlinear":
            self.update_plain()
            _, phis = self.roll_out([m.live[0] for m in self.samples.micro_batches], phis)
        else:
            phis = self.feedback(phis)
            for player in self.trajectory.players:
                self.samples.recall(player)
                self.act(player, *self.collect(player))
            self.update_plain()  # last: a stage that is made anew is what it was
        self.facts.finish(self.groups, phis, self.options)

    @in_phase("curvature")
    def complete_statistics(self) -> None:
        """Statistics made of samples, as far as the sweep has not made them; changes no weight.

        Raises:
            CurvatureError: factors are refused.
        """
        if not self.curvature.needs_samples:
            return
        waiting: list[tuple[Player, Begun]] = []
        for player in self.trajectory.players:
            with phase("curvature", player):
                evidence = None if player.controls().keys() <= self.statistics.keys() else self._evidence(player)
                if evidence is not None:
                    begun = self.curvature.begin(self.controls_of(player), evidence)
                    if begun.waits:
                        waiting.append((player, begun))
                    else:
                        self.statistics.update(begun.finish(evidence.samples))
        for player, begun in waiting:  # each replica has its part of the decompositions by now
            self.statistics.update(begun.finish(self.samples.of(player, self.curvature.stream)))

    @in_phase("update")
    def update_plain(self) -> None:
        """The base update of the parameters that belong to no player."""
        plain = {name: self.grads[name] for name in self.trajectory.plain_parameters if name in self.grads}
        if plain:
            controls = self.controls_of(None)
            self._update(controls, plain, {}, self.curvature.statistics(controls, Evidence(plain, None)))

    @in_phase("sweep")
    def feedback(self, phis: list[Tensor]) -> list[Tensor]:
        """Every player's weights, with the linear rollout's feedback.

        Args:
            phis: <s_z, delta z> at the first cut, for every group.

        Returns:
            The same at the last cut.
        """
        for player in self.trajectory.players:
            phis = self._decide(player, phis)
        return phis

    @in_phase("sweep")
    def _decide(self, player: Player, phis: list[Tensor]) -> list[Tensor]:
        """One player's v from its policy; the feedback after it, linearly."""
        if player.index not in self.policies:
            return phis
        weights, after = [], []
        for index, policy in enumerate(self.policies[player.index]):
            v, moved = forward_stage(policy, phis[index])
            weights.append(self.groups[index].share * v)
            after.append(phis[index] + moved)
            self.facts.apply(player.index, index, policy, v)
        self.weights[player.index] = torch.cat(weights)
        return after

    @in_phase("rollout")
    def roll_out(
        self, lives: list[tuple[LiveValue, ...]], phis: list[Tensor]
    ) -> tuple[list[tuple[LiveValue, ...]], list[Tensor]]:
        """Every player's control, applied, and its stage run anew with it (Alg. 1).

        Args:
            lives: live values at the first cut with the controls before it, for every micro-batch.
            phis: <s_z, delta z> there, for every group.

        Returns:
            Both at the last cut.
        """
        with unchanged_buffers(self.model):
            for player, stage in zip(self.trajectory.players, self.trajectory.stages, strict=True):
                self._decide(player, phis)
                self.samples.recall(player)
                self.act(player, *(self._summed(part) for part in self.collect(player)))
                moved = []
                for micro_batch, live in zip(self.samples.micro_batches, lives, strict=True):
                    assert micro_batch.context is not None
                    with micro_batch.context.again():
                        moved.append(stage.run(live))
                lives = moved
                phis = self.real_feedback(player.index + 1, lives)
        return lives, phis

    @in_phase("weight-gradient")
    def collect(self, player: Player) -> tuple[Grads, Grads]:
        """What the samples add to a player's control: its gradient, where that is formed here, and S^T v.

        Both are of this rank's samples alone.
        """
        averaged = self.weights.get(player.index)
        if self.absorbs(player):
            samples = self.samples.of(player, "gradient")
            if samples is not None:
                return samples.weighted(self.mean_weights() + (0.0 if averaged is None else averaged)), {}
        elif averaged is not None:
            samples = self.samples.of(player, self.stream)
            assert samples is not None
            return {}, samples.weighted(averaged)
        return {}, {}

    @in_phase("update")
    def act(self, player: Player, gradient: Grads, correction: Grads) -> None:
        """Take one player's control, given what :meth:`collect` found, summed over replicas."""
        controls = self.controls_of(player)
        if not gradient:
            gradient = {name: self.grads[name] for name in controls.parameters if name in self.grads}
        if not gradient:
            return  # no backward pass reached the player: it stays, as with torch.optim
        if self.curvature.adaptive and not gradient.keys() <= self.statistics.keys():
            self._new_statistics(player)
        statistics = {name: self.statistics.pop(name, {}) for name in gradient}
        self._update(controls, gradient, correction, statistics)

    def _summed(self, grads: Grads) -> Grads:
        return dict(zip(grads, self.ranks.sum_over_replicas(list(grads.values())), strict=True)) if grads else grads

    def _update(self, controls: Controls, gradient: Grads, correction: Grads, statistics: dict[str, State]) -> None:
        self.curvature.update(controls, gradient, correction, statistics, self.options.momentum_of)

    def real_feedback(self, cut: int, lives: list[tuple[LiveValue, ...]]) -> list[Tensor]:
        """phi^b = <s_z^b, zhat^b - z^b>, summed over the live tensors of a cut, for every group."""
        parts, rows = [], self.rows
        for micro_batch, live in zip(self.samples.micro_batches, lives, strict=True):
            phi = torch.zeros(micro_batch.samples * rows, dtype=torch.float64, device=self.device)
            derivatives = micro_batch.derivatives[self.stream]
            for position, moved in floating_tensors(live):
                slope = derivatives.get((cut, position))
                if slope is not None:
                    kept = cast(Tensor, micro_batch.live[cut][position])
                    change = moved.float() - kept.float() if moved.dtype.itemsize < 4 else moved - kept
                    change = change.repeat_interleave(rows, dim=0) if rows > 1 else change
                    phi = phi + (change * slope).flatten(1).sum(1).double()
            parts.append(phi * self.samples.factors[self.stream])
        phi_N = torch.cat(parts)
        return [phi_N[group.rows_of(rows)] for group in self.groups]


@dataclass(frozen=True)
class BaseStep:
    """R^-1 p of one player and group, and its metric: what an explicit policy needs besides the sweep's."""

    scaled: Grads
    metric: Metric


def _dot(x: Grads, y: Grads) -> Tensor:
    return torch.stack([(x[name] * y[name]).sum().double() for name in x]).sum()

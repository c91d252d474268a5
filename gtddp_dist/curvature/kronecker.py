"""What KFAC and EKFAC share: every layer's Kronecker factors, their bases, two cooperating layers, the base rule.

KFAC (arXiv 1503.05671, 1602.01407) takes A (x) B for the curvature of a layer, EKFAC (arXiv 1806.03884) its
eigenbasis with corrected eigenvalues. Both are base optimizers by themselves:

    buf <- mu buf + C^-1 g;   step = -lr buf;   decay (1 - lr wd) apart

In GT-DDP two layers of one player, u on the main path and v on a projection shortcut, may cooperate (Sec. 4.3):
their metric then has cross factors A_uv = E[x_u x_v^T] and B_uv = E[y_u y_v^T] (Eq. 22-24, Theorem 3, Corollary 7).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor

from ..capture import Stream
from ..collectives import Collectives
from ..errors import CurvatureError, OptionError
from ..players import AffineGradients, PlayerSamples, is_affine, of_module, qualified
from ..trajectory import Player
from . import factors as bases
from .base import (
    Begun,
    Controls,
    Cooperation,
    Curvature,
    Direction,
    Evidence,
    Grads,
    MomentumOf,
    State,
    Statistics,
    check,
    number,
)
from .coordinates import CoordinateMetric, Coordinates, Coupling
from .decompositions import Ahead, Decompositions, Task, Timing, drop_snapshot, keep_snapshot, snapshot
from .factors import Factors, InputSide, Layout

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KroneckerCurvature(Curvature):
    """Options and rules of a Kronecker curvature; what it makes of the factors is left to KFAC and EKFAC.

    Attributes:
        lr: learning rate; 0 or more.
        momentum: mu; the buffer keeps preconditioned steps.
        weight_decay: decoupled: u <- (1 - lr wd) u, apart from the step.
        damping: added to the curvature when it is solved with.
        factor_decay: of the running averages of factors and second moments.
        factor_every: steps from one update of the factors to the next.
        basis_every: steps from one decomposition of the factors to the next.
        basis_method: "eigh": eigenvectors of the factors, by a full decomposition. "qr" (EKFAC): after the first time a
            step of orthogonal iteration from the former basis (as in SOAP, arXiv 2409.11321), into which EKFAC's second
            moments are carried, in place of starting anew. Canonical coordinates of cooperating layers are not
            orthogonal: for them always a full decomposition.
        basis_spread: players take their decompositions in turn, evenly over ``basis_every`` steps; all at the first.
        basis_lag: steps from the factors that are decomposed to the use of their bases, below ``basis_every``. With
            more than 0 a background thread decomposes them on the CPU meanwhile; those of the first step at once.
        factors: what they are made of: "unfolded" patches and all positions; "spatially_uncorrelated": over channels
            alone; "reduced": mean inputs and summed output gradients (KFAC-reduce).
        fisher: "empirical": gradients of the batch's own loss; "sampled": of labels drawn from the model's softmax.
        max_factor_dim: largest factor allowed.
        max_basis_failures: decompositions in a row that may fail, the previous basis being kept, before an error.
    """

    lr: float = 0.03
    momentum: float = 0.0
    weight_decay: float = 0.0
    damping: float = 0.03
    factor_decay: float = 0.95
    factor_every: int = 1
    basis_every: int = 50
    basis_method: Literal["eigh", "qr"] = "eigh"
    basis_spread: bool = False
    basis_lag: int = 0
    factors: Factors = "unfolded"
    fisher: Literal["empirical", "sampled"] = "empirical"
    max_factor_dim: int = 8192
    max_basis_failures: int = 3
    cooperation: Cooperation | None = field(default=None, repr=False)
    """The optimizer's option of that name goes before it."""
    lenient: bool = field(default=False, repr=False)
    """Players that cannot cooperate do not, rather than being refused (the optimizer's default)."""
    _ahead: Ahead = field(default_factory=Ahead, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self.lr >= 0, "lr", self.lr, "a number >= 0")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        check(self.damping > 0, "damping", self.damping, "a number > 0")
        check(0 <= self.factor_decay < 1, "factor_decay", self.factor_decay, "a number in [0, 1)")
        for name in ("factor_every", "basis_every", "max_factor_dim"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        check(self.basis_method in ("eigh", "qr"), "basis_method", self.basis_method, "'eigh' or 'qr'")
        check(
            0 <= self.basis_lag < self.basis_every,
            "basis_lag",
            self.basis_lag,
            f"a whole number from 0 up to below basis_every={self.basis_every}; raise basis_every, or lower basis_lag",
        )
        check(self.max_basis_failures >= 0, "max_basis_failures", self.max_basis_failures, "a whole number >= 0")
        choices = ("unfolded", "spatially_uncorrelated", "reduced")
        check(self.factors in choices, "factors", self.factors, "one of " + ", ".join(map(repr, choices)))
        check(self.fisher in ("empirical", "sampled"), "fisher", self.fisher, "'empirical' or 'sampled'")
        check(
            self.cooperation in (None, "none") or self.factors != "spatially_uncorrelated",
            "factors",
            self.factors,
            f"'unfolded' or 'reduced' with cooperation={self.cooperation!r} (cross factors join two layers' patches)",
        )

    def defaults(self) -> dict[str, object]:
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay, "damping": self.damping}

    @property
    def needs_samples(self) -> bool:
        return True

    @property
    def stream(self) -> Stream:
        return "gradient" if self.fisher == "empirical" else "sampled"

    @property
    def of_paper(self) -> Cooperation:
        return "theorem3"

    def cooperating(self, cooperation: Cooperation | None) -> KroneckerCurvature:
        chosen = cooperation or self.cooperation
        default: Cooperation = "none" if self.factors == "spatially_uncorrelated" else "exact"
        return replace(self, cooperation=chosen or default, lenient=chosen is None)

    # ------------------------------------------------------------------------------------------------------
    # Which layers there are, and which cooperate

    def check(self, controls: Controls) -> None:
        assert controls.player is not None
        for name, layout in _layers(controls).items():
            bases.check_size(name, layout, self.factors, self.max_factor_dim)
            own = of_module(name, controls.groups)
            if any(group is not next(iter(own.values())) for group in own.values()):
                raise OptionError(
                    f"param_groups: weight and bias of module '{name}' are in different groups; a Kronecker "
                    "curvature couples them: put them into one"
                )
        pair = self.pair(controls)
        if pair is not None and len({id(of_module(n, controls.groups).popitem()[1]) for n in pair}) > 1:
            raise OptionError(
                f"param_groups: modules '{pair[0]}' and '{pair[1]}' cooperate (cooperation={self.cooperation!r}): put "
                "their parameters into one group, or use cooperation='none'"
            )

    def pair(self, controls: Controls) -> tuple[str, str] | None:
        """The modules u and v that cooperate in this player, if any."""
        player = cast(Player, controls.player)
        if self.cooperation in (None, "none") or not player.shortcut:
            return None
        layers = _layers(controls)
        main = [name for name in layers if name not in player.shortcut]
        shortcut = [name for name in layers if name in player.shortcut]
        reason = None
        if len(main) != 1 or len(shortcut) != 1:
            reason = f"has {len(main)} layers on the main path and {len(shortcut)} on shortcuts, not one and one"
        elif any(layers[name].groups > 1 for name in (*main, *shortcut)):
            reason = "has a grouped convolution"
        if reason is None:
            return main[0], shortcut[0]
        if self.lenient:
            return None
        raise OptionError(
            f"player '{player.name}' {reason}, which cooperation={self.cooperation!r} does not take; use "
            "cooperation='none', or projection='separate'"
        )

    # ------------------------------------------------------------------------------------------------------
    # Statistics: running averages, then bases

    def statistics(self, controls: Controls, evidence: Evidence) -> dict[str, State]:
        return self.begin(controls, evidence).finish(evidence.samples)

    def begin(self, controls: Controls, evidence: Evidence) -> Begun:
        """Up to the decompositions that are this replica's to make; the rest exchanges them."""
        new: dict[str, State] = {name: {} for name in (controls.parameters if controls.player else evidence.gradient)}
        if controls.player is None:
            return Begun(lambda samples: new, waits=False)
        samples = evidence.samples
        ranks = evidence.ranks  # what finishes the work must not hold on to the samples
        layers = _layers(controls)
        if samples is None or not layers.keys() <= samples.parts.keys():
            raise CurvatureError(
                f"player '{controls.player.name}': no derivative of the stream '{self.stream}' reached all its modules"
            )
        first = next(iter(new))
        steps = int(controls.state[first].get("step", torch.zeros(())))
        for name in new:
            new[name] = {k: v for k, v in controls.state[name].items() if k != "momentum_buffer"}
        if steps % self.factor_every == 0:
            self._average(controls, samples, layers, new, ranks)
        work = self._begin_bases(controls, layers, new, steps, ranks)

        def finish(samples: PlayerSamples | None) -> dict[str, State]:
            if work is not None:
                self._exchange(controls, layers, new, work, ranks)
            if steps % self.factor_every == 0:
                assert samples is not None
                self._correct(controls, samples, layers, new, ranks)
            new[first]["step"] = torch.tensor(float(steps + 1))
            # Decompositions have other strides than a checkpoint gives back; the last bit of products depends on them.
            return {name: {key: value.contiguous() for key, value in state.items()} for name, state in new.items()}

        return Begun(finish, waits=work is not None and ranks.replicas > 1)

    def ages(self, controls: Controls) -> dict[str, float]:
        """Of the factors' last update, and of the factors that the bases are of: more than ``basis_every`` (and
        ``basis_lag``) where a decomposition failed."""
        first = next(iter(controls.parameters))
        if controls.player is None or "step" not in controls.state[first]:
            return {}
        last = int(controls.state[first]["step"]) - 1
        timing = self.timing(controls.player)
        failures = max(
            (int(state["basis_failures"]) for state in controls.state.values() if "basis_failures" in state), default=0
        )
        return {
            "factor_age": float(last % self.factor_every),
            "basis_age": float(timing.age(last, failures)),
        }

    @property
    def basis_work(self) -> float:
        """Operations of a new basis of n vectors, as a multiple of n^3: an eigendecomposition's."""
        return 9.0

    def timing(self, player: Player) -> Timing:
        """When a player's bases are renewed."""
        offset = int(player.turn * self.basis_every) if self.basis_spread else 0
        return Timing(self.basis_every, offset, self.basis_lag)

    def mix(self, state: State, key: str, value: Tensor, module: str, ranks: Collectives) -> None:
        """Take a new value, averaged over replicas, into a running average; the first one is the average."""
        value = ranks.sum_over_replicas([value])[0] / ranks.replicas
        average = state[key].lerp(value, 1 - self.factor_decay) if key in state else value
        if not bool(torch.isfinite(average).all()):
            whose = "of this step" if not bool(torch.isfinite(value).all()) else "of the steps before"
            raise CurvatureError(f"module '{module}': {key} {whose} is not finite; nothing was changed")
        state[key] = average

    def _average(
        self,
        controls: Controls,
        samples: PlayerSamples,
        layers: Mapping[str, Layout],
        new: dict[str, State],
        ranks: Collectives,
    ) -> None:
        """Running averages of factors, cross factors, and the squares of normalisation parameters' gradients."""
        pair = self.pair(controls)
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for name, part in samples.parts.items():
            if name not in layers:
                for local, grads in part.per_sample().items():
                    self.mix(new[qualified(name, local)], "square_avg", (grads**2).mean(0), name, ranks)
                continue
            assert isinstance(part, AffineGradients)
            state = new[anchor_of(name, controls)]
            layout = layers[name]
            first = "factor_a" not in state
            by_channel = self.factors == "spatially_uncorrelated" and layout.channels > 0
            if by_channel:
                y_BGLO = part.output_positions()
                self.mix(state, "factor_a", bases.channel_factor(part, layout), name, ranks)
                self.mix(state, "factor_ones", y_BGLO.new_full((), y_BGLO.shape[2]), name, ranks)
                if pair is None or name not in pair:  # no need to unfold inputs
                    self.mix(state, "factor_b", bases.output_factor(y_BGLO), name, ranks)
                    continue
            x_BGLI, y_BGLO = layout.positions(part)
            if pair is not None and self.cooperation == "corollary7" and name in pair and first:
                kept[name] = (x_BGLI, y_BGLO)
            x_BGLI, y_BGLO = bases.reduced(x_BGLI, y_BGLO, self.factors)
            if not by_channel:
                self.mix(state, "factor_a", bases.input_factor(x_BGLI), name, ranks)
            self.mix(state, "factor_b", bases.output_factor(y_BGLO), name, ranks)
            if pair is not None and self.cooperation != "corollary7" and name in pair:
                kept[name] = (x_BGLI, y_BGLO)
        if pair is None or not kept:
            return
        (x_u, y_u), (x_v, y_v) = kept[pair[0]], kept[pair[1]]
        if self.cooperation == "corollary7":
            if x_u.shape != x_v.shape or not torch.equal(x_u, x_v) or not torch.allclose(y_u, y_v):
                raise OptionError(
                    f"player '{cast(Player, controls.player).name}': cooperation='corollary7' needs two layers with "
                    "the same input and the same output derivative; use 'exact'"
                )
            return
        state = new[anchor_of(pair[0], controls)]
        self.mix(state, "cross_a", bases.input_factor(x_u, x_v), pair[0], ranks)
        self.mix(state, "cross_b", bases.output_factor(y_u, y_v), pair[0], ranks)

    def _begin_bases(
        self, controls: Controls, layers: Mapping[str, Layout], new: dict[str, State], step: int, ranks: Collectives
    ) -> Decompositions | None:
        """New bases, as far as any are due by this step; of later ones a snapshot of the factors is kept and, by their
        owner, begun."""
        player, pair = cast(Player, controls.player), self.pair(controls)
        timing = self.timing(player)
        # The second layer of a pair is decomposed with the first.
        states = {n: new[anchor_of(n, controls)] for n in layers if pair is None or n != pair[1]}
        owners = {name: index % ranks.replicas for index, name in enumerate(states, player.index)}
        first = any("basis_b" not in state for state in states.values())
        if first or (timing.begins(step) and not timing.lag):
            tasks = {n: self._task(self._factors(n, controls, new), state) for n, state in states.items()}
            return self._decompose(tasks, owners, ranks, begun=False)
        if timing.begins(step):
            for name, state in states.items():
                keep_snapshot(state, self._factors(name, controls, new))
                if owners[name] == ranks.replica:
                    self._ahead.begin(name, self._task(snapshot(state), state))
        elif timing.ends(step):
            tasks = {n: self._task(snapshot(state), state) for n, state in states.items() if snapshot(state)}
            return self._decompose(tasks, owners, ranks, begun=True) if tasks else None
        return None

    def _factors(self, name: str, controls: Controls, new: Mapping[str, State]) -> dict[str, Tensor]:
        """What a layer's bases are made of, or those of the pair that it is the first of."""
        state, pair = new[anchor_of(name, controls)], self.pair(controls)
        if pair is None or name != pair[0] or self.cooperation == "corollary7":
            return {"a": state["factor_a"], "b": state["factor_b"]}
        group = controls.groups[anchor_of(name, controls)]
        return _damped(state, new[anchor_of(pair[1], controls)], number(group, "damping") ** 0.5)

    def _task(self, factors: Mapping[str, Tensor], state: State) -> Task:
        """How they are decomposed; ``state`` has the bases there are."""
        return Task("canonical" if "cross_a" in factors else "eigenbases", factors)

    def _decompose(
        self, tasks: Mapping[str, Task], owners: dict[str, int], ranks: Collectives, *, begun: bool
    ) -> Decompositions:
        """New bases of those layers that are this replica's part; ``begun``: their tasks run in the background.

        Replicas have the same factors, so they share the decompositions out among themselves, player by player.
        """
        found = {name: task.shaped() for name, task in tasks.items()}
        reasons: dict[str, str] = {}
        for name, task in tasks.items():
            if owners[name] == ranks.replica:
                try:
                    found[name] = self._ahead.result(name, task) if begun else task.run()
                except torch.linalg.LinAlgError as error:
                    reasons[name] = str(error)
        return Decompositions({name: owners[name] for name in tasks}, found, reasons)

    def _exchange(
        self,
        controls: Controls,
        layers: Mapping[str, Layout],
        new: dict[str, State],
        work: Decompositions,
        ranks: Collectives,
    ) -> None:
        """New bases from whoever made them; where that failed the previous one is kept, a bounded number of times."""
        pair = self.pair(controls)
        for name, owner in work.owners.items():
            state = new[anchor_of(name, controls)]
            partner = None if pair is None or name not in pair else new[anchor_of(pair[1], controls)]
            drop_snapshot(state)
            failed = torch.tensor(float(name in work.reasons)).to(state["factor_b"])
            failed, *tensors = ranks.from_replica(owner, [failed, *work.found[name].tensors()])
            if bool(failed):
                self._keep_basis(state, name, work.reasons.get(name, f"in replica {owner}"))
                continue
            former = dict(state)
            work.found[name].filled(tensors).store(state, partner)
            state["basis_failures"] = torch.zeros(())
            self._restart(former, state, partner, layers[name])

    def _keep_basis(self, state: State, name: str, reason: str) -> None:
        failures = int(state.get("basis_failures", torch.zeros(()))) + 1
        if "basis_b" not in state or failures > self.max_basis_failures:
            raise CurvatureError(
                f"module '{name}': decomposing its factors failed ({reason}), {failures} times in a row "
                f"(max_basis_failures={self.max_basis_failures}); more damping or a smaller rate may help"
            )
        state["basis_failures"] = torch.tensor(float(failures))
        _log.warning("module '%s': decomposition failed (%s); the previous basis is kept", name, reason)

    @abstractmethod
    def _restart(self, former: State, state: State, partner: State | None, layout: Layout) -> None:
        """Set what lives in the new basis; ``former`` has the one before, if any."""

    @abstractmethod
    def _correct(
        self,
        controls: Controls,
        samples: PlayerSamples,
        layers: Mapping[str, Layout],
        new: dict[str, State],
        ranks: Collectives,
    ) -> None:
        """Running averages of what lives in the basis."""

    # ------------------------------------------------------------------------------------------------------
    # The metric

    def metric(self, controls: Controls, statistics: Statistics) -> CoordinateMetric | None:
        known = controls.player is None or "step" in statistics[next(iter(controls.parameters))]
        return self._metric(controls, statistics, rated=True) if known else None

    def _metric(self, controls: Controls, statistics: Statistics, *, rated: bool) -> CoordinateMetric:
        """R = C / lr; without the rates, C."""
        lr = {name: number(group, "lr") if rated else 1.0 for name, group in controls.groups.items()}
        if controls.player is None:
            return CoordinateMetric({}, {}, lr)
        layers = _layers(controls)
        pair = self.pair(controls)
        coordinates: dict[str, Coordinates] = {}
        rates: dict[str, float] = {}
        for name, layout in layers.items():
            anchor = anchor_of(name, controls)
            rates[name] = lr[anchor]
            if pair is None or name not in pair:
                coordinates[name] = self._alone(statistics[anchor], layout, number(controls.groups[anchor], "damping"))
        coupling = None
        if pair is not None:
            u, v = (statistics[anchor_of(name, controls)] for name in pair)
            damping = number(controls.groups[anchor_of(pair[0], controls)], "damping")
            both, cross = self._together(u, v, [layers[name] for name in pair], damping)
            coordinates.update(zip(pair, both, strict=True))
            coupling = Coupling(pair[0], pair[1], cross)
        diagonal: dict[str, Tensor] = {}
        for name, state in statistics.items():
            if "square_avg" in state:
                diagonal[name] = lr[name] / (state["square_avg"] + number(controls.groups[name], "damping"))
        return CoordinateMetric(rates, coordinates, diagonal, coupling)

    @abstractmethod
    def _alone(self, state: State, layout: Layout, damping: float) -> Coordinates:
        """The coordinates of a layer that decides by itself."""

    @abstractmethod
    def _together(
        self, u: State, v: State, layouts: list[Layout], damping: float
    ) -> tuple[tuple[Coordinates, Coordinates], Tensor]:
        """The coordinates of two layers that cooperate, and the cross entries of their pairs."""

    def sides(self, state: State, layout: Layout) -> tuple[InputSide, Tensor]:
        """A layer's bases: of its input side, and E_B."""
        by_channel = self.factors == "spatially_uncorrelated" and layout.channels > 0
        return InputSide(state["basis_a"], layout, by_channel), state["basis_b"]

    # ------------------------------------------------------------------------------------------------------
    # The base rule

    def direction(self, controls: Controls, statistics: Statistics) -> Direction:
        fresh = dict.fromkeys(controls.parameters, 1.0)
        buffers = {
            name: state["momentum_buffer"] * number(controls.groups[name], "momentum")
            for name, state in controls.state.items()
            if "momentum_buffer" in state
        }
        if buffers.keys() != controls.parameters.keys():
            return Direction(fresh, {})
        # R^-1 p = lr (C^-1 g + mu buf), so p = g + mu C buf.
        return Direction(fresh, self._metric(controls, statistics, rated=False).multiply(buffers))

    def absorbs_correction(self, controls: Controls, momentum_of: MomentumOf) -> bool:
        return momentum_of == "step" or not any(number(group, "momentum") for group in controls.groups.values())

    def update(
        self,
        controls: Controls,
        gradient: Grads,
        correction: Grads,
        statistics: dict[str, State],
        momentum_of: MomentumOf,
    ) -> None:
        for name, new in statistics.items():
            state = controls.state[name]
            for key in state.keys() - new.keys() - {"momentum_buffer"} if new else ():
                del state[key]  # of a basis that is no more
            state.update(new)
        metric = self._metric(controls, controls.state, rated=False)
        base = metric.solve(gradient)
        corrected = metric.solve(correction) if correction else {}
        for name, step in base.items():
            parameter, state, group = controls.parameters[name], controls.state[name], controls.groups[name]
            lr, momentum = number(group, "lr"), number(group, "momentum")
            if momentum:
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(step))
                step = buffer.mul_(momentum).add_(step)
            if name in corrected:
                step = step + corrected[name]
                if momentum and momentum_of == "step":
                    state["momentum_buffer"].add_(corrected[name])
            parameter.mul_(1 - lr * number(group, "weight_decay"))
            parameter.sub_(step, alpha=lr)


def corollary7(
    curvature: KroneckerCurvature, u: State, layouts: list[Layout], values_GOI: Tensor, damping: float
) -> tuple[tuple[Coordinates, Coordinates], Tensor]:
    """Same input, same output derivative: one eigenbasis, pairs [[l + g, l], [l, l + g]], g the damping.

    The Schur complement's eigenvalue is (l + g) - l^2 / (l + g) (Corollary 7).
    """
    schur = (values_GOI + damping) - values_GOI**2 / (values_GOI + damping)
    side, basis_b = curvature.sides(u, layouts[0])
    one = Coordinates(side, basis_b, 1 / schur)
    other = Coordinates(InputSide(side.basis, layouts[1], side.by_channel), basis_b, 1 / schur)
    return (one, other), (-values_GOI / (values_GOI + damping) / schur)[0]


def _damped(u: State, v: State, root: float) -> dict[str, Tensor]:
    """What canonical bases of two layers are made of: the factors of each, damped by themselves, and cross factors."""
    damped = []
    for state in (u, v):
        a, b = state["factor_a"][0], state["factor_b"][0]
        pi = trace_ratio(a, b)
        damped.append((a + pi * root * torch.eye(len(a)).to(a), b + root / pi * torch.eye(len(b)).to(b)))
    (a_u, b_u), (a_v, b_v) = damped
    cross = {"cross_a": u["cross_a"][0], "cross_b": u["cross_b"][0]}
    return {"a": a_u, "b": b_u, "other_a": a_v, "other_b": b_v, **cross}


def trace_ratio(a: Tensor, b: Tensor) -> Tensor:
    """pi = sqrt((tr A / dim A) / (tr B / dim B)), 1 where a factor is zero (a dead layer)."""
    return value_ratio(a.diagonal(dim1=-2, dim2=-1), b.diagonal(dim1=-2, dim2=-1))


def value_ratio(values_a: Tensor, values_b: Tensor) -> Tensor:
    """The same from eigenvalues or diagonals, along the last dimension."""
    mean_a, mean_b = values_a.mean(-1), values_b.mean(-1)
    return torch.where((mean_a > 0) & (mean_b > 0), mean_a / mean_b, torch.ones_like(mean_a)).sqrt()


def padded(s: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(s, (0, size - len(s)))


def _layers(controls: Controls) -> dict[str, Layout]:
    """The player's affine modules and their layouts."""
    player = cast(Player, controls.player)
    return {name: Layout.of(module) for name, module in player.modules.items() if is_affine(module)}


def anchor_of(module: str, controls: Controls) -> str:
    """The parameter whose state keeps the module's factors: its first control."""
    return next(name for name in controls.parameters if name.rpartition(".")[0] == module)

"""What a base optimizer must say of itself so that GT-DDP can stand on it.

A base takes the step -R^-1 p: R^-1 = lr C^-1 the inverse metric made of its curvature estimate C, p its direction
(gradient, momentum, decay). GT-DDP adds a correction c to p: the step becomes -R^-1 (p + c). With c = 0 every base
here is the optimizer of that name.

A base sees one player at a time: all its controls together, since a Kronecker metric couples a layer's weight and
bias, and a cooperative one two layers. State is kept by parameter, in torch.optim's own way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor, nn

from ..capture import Stream
from ..collectives import ALONE, Collectives
from ..errors import OptionError
from ..players import PlayerSamples, SampleGradients, is_affine
from ..trajectory import Player

Grads = Mapping[str, Tensor]
"""Something for every control, by qualified parameter name."""
State = dict[str, Tensor]
Statistics = Mapping[str, State]
"""Curvature statistics by qualified parameter name."""
Group = Mapping[str, object]
"""One entry of ``param_groups``: the options of its parameters."""
Cooperation = Literal["none", "theorem3", "exact", "corollary7"]
"""How a projection shortcut's layer and the last main-path layer decide together (Sec. 4.3)."""
MomentumOf = Literal["step", "gradient"]
"""What a momentum buffer keeps: the corrected step, or the raw gradient."""


@dataclass(frozen=True)
class Controls:
    """The controls of one player, or parameters of none, with their state and options.

    Attributes:
        parameters: by qualified name.
        state: the optimizer's state of each, to be changed by :meth:`Curvature.update` alone.
        groups: the ``param_groups`` entry of each.
        player: the player; None for parameters that belong to none.
    """

    parameters: Mapping[str, nn.Parameter]
    state: Mapping[str, State]
    groups: Mapping[str, Group]
    player: Player | None


@dataclass(frozen=True)
class Evidence:
    """What curvature statistics are made of in one step.

    Attributes:
        gradient: the mean gradient, or Q_u where statistics are of the value function.
        samples: this replica's, sample by sample, for curvatures that ask for it (:attr:`Curvature.needs_samples`).
        ranks: the other replicas, over which statistics made of samples are averaged.
    """

    gradient: Grads
    samples: PlayerSamples | None
    ranks: Collectives = ALONE


@dataclass(frozen=True)
class Begun:
    """Curvature statistics of which a part was made.

    Attributes:
        finish: makes the rest, given the samples of the evidence once more.
        waits: whether other replicas have a part in the rest; begin the statistics of other players before it.
    """

    finish: Callable[[PlayerSamples | None], dict[str, State]]
    waits: bool


class Metric(ABC):
    """R of one player, as the sweep and the step use it."""

    @abstractmethod
    def solve(self, grads: Grads) -> dict[str, Tensor]:
        """R^-1 g."""

    @abstractmethod
    def gram(self, samples: PlayerSamples) -> Tensor:
        """H = S R^-1 S^T, shape (B, B), symmetric, in float64."""


@dataclass(frozen=True)
class Direction:
    """A base optimizer's direction as p = a g + e.

    Attributes:
        fresh: a, by parameter name.
        rest: e, by parameter name; those left out are zero.
    """

    fresh: Mapping[str, float]
    rest: Grads

    def of(self, gradient: Grads) -> dict[str, Tensor]:
        """p for a gradient."""
        return {
            name: a * gradient[name] + self.rest[name] if name in self.rest else a * gradient[name]
            for name, a in self.fresh.items()
        }


@dataclass(frozen=True, kw_only=True)
class Curvature(ABC):
    """A base optimizer: its options (fields) and its rules."""

    @property
    def adaptive(self) -> bool:
        """Whether the metric changes from step to step (else "previous" and "current" agree)."""
        return True

    @property
    def gauss_newton_weight(self) -> float:
        """The weight rho of the terminal Hessian that goes with this base by default (docs/study-defaults.md)."""
        return 0.03

    @property
    def needs_samples(self) -> bool:
        """Whether statistics are made of per-sample quantities."""
        return False

    @property
    def stream(self) -> Stream:
        """The captured stream that per-sample statistics are made of."""
        return "gradient"

    @property
    def of_paper(self) -> Cooperation:
        """How layers cooperate in the paper with this curvature (Table 1)."""
        return "none"

    def cooperating(self, cooperation: Cooperation | None) -> Curvature:
        """This curvature with a way for two layers of one player to decide together; None: its own default.

        Identity and diagonal curvatures have no cross terms: "none" is all there is (Table 1).

        Raises:
            OptionError: this curvature does not know that way.
        """
        if cooperation not in (None, "none"):
            raise OptionError(
                f"cooperation={cooperation!r} needs a Kronecker curvature (KFAC, EKFAC); {type(self).__name__} has "
                "no cross terms: use 'none'"
            )
        return self

    def forms(self, samples: SampleGradients, rows: int) -> bool:
        """Whether S of a module is best formed as soon as its derivative is there: what it is made of is then let go.

        Args:
            samples: of one module.
            rows: of a recursion group.
        """
        return not is_affine(samples.module)  # statistics may need a layer's inputs

    def formed(self, samples: PlayerSamples, rows: int) -> PlayerSamples:
        """The same samples; with S formed, where that is cheapest for the Gram matrices of groups of so many rows and
        for the step, and it is small."""
        return samples

    def defaults(self) -> dict[str, object]:
        """The options, as they go into ``param_groups``."""
        return asdict(self)

    def check(self, controls: Controls) -> None:  # noqa: B027 - most bases take any player
        """Refuse a player that this curvature cannot take.

        Raises:
            OptionError: names the module and the choices.
        """

    @abstractmethod
    def statistics(self, controls: Controls, evidence: Evidence) -> dict[str, State]:
        """The curvature statistics after this step; changes nothing."""

    def begin(self, controls: Controls, evidence: Evidence) -> Begun:
        """:meth:`statistics` in two parts, between which replicas work side by side on those of several players."""
        new = self.statistics(controls, evidence)
        return Begun(lambda samples: new, waits=False)

    @abstractmethod
    def metric(self, controls: Controls, statistics: Statistics) -> Metric | None:
        """R from statistics; None where there are none yet."""

    @abstractmethod
    def direction(self, controls: Controls, statistics: Statistics) -> Direction:
        """The direction; changes nothing. ``statistics`` are those the sweep's metric is made of."""

    @abstractmethod
    def update(
        self,
        controls: Controls,
        gradient: Grads,
        correction: Grads,
        statistics: dict[str, State],
        momentum_of: MomentumOf,
    ) -> None:
        """Take the step -R^-1 (p + c) in place, for the parameters in ``gradient``, and bring the state up to date."""

    def ages(self, controls: Controls) -> dict[str, float]:
        """Steps since parts of the curvature that are not renewed at every step were: name -> age, for a log."""
        return {}

    def absorbs_correction(self, controls: Controls, momentum_of: MomentumOf) -> bool:
        """Whether an update with (g, c) equals one with (g + c, 0): one weighted gradient then serves both."""
        return False


def number(group: Group, name: str) -> float:
    """A numeric option of a parameter group."""
    value = group[name]
    if isinstance(value, Tensor) and value.numel() == 1:  # torch.optim takes learning rates so, too
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"param_groups: {name} is {value!r}, not a number")
    return float(value)


def check(condition: bool, option: str, value: object, expected: str) -> None:
    """Refuse a bad option, as torch.optim does at construction."""
    if not condition:
        raise OptionError(f"curvature: {option}={value!r}, expected {expected}")

"""Curvatures that are numbers or diagonals: every parameter by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..players import PlayerSamples, SampleGradients, Scale
from .base import Controls, Curvature, Direction, Evidence, Grads, Group, Metric, MomentumOf, State, Statistics


@dataclass(frozen=True)
class DiagonalMetric(Metric):
    """R^-1 as a number or a tensor of its own shape for each parameter."""

    inverse: Mapping[str, Scale]

    def solve(self, grads: Grads) -> dict[str, Tensor]:
        return {name: grad * self.inverse[name] for name, grad in grads.items()}

    def gram(self, samples: PlayerSamples) -> Tensor:
        return samples.gram(self.inverse)


@dataclass(frozen=True, kw_only=True)
class DiagonalCurvature(Curvature):
    """Rules for one parameter at a time."""

    @abstractmethod
    def parameter_statistics(self, parameter: Tensor, grad: Tensor, state: State, group: Group) -> State:
        """The statistics after this step, from the gradient they are made of."""

    @abstractmethod
    def inverse_metric(self, statistics: Mapping[str, Tensor], group: Group) -> Scale | None:
        """R^-1 = lr C^-1; None where there are no statistics yet."""

    @abstractmethod
    def parameter_direction(
        self, parameter: Tensor, state: State, group: Group, statistics: Mapping[str, Tensor]
    ) -> tuple[float, Tensor | None]:
        """a, and e or None for zero."""

    @abstractmethod
    def update_parameter(
        self,
        parameter: Tensor,
        grad: Tensor,
        correction: Tensor | None,
        state: State,
        group: Group,
        statistics: State,
        momentum_of: MomentumOf,
    ) -> None:
        """Take the step in place and bring ``state`` up to date."""

    def absorbs(self, group: Group, momentum_of: MomentumOf) -> bool:
        """Whether an update with (g, c) equals one with (g + c, None)."""
        return False

    def forms(self, samples: SampleGradients, rows: int) -> bool:
        return samples.best_formed_at_once(self.adaptive, rows)

    def formed(self, samples: PlayerSamples, rows: int) -> PlayerSamples:
        return samples.formed(self.adaptive, rows)

    def statistics(self, controls: Controls, evidence: Evidence) -> dict[str, State]:
        return {
            name: self.parameter_statistics(
                controls.parameters[name], grad, controls.state[name], controls.groups[name]
            )
            for name, grad in evidence.gradient.items()
        }

    def metric(self, controls: Controls, statistics: Statistics) -> DiagonalMetric | None:
        inverse = {}
        for name in controls.parameters:
            scale = self.inverse_metric(statistics[name], controls.groups[name])
            if scale is None:
                return None
            inverse[name] = scale
        return DiagonalMetric(inverse)

    def direction(self, controls: Controls, statistics: Statistics) -> Direction:
        affine = {
            name: self.parameter_direction(p, controls.state[name], controls.groups[name], statistics[name])
            for name, p in controls.parameters.items()
        }
        return Direction(
            {n: a for n, (a, _) in affine.items()}, {n: e for n, (_, e) in affine.items() if e is not None}
        )

    def update(
        self,
        controls: Controls,
        gradient: Grads,
        correction: Grads,
        statistics: dict[str, State],
        momentum_of: MomentumOf,
    ) -> None:
        for name, grad in gradient.items():
            self.update_parameter(
                controls.parameters[name],
                grad,
                correction.get(name),
                controls.state[name],
                controls.groups[name],
                statistics[name],
                momentum_of,
            )

    def absorbs_correction(self, controls: Controls, momentum_of: MomentumOf) -> bool:
        return all(self.absorbs(group, momentum_of) for group in controls.groups.values())

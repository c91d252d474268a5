"""RMSprop: diagonal metric, C = sqrt(E[g^2]) + eps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..players import Scale
from .base import Group, MomentumOf, State, check, number
from .diagonal import DiagonalCurvature


@dataclass(frozen=True, kw_only=True)
class RMSprop(DiagonalCurvature):
    """torch.optim.RMSprop: A = sqrt(v) + eps (centered: of v minus the squared mean); buf <- mu buf + g / A; p = A buf.

    The options are torch's. With ``momentum_of="step"`` the buffer also keeps the correction: buf <- buf + c / A.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check(self.lr >= 0, "lr", self.lr, "a number >= 0")
        check(0 <= self.alpha < 1, "alpha", self.alpha, "a number in [0, 1)")
        check(self.eps >= 0, "eps", self.eps, "a number >= 0")
        check(self.momentum >= 0, "momentum", self.momentum, "a number >= 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")

    def parameter_statistics(self, parameter: Tensor, grad: Tensor, state: State, group: Group) -> State:
        alpha, decay = number(group, "alpha"), number(group, "weight_decay")
        if decay:
            grad = grad.add(parameter, alpha=decay)
        square_avg = state.get("square_avg", torch.zeros_like(grad))
        statistics = {
            "step": state.get("step", torch.zeros(())) + 1,
            "square_avg": (square_avg * alpha).addcmul_(grad, grad, value=1 - alpha),
        }
        if group["centered"]:
            statistics["grad_avg"] = state.get("grad_avg", torch.zeros_like(grad)).lerp(grad, 1 - alpha)
        return statistics

    def _curvature(self, statistics: Mapping[str, Tensor], group: Group) -> Tensor:
        square_avg = statistics["square_avg"]
        if group["centered"]:
            square_avg = square_avg.addcmul(statistics["grad_avg"], statistics["grad_avg"], value=-1)
        return square_avg.sqrt().add_(number(group, "eps"))

    def inverse_metric(self, statistics: Mapping[str, Tensor], group: Group) -> Scale | None:
        if "square_avg" not in statistics:
            return None
        return number(group, "lr") / self._curvature(statistics, group)

    def parameter_direction(
        self, parameter: Tensor, state: State, group: Group, statistics: Mapping[str, Tensor]
    ) -> tuple[float, Tensor | None]:
        momentum, decay = number(group, "momentum"), number(group, "weight_decay")
        rest = parameter * decay if decay else None
        if momentum and "momentum_buffer" in state:
            kept = self._curvature(statistics, group) * state["momentum_buffer"] * momentum
            rest = kept if rest is None else rest + kept
        return 1.0, rest

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
        momentum, decay = number(group, "momentum"), number(group, "weight_decay")
        step = grad.add(parameter, alpha=decay) if decay else grad
        state.update(statistics)
        curvature = self._curvature(state, group)
        if momentum:
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(grad))
            buffer.mul_(momentum).addcdiv_(step, curvature)
            step = buffer
            if correction is not None:
                scaled = correction / curvature
                step = buffer + scaled
                if momentum_of == "step":
                    buffer.add_(scaled)
        else:
            step = (step if correction is None else step + correction) / curvature
        parameter.add_(step, alpha=-number(group, "lr"))

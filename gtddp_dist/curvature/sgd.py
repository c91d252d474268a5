"""SGD: constant metric, C = I."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..players import Scale
from .base import Group, MomentumOf, State, check, number
from .diagonal import DiagonalCurvature


@dataclass(frozen=True, kw_only=True)
class SGD(DiagonalCurvature):
    """torch.optim.SGD: buf <- mu buf + (1 - dampening) (g + wd u); p = buf, or g + wd u + mu buf (Nesterov).

    The options are torch's. With ``momentum_of="step"`` the buffer also keeps the correction: buf <- buf + c.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check(self.lr >= 0, "lr", self.lr, "a number >= 0")
        check(self.momentum >= 0, "momentum", self.momentum, "a number >= 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        check(
            not self.nesterov or (self.momentum > 0 and self.dampening == 0),
            "nesterov",
            True,
            "momentum > 0 and dampening = 0 with it",
        )

    @property
    def gauss_newton_weight(self) -> float:
        return 0.1

    @property
    def adaptive(self) -> bool:
        return False

    def parameter_statistics(self, parameter: Tensor, grad: Tensor, state: State, group: Group) -> State:
        return {}

    def inverse_metric(self, statistics: Mapping[str, Tensor], group: Group) -> Scale:
        return number(group, "lr")

    def parameter_direction(
        self, parameter: Tensor, state: State, group: Group, statistics: Mapping[str, Tensor]
    ) -> tuple[float, Tensor | None]:
        momentum, decay = number(group, "momentum"), number(group, "weight_decay")
        rest = parameter * decay if decay else None
        if not momentum:
            return 1.0, rest
        old = state.get("momentum_buffer")
        fresh = 1.0 if old is None else 1 - number(group, "dampening")  # torch: the first buffer is not damped
        if group["nesterov"]:
            fresh, kept = 1 + momentum, momentum**2
        else:
            kept = momentum
        if rest is not None:
            rest = rest * fresh
        if old is not None:
            rest = old * kept if rest is None else rest.add_(old, alpha=kept)
        return fresh, rest

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
        if momentum:
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"].mul_(momentum).add_(step, alpha=1 - number(group, "dampening"))
            else:
                buffer = state["momentum_buffer"] = step.clone()
            step = step.add(buffer, alpha=momentum) if group["nesterov"] else buffer
            if correction is not None:
                step = step + correction
                if momentum_of == "step":
                    buffer.add_(correction)
        elif correction is not None:
            step = step + correction
        parameter.add_(step, alpha=-number(group, "lr"))

    def absorbs(self, group: Group, momentum_of: MomentumOf) -> bool:
        return not group["momentum"] or (momentum_of == "step" and not group["nesterov"] and not group["dampening"])

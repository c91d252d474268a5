"""Adam and AdamW: diagonal metric, C = sqrt(v / (1 - b2^t)) + eps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..players import Scale
from .base import Group, MomentumOf, State, check, number
from .diagonal import DiagonalCurvature


@dataclass(frozen=True, kw_only=True)
class Adam(DiagonalCurvature):
    """torch.optim.Adam: m <- b1 m + (1 - b1) g; p = m / (1 - b1^t).

    The options are torch's; ``weight_decay`` is the L2 kind. With ``momentum_of="step"`` the first moment also keeps
    the correction: m <- m + (1 - b1^t) c.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check(self.lr >= 0, "lr", self.lr, "a number >= 0")
        check(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        check(self.eps >= 0, "eps", self.eps, "a number >= 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")

    def _l2(self, group: Group) -> float:
        return number(group, "weight_decay")

    def parameter_statistics(self, parameter: Tensor, grad: Tensor, state: State, group: Group) -> State:
        _, beta2 = _betas(group)
        if self._l2(group):
            grad = grad.add(parameter, alpha=self._l2(group))
        old = state.get("exp_avg_sq", torch.zeros_like(grad))
        statistics = {
            "step": state.get("step", torch.zeros(())) + 1,
            "exp_avg_sq": (old * beta2).addcmul_(grad, grad, value=1 - beta2),
        }
        if group["amsgrad"]:
            largest = state.get("max_exp_avg_sq", torch.zeros_like(grad))
            statistics["max_exp_avg_sq"] = torch.maximum(largest, statistics["exp_avg_sq"])
        return statistics

    def inverse_metric(self, statistics: Mapping[str, Tensor], group: Group) -> Scale | None:
        if "exp_avg_sq" not in statistics:
            return None
        second = statistics["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        bias_correction = 1 - _betas(group)[1] ** float(statistics["step"])
        return number(group, "lr") / ((second / bias_correction).sqrt_().add_(number(group, "eps")))

    def parameter_direction(
        self, parameter: Tensor, state: State, group: Group, statistics: Mapping[str, Tensor]
    ) -> tuple[float, Tensor | None]:
        beta1, _ = _betas(group)
        bias_correction = 1 - beta1 ** (float(state["step"]) + 1 if "step" in state else 1.0)
        fresh = (1 - beta1) / bias_correction
        rest = parameter * (self._l2(group) * fresh) if self._l2(group) else None
        if "exp_avg" in state:
            kept = state["exp_avg"] * (beta1 / bias_correction)
            rest = kept if rest is None else rest + kept
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
        beta1, _ = _betas(group)
        if self._l2(group):
            grad = grad.add(parameter, alpha=self._l2(group))
        state.update(statistics)
        bias_correction = 1 - beta1 ** float(state["step"])
        first = state.setdefault("exp_avg", torch.zeros_like(grad))
        first.lerp_(grad, 1 - beta1)
        step = first / bias_correction
        if correction is not None:
            step.add_(correction)
            if momentum_of == "step":
                first.add_(correction, alpha=bias_correction)
        self._decay(parameter, group)
        inverse_metric = self.inverse_metric(state, group)
        assert isinstance(inverse_metric, Tensor)
        parameter.addcmul_(step, inverse_metric, value=-1)

    def _decay(self, parameter: Tensor, group: Group) -> None:
        """Decoupled weight decay, which Adam has none of."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """torch.optim.AdamW: decoupled decay u <- (1 - lr wd) u, applied apart: the recursion does not see it."""

    weight_decay: float = 1e-2

    def _l2(self, group: Group) -> float:
        return 0.0

    def _decay(self, parameter: Tensor, group: Group) -> None:
        parameter.mul_(1 - number(group, "lr") * number(group, "weight_decay"))


def _betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = cast(tuple[float, float], group["betas"])
    return beta1, beta2

"""What a base optimizer must say of itself so that GT-DDP can stand on it.

A base takes the step -R^-1 p: R^-1 = lr C^-1 the inverse metric made of its curvature estimate C, p its direction
(gradient, momentum, decay). GT-DDP adds a correction c to p: the step becomes -R^-1 (p + c). With c = 0 every base
here is torch.optim's, to rounding.

Each method works on one parameter and its state, a dictionary of tensors with torch.optim's own names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

from ..errors import OptionError
from ..players import Scale

State = dict[str, Tensor]
Group = Mapping[str, object]
"""One entry of ``param_groups``: the options of its parameters."""
MomentumOf = Literal["step", "gradient"]
"""What a momentum buffer keeps: the corrected step, or the raw gradient."""


@dataclass(frozen=True, kw_only=True)
class Curvature(ABC):
    """A base optimizer: its options (fields, torch's names and defaults) and its rules."""

    @property
    def adaptive(self) -> bool:
        """Whether the metric changes from step to step (else "previous" and "current" agree)."""
        return True

    def defaults(self) -> dict[str, object]:
        """The options, as they go into ``param_groups``."""
        return asdict(self)

    @abstractmethod
    def statistics(self, parameter: Tensor, grad: Tensor, state: State, group: Group) -> State:
        """The curvature statistics after this step, from the gradient they are made of; changes nothing."""

    @abstractmethod
    def inverse_metric(self, statistics: Mapping[str, Tensor], group: Group) -> Scale | None:
        """R^-1 = lr C^-1 from statistics; None where there are none yet."""

    @abstractmethod
    def direction(
        self, parameter: Tensor, state: State, group: Group, statistics: Mapping[str, Tensor]
    ) -> tuple[float, Tensor | None]:
        """The direction as p = a g + e: a, and e or None for zero; changes nothing.

        ``statistics`` are those the sweep's metric is made of.
        """

    @abstractmethod
    def update(
        self,
        parameter: Tensor,
        grad: Tensor,
        correction: Tensor | None,
        state: State,
        group: Group,
        statistics: State,
        momentum_of: MomentumOf,
    ) -> None:
        """Take the step -R^-1 (p + c) in place and bring ``state`` up to date."""

    def absorbs_correction(self, group: Group, momentum_of: MomentumOf) -> bool:
        """Whether ``update(g, c)`` equals ``update(g + c, None)``: one weighted gradient then serves both."""
        return False


def number(group: Group, name: str) -> float:
    """A numeric option of a parameter group."""
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"param_groups: {name} is {value!r}, not a number")
    return float(value)


def check(condition: bool, option: str, value: object, expected: str) -> None:
    """Refuse a bad option, as torch.optim does at construction."""
    if not condition:
        raise OptionError(f"curvature: {option}={value!r}, expected {expected}")

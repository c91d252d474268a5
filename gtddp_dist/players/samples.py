"""The matrix S of a whole player: its modules' per-sample gradients side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from .base import SampleGradients, Scale, sum_tensors

V = TypeVar("V")


@dataclass(frozen=True)
class PlayerSamples:
    """Rows are samples (or several cotangents of each). Products with B numbers come back in float64.

    Attributes:
        parts: qualified module name -> the module's own S.
    """

    parts: Mapping[str, SampleGradients]

    def gram(self, inverse_metric: Mapping[str, Scale]) -> Tensor:
        """H = S R^-1 S^T, shape (B, B), for a diagonal R^-1 by qualified parameter name."""
        return symmetric(
            sum_tensors(part.gram(of_module(name, inverse_metric)).double() for name, part in self.parts.items())
        )

    def formed(self, diagonal: bool, samples: int) -> PlayerSamples:
        """The same with S formed where that is cheapest for Gram matrices of so many rows, and it is small."""
        return PlayerSamples({name: part.formed(diagonal, samples) for name, part in self.parts.items()})

    def least_memory(self) -> int:
        """Bytes of temporary memory that the Gram matrix takes at least, by which one input channel is at work."""
        return max(part.least_memory() for part in self.parts.values())

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        """S d, shape (B,), for d by qualified parameter name."""
        return sum_tensors(part.inner(of_module(name, direction)).double() for name, part in self.parts.items())

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        """S^T w, by qualified parameter name."""
        return {
            qualified(module, name): grad
            for module, part in self.parts.items()
            for name, grad in part.weighted(weights_B).items()
        }

    def per_sample(self) -> dict[str, Tensor]:
        """S itself, by qualified parameter name: (B, *parameter shape)."""
        return {
            qualified(module, name): grad
            for module, part in self.parts.items()
            for name, grad in part.per_sample().items()
        }

    def rows(self, rows: slice) -> PlayerSamples:
        """The same for some of the rows."""
        return PlayerSamples({name: part.rows(rows) for name, part in self.parts.items()})

    def plus(self, other: PlayerSamples, weights_R: Tensor) -> PlayerSamples:
        """Each sample's gradient plus its rows in ``other``, weighted: g_b + sum over its rows r of w_r s_r.

        ``other`` has a whole number of rows for each row of this one, next to each other.
        """
        return PlayerSamples({name: part.plus(other.parts[name], weights_R) for name, part in self.parts.items()})


def qualified(module: str, name: str) -> str:
    """A parameter's name in the model."""
    return f"{module}.{name}" if module else name


def of_module(module: str, values: Mapping[str, V]) -> dict[str, V]:
    """Those of the values that belong to one module's own parameters, by the parameter's name in it."""
    prefix = qualified(module, "")
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }


def symmetric(x_BB: Tensor) -> Tensor:
    """The symmetric part, which is all of a Gram matrix but for rounding."""
    return (x_BB + x_BB.mT) / 2

"""KFAC: the damped factors themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import Collectives
from ..players import PlayerSamples
from .base import Controls, State, check
from .coordinates import Coordinates
from .factors import Layout
from .kronecker import KroneckerCurvature, corollary7, padded, value_ratio


@dataclass(frozen=True, kw_only=True)
class KFAC(KroneckerCurvature):
    """C = (A + pi sqrt(damping)) (x) (B + sqrt(damping) / pi), pi^2 the ratio of the factors' mean eigenvalues."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.basis_method == "eigh",
            "basis_method",
            self.basis_method,
            "'eigh' with KFAC (what it solves with is diagonal among eigenvectors alone; use EKFAC)",
        )

    def _restart(self, former: State, state: State, partner: State | None, layout: Layout) -> None:
        pass

    def _correct(
        self,
        controls: Controls,
        samples: PlayerSamples,
        layers: Mapping[str, Layout],
        new: dict[str, State],
        ranks: Collectives,
    ) -> None:
        pass

    def _alone(self, state: State, layout: Layout, damping: float) -> Coordinates:
        side, basis_b = self.sides(state, layout)

        def inverse(values_a: Tensor) -> tuple[Tensor, Tensor]:
            root, pi = damping**0.5, value_ratio(values_a, state["values_b"])[:, None]
            return 1 / (state["values_b"] + root / pi), 1 / (values_a + pi * root)

        b_GO, a_GI = inverse(state["values_a"])
        if not side.by_channel:
            return Coordinates(side, basis_b, b_GO[:, :, None] * a_GI[:, None], (b_GO, a_GI))
        spread = b_GO[:, :, None] * a_GI.repeat_interleave(layout.taps, dim=1)[:, None]
        if layout.bias:  # apart from the weight, with a factor and a trace ratio of its own
            b_of_ones, a_of_ones = inverse(state["factor_ones"].expand(layout.groups, 1))
            spread = torch.cat([spread, b_of_ones[:, :, None] * a_of_ones[:, None]], dim=2)
        return Coordinates(side, basis_b, spread)

    def _together(
        self, u: State, v: State, layouts: list[Layout], damping: float
    ) -> tuple[tuple[Coordinates, Coordinates], Tensor]:
        if self.cooperation == "corollary7":
            return corollary7(self, u, layouts, u["values_b"][:, :, None] * u["values_a"][:, None], damping)
        s_a, s_b = u["correlation_a"], u["correlation_b"]
        both = []
        for state, layout in zip((u, v), layouts, strict=True):
            side, basis_b = self.sides(state, layout)
            a2, b2 = padded(s_a, layout.inputs) ** 2, padded(s_b, layout.outputs) ** 2
            product = b2[:, None] * a2
            inverse = 1 / (1 - product) if self.cooperation == "exact" else 1 / ((1 - b2[:, None]) * (1 - a2))
            both.append(Coordinates(side, basis_b, inverse[None]))
        cross = -(s_b[:, None] * s_a) * both[0].inverse[0, : len(s_b), : len(s_a)]
        return (both[0], both[1]), cross

"""EKFAC: the factors' eigenbasis, with corrected eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import Collectives
from ..players import AffineGradients, PlayerSamples
from .base import Controls, Cooperation, State, check
from .coordinates import Coordinates
from .decompositions import Task
from .factors import InputSide, Layout
from .kronecker import KroneckerCurvature, anchor_of, corollary7


@dataclass(frozen=True, kw_only=True)
class EKFAC(KroneckerCurvature):
    """C = U diag(s + damping) U^T, U the factors' eigenbasis and s = E_b[(U_B^T g_b U_A)^2], a running average.

    Two cooperating layers ("exact") keep the 2 x 2 second moments of each pair of canonical coordinates instead.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.cooperation != "theorem3",
            "cooperation",
            "theorem3",
            "'none', 'exact' or 'corollary7' with EKFAC (Theorem 3 has no corrected eigenvalues; use KFAC)",
        )

    @property
    def gauss_newton_weight(self) -> float:
        return 0.1

    @property
    def of_paper(self) -> Cooperation:
        # The pairs' own second moments take the place of Theorem 3's factors.
        return "exact"

    @property
    def basis_work(self) -> float:
        # Two products, into the iteration and from basis to basis, and a QR decomposition with its Q.
        return super().basis_work if self.basis_method == "eigh" else 2 + 2 + 8 / 3

    def _task(self, factors: Mapping[str, Tensor], state: State) -> Task:
        if self.basis_method == "qr" and "basis_b" in state and "cross_a" not in factors:
            return Task("iteration", factors, {"a": state["basis_a"], "b": state["basis_b"]})
        return super()._task(factors, state)

    def _restart(self, former: State, state: State, partner: State | None, layout: Layout) -> None:
        if partner is None or self.cooperation == "corollary7":
            side, _ = self.sides(state, layout)
            if "values_b" not in state:
                state["second_moments"] = self._carried(former, state, layout)
                return
            ones = state.get("factor_ones", state["values_b"][0, 0])
            values_a = side.entries(state["values_a"], ones)
            state["second_moments"] = state["values_b"][:, :, None] * values_a[:, None]
            return
        s_a, s_b = state["correlation_a"], state["correlation_b"]
        for each in (state, partner):
            shape = (1, each["basis_b"].shape[1], each["basis_a"].shape[1])
            each["second_moments"] = torch.ones(shape).to(each["basis_a"])
        state["cross_moments"] = s_b[:, None] * s_a

    def _carried(self, former: State, state: State, layout: Layout) -> Tensor:
        """Second moments in the new basis, of a gradient whose coordinates in the former one had the former second
        moments and no others: the diagonal there of C as it was. s' = (E_B'^T E_B)^2 s (E_A^T E_A')^2, squares
        elementwise."""
        side, basis_b = self.sides(former, layout)
        # The last bit depends on the memory layout; replicas that are sent a basis have another than its maker.
        new_a, new_b = state["basis_a"].contiguous(), state["basis_b"].contiguous()
        turned = InputSide((side.basis.mT @ new_a) ** 2, layout, side.by_channel)
        return ((new_b.mT @ basis_b) ** 2) @ turned.into(former["second_moments"])

    def _correct(
        self,
        controls: Controls,
        samples: PlayerSamples,
        layers: Mapping[str, Layout],
        new: dict[str, State],
        ranks: Collectives,
    ) -> None:
        pair = self.pair(controls)
        coupled: dict[str, Tensor] = {}
        for name, layout in layers.items():
            if pair is not None and self.cooperation == "corollary7" and name == pair[1]:
                continue  # the same as its partner's
            state = new[anchor_of(name, controls)]
            side, basis_b = self.sides(state, layout)
            part = samples.parts[name]
            assert isinstance(part, AffineGradients)
            coordinates = Coordinates(side, basis_b, state["second_moments"])
            if pair is not None and name in pair:
                coupled[name] = coordinates.per_sample(part)
                squares = (coupled[name] ** 2).mean(0)
            else:
                squares = coordinates.mean_square(part)
            self.mix(state, "second_moments", squares, name, ranks)
        if pair is not None and self.cooperation == "exact":
            state = new[anchor_of(pair[0], controls)]
            O, I = state["cross_moments"].shape  # noqa: E741
            product = coupled[pair[0]][:, 0, :O, :I] * coupled[pair[1]][:, 0, :O, :I]
            self.mix(state, "cross_moments", product.mean(0), pair[0], ranks)

    def _alone(self, state: State, layout: Layout, damping: float) -> Coordinates:
        side, basis_b = self.sides(state, layout)
        return Coordinates(side, basis_b, 1 / (state["second_moments"] + damping))

    def _together(
        self, u: State, v: State, layouts: list[Layout], damping: float
    ) -> tuple[tuple[Coordinates, Coordinates], Tensor]:
        if self.cooperation == "corollary7":
            return corollary7(self, u, layouts, u["second_moments"], damping)
        cross = u["cross_moments"]
        O, I = cross.shape  # noqa: E741
        damped = [state["second_moments"] + damping for state in (u, v)]
        determinant = damped[0][0, :O, :I] * damped[1][0, :O, :I] - cross**2
        both = []
        for state, layout, own, other in zip((u, v), layouts, damped, reversed(damped), strict=True):
            inverse = 1 / own
            inverse[0, :O, :I] = other[0, :O, :I] / determinant
            side, basis_b = self.sides(state, layout)
            both.append(Coordinates(side, basis_b, inverse))
        return (both[0], both[1]), -cross / determinant

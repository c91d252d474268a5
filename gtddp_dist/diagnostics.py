"""Figures of one step, made of B-dimensional quantities that the sweep has anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .groups import RecursionGroup
from .options import Options
from .sweep import Policy, StageReport, forward_stage


@dataclass(frozen=True)
class Gains:
    """What a player brings to the recursion of one group.

    Attributes:
        gram: H = S R^-1 S^T, shape (B, B).
        response: q = S R^-1 p, shape (B,).
        base_norm2: p^T R^-1 p, a scalar.
    """

    gram: Tensor
    response: Tensor
    base_norm2: Tensor


@dataclass
class _GroupFacts:
    gains: Gains
    report: StageReport
    share: float
    policy: Policy | None = None
    applied_v: Tensor | None = None


@dataclass
class StepFacts:
    """Collected during a step as tensors; turned into numbers only when asked."""

    players: dict[int, list[_GroupFacts]] = field(default_factory=dict)
    predicted_decrease: Tensor | None = None

    def add(self, player: int, gains: Gains, report: StageReport, group: RecursionGroup) -> None:
        """Note a player's backward step for one group."""
        self.players.setdefault(player, []).append(_GroupFacts(gains, report, group.share))

    def apply(self, player: int, group: int, policy: Policy, applied_v: Tensor) -> None:
        """Note its forward step: v with the feedback there was."""
        facts = self.players[player][group]
        facts.policy, facts.applied_v = policy, applied_v

    def join(self, other: StepFacts) -> None:
        """Take in the facts of another part of the step."""
        for player, facts in other.players.items():
            self.players.setdefault(player, []).extend(facts)
        if other.predicted_decrease is not None:
            before = 0.0 if self.predicted_decrease is None else self.predicted_decrease
            self.predicted_decrease = before + other.predicted_decrease

    def finish(self, groups: Sequence[RecursionGroup], phis: Sequence[Tensor], options: Options) -> None:
        """Note the change at the output: phi of every group at the last cut."""
        if options.stream != "gradient" or not self.players:
            return  # with another cotangent phi says nothing about the loss itself
        terms = [
            g.share * g.weight * (phi + options.rho(g.samples) / 2 * phi**2).sum()
            for g, phi in zip(groups, phis, strict=True)
        ]
        self.predicted_decrease = -torch.stack(terms).sum()

    def figures(self) -> dict[str, float]:
        """Numbers for a log; empty after a step without feedback.

        Returns:
            ``open_gain``: norm of all players' open gains in the metric R, sqrt(sum k^T R k).
            ``feedback_ratio``: norm of the feedback's part of the controls, over ``open_gain``.
            ``gram_min``, ``gram_max``: range of the eigenvalues of the players' Gram matrices.
            ``clamped``: share of the value Hessian's entries set to zero ("replace" only).
            ``radius``: largest spectral radius of M H ("replace" only); above 1 the recursion amplifies.
            ``predicted_decrease``: of the objective, by the recursion's own model (loss-gradient cotangent only).
        """
        facts = [f for of_player in self.players.values() for f in of_player]
        if not facts:
            return {}
        open2 = feedback2 = 0.0
        low, high = float("inf"), 0.0
        for f in facts:
            H, q = f.gains.gram, f.gains.response
            eigenvalues = torch.linalg.eigvalsh(H)
            low, high = min(low, float(eigenvalues[0])), max(high, float(eigenvalues[-1]))
            if f.policy is None or f.applied_v is None:
                continue
            v, _ = forward_stage(f.policy, torch.zeros_like(f.applied_v))  # without feedback
            dv = f.applied_v - v
            open2 += f.share * float(f.gains.base_norm2 + 2 * q @ v + v @ H @ v)
            feedback2 += f.share * float(dv @ H @ dv)
        figures = {
            "open_gain": max(open2, 0.0) ** 0.5,
            "feedback_ratio": (max(feedback2, 0.0) / open2) ** 0.5 if open2 > 0 else 0.0,
            "gram_min": low,
            "gram_max": high,
        }
        radius = torch.stack([f.report.radius for f in facts]).max()
        if not bool(radius.isnan()):
            figures["radius"] = float(radius)
            figures["clamped"] = float(torch.stack([f.report.clamped for f in facts]).mean())
        if self.predicted_decrease is not None:
            figures["predicted_decrease"] = float(self.predicted_decrease)
        return figures

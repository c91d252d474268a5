"""Figures of one step, made of B-dimensional quantities that the sweep has anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

    def totals(self) -> Totals:
        """What :func:`figures` needs, in numbers that add up over parts of the step. Waits for the device."""
        totals = Totals()
        for f in (f for of_player in self.players.values() for f in of_player):
            H, q = f.gains.gram, f.gains.response
            eigenvalues = torch.linalg.eigvalsh(H)
            totals.gram_min = min(totals.gram_min, float(eigenvalues[0]))
            totals.gram_max = max(totals.gram_max, float(eigenvalues[-1]))
            totals.players += 1
            totals.clamped += float(f.report.clamped)
            totals.radius = max(totals.radius, float(f.report.radius.nan_to_num(-1.0)))
            if f.policy is None or f.applied_v is None:
                continue
            v, _ = forward_stage(f.policy, torch.zeros_like(f.applied_v))  # without feedback
            dv = f.applied_v - v
            totals.open2 += f.share * float(f.gains.base_norm2 + 2 * q @ v + v @ H @ v)
            totals.feedback2 += f.share * float(dv @ H @ dv)
        if self.predicted_decrease is not None:
            totals.predicted_decrease = float(self.predicted_decrease)
        return totals


@dataclass
class Totals:
    """Numbers of a part of a step; those of several parts join to those of the whole."""

    players: float = 0.0
    open2: float = 0.0
    feedback2: float = 0.0
    gram_min: float = math.inf
    gram_max: float = 0.0
    radius: float = -1.0
    clamped: float = 0.0
    predicted_decrease: float = math.nan

    @classmethod
    def joined(cls, parts: Iterable[Totals]) -> Totals:
        """Of parts with other players, other samples, or both."""
        whole = cls()
        for part in parts:
            whole.players += part.players
            whole.open2 += part.open2
            whole.feedback2 += part.feedback2
            whole.clamped += part.clamped
            whole.gram_min = min(whole.gram_min, part.gram_min)
            whole.gram_max = max(whole.gram_max, part.gram_max)
            whole.radius = max(whole.radius, part.radius)
            if not math.isnan(part.predicted_decrease):
                before = 0.0 if math.isnan(whole.predicted_decrease) else whole.predicted_decrease
                whole.predicted_decrease = before + part.predicted_decrease
        return whole


def figures(totals: Totals) -> dict[str, float]:
    """Numbers for a log; empty after a step without feedback.

    Returns:
        ``open_gain``: norm of all players' open gains in the metric R, sqrt(sum k^T R k).
        ``feedback_ratio``: norm of the feedback's part of the controls, over ``open_gain``.
        ``gram_min``, ``gram_max``: range of the eigenvalues of the players' Gram matrices.
        ``clamped``: share of the value Hessian's entries set to zero ("replace" only).
        ``radius``: largest spectral radius of M H ("replace" only); above 1 the recursion amplifies.
        ``predicted_decrease``: of the objective, by the recursion's own model (loss-gradient cotangent only).
    """
    if not totals.players:
        return {}
    open2 = totals.open2
    told = {
        "open_gain": max(open2, 0.0) ** 0.5,
        "feedback_ratio": (max(totals.feedback2, 0.0) / open2) ** 0.5 if open2 > 0 else 0.0,
        "gram_min": totals.gram_min,
        "gram_max": totals.gram_max,
    }
    if totals.radius >= 0:
        told |= {"radius": totals.radius, "clamped": totals.clamped / totals.players}
    if not math.isnan(totals.predicted_decrease):
        told["predicted_decrease"] = totals.predicted_decrease
    return told

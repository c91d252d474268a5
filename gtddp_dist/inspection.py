"""Value functions and policies of the last step in explicit form, for figures and for checks on small nets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .capture import Stream
from .errors import OptionError
from .groups import RecursionGroup, StepSamples
from .sweep import Policy, Value, feedback_matrix
from .trajectory import Trajectory

LIMIT = 2**27
"""Most entries an explicit matrix may have."""


@dataclass(frozen=True)
class ExplicitValue:
    """V_z and V_zz at a cut.

    Attributes:
        gradient: V_z, shape (B, n), n the size of one sample's live tensors together.
        hessian: V_zz, shape (B, n, B, n).
        live: name of each live tensor -> its place among the n. Tensors no derivative reaches are left out.
    """

    gradient: Tensor
    hessian: Tensor
    live: Mapping[str, slice]


@dataclass(frozen=True)
class ExplicitPolicy:
    """delta u = k + K delta z of one player (Eq. 16), in the sweep's metric.

    Attributes:
        open_gain: k, shape (U,).
        feedback_gain: K, shape (U, B, n), n the size of one sample's live tensors at the cut before the stage.
        controls: parameter name -> its place among the U.
        live: live tensor -> its place among the n; its columns are the residual gain where it is a residual state.
    """

    open_gain: Tensor
    feedback_gain: Tensor
    controls: Mapping[str, slice]
    live: Mapping[str, slice]


@dataclass(frozen=True)
class BaseStep:
    """What an explicit policy needs besides the sweep's: R^-1 p and R^-1 of one player and group."""

    base_step: Mapping[str, Tensor]
    inverse_metric: Mapping[str, float | Tensor]


class Inspector:
    """Holds a step's captured data and sweep; forms explicit matrices on demand."""

    def __init__(
        self,
        trajectory: Trajectory,
        samples: StepSamples,
        groups: Sequence[RecursionGroup],
        policies: Mapping[int, list[Policy]],
        values: Mapping[int, list[Value]],
        base_steps: Mapping[int, list[BaseStep]],
        stream: Stream,
    ) -> None:
        self.trajectory = trajectory
        self.samples = samples
        self.groups = groups
        self.policies = policies
        self.values = values
        self.base_steps = base_steps
        self.stream = stream

    def value(self, cut: int, group: int) -> ExplicitValue:
        """See :meth:`gtddp_dist.GTDDP.value`."""
        if cut not in self.values:
            raise OptionError(f"value: cut {cut} is not one of 0 to {len(self.trajectory.stages)}, or had no sweep")
        value, members = self.values[cut][group], self.groups[group]
        loss_slopes, live = self._slopes(cut, members, "gradient")
        slopes, _ = self._slopes(cut, members, self.stream)
        self._guard(slopes.numel() ** 2)
        M = torch.diag(value.curvature) if value.curvature.ndim == 1 else value.curvature
        gradient = members.weight * loss_slopes + value.slope[:, None] * slopes
        return ExplicitValue(gradient, torch.einsum("bi,bc,cj->bicj", slopes, M, slopes), live)

    def policy(self, player: int, group: int) -> ExplicitPolicy:
        """See :meth:`gtddp_dist.GTDDP.policy`."""
        if player not in self.policies:
            raise OptionError(
                f"policy: player {player} is not one of 0 to {len(self.trajectory.stages) - 1}, or had none"
            )
        policy, members, base = (
            self.policies[player][group],
            self.groups[group],
            self.base_steps[player][group],
        )
        samples = self.samples.of(self.trajectory.players[player], self.stream)
        assert samples is not None
        grads = samples.rows(members.rows).per_sample()
        scaled_BU = torch.cat([(g * base.inverse_metric[name]).flatten(1).double() for name, g in grads.items()], dim=1)
        base_U = torch.cat([base.base_step[name].flatten().double() for name in grads])
        slopes, live = self._slopes(player, members, self.stream)
        self._guard(scaled_BU.shape[1] * slopes.numel())
        value = policy.value
        M = torch.diag(value.curvature) if value.curvature.ndim == 1 else value.curvature
        v = value.slope - M @ policy.open_response if policy.proximal else value.slope
        gain = torch.einsum("cu,cb,bi->ubi", scaled_BU, feedback_matrix(policy), slopes)
        controls, first = {}, 0
        for name, grad in grads.items():
            controls[name] = slice(first, first + grad[0].numel())
            first += grad[0].numel()
        return ExplicitPolicy(-(base_U + scaled_BU.mT @ v), -gain, controls, live)

    def _slopes(self, cut: int, group: RecursionGroup, stream: Stream) -> tuple[Tensor, dict[str, slice]]:
        """Back-propagated derivatives of a cut's live tensors, one row a sample, and where each tensor lies."""
        stages = self.trajectory.stages
        names = stages[cut].live_before if cut < len(stages) else stages[-1].live_after
        columns, live, first = [], {}, 0
        micro_batches = self.samples.micro_batches
        for position, name in enumerate(names):
            grads = [m.derivatives[stream].get((cut, position)) for m in micro_batches]
            if any(g is None for g in grads):
                continue
            rows = torch.cat([cast(Tensor, g).flatten(1) for g in grads])[group.rows].double()
            columns.append(rows * self.samples.factors[stream])
            live[name] = slice(first, first + rows.shape[1])
            first += rows.shape[1]
        if not columns:
            return torch.zeros(group.samples, 0, dtype=torch.float64), live
        return torch.cat(columns, dim=1), live

    def _guard(self, entries: int) -> None:
        if entries > LIMIT:
            raise OptionError(f"the explicit matrix would have {entries:,} entries; inspect a smaller net or batch")

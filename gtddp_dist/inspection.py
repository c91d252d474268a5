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
from .step import BaseStep
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
        value, members = self.sample_value(cut, group), self.groups[group]
        loss_slopes, live = self._slopes(cut, members, "gradient")
        slopes, _ = self._slopes(cut, members, self.stream)
        self._guard(loss_slopes.numel() ** 2)
        M = torch.diag(value.curvature) if value.curvature.ndim == 1 else value.curvature
        B, n = loss_slopes.shape
        by_sample = slopes.reshape(B, -1, n)  # K cotangents a sample
        K = by_sample.shape[1]
        gradient = members.weight * loss_slopes + (value.slope[:, None] * slopes).reshape(B, K, n).sum(1)
        hessian = torch.einsum("bki,bkcl,clj->bicj", by_sample, M.reshape(B, K, B, K), by_sample)
        return ExplicitValue(gradient, hessian, live)

    def sample_value(self, cut: int, group: int) -> Value:
        """See :meth:`gtddp_dist.GTDDP.sample_value`."""
        if cut not in self.values:
            raise OptionError(f"value: cut {cut} is not one of 0 to {len(self.trajectory.stages)}, or had no sweep")
        return self.values[cut][group]

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
        rows = self.samples.rows_per_sample(self.stream)
        grads = samples.rows(members.rows_of(rows)).per_sample()
        solved = [base.metric.solve({n: g[row] for n, g in grads.items()}) for row in range(members.samples * rows)]
        scaled_BU = torch.stack([torch.cat([row[name].flatten().double() for name in grads]) for row in solved])
        base_U = torch.cat([base.scaled[name].flatten().double() for name in grads])
        slopes, live = self._slopes(player, members, self.stream)
        self._guard(scaled_BU.shape[1] * slopes.numel())
        value = policy.value
        M = torch.diag(value.curvature) if value.curvature.ndim == 1 else value.curvature
        v = value.slope - M @ policy.open_response if policy.proximal else value.slope
        response = scaled_BU.mT @ feedback_matrix(policy)  # (U, B K)
        by_sample = (members.samples, rows, slopes.shape[1])
        gain = torch.einsum("ubk,bki->ubi", response.reshape(-1, *by_sample[:2]), slopes.reshape(by_sample))
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
        per_sample = self.samples.rows_per_sample(stream)
        for position, name in enumerate(names):
            grads = [m.derivatives[stream].get((cut, position)) for m in micro_batches]
            if any(g is None for g in grads):
                continue
            rows = torch.cat([cast(Tensor, g).flatten(1) for g in grads])[group.rows_of(per_sample)].double()
            columns.append(rows * self.samples.factors[stream])
            live[name] = slice(first, first + rows.shape[1])
            first += rows.shape[1]
        if not columns:
            return torch.zeros(group.samples * per_sample, 0, dtype=torch.float64), live
        return torch.cat(columns, dim=1), live

    def _guard(self, entries: int) -> None:
        if entries > LIMIT:
            raise OptionError(f"the explicit matrix would have {entries:,} entries; inspect a smaller net or batch")

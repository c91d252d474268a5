"""DDPNOpt (arXiv 2002.08809) as published: the Bellman recursion on explicit matrices. For small networks only.

It shares the base optimizers with GT-DDP (the metric R, statistics, momentum) but nothing of its sample-space algebra:
Jacobians of every stage, the Hessian V_xx of every sample, the feedback of every control on every number of the state.

Shape suffixes: B samples, n numbers of a sample's state before a stage, N after it, m controls of the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .curvature import Controls, Curvature, Evidence, Metric
from .curvature.base import State
from .errors import OptionError, StepError
from .players import PlayerSamples, prepare, sample_gradients
from .trajectory import Player, Stage
from .whole_batch import WholeBatchOptimizer, run

LIMIT_GIB = 8.0
"""Largest size of the explicit matrices of a step."""


@dataclass(frozen=True)
class Decision:
    """One stage's policy, delta u = -R^-1 (Q_u + Q_ux delta x), and what its update needs.

    Attributes:
        gradient: g_m, of the mean loss.
        direction: p_m, the base optimizer's own; l_u = p - g.
        Q_u: shape (m,).
        Q_ux: shape (B, m, n); None for the first stage, before which nothing moves.
        statistics: the curvature's, not yet in force.
    """

    gradient: Tensor
    direction: Tensor
    Q_u: Tensor
    Q_ux: Tensor | None
    statistics: dict[str, State]


class LiteralDDPNOpt(WholeBatchOptimizer):
    """DDPNOpt with explicit matrices: Q_uu = R, one block of V_xx a sample, statistics of Q_u, nonlinear rollout.

    Args:
        model: see :class:`WholeBatchOptimizer`.
        curvature: the base optimizer.
        param_groups: as torch's.
        gauss_newton_weight: rho of the terminal Hessian (rho / B) phi_x phi_x^T; "1/B": one over the samples.

    Raises:
        ModelError: a network that it cannot take.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        *,
        param_groups: Iterable[dict[str, object]] | None = None,
        gauss_newton_weight: float | Literal["1/B"] = "1/B",
    ) -> None:
        if gauss_newton_weight != "1/B" and not 0 <= gauss_newton_weight < float("inf"):
            raise OptionError(f"gauss_newton_weight={gauss_newton_weight!r}, expected a number >= 0 or '1/B'")
        self.curvature = curvature.cooperating("none")
        if self.curvature.stream != "gradient":
            raise OptionError("ddpnopt-literal: fisher='sampled' is not for statistics of the value function")
        super().__init__(model, "ddpnopt-literal", curvature.defaults(), param_groups)
        self.gauss_newton_weight = gauss_newton_weight
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        for player in self.trajectory.players:
            self.curvature.check(self._controls(player))

    def decide(self, images: Tensor, derivative: Tensor) -> bool:
        """The backward sweep, then the rollout.

        Raises:
            StepError: the matrices would take more than LIMIT_GIB; nothing changed.
        """
        states = self.states(images)
        self._check_size(states)
        decisions = self.backward(states, derivative)
        if decisions is None:
            return False
        state = images
        for t, (stage, decision) in enumerate(zip(self.trajectory.stages, decisions, strict=True)):
            moved_Bn = (state - states[t]).flatten(1)
            slope_m = decision.Q_u
            if decision.Q_ux is not None:
                slope_m = slope_m + torch.einsum("bmn,bn->m", decision.Q_ux, moved_Bn)
            controls = self._controls(stage.player)
            gradient, correction = (
                by_name(controls.parameters, each) for each in (decision.gradient, slope_m - decision.direction)
            )
            self.curvature.update(controls, gradient, correction, decision.statistics, "gradient")
            state = run(stage, state)
        return True

    def backward(self, states: list[Tensor], derivative: Tensor) -> list[Decision] | None:
        """The decisions of all stages, from V_x and V_xx at the output (GT-DDP's Eq. 13-19 with one state).

        None where the value function is not finite somewhere.
        """
        B = len(derivative)
        rho = 1 / B if isinstance(self.gauss_newton_weight, str) else self.gauss_newton_weight
        loss_x = V_x = derivative.flatten(1)
        own = B * loss_x  # the derivative of each sample's own loss
        V_xx = rho / B * torch.einsum("bi,bj->bij", own, own)
        decisions: list[Decision] = []
        for t in reversed(range(len(self.trajectory.stages))):
            stage = self.trajectory.stages[t]
            controls = self._controls(stage.player)
            F_x, F_u = self.jacobians(stage, states[t])
            gradient = torch.einsum("bNm,bN->m", F_u, loss_x)
            value_gradient = torch.einsum("bNm,bN->m", F_u, V_x)
            by_sample = self._by_sample(stage, states[t], V_x) if self.curvature.needs_samples else None
            evidence = Evidence(by_name(controls.parameters, value_gradient), by_sample)
            statistics = self.curvature.statistics(controls, evidence)
            metric = self.curvature.metric(controls, statistics)
            assert metric is not None  # of this step's statistics
            p = flat(
                controls.parameters,
                self.curvature.direction(controls, statistics).of(by_name(controls.parameters, gradient)),
            )
            Q_u = (p - gradient) + value_gradient
            if t == 0:  # nothing moves before it
                decisions.append(Decision(gradient, p, Q_u, None, statistics))
                break
            Q_x = torch.einsum("bNn,bN->bn", F_x, V_x)
            Q_xx = F_x.mT @ V_xx @ F_x
            Q_ux = F_u.mT @ V_xx @ F_x
            decisions.append(Decision(gradient, p, Q_u, Q_ux, statistics))
            k = -solve(metric, controls, Q_u[:, None])[:, 0]
            K = -vmap(lambda columns: solve(metric, controls, columns))(Q_ux)  # noqa: B023 - called at once
            V_x = Q_x + torch.einsum("bmn,m->bn", Q_ux, k)
            V_xx = Q_xx + Q_ux.mT @ K
            if not bool(torch.isfinite(V_x).all() & torch.isfinite(V_xx).all()):
                return None
            V_xx = positive(V_xx)
            loss_x = torch.einsum("bNn,bN->bn", F_x, loss_x)
        return decisions[::-1]

    def jacobians(self, stage: Stage, state: Tensor) -> tuple[Tensor, Tensor]:
        """F_x (B, N, n) and F_u (B, N, m) of a stage at a state (B, ...)."""
        module = _AsModule(self.model, stage)
        parameters = stage.player.controls()
        shape = state.shape[1:]

        def step(x_n: Tensor, u_m: Tensor) -> Tensor:
            own = {f"model.{name}": value for name, value in by_name(parameters, u_m).items()}
            after: Tensor = functional_call(module, own, (x_n.reshape(1, *shape),))
            return after.flatten()

        controls = flat(parameters, {name: p.detach() for name, p in parameters.items()})
        F_x, F_u = vmap(jacrev(step, argnums=(0, 1)), in_dims=(0, None))(state.flatten(1), controls)
        return F_x, F_u

    def _by_sample(self, stage: Stage, state: Tensor, V_x: Tensor) -> PlayerSamples:
        """The derivative of every sample's value function, times B as if it were its own loss, by the controls."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = []
        for name, module in stage.player.modules.items():

            def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                seen[name] = (args[0].detach(), output)

            hooks.append(module.register_forward_hook(note))
        try:
            with torch.enable_grad():
                after = run(stage, state)
                slopes = torch.autograd.grad(after, [output for _, output in seen.values()], V_x.view_as(after))
        finally:
            for hook in hooks:
                hook.remove()
        modules = stage.player.modules
        return PlayerSamples(
            {
                name: sample_gradients(modules[name], prepare(modules[name], seen[name][0]), slope, float(len(state)))
                for name, slope in zip(seen, slopes, strict=True)
            }
        )

    def _check_size(self, states: list[Tensor]) -> None:
        kept, largest = 0, 0
        for t, stage in enumerate(self.trajectory.stages):
            m = sum(p.numel() for p in stage.player.controls().values())
            n, N = states[t][0].numel(), states[t + 1][0].numel()
            kept += m * n if t else 0  # Q_ux
            # Of 8 bytes: the Jacobians; V_xx before and after, Q_xx, a product; K and a product.
            largest = max(largest, N * (n + m) + N * N + 3 * n * n + N * n + 2 * m * n)
        size = (kept + largest) * len(states[0]) * 8 / 2**30
        if size > LIMIT_GIB:
            raise StepError(
                f"ddpnopt-literal: its explicit matrices would take {size:.1f} GiB, more than {LIMIT_GIB:g}: take a "
                "smaller network (model.width) or batch (train.batch_size), or ddpnopt-*, the same in sample space"
            )

    def _controls(self, player: Player) -> Controls:
        parameters = player.controls()
        return Controls(
            parameters,
            {name: self.state[p] for name, p in parameters.items()},
            {name: self._group_of[p] for name, p in parameters.items()},
            player,
        )

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """As torch's, with the counters."""
        super().load_state_dict(state_dict)
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}


class _AsModule(nn.Module):
    """A stage as a module, so that its controls can be given anew for a call."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def forward(self, state: Tensor) -> Tensor:
        return run(self.stage, state)


def flat(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """One vector (m,) of what belongs to the parameters, in their order."""
    return torch.cat([values[name].flatten() for name in parameters])


def by_name(parameters: Mapping[str, Tensor], vector_m: Tensor) -> dict[str, Tensor]:
    """A vector (m,) by parameter name, in the parameters' shapes."""
    parts = vector_m.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def solve(metric: Metric, controls: Controls, columns: Tensor) -> Tensor:
    """R^-1 times every column of a matrix (m, n)."""

    def of_one(vector_m: Tensor) -> Tensor:
        return flat(controls.parameters, metric.solve(by_name(controls.parameters, vector_m)))

    solved: Tensor = vmap(of_one, in_dims=1, out_dims=1)(columns)
    return solved


def positive(V_xx: Tensor) -> Tensor:
    """Each of the matrices (B, n, n) with its negative eigenvalues set to zero (in float64: their rank is one)."""
    eigenvalues, vectors = torch.linalg.eigh((V_xx + V_xx.mT).double() / 2)
    return ((vectors * eigenvalues.clamp(min=0)[:, None, :]) @ vectors.mT).to(V_xx)

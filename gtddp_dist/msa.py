"""The method of successive approximations, MSA and E-MSA (arXiv 1710.09513): Pontryagin's maximum principle, by layer.

With phi the loss of a sample, l_t(u) = weight_decay / 2 |u|^2 and means over the samples of a step,

    J(u) = mean phi(x_T) + sum_t l_t(u_t)           H_t(x, p, u) = mean p . f_t(x, u) - l_t(u)
    x_{t+1} = f_t(x_t, u_t)                         p_T = -phi_x, p_t = grad_x H_t(x_t, p_{t+1}, u_t)

every layer takes the control that maximises its own Hamiltonian, x and p held fixed; in E-MSA less what that changes:

    H_t - r/2 mean |x_{t+1} - f_t(x_t, u)|^2 - r/2 mean |p_t - grad_x H_t(x_t, p_{t+1}, u)|^2
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import OptionError
from .trajectory import Stage
from .whole_batch import WholeBatchOptimizer, run


@dataclass(frozen=True)
class Terms:
    """What the augmented Hamiltonian of one layer is made of, at one control.

    Attributes:
        hamiltonian: H_t.
        state: mean |x_{t+1} - f_t|^2.
        costate: mean |p_t - grad_x H_t|^2; zero for the first layer, before which nothing is decided.
    """

    hamiltonian: Tensor
    state: Tensor
    costate: Tensor


class EMSA(WholeBatchOptimizer):
    """E-MSA; with a weight of 0 it is MSA.

    Args:
        model: see :class:`WholeBatchOptimizer`.
        weight: r, the weight of the augmentation; MSA needs ``weight_decay`` above 0 in its place, for else the
            Hamiltonian of a linear layer has no maximum.
        iterations: of L-BFGS, for every layer.
        lr: share of the way from the old controls to the maximum.
        weight_decay: of the running cost l_t.
        param_groups: as torch's.

    Raises:
        ModelError: a network that it cannot take.
        OptionError: a bad option.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float = 1.0,
        iterations: int = 10,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        param_groups: Iterable[dict[str, object]] | None = None,
    ) -> None:
        name = "emsa" if weight else "msa"
        if not 0 <= weight < float("inf"):
            raise OptionError(f"emsa_weight={weight!r}, expected a number >= 0")
        if iterations < 1:
            raise OptionError(f"emsa_iterations={iterations!r}, expected a whole number >= 1")
        if not lr > 0:
            raise OptionError(f"lr={lr!r}, expected a number > 0")
        if not weight_decay >= 0:
            raise OptionError(f"weight_decay={weight_decay!r}, expected a number >= 0")
        if not weight and not weight_decay:
            raise OptionError(
                "msa: weight_decay=0, expected a number > 0: without a running cost the Hamiltonian of a linear layer "
                "has no maximum"
            )
        super().__init__(model, name, {"lr": lr, "weight_decay": weight_decay}, param_groups)
        self.weight = weight
        self.iterations = iterations
        self._facts: dict[str, float] = {}
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}

    def decide(self, images: Tensor, derivative: Tensor) -> bool:
        """Maximise every layer's augmented Hamiltonian at the states and costates of the old controls."""
        states = self.states(images)
        costates = self.costates(states, derivative)
        stages = self.trajectory.stages
        old = {p: p.detach().clone() for stage in stages for p in stage.player.controls().values()}
        gain = state_change = costate_change = 0.0
        for t, stage in enumerate(stages):
            at = (stage, states[t], states[t + 1], costates[t], costates[t + 1])
            before = self.terms(*at)
            self._maximise(*at)
            for parameter in stage.player.controls().values():
                parameter.lerp_(old[parameter], 1 - float(self._group_of[parameter]["lr"]))
            after = self.terms(*at)
            gain += float(after.hamiltonian - before.hamiltonian)
            state_change += float(after.state)
            costate_change += float(after.costate)
        if not all(bool(torch.isfinite(p).all()) for p in old):
            for parameter, value in old.items():
                parameter.copy_(value)
            return False
        self._facts = {
            "hamiltonian_gain": gain,
            "state_change": state_change,
            "costate_change": costate_change,
        }
        return True

    def costates(self, states: list[Tensor], derivative: Tensor) -> list[Tensor]:
        """p at every cut, of each sample's own loss; zero at the input, on which nothing depends."""
        costates = [-derivative * len(derivative)]
        for stage, state in zip(reversed(self.trajectory.stages[1:]), reversed(states[1:-1]), strict=True):
            with torch.enable_grad():
                x = state.detach().requires_grad_()
                [p] = torch.autograd.grad(run(stage, x), x, costates[-1])
            costates.append(p)
        return [torch.zeros_like(states[0]), *reversed(costates)]

    def terms(self, stage: Stage, x: Tensor, x_next: Tensor, p: Tensor, p_next: Tensor, graph: bool = False) -> Terms:
        """The parts of a layer's augmented Hamiltonian at its present control; with ``graph`` to be differentiated."""
        first = stage.player.index == 0
        with torch.enable_grad():
            x = x.detach().requires_grad_(not first)
            after = run(stage, x)
            along = (p_next * after).sum()
            cost = sum(
                (float(self._group_of[u]["weight_decay"]) / 2 * (u**2).sum() for u in stage.player.controls().values()),
                torch.zeros_like(along),
            )
            costate = torch.zeros_like(along)
            if not first and (self.weight or not graph):
                [p_new] = torch.autograd.grad(along, x, create_graph=graph, retain_graph=True)
                costate = ((p - p_new) ** 2).sum() / len(x)
            return Terms(along / len(x) - cost, ((x_next - after) ** 2).sum() / len(x), costate)

    def _maximise(self, stage: Stage, x: Tensor, x_next: Tensor, p: Tensor, p_next: Tensor) -> None:
        controls = list(stage.player.controls().values())
        solver = torch.optim.LBFGS(
            controls,
            max_iter=self.iterations,
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            terms = self.terms(stage, x, x_next, p, p_next, graph=True)
            lost = self.weight / 2 * (terms.state + terms.costate) - terms.hamiltonian
            grads = torch.autograd.grad(lost, controls)
            for control, grad in zip(controls, grads, strict=True):
                control.grad = grad.contiguous()
            return lost.detach()

        solver.step(closure)
        solver.zero_grad()

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step, sums over the layers.

        Returns:
            ``hamiltonian_gain``: H_t of the new controls less that of the old ones.
            ``state_change``, ``costate_change``: what the augmentation weighs with r / 2.
            ``skipped_steps``: steps refused.
        """
        return {**self._facts, **super().diagnostics()}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """As torch's, with the counters."""
        super().load_state_dict(state_dict)
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}

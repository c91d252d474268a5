"""What optimizers share that look at a step's whole batch at once, on a network without shortcuts.

They take from the training loop the images and the derivative of the loss by the output, and find everything else by
running the stages themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .errors import ModelError, OptionError, StepError
from .nonfinite import Source
from .tracing import trace
from .trajectory import Stage, refuse_shortcuts

_COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class WholeBatchOptimizer(torch.optim.Optimizer):
    """Takes one step from one forward and backward pass of the model over all samples of the step.

    A step whose derivative is not finite is refused: nothing changes, ``skipped_steps`` counts it.

    Args:
        model: a network without shortcuts, BatchNorm and dropout, whose output is one tensor, samples first.
        name: the optimizer's name in messages.
        defaults: options of the parameter groups.
        param_groups: as torch's; None: one group of all trainable parameters.

    Raises:
        ModelError: the network has what this cannot take; the message names the module.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        defaults: dict[str, object],
        param_groups: Iterable[dict[str, object]] | None = None,
    ) -> None:
        self.trajectory = trace(model)
        self.name = name
        refuse_shortcuts(self.trajectory, name)
        for where, module in model.named_modules():
            if isinstance(module, _COUPLED):
                raise ModelError(
                    f"{name}: module '{where}' ({type(module).__name__}) couples samples or is random: take a network "
                    "without BatchNorm and dropout, such as model.name=plain-net"
                )
        if self.trajectory.plain_parameters:
            raise ModelError(f"{name}: parameter '{self.trajectory.plain_parameters[0]}' belongs to no layer")
        trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__([{"params": trainable}] if param_groups is None else param_groups, defaults)
        held = {p for group in self.param_groups for p in group["params"]}
        missing = [where for where, p in model.named_parameters() if p.requires_grad and p not in held]
        if missing:
            raise OptionError(f"param_groups: trainable parameter '{missing[0]}' is in none; add it, or freeze it")
        self.model = model
        self.steps = 0
        """Steps taken."""
        self.skipped_steps = 0
        """Steps refused, in all."""
        self.source: Source | None = None
        """What the last refused step had made that was not finite; here None, the model and the data may tell."""
        self._passes: list[tuple[Tensor, list[Tensor]]] = []
        """Of every forward pass since the last step: the images, and the output's derivative once there is one."""
        model.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise ModelError(f"{self.name} takes a network from one tensor to one tensor")
        derivative: list[Tensor] = []
        output.register_hook(lambda grad: derivative.append(grad.detach()))
        self._passes.append((inputs[0].detach(), derivative))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also forgets what passes left since the last step."""
        super().zero_grad(set_to_none)
        self._passes.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the backward pass since the last one.

        Raises:
            StepError: there was none, or more than one. Nothing changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        passes = [(x, grads[0]) for x, grads in self._passes if len(grads) == 1]
        if len(passes) != 1 or len(self._passes) != 1:
            raise StepError(
                f"{self.name}: a step needs one forward and one backward pass over all its samples; there were "
                f"{len(self._passes)} and {sum(len(grads) for _, grads in self._passes)} (no micro-batches)"
            )
        self._passes.clear()
        images, derivative = passes[0]
        if bool(torch.isfinite(derivative).all()) and self.decide(images, derivative):
            self.steps += 1
        else:
            self.skipped_steps += 1
        return loss

    @abstractmethod
    def decide(self, images: Tensor, derivative: Tensor) -> bool:
        """Change all controls. Without autograd.

        Args:
            images: the step's samples, (B, ...).
            derivative: of the mean loss by the output, (B, C).

        Returns:
            Whether that was possible; if not, nothing has changed.
        """

    def states(self, images: Tensor) -> list[Tensor]:
        """The state at every cut, the input first."""
        states = [images]
        for stage in self.trajectory.stages:
            states.append(run(stage, states[-1]))
        return states

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step, for a log."""
        return {"skipped_steps": float(self.skipped_steps)}

    def extra_state(self) -> dict[str, int]:
        """What the state holds besides tensors by parameter: counters."""
        return {"steps": self.steps, "skipped_steps": self.skipped_steps}

    def load_extra_state(self, state: Mapping[str, int]) -> None:
        """Restore :meth:`extra_state`."""
        self.steps = state["steps"]
        self.skipped_steps = state["skipped_steps"]

    def state_dict(self) -> dict[str, object]:
        """torch's, with the counters under ``"gtddp"``."""
        return {**super().state_dict(), "gtddp": self.extra_state()}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """As torch's, with the counters."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "gtddp"})
        self.load_extra_state(cast(dict[str, int], state_dict["gtddp"]))


def run(stage: Stage, state: Tensor) -> Tensor:
    """The state after a stage, with the modules' present parameters.

    Raises:
        ModelError: more than the state passes from stage to stage.
    """
    live = stage.run((state,)) if len(stage.live_before) == 1 else ()
    if len(live) != 1 or not isinstance(live[0], Tensor):
        raise ModelError(
            f"behind module '{stage.player.name}' something else is live besides the state, such as the size of an "
            "earlier tensor: use flatten(1) in place of view(x.size(0), -1)"
        )
    return live[0]

"""The choices of the GT-DDP recursion, validated in one place (docs/algorithm.md lists what each means)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

from .capture import Stream
from .curvature import Cooperation, MomentumOf
from .errors import OptionError
from .groups import LossReduction, Scope

ControlHessian = Literal["proximal", "replace"]
ValueHessian = Literal["batch", "block_diagonal"]
Terminal = Literal["loss_gradient", "sampled", "exact"]
Rollout = Literal["linear", "nonlinear"]
Statistics = Literal["gradient", "value"]
Metric = Literal["current", "previous"]
CaptureMode = Literal["gradient", "weighted"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that decides a GT-DDP step besides the base optimizer.

    Attributes:
        gauss_newton_weight: rho, the weight of the terminal Hessian; 0 is the base optimizer; "1/B" is one over the
            recursion group's size; None: the base's own default (:attr:`Curvature.gauss_newton_weight`).
        control_hessian: "proximal": Q_uu = R + F_u^T V_zz' F_u; "replace": Q_uu = R (Sec. 4.1).
        value_hessian: "batch": all of M; "block_diagonal": its diagonal (Sec. 4.2).
        terminal: the curvature cotangent: "loss_gradient" (Prop. 5), "sampled" labels of the softmax, or "exact":
            all columns of the softmax Hessian's factor, as many backward passes and rows a sample as classes.
        rollout: "linear", or "nonlinear": a second forward pass, stage by stage (Alg. 1).
        statistics: what second moments are made of: "gradient", or "value" (Q_u; needs metric "current").
        metric: the sweep's metric: "current", or "previous", the one the step before left.
        scope: the samples of one recursion: "batch", "micro_batch" or a number.
        momentum_of: what momentum buffers keep: the corrected "step", or the raw "gradient".
        cooperation: how a projection shortcut's layer and the last main-path layer decide together: "none",
            "theorem3", "exact" or "corollary7"; None: "exact" where the curvature has cross factors, else "none".
        replace_guard: with "replace", keep the spectral radius of M H at 1 or below.
        capture: "gradient": p.grad is filled as ever; "weighted": players' gradients are formed once, weighted.
        recompute: let the layers' inputs go after the forward pass, and make them anew, run of stages by run, in the
            backward pass and in the step: less memory, for up to three forward passes more.
        gram_memory: megabytes that per-sample gradients and Gram matrices of layers may take beyond what is captured;
            None: each layer goes the fastest way.
        loss_reduction: whether the step's losses add up to the "mean" over its samples, or to the "sum".
        replica_groups: replicas that this process stands for.
        clip_norm: largest norm of the whole gradient; None for no clipping.
        seed: keys the sampled labels.
    """

    gauss_newton_weight: float | Literal["1/B"] | None = None
    control_hessian: ControlHessian = "proximal"
    value_hessian: ValueHessian = "batch"
    terminal: Terminal = "loss_gradient"
    rollout: Rollout = "linear"
    statistics: Statistics = "gradient"
    metric: Metric = "current"
    scope: Scope = "batch"
    momentum_of: MomentumOf = "step"
    cooperation: Cooperation | None = None
    replace_guard: bool = True
    capture: CaptureMode = "gradient"
    recompute: bool = False
    gram_memory: float | None = None
    loss_reduction: LossReduction = "mean"
    replica_groups: int = 1
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            choices = [c for part in get_args(hints[option.name]) for c in (get_args(part) or (part,))]
            value = getattr(self, option.name)
            named = choices and all(isinstance(choice, str) or choice is type(None) for choice in choices)
            if named and value is not None and value not in choices:
                words = [repr(choice) for choice in choices if isinstance(choice, str)]
                raise OptionError(f"{option.name}={value!r}, expected one of {', '.join(words)}")
        rho = self.gauss_newton_weight
        if rho not in ("1/B", None) and not (isinstance(rho, int | float) and 0 <= rho < float("inf")):
            raise OptionError(f"gauss_newton_weight={rho!r}, expected a number >= 0 or '1/B'")
        whole = isinstance(self.scope, int) and not isinstance(self.scope, bool) and self.scope > 0
        if self.scope not in ("batch", "micro_batch") and not whole:
            raise OptionError(f"scope={self.scope!r}, expected 'batch', 'micro_batch' or a number of samples > 0")
        if self.statistics == "value" and self.metric != "current":
            raise OptionError(
                "statistics='value' needs metric='current': value gradients are known when the sweep reaches a player"
            )
        if self.replica_groups < 1:
            raise OptionError(f"replica_groups={self.replica_groups!r}, expected a whole number >= 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise OptionError(f"clip_norm={self.clip_norm!r}, expected a number > 0 or None")
        if self.gram_memory is not None and not self.gram_memory > 0:
            raise OptionError(f"gram_memory={self.gram_memory!r}, expected a number of megabytes > 0 or None")
        if self.seed < 0:
            raise OptionError(f"seed={self.seed!r}, expected a whole number >= 0")

    @property
    def feedback(self) -> bool:
        """Whether there is a recursion at all."""
        assert self.gauss_newton_weight is not None, "on_base() says which"
        return self.gauss_newton_weight != 0

    @property
    def stream(self) -> Stream:
        """The captured stream whose derivatives are the rows of S."""
        return "gradient" if self.terminal == "loss_gradient" else self.terminal

    def rho(self, samples: int) -> float:
        """The Gauss-Newton weight for a recursion group of that many samples."""
        assert self.gauss_newton_weight is not None
        return 1 / samples if isinstance(self.gauss_newton_weight, str) else self.gauss_newton_weight

    def on_base(self, default_weight: float) -> Options:
        """The same with the base's weight where none was given."""
        return self if self.gauss_newton_weight is not None else replace(self, gauss_newton_weight=default_weight)


PAPER = {
    "control_hessian": "replace",
    "value_hessian": "block_diagonal",
    "terminal": "loss_gradient",
    "rollout": "nonlinear",
    "statistics": "value",
    "metric": "current",
    "momentum_of": "gradient",
    "gauss_newton_weight": "1/B",
    "replace_guard": False,
}
"""The paper's own algorithm, as options; the way layers cooperate depends on the curvature (`Curvature.of_paper`)."""

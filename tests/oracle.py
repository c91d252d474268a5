"""A literal, dense reference of one GT-DDP step in float64.

This is the Bellman recursion of the GT-DDP paper (arXiv 2007.08880, Eq. 13-19) as it stands there, on the
state that holds all samples of a recursion and, for every sample, all live tensors: Jacobians by
`torch.func.jacrev`, explicit Q matrices, explicit inverses. It shares no code with the package and none of
its algebra, so that the two can be compared.

How to read it beside the paper. With ' for stage t+1, stage t of `_backward_stage` is

    Q_z  = F_z^T V_z'          Q_u  = l_u + F_u^T V_z'
    Q_zz = F_z^T V_zz' F_z     Q_uz = F_u^T V_zz' F_z     Q_uu = R, or R + F_u^T V_zz' F_u
    k    = -Q_uu^-1 Q_u        K    = -Q_uu^-1 Q_uz
    V_z  = Q_z + Q_uz^T k      V_zz = Q_zz + Q_uz^T K

Letters, and the sizes written behind them:

    B   samples of a recursion group     N   samples of the step (B = N if there is one group)
    T   stages                           C   classes, or a player's curvature [m_t, m_t]
    n_t numbers in the live tensors of one sample at cut t (cut t is before stage t, cut T is the output)
    m_t parameters of player t
    z   a group's state [B n_t]: the samples in order, in each the live tensors in order, each flattened
    u   a player's control [m_t]: its parameters in the order of `Stage.parameters`, each flattened
    s   the curvature cotangents at the output, K for each sample (one, or with terminal="exact" one for each
        class), and what they are at an earlier point by the chain rule

What is computed here beyond the equations above: l_u, the part of the base optimizer's direction that is not
the gradient of this step; R, the base optimizer's curvature over its rate; and the update that the base
optimizer makes of a control that the recursion has chosen. Rules that the package states in the factors of
V_zz (the positive M of "replace", its guard) are stated in them here too, with M read off the dense V_zz.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from nets import Live, Parameters, Stage, run_stages
from torch import Tensor
from torch.nn import functional

Buffers = dict[str, Tensor]
PlayerBuffers = Mapping[str, Buffers]


# --- what a base optimizer is to a player -------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What a player's curvature statistics may be made of, besides the mean gradient. N samples, in order.

    F_u [N, n_t+1, m_t]: the Jacobians of the player's stage.
    cotangent [N, n_t+1]: at the cut after the stage, the derivative of each sample's own loss (not averaged) or,
        with statistics="value", of the value function by each sample's state, over the sample's weight 1/B.
    sampled [N, n_t+1]: the derivative of each sample's loss with sampled labels; None without any.
    """

    F_u: Tensor
    cotangent: Tensor
    sampled: Tensor | None


class PlayerRule(ABC):
    """The base optimizer's rule for one player, on control vectors [m_t].

    The plain step for a gradient is -R^-1 p with R = curvature / lr and p = direction. `old`: the buffers that the
    step before has left, by the names of the player's parameters and, for what belongs to no single one of
    them, by the player's. `step` counts from 1.
    """

    stage: Stage
    lr: Tensor
    """The rate of every control, [m_t]."""
    adaptive: bool
    """Whether the curvature comes from statistics (so there is none before the first step)."""

    @abstractmethod
    def statistics(self, old: PlayerBuffers, gradient: Tensor, evidence: Evidence, step: int) -> PlayerBuffers:
        """The curvature statistics after this step's samples; gradient: that of the loss or of the value."""

    @abstractmethod
    def curvature(self, statistics: PlayerBuffers, step: int) -> Tensor:
        """C [m_t, m_t] from the statistics that step `step` has left; symmetric, positive."""

    @abstractmethod
    def momentum(self, old: PlayerBuffers, C: Tensor, gradient: Tensor, step: int) -> PlayerBuffers:
        """The momentum buffers after this gradient, before any correction."""

    @abstractmethod
    def direction(self, old: PlayerBuffers, C: Tensor, gradient: Tensor, step: int) -> Tensor:
        """p, which is affine in the gradient."""

    @abstractmethod
    def correct(self, momentum: PlayerBuffers, C: Tensor, correction: Tensor, step: int) -> PlayerBuffers:
        """The momentum buffers that keep the corrected step, p + correction instead of p."""

    @abstractmethod
    def decayed(self) -> Tensor:
        """The controls after a decay that is applied apart from the step."""


class OptimizerRule(ABC):
    """A base optimizer with its options."""

    @abstractmethod
    def of_player(self, stage: Stage, parameters: Parameters, live: Live, options: Options) -> PlayerRule:
        """The rule of a stage's player; live: the nominal live tensors before the stage."""


# --- torch's optimizers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base(OptimizerRule):
    """A torch optimizer's rule, taken apart. Everything is element-wise, for one parameter at a time.

    The plain step for a gradient is -R^-1 p with R = curvature / lr and p = direction. Buffers have torch's
    names. `step` counts from 1. Methods take the buffers that the step before has left.
    """

    lr: float
    weight_decay: float = 0.0

    adaptive = True
    """Whether the curvature comes from statistics (so there is none before the first step)."""

    def of_player(self, stage: Stage, parameters: Parameters, live: Live, options: Options) -> PlayerRule:
        if options.cooperation != "none":
            raise ValueError(f"cooperation={options.cooperation!r} needs Kronecker curvature")
        return ElementWise(stage, parameters, options)

    def decayed(self, u: Tensor) -> Tensor:
        """The parameter after a decay that is applied apart from the step."""
        return u

    def penalised(self, gradient: Tensor, u: Tensor) -> Tensor:
        """The gradient with that of the L2 penalty: g' = g + wd u."""
        return gradient + self.weight_decay * u

    @abstractmethod
    def statistics(self, old: Buffers, gradient: Tensor, u: Tensor) -> Buffers:
        """The curvature statistics after this gradient."""

    @abstractmethod
    def curvature(self, statistics: Buffers, u: Tensor, step: int) -> Tensor:
        """Diagonal of the curvature from the statistics that step `step` has left."""

    @abstractmethod
    def momentum(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Buffers:
        """The momentum buffers after this gradient, before any correction."""

    @abstractmethod
    def direction(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Tensor:
        """p, which is affine in the gradient."""

    @abstractmethod
    def correct(self, momentum: Buffers, curvature: Tensor, correction: Tensor, step: int) -> Buffers:
        """The momentum buffers that keep the corrected step, p + correction instead of p."""


@dataclass(frozen=True)
class SGD(Base):
    """torch.optim.SGD: p = buf, or g' + mu buf (Nesterov).

    buf <- mu buf + (1 - dampening) g', but the first buf is g' itself.
    """

    mu: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    adaptive = False

    def statistics(self, old: Buffers, gradient: Tensor, u: Tensor) -> Buffers:
        return {}

    def curvature(self, statistics: Buffers, u: Tensor, step: int) -> Tensor:
        return torch.ones_like(u)

    def momentum(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Buffers:
        if self.mu == 0:
            return {}
        g = self.penalised(gradient, u)
        if "momentum_buffer" not in old:
            return {"momentum_buffer": g}
        return {"momentum_buffer": self.mu * old["momentum_buffer"] + (1 - self.dampening) * g}

    def direction(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Tensor:
        g = self.penalised(gradient, u)
        if self.mu == 0:
            return g
        buffer = self.momentum(old, curvature, gradient, u, step)["momentum_buffer"]
        return g + self.mu * buffer if self.nesterov else buffer

    def correct(self, momentum: Buffers, curvature: Tensor, correction: Tensor, step: int) -> Buffers:
        return {name: buffer + correction for name, buffer in momentum.items()}


@dataclass(frozen=True)
class RMSprop(Base):
    """torch.optim.RMSprop: p = a buf, curvature a = sqrt(v) + eps (centred: sqrt(v - mean^2) + eps).

    buf <- mu buf + g' / a.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    mu: float = 0.0
    centered: bool = False

    def statistics(self, old: Buffers, gradient: Tensor, u: Tensor) -> Buffers:
        g = self.penalised(gradient, u)
        zero = torch.zeros_like(u)
        new = {"square_avg": self.alpha * old.get("square_avg", zero) + (1 - self.alpha) * g**2}
        if self.centered:
            new["grad_avg"] = self.alpha * old.get("grad_avg", zero) + (1 - self.alpha) * g
        return new

    def curvature(self, statistics: Buffers, u: Tensor, step: int) -> Tensor:
        variance = statistics["square_avg"]
        if self.centered:
            variance = variance - statistics["grad_avg"] ** 2
        return variance.sqrt() + self.eps

    def momentum(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Buffers:
        if self.mu == 0:
            return {}
        buffer = old.get("momentum_buffer", torch.zeros_like(u))
        return {"momentum_buffer": self.mu * buffer + self.penalised(gradient, u) / curvature}

    def direction(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Tensor:
        buffer = old.get("momentum_buffer", torch.zeros_like(u))
        return curvature * (self.mu * buffer) + self.penalised(gradient, u)

    def correct(self, momentum: Buffers, curvature: Tensor, correction: Tensor, step: int) -> Buffers:
        return {name: buffer + correction / curvature for name, buffer in momentum.items()}


@dataclass(frozen=True)
class Adam(Base):
    """torch.optim.Adam: p = m / (1 - b1^t), curvature sqrt(v / (1 - b2^t)) + eps (amsgrad: the largest v)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False

    def statistics(self, old: Buffers, gradient: Tensor, u: Tensor) -> Buffers:
        b2 = self.betas[1]
        zero = torch.zeros_like(u)
        v = b2 * old.get("exp_avg_sq", zero) + (1 - b2) * self.penalised(gradient, u) ** 2
        if not self.amsgrad:
            return {"exp_avg_sq": v}
        return {"exp_avg_sq": v, "max_exp_avg_sq": torch.maximum(old.get("max_exp_avg_sq", zero), v)}

    def curvature(self, statistics: Buffers, u: Tensor, step: int) -> Tensor:
        v = statistics["max_exp_avg_sq" if self.amsgrad else "exp_avg_sq"]
        return (v / (1 - self.betas[1] ** step)).sqrt() + self.eps

    def momentum(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Buffers:
        b1 = self.betas[0]
        m = b1 * old.get("exp_avg", torch.zeros_like(u)) + (1 - b1) * self.penalised(gradient, u)
        return {"exp_avg": m}

    def direction(self, old: Buffers, curvature: Tensor, gradient: Tensor, u: Tensor, step: int) -> Tensor:
        return self.momentum(old, curvature, gradient, u, step)["exp_avg"] / (1 - self.betas[0] ** step)

    def correct(self, momentum: Buffers, curvature: Tensor, correction: Tensor, step: int) -> Buffers:
        return {"exp_avg": momentum["exp_avg"] + (1 - self.betas[0] ** step) * correction}


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW: Adam without the penalty; u <- (1 - lr wd) u first, which is no part of p."""

    def decayed(self, u: Tensor) -> Tensor:
        return (1 - self.lr * self.weight_decay) * u

    def penalised(self, gradient: Tensor, u: Tensor) -> Tensor:
        return gradient


class ElementWise(PlayerRule):
    """The rule of a player whose parameters have element-wise rules, each its own."""

    def __init__(self, stage: Stage, parameters: Parameters, options: Options) -> None:
        self.stage, self.parameters = stage, parameters
        self.bases: dict[str, Base] = {}
        for name in stage.parameters:
            base = options.base_of(name)
            if not isinstance(base, Base):
                raise TypeError(f"{name}: {base} is not element-wise, as that of another parameter of {stage.name}")
            self.bases[name] = base
        self.lr = self._vector(lambda name, base: torch.full_like(parameters[name], base.lr))
        self.adaptive = any(base.adaptive for base in self.bases.values())

    def _vector(self, of: Callable[[str, Base], Tensor]) -> Tensor:
        return flatten_control(self.stage, lambda name: of(name, self.bases[name]))

    def _parts(self, control: Tensor) -> dict[str, Tensor]:
        return unflatten_control(self.stage, control, self.parameters)

    def statistics(self, old: PlayerBuffers, gradient: Tensor, evidence: Evidence, step: int) -> PlayerBuffers:
        g, u = self._parts(gradient), self.parameters
        return {name: base.statistics(old.get(name, {}), g[name], u[name]) for name, base in self.bases.items()}

    def curvature(self, statistics: PlayerBuffers, step: int) -> Tensor:
        u = self.parameters
        return torch.diag(self._vector(lambda name, base: base.curvature(statistics.get(name, {}), u[name], step)))

    def momentum(self, old: PlayerBuffers, C: Tensor, gradient: Tensor, step: int) -> PlayerBuffers:
        g, C_of, u = self._parts(gradient), self._parts(C.diagonal()), self.parameters
        return {
            name: base.momentum(old.get(name, {}), C_of[name], g[name], u[name], step)
            for name, base in self.bases.items()
        }

    def direction(self, old: PlayerBuffers, C: Tensor, gradient: Tensor, step: int) -> Tensor:
        g, C_of, u = self._parts(gradient), self._parts(C.diagonal()), self.parameters
        return self._vector(lambda n, base: base.direction(old.get(n, {}), C_of[n], g[n], u[n], step))

    def correct(self, momentum: PlayerBuffers, C: Tensor, correction: Tensor, step: int) -> PlayerBuffers:
        c, C_of = self._parts(correction), self._parts(C.diagonal())
        return {name: base.correct(momentum[name], C_of[name], c[name], step) for name, base in self.bases.items()}

    def decayed(self) -> Tensor:
        return self._vector(lambda name, base: base.decayed(self.parameters[name]))


# --- options, state, result ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What a step does; the names are the optimizer's.

    overrides: other base rules for single parameters, by name (parameter groups with other rates or decays).
    gauss_newton_weight: rho, or "1/B" with the group's B.
    cooperation: of the two affine modules of a player; for Kronecker bases (`oracle_kronecker.py`).
    groups: the recursion groups, ranges that follow each other and cover the step's samples; None: one group.
    """

    base: OptimizerRule
    overrides: Mapping[str, OptimizerRule] = field(default_factory=dict)
    gauss_newton_weight: float | Literal["1/B"] = 0.03
    control_hessian: Literal["proximal", "replace"] = "proximal"
    value_hessian: Literal["batch", "block_diagonal"] = "batch"
    terminal: Literal["loss_gradient", "sampled", "exact"] = "loss_gradient"
    rollout: Literal["linear", "nonlinear"] = "linear"
    statistics: Literal["gradient", "value"] = "gradient"
    metric: Literal["current", "previous"] = "current"
    momentum_of: Literal["step", "gradient"] = "step"
    groups: tuple[range, ...] | None = None
    replace_guard: bool = True
    cooperation: Literal["none", "exact", "theorem3", "corollary7"] = "none"

    def __post_init__(self) -> None:
        allowed = {
            "control_hessian": ("proximal", "replace"),
            "value_hessian": ("batch", "block_diagonal"),
            "terminal": ("loss_gradient", "sampled", "exact"),
            "rollout": ("linear", "nonlinear"),
            "statistics": ("gradient", "value"),
            "metric": ("current", "previous"),
            "momentum_of": ("step", "gradient"),
            "cooperation": ("none", "exact", "theorem3", "corollary7"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {values}")
        if self.statistics == "value" and self.metric == "previous":
            raise ValueError("statistics='value' needs metric='current'")

    def base_of(self, name: str) -> OptimizerRule:
        """The base rule of a parameter."""
        return self.overrides.get(name, self.base)


@dataclass(frozen=True)
class State:
    """The base optimizer's state: steps done, and the buffers by parameter name (and player name).

    The buffers of a parameter have torch's names.
    """

    step: int = 0
    buffers: dict[str, Buffers] = field(default_factory=dict)


@dataclass
class GroupSweep:
    """The recursion of one group. Lists over cuts have T + 1 entries (the last is the output), over stages T.

    live: the nominal live tensors at every cut (of the group's samples).
    V_z [B n_t], V_zz [B n_t, B n_t]: the value's derivatives at every cut. With the replace guard, V_zz at
        cut t+1 is the one that stage t used, so after scaling.
    radius: the guard's spectral radius of M H at every stage, before scaling; None where the guard is off.
    k [m_t], K [m_t, B n_t]: open and feedback gains.
    delta_z [B n_t]: the deviations the gains were fed with.
    delta_u [m_t]: k + K delta_z, the sweep's own control (the applied one: `OracleResult.delta_u`).
    """

    samples: slice
    live: list[Live]
    V_z: list[Tensor]
    V_zz: list[Tensor]
    radius: list[float | None]
    k: list[Tensor]
    K: list[Tensor]
    delta_z: list[Tensor]
    delta_u: list[Tensor]


@dataclass
class OracleResult:
    """parameters, state: after the step.

    loss: J before the step.  sweeps: one for each group, none where the sweep had no metric yet.
    metric [m_t, m_t] for each stage: the R of the sweep (empty list where there was none).
    correction [m_t] for each stage: c of the update -R_now^-1 (p + c), averaged over the groups.
    delta_u: the applied control of every parameter by name (without AdamW's decay).
    """

    parameters: dict[str, Tensor]
    state: State
    loss: float
    sweeps: list[GroupSweep]
    metric: list[Tensor]
    correction: list[Tensor]
    delta_u: dict[str, Tensor]


# --- layouts ------------------------------------------------------------------------------------------------


def flatten_live(live: Live) -> Tensor:
    """Live tensors [B, ...] as one row for each sample, [B, n_t]."""
    return torch.cat([part.flatten(1) for part in live], 1)


def unflatten_live(rows: Tensor, like: Live) -> Live:
    """Rows [B, n_t] as live tensors with the shapes of `like` (whose number of samples may be another)."""
    parts = torch.split(rows, [part[0].numel() for part in like], dim=1)
    return tuple(part.reshape(-1, *shape.shape[1:]) for part, shape in zip(parts, like, strict=True))


def flatten_control(stage: Stage, values: Callable[[str], Tensor]) -> Tensor:
    """One vector [m_t] of the tensors that belong to the names of the player's parameters."""
    return torch.cat([values(name).flatten() for name in stage.parameters])


def unflatten_control(stage: Stage, control: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector [m_t] by parameter name, with the shapes of `like`."""
    parts = torch.split(control, [like[name].numel() for name in stage.parameters])
    return {name: part.view_as(like[name]) for name, part in zip(stage.parameters, parts, strict=True)}


def value_block(V_zz: Tensor, live: Live, row: tuple[int, int], column: tuple[int, int]) -> Tensor:
    """The block of V_zz of two (sample, live tensor) pairs, for example the cross-term V_{x x_r}."""

    def positions(sample: int, part: int) -> slice:
        sizes = [tensor[0].numel() for tensor in live]
        start = sample * sum(sizes) + sum(sizes[:part])
        return slice(start, start + sizes[part])

    return V_zz[positions(*row), positions(*column)]


# --- derivatives --------------------------------------------------------------------------------------------


def stage_jacobians(stage: Stage, parameters: Parameters, live: Live) -> tuple[Tensor, Tensor]:
    """Jacobians of a stage, F_z [B, n_t+1, n_t] and F_u [B, n_t+1, m_t], one for each sample."""

    def step(z: Tensor, u: Tensor) -> Tensor:
        own = unflatten_control(stage, u, parameters)
        return flatten_live(stage.function({**parameters, **own}, unflatten_live(z[None], live)))[0]

    jacobians = torch.func.vmap(torch.func.jacrev(step, argnums=(0, 1)), in_dims=(0, None))
    F_z, F_u = jacobians(flatten_live(live), flatten_control(stage, parameters.__getitem__))
    return F_z, F_u


def mean_loss(stages: Sequence[Stage], parameters: Parameters, inputs: Tensor, labels: Tensor) -> Tensor:
    """J: the mean over the samples of the cross-entropy."""
    (logits,) = run_stages(tuple(stages), parameters, (inputs,))
    return functional.cross_entropy(logits, labels)


def mean_gradient(stages: Sequence[Stage], parameters: Parameters, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradient of J by parameter name, of the parameters of all players; zero where J does not depend on one."""
    names = [name for stage in stages for name in stage.parameters]
    own = {name: parameters[name].detach().clone().requires_grad_() for name in names}
    loss = mean_loss(stages, {**parameters, **own}, inputs, labels)
    gradients = torch.autograd.grad(loss, [own[name] for name in names], materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def pull_back(stages: Sequence[Stage], parameters: Parameters, live: Live, cotangent: Tensor) -> Tensor:
    """The output's cotangent [B, C] at the cut before the given (remaining) stages, [B, n_t]."""
    rows = flatten_live(live).detach().requires_grad_()
    output = flatten_live(run_stages(tuple(stages), parameters, unflatten_live(rows, live)))
    return torch.autograd.grad(output, rows, cotangent)[0]


# --- the value Hessian in its factors, for the rules that are stated in them --------------------------------


def _with_rows(s_z: Tensor) -> Tensor:
    """Cotangents [B, n_t], one for each sample, or [B, K, n_t] as [B, K, n_t]."""
    return s_z if s_z.ndim == 3 else s_z[:, None]


def value_matrix(V_zz: Tensor, s_z: Tensor) -> Tensor:
    """M [B K, B K] of V_zz^{b b'} = sum_kl M_{bk, b'l} s_z^{b k} s_z^{b' l}^T; s_z [B, K, n_t], or [B, n_t] if K = 1.

    The samples' parts of the state are different coordinates, so every block of V_zz gives its own K x K entries.
    Where a sample's cotangents are linearly dependent (those of terminal="exact" always are, a sample without any
    derivative is) M is not unique; this is the one without a part that the cotangents do not see.
    """
    s_z = _with_rows(s_z)
    samples, rows, size = s_z.shape
    blocks = V_zz.view(samples, size, samples, size)
    along = torch.linalg.pinv(s_z, rtol=1e-10)  # [B, n_t, K]
    M = torch.einsum("bik,bicj,cjl->bkcl", along, blocks, along)
    return M.reshape(samples * rows, samples * rows)


def from_value_matrix(M: Tensor, s_z: Tensor) -> Tensor:
    """V_zz [B n_t, B n_t] from its factors."""
    s_z = _with_rows(s_z)
    samples, rows, size = s_z.shape
    V_zz = torch.einsum("bkcl,bki,clj->bicj", M.view(samples, rows, samples, rows), s_z, s_z)
    return V_zz.reshape(samples * size, samples * size)


def _positive(V_zz: Tensor, s_z: Tensor) -> Tensor:
    """The "replace" mode's rule: M is made positive semi-definite (where it is block-diagonal, block by block).

    terminal="exact": the part of M that `value_matrix` leaves out is one direction for each sample, sqrt(p), along
    which the recursion leaves M at rho / B > 0. So it has no share in the negative eigenvalues.
    """
    eigenvalues, vectors = torch.linalg.eigh(value_matrix(V_zz, s_z))
    return from_value_matrix(vectors @ torch.diag(eigenvalues.clamp(min=0)) @ vectors.T, s_z)


# --- the recursion ------------------------------------------------------------------------------------------


def _inverse(Q_uu: Tensor) -> Tensor:
    """Q_uu^-1. Rows and columns are first scaled by the diagonal's root: Adam's R spans many magnitudes."""
    scale = Q_uu.diagonal().rsqrt()
    inverse: Tensor = torch.linalg.inv(scale[:, None] * Q_uu * scale)
    return scale[:, None] * inverse * scale


def _of_all_samples(blocks: Tensor) -> Tensor:
    """The block-diagonal matrix [B r, B c] of the samples' blocks [B, r, c]."""
    samples, rows, columns = blocks.shape
    unit = torch.eye(samples, dtype=blocks.dtype)
    return torch.einsum("bij,bc->bicj", blocks, unit).reshape(samples * rows, samples * columns)


def _same_sample(V_zz: Tensor, samples: int) -> Tensor:
    """V_zz with zeros between different samples."""
    size = len(V_zz) // samples
    mask = torch.eye(samples, dtype=V_zz.dtype)
    return V_zz * mask.repeat_interleave(size, 0).repeat_interleave(size, 1)


def _terminal(options: Options, live: Live, phi_z: Tensor, s: Tensor, samples: slice) -> GroupSweep:
    """A group's sweep before its first stage: V_z = phi_z / B, V_zz = rho / B sum_k s s^T for every sample."""
    B = len(s)
    rho = 1 / B if options.gauss_newton_weight == "1/B" else options.gauss_newton_weight
    V_zz = _of_all_samples(rho / B * torch.einsum("bki,bkj->bij", s, s))
    return GroupSweep(samples, [live], [(phi_z / B).flatten()], [V_zz], [], [], [], [], [])


def _guard(sweep: GroupSweep, F_u: Tensor, R: Tensor, s_z_next: Tensor) -> None:
    """Scales V_zz' so that the spectral radius of M H is at most 1, where H = S R^-1 S^T.

    F_u [B, n_t+1, m_t]; R [m_t, m_t]; s_z_next [B, K, n_t+1]: the curvature cotangents at the next cut.
    """
    S = torch.einsum("bxu,bkx->bku", F_u, s_z_next).flatten(0, 1)
    M = value_matrix(sweep.V_zz[0], s_z_next)
    radius = float(torch.linalg.eigvals(M @ S @ torch.linalg.solve(R, S.T)).abs().max())
    sweep.radius.insert(0, radius)
    if radius > 1:
        sweep.V_zz[0] = sweep.V_zz[0] / radius


def _backward_stage(
    options: Options, sweep: GroupSweep, F_z: Tensor, F_u: Tensor, R: Tensor, l_u: Tensor, s_z: Tensor
) -> None:
    """One stage of a group's backward recursion (Eq. 13-19); the new value and gains come first in its lists.

    F_z [B, n_t+1, n_t], F_u [B, n_t+1, m_t]; R [m_t, m_t], l_u [m_t]; s_z [B, K, n_t]: the curvature cotangents
    at this cut.
    """
    B = len(F_z)
    F_z, F_u = _of_all_samples(F_z), F_u.flatten(0, 1)  # [B n_t+1, B n_t] and [B n_t+1, m_t]
    V_z, V_zz = sweep.V_z[0], sweep.V_zz[0]  # of stage t+1

    Q_z = F_z.T @ V_z
    Q_u = l_u + F_u.T @ V_z
    Q_zz = F_z.T @ V_zz @ F_z
    Q_uz = F_u.T @ V_zz @ F_z
    Q_uu = R
    if options.control_hessian == "proximal":
        Q_uu = Q_uu + F_u.T @ V_zz @ F_u

    inverse = _inverse(Q_uu)
    k = -inverse @ Q_u
    K = -inverse @ Q_uz
    V_z = Q_z + Q_uz.T @ k
    V_zz = Q_zz + Q_uz.T @ K

    V_zz = (V_zz + V_zz.T) / 2
    if options.value_hessian == "block_diagonal":
        V_zz = _same_sample(V_zz, B)
    if options.control_hessian == "replace":
        V_zz = _positive(V_zz, s_z)

    for values, value in ((sweep.V_z, V_z), (sweep.V_zz, V_zz), (sweep.k, k), (sweep.K, K)):
        values.insert(0, value)


def _curvature_cotangents(options: Options, logits: Tensor, phi_z: Tensor, sampled_phi_z: Tensor | None) -> Tensor:
    """The s [N, K, C] at the output.

    K = 1: the loss gradient, or that of the loss with sampled labels. terminal="exact": K = C, for class c
    sqrt(p_c) (p - e_c), p the softmax, so that sum_c s s^T = diag(p) - p p^T.
    """
    if options.terminal == "loss_gradient":
        return phi_z[:, None]
    if options.terminal == "sampled":
        if sampled_phi_z is None:
            raise ValueError("terminal='sampled' needs sampled_labels")
        return sampled_phi_z[:, None]
    p = logits.softmax(1)
    unit = torch.eye(p.shape[1], dtype=p.dtype)
    return p.sqrt()[:, :, None] * (p[:, None, :] - unit)


def _groups(options: Options, samples: int) -> list[slice]:
    """The recursion groups as slices, checked."""
    groups = options.groups if options.groups is not None else (range(samples),)
    if [b for group in groups for b in group] != list(range(samples)):
        raise ValueError(f"groups {groups} are not ranges that follow each other and cover {samples} samples")
    return [slice(group.start, group.stop) for group in groups]


def oracle_step(
    stages: Sequence[Stage],
    parameters: Mapping[str, Tensor],
    state: State,
    inputs: Tensor,
    labels: Tensor,
    options: Options,
    sampled_labels: Tensor | None = None,
) -> OracleResult:
    """One step of GT-DDP.

    stages: of the whole network.  parameters: by name; those of no player stay as they are.
    inputs [N, ...], labels [N]: all samples of the step in order (micro-batches concatenated); float64, CPU.
    sampled_labels [N]: with terminal="sampled", the labels drawn from the model's softmax.
    """
    if any(p.dtype != torch.float64 for p in parameters.values()) or inputs.dtype != torch.float64:
        raise TypeError("the reference runs in float64")
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    T, N, step = len(stages), len(inputs), state.step + 1
    groups = _groups(options, N)
    share = [len(inputs[group]) / N for group in groups]  # pi_j
    old = state.buffers

    # The nominal trajectory and every first derivative along it.
    live: list[Live] = [(inputs,)]
    for stage in stages:
        live.append(stage.function(parameters, live[-1]))
    jacobians = [stage_jacobians(stage, parameters, live[t]) for t, stage in enumerate(stages)]
    (logits,) = live[T]
    classes = logits.shape[1]

    def at_cuts(cotangent: Tensor) -> list[Tensor]:
        """The output's cotangent [N, C] at every cut."""
        return [pull_back(stages[t:], parameters, live[t], cotangent) for t in range(T)] + [cotangent]

    phi_z = logits.softmax(1) - functional.one_hot(labels, classes)
    sampled_phi_z = None
    if sampled_labels is not None:
        sampled_phi_z = logits.softmax(1) - functional.one_hot(sampled_labels, classes)
    s = _curvature_cotangents(options, logits, phi_z, sampled_phi_z)
    s_z = [torch.stack(rows, 1) for rows in zip(*(at_cuts(row) for row in s.unbind(1)), strict=True)]
    g_z = at_cuts(phi_z)
    sampled_z = None if sampled_phi_z is None else at_cuts(sampled_phi_z)
    gradient = mean_gradient(stages, parameters, inputs, labels)
    group_gradients = [mean_gradient(stages, parameters, inputs[g], labels[g]) for g in groups]

    rules = [
        options.base_of(stage.parameters[0]).of_player(stage, parameters, live[t], options)
        for t, stage in enumerate(stages)
    ]

    def direction(t: int, C: Tensor, of_gradient: Mapping[str, Tensor]) -> Tensor:
        """The base's p [m_t] for a gradient."""
        return rules[t].direction(old, C, flatten_control(stages[t], of_gradient.__getitem__), step)

    # The backward sweep. Groups go through it side by side, because value statistics are made of all of them.
    # A sweep in the metric of the step before cannot be where an adaptive base has not done one.
    sweeping = options.metric == "current" or step > 1 or not any(rule.adaptive for rule in rules)
    sweeps = [_terminal(options, (logits[g],), phi_z[g], s[g], g) for g in groups if sweeping]
    statistics: dict[str, Buffers] = {}  # after this step
    R_now: list[Tensor] = []  # the metric of the update
    C_now: list[Tensor] = []  # its curvature
    R_sweep: list[Tensor] = []  # the metric of the sweep
    C_sweep: list[Tensor] = []
    for t in reversed(range(T)):
        stage, rule, (F_z, F_u) = stages[t], rules[t], jacobians[t]
        of_gradient = flatten_control(stage, gradient.__getitem__)
        cotangent = g_z[t + 1]
        if options.statistics == "value":
            of_gradient = torch.zeros_like(of_gradient)
            for pi, sweep in zip(share, sweeps, strict=True):
                of_gradient += pi * F_u[sweep.samples].flatten(0, 1).T @ sweep.V_z[0]
            cotangent = torch.cat([len(sweep.live[0][0]) * sweep.V_z[0] for sweep in sweeps]).view_as(cotangent)
        evidence = Evidence(F_u, cotangent, None if sampled_z is None else sampled_z[t + 1])
        of_player = rule.statistics(old, of_gradient, evidence, step)
        statistics |= of_player
        C_now.insert(0, rule.curvature(of_player, step))
        R_now.insert(0, C_now[0] / rule.lr[:, None])
        if not sweeping:
            continue

        C_sweep.insert(0, C_now[0] if options.metric == "current" else rule.curvature(old, step - 1))
        R_sweep.insert(0, C_sweep[0] / rule.lr[:, None])
        for sweep, own_gradient in zip(sweeps, group_gradients, strict=True):
            g = sweep.samples
            if options.control_hessian == "replace" and options.replace_guard:
                _guard(sweep, F_u[g], R_sweep[0], s_z[t + 1][g])
            else:
                sweep.radius.insert(0, None)
            # l_u is what the base's direction has beside the group's mean gradient, which F_u^T V_z' brings.
            p = direction(t, C_sweep[0], own_gradient)
            l_u = p - flatten_control(stage, own_gradient.__getitem__)
            _backward_stage(options, sweep, F_z[g], F_u[g], R_sweep[0], l_u, s_z[t][g])
            sweep.live.insert(0, tuple(part[g] for part in live[t]))

    # The forward sweep: the players act in their order.
    new_parameters = dict(parameters)
    new_buffers: dict[str, Buffers] = {}
    delta_u: dict[str, Tensor] = {}
    corrections: list[Tensor] = []
    new_live = live[0]
    delta_z = [torch.zeros_like(flatten_live(sweep.live[0])) for sweep in sweeps]  # [B, n_t] for each group
    for t, (stage, rule) in enumerate(zip(stages, rules, strict=True)):
        correction = torch.zeros_like(rule.lr)
        for j, sweep in enumerate(sweeps):
            sweep.delta_z.append(delta_z[j].flatten())
            sweep.delta_u.append(sweep.k[t] + sweep.K[t] @ sweep.delta_z[t])
            # In the sweep's metric this control is -R^-1 (p + c): c is what the recursion adds to the base.
            p = direction(t, C_sweep[t], group_gradients[j])
            correction += share[j] * (-R_sweep[t] @ sweep.delta_u[t] - p)
        corrections.append(correction)

        control = -torch.linalg.solve(R_now[t], direction(t, C_now[t], gradient) + correction)
        delta_u |= unflatten_control(stage, control, parameters)
        new_parameters |= unflatten_control(stage, rule.decayed() + control, parameters)
        momentum = rule.momentum(old, C_now[t], flatten_control(stage, gradient.__getitem__), step)
        if options.momentum_of == "step":
            momentum = rule.correct(momentum, C_now[t], correction, step)
        for name in (*stage.parameters, stage.name):
            buffers = statistics.get(name, {}) | momentum.get(name, {})
            if buffers or name in stage.parameters:
                new_buffers[name] = buffers

        if options.rollout == "nonlinear":
            new_live = stage.function(new_parameters, new_live)
            difference = flatten_live(new_live) - flatten_live(live[t + 1])
            delta_z = [difference[sweep.samples] for sweep in sweeps]
        else:
            F_z, F_u = jacobians[t]
            delta_z = [
                torch.einsum("bxz,bz->bx", F_z[sweep.samples], rows) + F_u[sweep.samples] @ sweep.delta_u[t]
                for rows, sweep in zip(delta_z, sweeps, strict=True)
            ]

    if not all(bool(parameter.isfinite().all()) for parameter in new_parameters.values()):
        raise FloatingPointError("the step is not finite: choose another net, rate or gauss_newton_weight")
    return OracleResult(
        parameters=new_parameters,
        state=State(step, new_buffers),
        loss=float(functional.cross_entropy(logits, labels)),
        sweeps=sweeps,
        metric=R_sweep,
        correction=corrections,
        delta_u=delta_u,
    )

"""The value Hessian of a whole batch on explicit matrices: Jacobians of every stage by torch.func, and the recursion.

Nothing is taken to be block-diagonal over samples here: the state at a cut is that of the whole batch, so a BatchNorm
couples its samples. It shares nothing with the sweep in sample space. For small networks and batches only.

Shape suffixes: B samples, n numbers of one sample's live tensors before a stage and N after it, m controls of it.
A state of the whole batch has the samples one after another, in each the live tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from ..tracing import trace
from ..trajectory import Stage

_CHUNK = 256
"""Rows of a Jacobian that are formed at a time."""


@dataclass(frozen=True)
class StageJacobians:
    """The dynamics of one stage, linearised on the whole batch.

    Attributes:
        name: of the stage's first module.
        F_z: shape (B N, B n).
        F_u: shape (B N, m).
    """

    name: str
    F_z: Tensor
    F_u: Tensor


def batch_jacobians(model: nn.Module, images: Tensor) -> tuple[list[StageJacobians], Tensor]:
    """Those of all stages, and the output (B, C), with the model in training mode.

    BatchNorms are changed to keep no running statistics, which torch.func cannot update: give a copy of the model.
    """
    torch.func.replace_all_batch_norm_modules_(model)
    model.train()
    stages = trace(model).stages
    found: list[StageJacobians] = []
    live: tuple[Tensor, ...] = (images,)
    for stage in stages:
        F_z, F_u = _of_stage(model, stage, live)
        found.append(StageJacobians(next(iter(stage.player.modules)), F_z, F_u))
        with torch.no_grad():
            live = cast(tuple[Tensor, ...], stage.run(live))
    return found, live[0]


def softmax_hessian(logits: Tensor, weight: float) -> Tensor:
    """weight / B times the Hessian of each sample's cross-entropy by its own logits (B, C), as (B C, B C)."""
    p = logits.softmax(1)
    return torch.block_diag(*(weight / len(p) * (torch.diag(row) - torch.outer(row, row)) for row in p))


def value_hessians(
    stages: Sequence[StageJacobians], terminal: Tensor, rate: float, *, proximal: bool
) -> dict[int, Tensor]:
    """V_zz (B n, B n) at every cut but the first, where the images are, with R = I / rate, as SGD has it.

    V_zz = Q_zz - Q_uz^T Q_uu^-1 Q_uz with Q_uu = R, or with `proximal` R + F_u^T V_zz' F_u. Nothing is clamped.
    """
    values = {len(stages): terminal}
    V = terminal
    for cut in range(len(stages) - 1, 0, -1):
        F_z, F_u = stages[cut].F_z, stages[cut].F_u
        if not proximal:
            Q_uz = F_u.T @ V @ F_z
            V = F_z.T @ V @ F_z - rate * Q_uz.T @ Q_uz
        elif F_u.shape[1] <= len(V):
            Q_uz = F_u.T @ V @ F_z
            Q_uu = torch.eye(F_u.shape[1], dtype=V.dtype) / rate + F_u.T @ V @ F_u
            V = F_z.T @ V @ F_z - Q_uz.T @ torch.linalg.solve(Q_uu, Q_uz)
        else:  # more controls than numbers of the state: the same, by V - V F_u Q_uu^-1 F_u^T V = V (I + G V)^-1
            G = rate * F_u @ F_u.T
            V = F_z.T @ V @ torch.linalg.solve(torch.eye(len(V), dtype=V.dtype) + G @ V, F_z)
        V = (V + V.T) / 2
        values[cut] = V
    return values


def block_norms(V: Tensor, samples: int) -> Tensor:
    """Frobenius norms (B, B) of the blocks of V (B n, B n)."""
    n = len(V) // samples
    return V.reshape(samples, n, samples, n).pow(2).sum((1, 3)).sqrt()


def off_diagonal_share(V: Tensor, samples: int) -> float:
    """Norm of V (B n, B n) outside its diagonal blocks, over that of all of it; 0 where it is zero."""
    norms2 = block_norms(V, samples) ** 2
    return float((1 - norms2.trace() / norms2.sum()).clamp(min=0).sqrt().nan_to_num())


class _AsModule(nn.Module):
    """A stage as a module, so that its controls can be given anew for a call."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def forward(self, *live: Tensor) -> Tensor:
        return _rows(cast(tuple[Tensor, ...], self.stage.run(live)))


def _of_stage(model: nn.Module, stage: Stage, live: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    module = _AsModule(model, stage)
    parameters = {f"model.{name}": p.detach() for name, p in stage.player.controls().items()}
    shapes, sizes = [part.shape for part in live], [part[0].numel() for part in live]

    def after(z_Bn: Tensor, controls: dict[str, Tensor]) -> Tensor:
        parts = z_Bn.split(sizes, dim=1)
        again = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        moved: Tensor = functional_call(module, controls, again)
        return moved.flatten()

    z_Bn = _rows(live)
    F_z, by_name = jacrev(after, argnums=(0, 1), chunk_size=_CHUNK)(z_Bn, parameters)
    return F_z.flatten(1), torch.cat([by_name[name].flatten(1) for name in parameters], dim=1)


def _rows(live: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten(1) for part in live], dim=1)

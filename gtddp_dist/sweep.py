"""The Bellman recursion of GT-DDP in sample space: one page, no hooks, no processes, no parameters.

With a terminal Hessian that is an outer product of per-sample curvature cotangents (Prop. 5 and 6), the value
function at every cut is carried by B numbers and a B x B matrix (docs/algorithm.md, "Sample space"):

    V_z^b = omega g_z^b + c^b s_z^b            V_zz = S_z^T M S_z

where g_z and s_z are the plain back-propagated loss gradient and curvature cotangent of sample b. A player enters
only through its Gram matrix H = S R^-1 S^T and q = S R^-1 p, with S its per-sample gradients, R the metric of its
control Hessian and p the direction its base optimizer would take (step = -R^-1 p).

Equation numbers are those of arXiv 2007.08880. Shape suffixes: B rows of S: the samples of one recursion group, or
several curvature cotangents of each, next to each other. A block-diagonal M (Sec. 4.2) is kept as its diagonal, M_B,
where a sample has one row; else, as a full one, it is M_BB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Value:
    """The value function at one cut for one recursion group.

    Attributes:
        slope: c, shape (B,); the part of V_z beyond the plain gradient, in units of the curvature cotangent.
        curvature: M, shape (B, B), or (B,) when the value Hessian is block-diagonal over samples.
    """

    slope: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Policy:
    """What the forward sweep needs of one player: delta u = -R^-1 (p + S^T v), v affine in the feedback phi.

    Attributes:
        open_response: a, shape (B,); minus the change of the cotangent-weighted output the open gain alone makes.
        feedback_response: F = N H M, shape (B, B); the same for a unit of phi.
        value: the value function at the cut after this player's stage, with which its gains were built.
        proximal: whether Q_uu held F_u^T V_zz' F_u besides R.
    """

    open_response: Tensor
    feedback_response: Tensor
    value: Value
    proximal: bool


@dataclass(frozen=True)
class StageReport:
    """Cheap facts about one player's backward step, as tensors (nothing is synchronised with the host).

    Attributes:
        radius: spectral radius of M H before any guard; above 1 the "replace" recursion amplifies. NaN in
            "proximal" mode, which does not need it.
        clamped: share of the entries (block-diagonal) or eigenvalues (full) of M set to zero.
    """

    radius: Tensor
    clamped: Tensor


def terminal_value(rows: int, weight: float, rho: float, diagonal: bool, like: Tensor) -> Value:
    """The value function at the output: V_z = omega phi_z, V_zz = omega rho s s^T (Prop. 5 and 6).

    Args:
        rows: B, the rows of S in the recursion group.
        weight: omega, the weight of one sample in the objective (1/B for a mean).
        rho: the Gauss-Newton weight.
        diagonal: keep M as its diagonal, for samples of one row and a block-diagonal value Hessian (Sec. 4.2).
        like: a tensor whose dtype and device the value takes.
    """
    slope = torch.zeros(rows, dtype=like.dtype, device=like.device)
    entries = torch.full_like(slope, rho * weight)
    return Value(slope, entries if diagonal else torch.diag(entries))


def backward_stage(
    after: Value, gram_BB: Tensor, response_B: Tensor, *, proximal: bool, guard: bool, block: int | None = None
) -> tuple[Policy, Value, StageReport]:
    """One player's step of the backward Bellman sweep (Eq. 13-19).

    Args:
        after: value function at the cut after the stage.
        gram_BB: H = S R^-1 S^T, shape (B, B).
        response_B: q = S R^-1 p, shape (B,).
        proximal: Q_uu = R + F_u^T V_zz' F_u; else Q_uu = R (Sec. 4.1, "replace").
        guard: in "replace" mode, scale M down to keep the spectral radius of M H at 1.
        block: keep only the diagonal blocks of this many rows of a full M (Sec. 4.2, several rows a sample).

    Returns:
        The player's policy, the value function at the cut before the stage, and a report.
    """
    H, c, M = gram_BB, after.slope, after.curvature
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    if proximal:
        radius = torch.full((), torch.nan, dtype=H.dtype, device=H.device)
    else:
        root = _root(M)
        radius = _largest_eigenvalue(_symmetric(_left(root, _right(H, root)))).clamp(min=0)
        if guard:
            M = M / radius.clamp(min=1)

    # k and K of Eq. 16, seen from the samples: N = (I + H M)^-1 is where Q_uu^-1 goes.
    right_hand_sides = torch.cat([(response_B + H @ c)[:, None], _right(H, M)], dim=1)
    if proximal:
        right_hand_sides = _solved(identity + _right(H, M), right_hand_sides)
    a_B, F_BB = right_hand_sides[:, 0], right_hand_sides[:, 1:]

    # V_z = Q_z + Q_uz^T k and V_zz = Q_zz + Q_uz^T K (Eq. 18, 19), as c <- c - M a and M <- M - M N H M.
    c_before = c - _left(M, a_B)
    M_before = M - M * F_BB.diagonal() if M.ndim == 1 else _symmetric(M - M @ F_BB)
    if block is not None and M_before.ndim == 2:
        sample = torch.arange(len(M_before), device=H.device) // block
        M_before = M_before * (sample[:, None] == sample)
    clamped = torch.zeros((), dtype=H.dtype, device=H.device)
    if not proximal:
        M_before, clamped = _positive_part(M_before)
    policy = Policy(a_B, F_BB, Value(c, M), proximal)
    return policy, Value(c_before, M_before), StageReport(radius, clamped)


def forward_stage(policy: Policy, phi_B: Tensor) -> tuple[Tensor, Tensor]:
    """One player's step of the forward sweep (Eq. 20): open gain plus feedback.

    Args:
        policy: what the backward sweep left.
        phi_B: <s_z^b, delta z^b> summed over the live tensors of the cut before the stage, shape (B,).

    Returns:
        v, shape (B,): the correction is S^T v, the control delta u = -R^-1 (p + S^T v); and
        S delta u, shape (B,): the linear rollout continues with phi + S delta u.
    """
    c, M = policy.value.slope, policy.value.curvature
    step_B = -(policy.open_response + policy.feedback_response @ phi_B)
    seen_B = phi_B + step_B if policy.proximal else phi_B
    return c + _left(M, seen_B), step_B


def feedback_matrix(policy: Policy) -> Tensor:
    """dv / dphi, shape (B, B): the feedback gain is K = -R^-1 S^T (dv / dphi) S_z."""
    M = policy.value.curvature
    if policy.proximal:
        seen = torch.eye(policy.feedback_response.shape[0], dtype=M.dtype, device=M.device) - policy.feedback_response
        return _left(M, seen)
    return torch.diag(M) if M.ndim == 1 else M


def _left(M: Tensor, x: Tensor) -> Tensor:
    """M x, for x of shape (B,) or (B, n) and M full or a diagonal."""
    if M.ndim == 2:
        return M @ x
    return M * x if x.ndim == 1 else M[:, None] * x


def _right(x_BB: Tensor, M: Tensor) -> Tensor:
    """X M, for M full or a diagonal."""
    return x_BB @ M if M.ndim == 2 else x_BB * M


def _symmetric(x_BB: Tensor) -> Tensor:
    return (x_BB + x_BB.mT) / 2


def _solved(matrix_BB: Tensor, right_Bn: Tensor) -> Tensor:
    """A^-1 x; NaN for a matrix that is singular, as only one that is not finite is here.

    torch.linalg.solve would wait for the device to raise.
    """
    found, singular = torch.linalg.solve_ex(matrix_BB, right_Bn)
    return torch.where(singular == 0, found, torch.nan)


def _spectrum(symmetric_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; NaN for a matrix that is not finite."""
    solvable, factor = _solvable(symmetric_BB)
    eigenvalues, vectors = torch.linalg.eigh(solvable)
    return factor * eigenvalues, vectors


def _largest_eigenvalue(symmetric_BB: Tensor) -> Tensor:
    """NaN for a matrix that is not finite."""
    solvable, factor = _solvable(symmetric_BB)
    return factor * torch.linalg.eigvalsh(solvable)[-1]


def _solvable(x_BB: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and 1; zeros and NaN where it is not finite, on which torch.linalg would raise.

    A Gram matrix can be that, and M can overflow, since "replace" is not bounded. The step is refused for it as for any
    other value that is not finite.
    """
    finite = torch.isfinite(x_BB).all()
    return torch.where(finite, x_BB, 0.0), torch.where(finite, 1.0, torch.nan).to(x_BB.dtype)


def _root(M: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite M."""
    if M.ndim == 1:
        return M.clamp(min=0).sqrt()
    eigenvalues, vectors = _spectrum(M)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.mT


def _positive_part(M: Tensor) -> tuple[Tensor, Tensor]:
    """M with negative entries (diagonal) or eigenvalues (full) set to zero, and the share of them."""
    if M.ndim == 1:
        return M.clamp(min=0), (M < 0).to(M.dtype).mean()
    eigenvalues, vectors = _spectrum(M)
    clamped = (vectors * eigenvalues.clamp(min=0)) @ vectors.mT
    return clamped, (eigenvalues < -1e-12 * eigenvalues.abs().max()).to(M.dtype).mean()

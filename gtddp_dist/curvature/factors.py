"""Kronecker factors of affine layers: how a layer's controls are a matrix, what the factors are made of, their bases.

Shape suffixes: B samples, G channel groups, L positions, I inputs of a position (a last one of 1 for a bias),
O outputs, C channels of a group; n either I or C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..players import AffineGradients

Factors = Literal["unfolded", "spatially_uncorrelated", "reduced"]


@dataclass(frozen=True)
class Layout:
    """A layer's trainable parameters as one matrix a channel group: outputs x (inputs and the bias).

    Attributes:
        groups: G.
        outputs: O, of one group.
        channels: C, input channels of one group; 0 where the weight is frozen.
        taps: kernel elements; 1 for a linear layer.
        bias: whether there is a trainable bias.
        weight_shape: of the parameter.
    """

    groups: int
    outputs: int
    channels: int
    taps: int
    bias: bool
    weight_shape: torch.Size

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of a Linear or convolution."""
        weight = module.get_parameter("weight")
        bias = getattr(module, "bias", None)
        groups = int(getattr(module, "groups", 1))
        return cls(
            groups=groups,
            outputs=weight.shape[0] // groups,
            channels=weight.shape[1] if weight.requires_grad else 0,
            taps=weight.shape[2:].numel(),
            bias=isinstance(bias, Tensor) and bias.requires_grad,
            weight_shape=weight.shape,
        )

    @property
    def inputs(self) -> int:
        """I: with the bias."""
        return self.channels * self.taps + self.bias

    def matrix(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped tensors by name -> (G, O, I)."""
        return self.matrices({name: grad[None] for name, grad in grads.items()})[0]

    def matrices(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The same for every sample: (B, *parameter shape) by name -> (B, G, O, I)."""
        parts = []
        if self.channels:
            parts.append(grads["weight"].reshape(-1, self.groups, self.outputs, self.channels * self.taps))
        if self.bias:
            parts.append(grads["bias"].reshape(-1, self.groups, self.outputs, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    def parameters(self, matrix_GOI: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`matrix`."""
        weights = self.channels * self.taps
        grads = {}
        if self.channels:
            grads["weight"] = matrix_GOI[:, :, :weights].reshape(self.weight_shape)
        if self.bias:
            grads["bias"] = matrix_GOI[:, :, weights].flatten()
        return grads

    def taps_first(self, matrix_GOI: Tensor) -> Tensor:
        """The weight's part of a matrix, kernel elements before channels: (G, O, taps, C), dense."""
        weights = self.channels * self.taps
        return matrix_GOI[..., :weights].unflatten(-1, (self.channels, self.taps)).mT.contiguous()

    def positions(self, part: AffineGradients) -> tuple[Tensor, Tensor]:
        """x_BGLI, with the ones of a bias, and y_BGLO."""
        if not self.channels:
            y_BGLO = part.output_positions()
            return torch.ones_like(y_BGLO[..., :1]), y_BGLO
        x_BGLI, y_BGLO = part.positions()
        if self.bias:
            x_BGLI = torch.cat([x_BGLI, torch.ones_like(x_BGLI[..., :1])], dim=3)
        return x_BGLI, y_BGLO


def reduced(x_BGLI: Tensor, y_BGLO: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """The positions that factors are made of: all; or one, the mean input and summed output gradient ("reduced")."""
    if factors == "reduced":
        return x_BGLI.mean(2, keepdim=True), y_BGLO.sum(2, keepdim=True)
    return x_BGLI, y_BGLO


def input_factor(x_BGLI: Tensor, other_BGLI: Tensor | None = None) -> Tensor:
    """A = E_b sum_p x x^T, shape (G, I, I); with another layer's input, the cross factor."""
    other = x_BGLI if other_BGLI is None else other_BGLI
    return torch.einsum("bgli,bglj->gij", x_BGLI, other) / len(x_BGLI)


def output_factor(y_BGLO: Tensor, other_BGLO: Tensor | None = None) -> Tensor:
    """B = E_{b,p} y y^T, shape (G, O, O); with another layer's output gradient, the cross factor."""
    other = y_BGLO if other_BGLO is None else other_BGLO
    return torch.einsum("bglo,bglp->gop", y_BGLO, other) / (y_BGLO.shape[0] * y_BGLO.shape[2])


def channel_factor(part: AffineGradients, layout: Layout) -> Tensor:
    """A over channels alone, shape (G, C, C): pixels of the input, as many as there are positions of the output."""
    inputs = part.inputs
    if isinstance(part.module, nn.Linear):
        pixels_BGLC = inputs.reshape(len(inputs), 1, -1, layout.channels)
        return input_factor(pixels_BGLC)
    pixels_BGLC = inputs.reshape(len(inputs), layout.groups, layout.channels, -1).mT
    stride = torch.tensor(part.module.stride).prod().item()
    return input_factor(pixels_BGLC) / stride


@dataclass(frozen=True)
class InputSide:
    """How the input side of a gradient matrix goes into coordinates.

    Attributes:
        basis: E, shape (G, n, n): over all I, or over the C channels, every kernel element alike.
        layout: of the layer.
        by_channel: whether the basis is over channels.
    """

    basis: Tensor
    layout: Layout
    by_channel: bool

    def into(self, z: Tensor) -> Tensor:
        """z E along the last dimension; z of shape (..., G, M, I)."""
        return self._rotate(z, self.basis)

    def back(self, z: Tensor) -> Tensor:
        """z E^T along the last dimension."""
        return self._rotate(z, self.basis.mT)

    def inverse(self) -> InputSide:
        """The basis E^-T, with which a metric is multiplied rather than solved."""
        return InputSide(torch.linalg.inv(self.basis).mT, self.layout, self.by_channel)

    def _rotate(self, z: Tensor, basis: Tensor) -> Tensor:
        if not self.by_channel:
            # One product a group: a broadcast one would read the basis, 85 MB of it, once for every sample.
            groups_first = z.movedim(-3, 0)
            rotated = groups_first.reshape(len(basis), -1, z.shape[-1]) @ basis
            return rotated.view(groups_first.shape).movedim(0, -3)
        weights = self.layout.channels * self.layout.taps
        by_tap = z[..., :weights].unflatten(-1, (self.layout.channels, self.layout.taps))
        rotated = (by_tap.mT @ basis[:, None]).mT.flatten(-2)
        return torch.cat([rotated, z[..., weights:]], dim=-1)

    def entries(self, values_Gn: Tensor, of_ones: Tensor) -> Tensor:
        """A diagonal in this basis as one number an input, shape (G, I)."""
        if not self.by_channel:
            return values_Gn
        spread = values_Gn.repeat_interleave(self.layout.taps, dim=1)
        ones = of_ones.expand(len(spread), 1)
        return torch.cat([spread, ones], dim=1) if self.layout.bias else spread


def eigenbasis(factor_Gnn: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (G, n), none negative, and eigenvectors (G, n, n) of a symmetric factor.

    A factor of few samples has a large null space, where single precision sometimes does not converge: then in double.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge, or its result is not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(factor_Gnn)
    except torch.linalg.LinAlgError:
        values, vectors = (part.to(factor_Gnn) for part in torch.linalg.eigh(factor_Gnn.double()))
    if not bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
        raise torch.linalg.LinAlgError("eigendecomposition: the result is not finite")
    return values.clamp(min=0), vectors


def iterated_basis(factor_Gnn: Tensor, basis_Gnn: Tensor) -> Tensor:
    """One step of orthogonal iteration from a former basis towards the eigenvectors: Q of the QR decomposition of A E.

    The columns of E are taken by falling Rayleigh quotient: each then loses what belongs to those before it, and keeps
    its own place. In the order of eigenvalues that rise, every error would grow towards the largest one.

    Args:
        factor_Gnn: A, symmetric, shape (G, n, n).
        basis_Gnn: E, orthogonal, of the same shape.

    Returns:
        The new basis (G, n, n), its columns in that order.

    Raises:
        torch.linalg.LinAlgError: the result is not finite.
    """
    moved = factor_Gnn @ basis_Gnn
    order = (basis_Gnn * moved).sum(-2).argsort(dim=-1, descending=True, stable=True)
    vectors = torch.linalg.qr(moved.take_along_dim(order[..., None, :], -1)).Q
    if not bool(torch.isfinite(vectors).all()):
        raise torch.linalg.LinAlgError("orthogonal iteration: the result is not finite")
    return vectors


def canonical_bases(uu_nn: Tensor, vv_mm: Tensor, uv_nm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in which two layers' factors are I, I and diag(s): canonical correlations.

    With Cholesky factors uu = L L^T, vv = K K^T and L^-1 uv K^-T = P diag(s) W^T these are E_u = L^-T P and
    E_v = K^-T W.

    Args:
        uu_nn: damped factor of the first layer, shape (n, n).
        vv_mm: of the second, shape (m, m).
        uv_nm: their undamped cross factor, shape (n, m).

    Returns:
        E_u (n, n), E_v (m, m), s (min(n, m)).

    Raises:
        torch.linalg.LinAlgError: a factor is not positive definite (no damping), or a result is not finite.
    """
    L, K = torch.linalg.cholesky(uu_nn), torch.linalg.cholesky(vv_mm)
    half = torch.linalg.solve_triangular(L, uv_nm, upper=False)
    correlation = torch.linalg.solve_triangular(K, half.mT, upper=False).mT
    P, s, Wh = torch.linalg.svd(correlation, full_matrices=True)
    basis_u = torch.linalg.solve_triangular(L.mT, P, upper=True)
    basis_v = torch.linalg.solve_triangular(K.mT, Wh.mT, upper=True)
    if not bool(torch.isfinite(basis_u).all() and torch.isfinite(basis_v).all()):
        raise torch.linalg.LinAlgError("canonical correlations: the result is not finite")
    return basis_u, basis_v, s


def check_size(module: str, layout: Layout, factors: Factors, limit: int) -> None:
    """Refuse a factor that is larger than the limit."""
    n = layout.channels if factors == "spatially_uncorrelated" else layout.inputs
    for side, size in (("input", n), ("output", layout.outputs)):
        if size > limit:
            choices = f"raise max_factor_dim={limit}, or name the module in plain_modules"
            if side == "input" and layout.taps > 1 and factors != "spatially_uncorrelated":
                choices += f", or use factors='spatially_uncorrelated' ({layout.channels})"
            raise OptionError(f"module '{module}': its {side} factor would be {size} x {size}; {choices}")

"""A metric that is diagonal in a layer's Kronecker basis, or couples two layers' coordinates pair by pair.

Every Kronecker metric here has one form: the gradient matrix goes into coordinates, E_B^T g E_A, is multiplied there
by numbers (one a coordinate, and for a pair of cooperating layers a cross number), and comes back by E_B . E_A^T.
KFAC, EKFAC and the cooperative games (Sec. 4.3, Theorem 3, Corollary 7) differ in the numbers and bases alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..players import AffineGradients, PlayerSamples, Scale, of_module, qualified
from ..players.affine import outer_product_gram
from ..players.base import gram_of
from ..players.blocks import gradient_blocks, gram_of_blocks, gram_runs, mean_square_of_blocks
from ..players.samples import symmetric
from .base import Grads, Metric
from .factors import InputSide


@dataclass(frozen=True)
class Coordinates:
    """One layer's part of a metric.

    Attributes:
        inputs: basis of the input side.
        outputs: E_B, shape (G, O, O).
        inverse: C^-1 in the coordinates, shape (G, O, I).
        separable: the same as an outer product b_GO a_GI, where it is one: cheaper Gram matrices.
    """

    inputs: InputSide
    outputs: Tensor
    inverse: Tensor
    separable: tuple[Tensor, Tensor] | None = None

    def into(self, matrix_GOI: Tensor) -> Tensor:
        """E_B^T g E_A."""
        return self.inputs.into(self.outputs.mT @ matrix_GOI)

    def back(self, matrix_GOI: Tensor) -> Tensor:
        """E_B g E_A^T."""
        return self.inputs.back(self.outputs @ matrix_GOI)

    def solve(self, matrix_GOI: Tensor) -> Tensor:
        """C^-1 g."""
        if not self.inputs.by_channel:
            return self.back(self.into(matrix_GOI) * self.inverse)
        # Kernel elements before channels: every product is then one of matrices as they lie in memory.
        layout = self.inputs.layout
        g_GOKC, inverse_GOKC = (layout.taps_first(z) for z in (matrix_GOI, self.inverse))
        rotated = (self.outputs.mT @ g_GOKC.flatten(2)).reshape(g_GOKC.flatten(1, 2).shape) @ self.inputs.basis
        rotated = (rotated.view(g_GOKC.shape).mul_(inverse_GOKC)).flatten(1, 2) @ self.inputs.basis.mT
        solved = (self.outputs @ rotated.view(g_GOKC.shape).flatten(2)).view(g_GOKC.shape).mT.flatten(2)
        if not layout.bias:
            return solved
        of_bias = (self.outputs.mT @ matrix_GOI[..., -1:]) * self.inverse[..., -1:]
        return torch.cat([solved, self.outputs @ of_bias], dim=2)

    def positions(self, part: AffineGradients) -> tuple[Tensor, Tensor]:
        """x and y of every sample and position, in coordinates."""
        x_BGLI, y_BGLO = self.inputs.layout.positions(part)
        return self.inputs.into(x_BGLI), y_BGLO @ self.outputs

    def per_sample(self, part: AffineGradients) -> Tensor:
        """Every sample's gradient matrix in coordinates, shape (B, G, O, I)."""
        if self.inputs.by_channel:
            grads = part.rotated(self.inputs.basis, self.outputs).per_sample()
            return self.inputs.layout.matrices(grads)
        if self._formed_first(part):
            return self.into(self.inputs.layout.matrices(part.per_sample()))
        x_BGLI, y_BGLO = self.positions(part)
        return y_BGLO.mT @ x_BGLI

    def gram(self, part: AffineGradients) -> Tensor:
        """S C^-1 S^T, shape (B, B)."""
        if self.separable is not None:
            b_GO, a_GI = self.separable
            x_BGLI, y_BGLO = self.positions(part)
            return outer_product_gram(x_BGLI * a_GI.sqrt()[:, None], y_BGLO * b_GO.sqrt()[:, None])
        if self.inputs.by_channel:  # a rotation of channels leaves a convolution one
            return part.rotated(self.inputs.basis, self.outputs).gram(self.inputs.layout.parameters(self.inverse))
        if self._formed_first(part):
            return gram_runs(self.per_sample(part), self.inverse)
        x_BGLI, y_BGLO = self.positions(part)
        return gram_of_blocks(gradient_blocks(x_BGLI, y_BGLO), len(x_BGLI), x_BGLI, self.inverse)

    def mean_square(self, part: AffineGradients) -> Tensor:
        """The mean over samples of every coordinate's square, shape (G, O, I)."""
        if self.inputs.by_channel:
            return self.inputs.layout.matrix(part.rotated(self.inputs.basis, self.outputs).mean_square())
        if self._formed_first(part):
            return self.per_sample(part).square_().mean(0)
        return mean_square_of_blocks(gradient_blocks(*self.positions(part)), self.inverse)

    def _formed_first(self, part: AffineGradients) -> bool:
        """Whether forming gradients and rotating them is less work than rotating the inputs of all positions."""
        positions = part.output_grads.numel() // (
            len(part.output_grads) * self.outputs.shape[0] * self.outputs.shape[1]
        )
        return self.outputs.shape[1] < positions


@dataclass(frozen=True)
class Coupling:
    """Two cooperating layers: coordinates (o, i) of one and of the other go together where both have them.

    Attributes:
        first, second: module names.
        inverse: the cross entry of each pair's 2 x 2 inverse, shape (pairs O, pairs I).
    """

    first: str
    second: str
    inverse: Tensor

    def cross(self, matrix: Tensor) -> Tensor:
        """The cross entries times one layer's coordinates (..., G, O, I), cut to those that have a partner."""
        O, I = self.inverse.shape  # noqa: E741
        return matrix[..., :O, :I] * self.inverse


@dataclass(frozen=True)
class CoordinateMetric(Metric):
    """R of one player.

    Attributes:
        rates: learning rate by module name.
        layers: affine modules' coordinates, by module name.
        diagonal: R^-1 of the other parameters, by qualified name, rate included.
        coupling: the two layers that cooperate.
    """

    rates: Mapping[str, float]
    layers: Mapping[str, Coordinates]
    diagonal: Mapping[str, Scale]
    coupling: Coupling | None = None

    def solve(self, grads: Grads) -> dict[str, Tensor]:
        matrices = {n: layer.inputs.layout.matrix(of_module(n, grads)) for n, layer in self.layers.items()}
        u, v = (None, None) if self.coupling is None else (self.coupling.first, self.coupling.second)
        solved = {n: layer.solve(matrices[n]) for n, layer in self.layers.items() if n not in (u, v)}
        if self.coupling is not None and u is not None and v is not None:
            into = {n: self.layers[n].into(matrices[n]) for n in (u, v)}
            O, I = self.coupling.inverse.shape  # noqa: E741
            for own, other in ((u, v), (v, u)):
                mixed = into[own] * self.layers[own].inverse
                mixed[..., :O, :I] += self.coupling.cross(into[other])
                solved[own] = self.layers[own].back(mixed)
        result = {name: grad * self.diagonal[name] for name, grad in grads.items() if name in self.diagonal}
        for name, layer in self.layers.items():
            back = layer.inputs.layout.parameters(solved[name] * self.rates[name])
            result.update({qualified(name, local): grad for local, grad in back.items()})
        return result

    def gram(self, samples: PlayerSamples) -> Tensor:
        total: Tensor | float = 0.0
        coupled: dict[str, Tensor] = {}
        for name, part in samples.parts.items():
            if name not in self.layers:
                local = of_module(name, self.diagonal)
                total = total + gram_of(part.per_sample(), local).double()
                continue
            layer = self.layers[name]
            assert isinstance(part, AffineGradients)
            if self.coupling is not None and name in (self.coupling.first, self.coupling.second):
                coupled[name] = layer.per_sample(part)
                gram = gram_runs(coupled[name], layer.inverse)
            else:
                gram = layer.gram(part)
            total = total + self.rates[name] * gram.double()
        if self.coupling is not None and len(coupled) == 2:
            O, I = self.coupling.inverse.shape  # noqa: E741
            u, v = coupled[self.coupling.first], coupled[self.coupling.second]
            cross = self.coupling.cross(u).flatten(1) @ v[..., :O, :I].flatten(1).mT
            total = total + self.rates[self.coupling.first] * (cross + cross.mT).double()
        assert isinstance(total, Tensor)
        return symmetric(total)

    def multiply(self, grads: Grads) -> dict[str, Tensor]:
        """R g: the same with every number's and every pair's inverse, in the bases' inverses."""
        return self._inverted().solve(grads)

    def _inverted(self) -> CoordinateMetric:
        layers = {
            name: Coordinates(layer.inputs.inverse(), torch.linalg.inv(layer.outputs).mT, 1 / layer.inverse)
            for name, layer in self.layers.items()
        }
        coupling = self.coupling
        if coupling is not None:
            O, I = coupling.inverse.shape  # noqa: E741
            first, second = (self.layers[n].inverse for n in (coupling.first, coupling.second))
            n = coupling.inverse
            determinant = first[0, :O, :I] * second[0, :O, :I] - n**2
            for name, partner in ((coupling.first, second), (coupling.second, first)):
                inverse = layers[name].inverse.clone()
                inverse[0, :O, :I] = partner[0, :O, :I] / determinant
                layers[name] = replace(layers[name], inverse=inverse)
            coupling = replace(coupling, inverse=-n / determinant)
        diagonal = {name: 1 / scale for name, scale in self.diagonal.items()}
        return CoordinateMetric({name: 1 / rate for name, rate in self.rates.items()}, layers, diagonal, coupling)

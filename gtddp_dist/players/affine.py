"""Linear layers, and what they share with convolutions: a sum over positions of outer products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .base import SampleGradients, Scale, gram_of

GramPath = Literal["materialise", "positions"]

POSITION_GRAM_LIMIT = 2**26
"""Entries of a (B L) x (B L) matrix above which per-sample gradients are materialised whatever the cost."""


FORMED_LIMIT = 4
"""Numbers of a sample's gradient, over those of its captured input and output gradient, up to which it is kept."""


def cheapest_gram_path(samples: int, positions: int, inputs: int, outputs: int) -> GramPath:
    """Which way to S S^T takes fewer multiplications (docs/algorithm.md, "Gram matrices").

    Materialising costs B L I O to form the per-sample gradients and B^2 I O to multiply them; the sum over pairs
    of positions costs B^2 L^2 (I + O).
    """
    B, L, I, O = samples, positions, inputs, outputs  # noqa: E741
    if (B * L) ** 2 > POSITION_GRAM_LIMIT:
        return "materialise"
    return "positions" if B * B * L * L * (I + O) <= B * L * I * O + B * B * I * O else "materialise"


def outer_product_gram(x_BGLI: Tensor, y_BGLO: Tensor, path: GramPath | None = None) -> Tensor:
    """S S^T, shape (B, B), of per-sample gradients sum over positions of y x^T; ``path`` overrides the choice."""
    B, G, L, I = x_BGLI.shape  # noqa: E741
    if (path or cheapest_gram_path(B, L, I, y_BGLO.shape[3])) == "materialise":
        grads = (y_BGLO.mT @ x_BGLI).flatten(1)
        return grads @ grads.mT
    x_G = x_BGLI.transpose(0, 1).reshape(G, B * L, -1)
    y_G = y_BGLO.transpose(0, 1).reshape(G, B * L, -1)
    return ((x_G @ x_G.mT) * (y_G @ y_G.mT)).reshape(G, B, L, B, L).sum((0, 2, 4))


class AffineGradients(SampleGradients):
    """A layer whose weight gradient is, per sample and channel group, sum over positions of y x^T."""

    affine = True

    @abstractmethod
    def positions(self) -> tuple[Tensor, Tensor]:
        """Inputs x_BGLI and scaled output gradients y_BGLO, position by position."""

    def _bias_grads(self) -> Tensor:
        """Per-sample gradient of the bias, shape (B, outputs)."""
        y_BGLO = self.output_positions()
        return y_BGLO.sum(2).flatten(1)

    def output_positions(self) -> Tensor:
        """Only y_BGLO of :meth:`positions`."""
        return self.positions()[1]

    def per_sample(self) -> dict[str, Tensor]:
        grads = {}
        for name, parameter in self.controls.items():
            if name == "bias":
                grads[name] = self._bias_grads()
            else:
                x_BGLI, y_BGLO = self.positions()
                grads[name] = (y_BGLO.mT @ x_BGLI).reshape(-1, *parameter.shape)
        return grads

    def gram(self, inverse_metric: Mapping[str, Scale], path: GramPath | None = None) -> Tensor:
        """S R^-1 S^T; ``path`` overrides the choice by counted cost (a diagonal metric is always materialised)."""
        weight = self.controls.get("weight")
        scale = inverse_metric["weight"] if weight is not None else 1.0
        if weight is None or (isinstance(scale, Tensor) and scale.ndim > 0):
            return gram_of(self.per_sample(), inverse_metric)
        if (path or self._gram_path()) == "materialise":
            return gram_of(self.per_sample(), inverse_metric)
        x_BGLI, y_BGLO = self.positions()
        gram = scale * outer_product_gram(x_BGLI, y_BGLO, "positions")
        if "bias" in self.controls:
            gram = gram + gram_of({"bias": self._bias_grads()}, inverse_metric)
        return gram

    def formed(self, inverse_metric: Mapping[str, Scale]) -> SampleGradients:
        numbers = sum(parameter.numel() for parameter in self.controls.values())
        captured = (self.inputs.numel() + self.output_grads.numel()) / len(self.inputs)
        scale = inverse_metric.get("weight", 1.0)
        by_sample = (isinstance(scale, Tensor) and scale.ndim > 0) or self._gram_path() == "materialise"
        return super().formed(inverse_metric) if by_sample and numbers <= FORMED_LIMIT * captured else self

    def _gram_path(self) -> GramPath:
        """The cheaper one for the weight."""
        weight = self.module.get_parameter("weight")
        groups = int(getattr(self.module, "groups", 1))
        positions = self.output_grads.numel() // (len(self.output_grads) * weight.shape[0])
        return cheapest_gram_path(len(self.inputs), positions, weight[0].numel(), weight.shape[0] // groups)


class LinearGradients(AffineGradients):
    """nn.Linear, also on tokens: input (B, ..., I), output gradient (B, ..., O)."""

    def positions(self) -> tuple[Tensor, Tensor]:
        B, I = self.inputs.shape[0], self.inputs.shape[-1]  # noqa: E741
        return self.inputs.reshape(B, 1, -1, I), self.output_positions()

    def output_positions(self) -> Tensor:
        y = self.output_grads * self.factor
        return y.reshape(y.shape[0], 1, -1, y.shape[-1])

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        x_BGLI, y_BGLO = self.positions()
        y_weighted = (y_BGLO * weights_B.to(y_BGLO)[:, None, None, None]).flatten(0, 2)
        grads = {}
        if "weight" in self.controls:
            grads["weight"] = y_weighted.mT @ x_BGLI.flatten(0, 2)
        if "bias" in self.controls:
            grads["bias"] = y_weighted.sum(0)
        return grads

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        x_BGLI, y_BGLO = self.positions()
        along = torch.zeros_like(y_BGLO)
        if "weight" in self.controls:
            along = along + x_BGLI @ direction["weight"].mT
        if "bias" in self.controls:
            along = along + direction["bias"]
        return (along * y_BGLO).flatten(1).sum(1)

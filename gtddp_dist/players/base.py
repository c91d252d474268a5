"""Per-sample gradients of one module's controls, and the products the recursion needs of them.

Stacked as rows they are the matrix S (B x U) of docs/algorithm.md. It is rarely formed: every module type knows
cheaper ways to S^T w, S d and S R^-1 S^T.

Shape suffixes in this folder: B samples, G channel groups, L positions (pixels, tokens), I inputs of a position,
O outputs of a position, U controls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .blocks import gram_runs, inner_runs, weighted_runs

Scale = float | Tensor
"""One parameter's diagonal inverse metric: a number, or a tensor of the parameter's shape."""


class SampleGradients(ABC):
    """The matrix S of one module for the samples of one recursion group.

    Args:
        module: the module whose trainable parameters are the controls.
        inputs: the module's input, prepared by :meth:`prepare`, samples first.
        output_grads: derivative with respect to the module's output, samples first.
        factor: multiplies ``output_grads``: what makes it the derivative of a sample's own, unaveraged loss.
    """

    affine: bool
    """Whether the module opens a player of its own (else it joins the affine module it directly follows)."""

    def __init__(self, module: nn.Module, inputs: Tensor, output_grads: Tensor, factor: float | Tensor = 1.0) -> None:
        self.module = module
        self.inputs = inputs
        self.output_grads = output_grads
        self.factor = factor
        self.controls = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}

    @staticmethod
    def prepare(module: nn.Module, inputs: Tensor) -> Tensor:
        """What of a micro-batch's input the gradients need; called once on the whole micro-batch."""
        return inputs

    def rows(self, rows: slice) -> SampleGradients:
        """The same for some of the samples."""
        return type(self)(self.module, self.inputs[rows], self.output_grads[rows], self.factor)

    def plus(self, other: SampleGradients, weights_R: Tensor) -> SampleGradients:
        """Output gradients plus those of ``other``, each of its rows weighted and added to its sample's."""
        own = self.output_grads * self.factor
        added = other.output_grads * other.factor
        added = added * weights_R.to(added).reshape(-1, *([1] * (added.ndim - 1)))
        return type(self)(self.module, self.inputs, own + added.reshape(len(own), -1, *own.shape[1:]).sum(1))

    @abstractmethod
    def per_sample(self) -> dict[str, Tensor]:
        """S itself: parameter name -> (B, *parameter shape)."""

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        """S^T w: parameter name -> parameter shape."""
        return {n: weighted_runs(weights_B.to(g), g) for n, g in self.per_sample().items()}

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        """S d, shape (B,), for a direction given by parameter name."""
        grads = self.per_sample()
        return sum_tensors(inner_runs(grads[n], direction[n]) for n in self.controls)

    def gram(self, inverse_metric: Mapping[str, Scale]) -> Tensor:
        """S R^-1 S^T, shape (B, B), for a diagonal R^-1 given by parameter name."""
        return gram_of(self.per_sample(), inverse_metric)

    def formed(self, diagonal: bool, samples: int) -> SampleGradients:
        """The same with S formed, where that is the cheapest for Gram matrices of so many samples and S^T w together,
        and S is small; else this one.

        Args:
            diagonal: whether the metric has a number for every control, rather than one for all.
            samples: of a recursion group.
        """
        return FormedGradients(self.module, self.per_sample())

    def formed_at_once(self) -> dict[str, Tensor]:
        """S by parameter name, of samples without a factor; of layers within the budget (`budget`)."""
        return self.per_sample()

    def least_memory(self) -> int:
        """Bytes of temporary memory that the Gram matrix of these samples takes at least."""
        return 0

    def best_formed_at_once(self, diagonal: bool, samples: int) -> bool:
        """Whether :meth:`formed` forms S, and S takes less memory than what it is made of."""
        return True


class FormedGradients(SampleGradients):
    """S as it is: what was formed for the Gram matrix then serves S^T w and S d as well.

    Args:
        module: the module whose trainable parameters are the controls.
        grads: S by parameter name, but for the factor.
        factor: multiplies them, where they are used.
    """

    def __init__(self, module: nn.Module, grads: Mapping[str, Tensor], factor: float | Tensor = 1.0) -> None:
        empty = next(iter(grads.values())).new_empty(0)
        super().__init__(module, empty, empty, factor)
        self._grads = dict(grads)

    def rows(self, rows: slice) -> SampleGradients:
        return FormedGradients(self.module, {name: grad[rows] for name, grad in self._grads.items()}, self.factor)

    def per_sample(self) -> dict[str, Tensor]:
        return {name: grad * self.factor for name, grad in self._grads.items()}

    def weighted(self, weights_B: Tensor) -> dict[str, Tensor]:
        return {n: weighted_runs((weights_B * self.factor).to(g), g) for n, g in self._grads.items()}

    def inner(self, direction: Mapping[str, Tensor]) -> Tensor:
        return sum_tensors(inner_runs(grad, direction[n]) for n, grad in self._grads.items()) * self.factor

    def gram(self, inverse_metric: Mapping[str, Scale]) -> Tensor:
        return gram_of(self._grads, inverse_metric) * self.factor**2

    def plus(self, other: SampleGradients, weights_R: Tensor) -> SampleGradients:
        grads = self.per_sample()
        for name, added in other.per_sample().items():
            own, weights = grads[name], weights_R.to(added).reshape(-1, *([1] * (added.ndim - 1)))
            grads[name] = own + (added * weights).reshape(len(own), -1, *own.shape[1:]).sum(1)
        return FormedGradients(self.module, grads)

    def formed(self, diagonal: bool, samples: int) -> SampleGradients:
        return self


def put_together(grads: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """S of several runs of samples of one module, one below the other."""
    if len(grads) == 1:
        return dict(grads[0])
    return {name: torch.cat([each[name] for each in grads]) for name in grads[0]}


def gram_of(grads: Mapping[str, Tensor], inverse_metric: Mapping[str, Scale]) -> Tensor:
    """S R^-1 S^T from materialised per-sample gradients."""
    return sum_tensors(_gram_of_one(g, inverse_metric[n]) for n, g in grads.items())


def _gram_of_one(grads: Tensor, scale: Scale) -> Tensor:
    if is_diagonal(scale):
        return gram_runs(grads, scale)
    return scale * gram_runs(grads, None)


def is_diagonal(scale: Scale) -> TypeGuard[Tensor]:
    """Whether it is a tensor of the parameter's shape, not one number."""
    return isinstance(scale, Tensor) and scale.ndim > 0


def sum_tensors(terms: object) -> Tensor:
    """The sum of at least one tensor."""
    iterator = iter(terms)  # type: ignore[call-overload]
    total: Tensor = next(iterator)
    for term in iterator:
        total = total + term
    return total

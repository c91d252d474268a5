"""Linear layers, and what they share with convolutions: a sum over positions of outer products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from .base import FormedGradients, SampleGradients, Scale, gram_of, is_diagonal
from .blocks import Block, block_numbers, gradient_blocks, gram_of_blocks, mean_square_of_blocks
from .bounded import bounded_gradients, bounded_gram, least_bytes
from .budget import budget
from .pairs import PASS, pair_cost, pair_gram, pair_numbers, unfolded

GramPath = Literal["materialise", "positions", "pixels"]
"""Ways to S S^T: per-sample gradients, formed and multiplied; pairs of positions of unfolded inputs, or of pixels."""

FORMED_LIMIT = 8
"""Numbers of a sample's gradient, over those of its captured input and output gradient, up to which it is kept."""

FORMED_PASSES = 3
"""In blocks that stay in the cache: written once and read twice for the Gram matrix."""

KEPT_PASSES = 8
"""The same where more are kept than a block has, and read once more for S^T w: memory is slower (measured: 32 samples
of 295,000 numbers take 20 ms to form and keep, 13 ms to form and multiply in blocks)."""


def formed_cost(samples: int, positions: int, inputs: int, outputs: int, passes: int) -> int:
    """Multiplications that per-sample gradients of a channel group cost: forming, multiplying, going over them.

    B L I O to form them and B^2 I O to multiply them (docs/performance.md). Numbers that are used once or twice cost
    more than the multiplications that they are made with: ``passes`` says how often they are written or read.
    """
    return samples * inputs * outputs * (positions + samples + PASS * passes)


def outer_product_gram(x_BGLI: Tensor, y_BGLO: Tensor, path: GramPath | None = None) -> Tensor:
    """S S^T, shape (B, B), of per-sample gradients sum over positions of y x^T; ``path`` overrides the choice."""
    B, _, L, I = x_BGLI.shape  # noqa: E741
    O, seen = y_BGLO.shape[3], unfolded(L)  # noqa: E741
    if path is None:
        by_pairs = pair_cost(B, seen, L, I, O, x_BGLI.device.type) <= formed_cost(B, L, I, O, FORMED_PASSES)
        path = "positions" if by_pairs else "materialise"
    if path == "materialise":
        return gram_of_blocks(gradient_blocks(x_BGLI, y_BGLO), B, x_BGLI, None)
    return pair_gram(x_BGLI.permute(1, 2, 0, 3), y_BGLO.permute(1, 2, 0, 3), seen)


class AffineGradients(SampleGradients):
    """A layer whose weight gradient is, per sample and channel group, sum over positions of y x^T."""

    affine = True

    @abstractmethod
    def rotated(self, inputs_GCC: Tensor, outputs_GOO: Tensor) -> AffineGradients:
        """The same with other channels: x E along those of the input, y E along those of the output, group by group."""

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
        if weight is None:
            return gram_of(self.per_sample(), inverse_metric)
        path = "materialise" if is_diagonal(scale) else path or self.cheapest_path(len(self.inputs))
        held = budget()
        if held is not None:
            return bounded_gram(self, inverse_metric, path, held)
        gram = self._gram_in_blocks(scale) if path == "materialise" else scale * self.pair_gram(path)
        if "bias" in self.controls:
            gram = gram + gram_of({"bias": self._bias_grads()}, inverse_metric)
        return gram

    def _gram_in_blocks(self, scale: Scale) -> Tensor:
        """S R^-1 S^T of the weight, S never formed as a whole."""
        entries = self._by_group(scale) if is_diagonal(scale) else None
        gram = gram_of_blocks(self._blocks(), len(self.inputs), self.inputs, entries)
        return gram if is_diagonal(scale) else scale * gram

    def _blocks(self) -> Iterator[Block]:
        """S of the weight, some inputs at a time."""
        return gradient_blocks(*self.positions())

    def _by_group(self, weight: Tensor) -> Tensor:
        """Something of the weight's shape in that of :meth:`_blocks`, (G, O, *inputs)."""
        return weight.reshape(self.channel_groups, len(weight) // self.channel_groups, -1)

    def pair_gram(self, path: GramPath) -> Tensor:
        """S S^T of the weight by pairs."""
        return outer_product_gram(*self.positions(), "positions")

    def mean_square(self) -> dict[str, Tensor]:
        """The mean over samples of the squares of S: parameter name -> parameter shape."""
        if "weight" not in self.controls:
            return {name: grads.square().mean(0) for name, grads in self.per_sample().items()}
        weight = self.controls["weight"]
        squares = {"weight": mean_square_of_blocks(self._blocks(), self._by_group(weight)).reshape(weight.shape)}
        return squares | ({"bias": self._bias_grads().square().mean(0)} if "bias" in self.controls else {})

    def formed(self, diagonal: bool, samples: int) -> SampleGradients:
        if not (self._small and (diagonal or self._worth_forming(samples)) and self._may_be_kept()):
            return self
        held = budget()
        if held is None:
            return super().formed(diagonal, samples)
        return FormedGradients(self.module, bounded_gradients(self, held), self.factor)

    def formed_at_once(self) -> dict[str, Tensor]:
        held = budget()
        return super().formed_at_once() if held is None else bounded_gradients(self, held)

    def _may_be_kept(self) -> bool:
        """Whether the budget has room for S, and for forming it."""
        held = budget()
        size = sum(p.numel() for p in self.controls.values()) * len(self.inputs) * self.output_grads.element_size()
        return held is None or (self.least_memory() <= held.half and held.keep(size))

    def least_memory(self) -> int:
        return least_bytes(self) if "weight" in self.controls else 0

    def best_formed_at_once(self, diagonal: bool, samples: int) -> bool:
        best = self._relative_size <= 1 and (diagonal or self._worth_forming(samples))
        return best and self._may_be_kept()

    @property
    def _relative_size(self) -> float:
        """Numbers of S over those of what it is made of."""
        numbers = sum(parameter.numel() for parameter in self.controls.values())
        return numbers * len(self.inputs) / (self.inputs.numel() + self.output_grads.numel())

    @property
    def _small(self) -> bool:
        """Whether S may be kept."""
        return self._relative_size <= FORMED_LIMIT

    def _worth_forming(self, samples: int) -> bool:
        """Whether to keep per-sample gradients, which then serve S^T w too, costs less than another product for it."""
        B, L, I, O = self._sizes(samples)  # noqa: E741
        product = B * L * I * O
        in_cache = B * self.channel_groups * I * O <= block_numbers(self.inputs.device)
        kept = formed_cost(B, L, I, O, FORMED_PASSES + 1 if in_cache else KEPT_PASSES)
        return kept <= min(self.path_costs(samples).values()) + product

    def cheapest_path(self, samples: int) -> GramPath:
        """The cheapest way to the Gram matrix of the weight for that many samples, by counted work."""
        costs = self.path_costs(samples)
        return min(costs, key=costs.__getitem__)

    def path_costs(self, samples: int) -> dict[GramPath, int]:
        """What every way to that matrix costs."""
        costs: dict[GramPath, int] = {"materialise": formed_cost(*self._sizes(samples), FORMED_PASSES)}
        return costs | self._pair_costs(samples)

    def _sizes(self, samples: int) -> tuple[int, int, int, int]:
        """B, L, I, O of a channel group."""
        weight = self.module.get_parameter("weight")
        groups = int(getattr(self.module, "groups", 1))
        positions = self.output_grads.numel() // (len(self.output_grads) * weight.shape[0])
        return samples, positions, weight[0].numel(), weight.shape[0] // groups

    @property
    def channel_groups(self) -> int:
        """G."""
        return int(getattr(self.module, "groups", 1))

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.module.get_parameter("weight").shape[1]

    @property
    def inputs_of_channel(self) -> int:
        """Inputs of a position that one channel has: kernel elements."""
        return self.module.get_parameter("weight")[0, 0].numel()

    @abstractmethod
    def input_channels(self, group: int, channels: slice) -> Tensor:
        """Inputs (B, i, L) of some channels of a group, and no copy of the others."""

    @abstractmethod
    def output_channels(self, group: int) -> Tensor:
        """Output gradients (B, O, L) of a group, without the factor; a view."""

    @abstractmethod
    def channel_numbers(self) -> int:
        """Numbers that are made on the way to all samples' gradients of one input channel."""

    def pair_numbers(self, path: GramPath) -> int:
        """Numbers that are made on the way to the Gram matrix by pairs: the unfolded inputs and output gradients, also
        in rows, and pairs of them."""
        B, L, I, O = self._sizes(len(self.inputs))  # noqa: E741
        G = self.channel_groups
        return G * (2 * B * L * (I + O) + pair_numbers(B, unfolded(L), L, self.inputs.device.type))

    def _pair_costs(self, samples: int) -> dict[GramPath, int]:
        """What the ways by pairs cost."""
        B, L, I, O = self._sizes(samples)  # noqa: E741
        return {"positions": pair_cost(B, unfolded(L), L, I, O, self.inputs.device.type)}


class LinearGradients(AffineGradients):
    """nn.Linear, also on tokens: input (B, ..., I), output gradient (B, ..., O)."""

    def positions(self) -> tuple[Tensor, Tensor]:
        B, I = self.inputs.shape[0], self.inputs.shape[-1]  # noqa: E741
        return self.inputs.reshape(B, 1, -1, I), self.output_positions()

    def output_positions(self) -> Tensor:
        y = self.output_grads * self.factor
        return y.reshape(y.shape[0], 1, -1, y.shape[-1])

    def input_channels(self, group: int, channels: slice) -> Tensor:
        return self.inputs.reshape(len(self.inputs), -1, self.inputs.shape[-1])[..., channels].mT

    def output_channels(self, group: int) -> Tensor:
        return self.output_grads.reshape(len(self.output_grads), -1, self.output_grads.shape[-1]).mT

    def channel_numbers(self) -> int:
        B, L, _, O = self._sizes(len(self.inputs))  # noqa: E741
        return B * (L + O)

    def rotated(self, inputs_GCC: Tensor, outputs_GOO: Tensor) -> LinearGradients:
        x, y = self.inputs @ inputs_GCC[0], self.output_grads @ outputs_GOO[0]
        return LinearGradients(self.module, x, y, self.factor)

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

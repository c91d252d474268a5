"""The FLOP limit of a step, against hand counts on a small network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gtddp_dist.bench.limit import _by_pairs, flop_limit, least_products
from gtddp_dist.bench.single import Contender, batch
from gtddp_dist.config import load_config
from gtddp_dist.pipeline.counting import flop_counter
from gtddp_dist.players import AffineGradients, sample_gradients

B, N = 8, 4
"""Samples of a step, and of a recursion."""
LAYERS = {  # positions, inputs and outputs of a position
    "stem": (64, 1 * 9, 4),
    "first": (64, 4 * 9, 4),
    "second": (64, 4 * 9, 4),
    "hidden": (1, 4 * 16, 64),
    "classifier": (1, 64, 5),
}
CONFIG = load_config(
    "bench-step",
    [
        "model.name=small-resnet",
        "model.width=4",
        "model.channels=[4]",
        "bench.image=[1,8,8]",
        "bench.classes=5",
        f"train.batch_size={B}",
        f"optimizer.scope={N}",
        "train.device=cpu",
    ],
)


def weight_gradient(layer: str) -> int:
    positions, inputs, outputs = LAYERS[layer]
    return 2 * B * positions * inputs * outputs


def by_samples(layer: str) -> int:
    """Per-sample gradients formed, multiplied pair by pair in every group (biases too), and summed with weights.

    With one position that sum is the weight-gradient itself, which sums biases without a product.
    """
    positions, inputs, outputs = LAYERS[layer]
    numbers = (inputs + 1) * outputs
    summed = numbers if positions > 1 else inputs * outputs
    return weight_gradient(layer) + (B // N) * 2 * N * N * numbers + 2 * B * summed


def by_pairs(layer: str) -> int:
    """One pair of samples of a linear layer after the other, and the weight-gradient by itself; its bias by samples."""
    positions, inputs, outputs = LAYERS[layer]
    assert positions == 1
    return (B // N) * 2 * N * N * (inputs + outputs + outputs) + weight_gradient(layer)


@pytest.mark.parametrize("name", ["gtddp-sgd", "gtddp-adam"])
def test_cheapest_products_by_hand(name: str) -> None:
    """Convolutions form per-sample gradients; a linear layer takes pairs, but with Adam's metric, which has none."""
    contender = Contender(CONFIG, name)
    images, labels = batch(CONFIG, contender.device, seed=0)
    expected = sum(by_samples(layer) for layer in ("stem", "first", "second"))
    for layer in ("hidden", "classifier"):
        expected += by_pairs(layer) if name == "gtddp-sgd" else by_samples(layer)
    assert least_products(contender, images, labels) == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_pairs_are_counted_as_they_are_done(stride: int) -> None:
    """From one pair the same number as from all blocks, of which there are several here."""
    conv = nn.Conv2d(3, 5, 3, stride, padding=1)
    outputs = 16 // stride
    part = sample_gradients(conv, torch.randn(7, 3, 16, 16), torch.randn(7, 5, outputs, outputs))
    assert isinstance(part, AffineGradients)
    metric = {"weight": 1.0, "bias": 1.0}
    some = part.rows(slice(0, 6))
    assert isinstance(some, AffineGradients)
    with torch.no_grad():
        for path in ("positions", "pixels"):
            with flop_counter() as counter:
                some.gram(metric, path)
            assert _by_pairs(part, path, metric, part.per_sample(), 6) == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", ["sgd", "gtddp-sgd", "gtddp-adam", "kfac", "gtddp-ekfac"])
def test_a_limit_is_what_is_needed_and_not_more_than_was_done(name: str) -> None:
    contender = Contender(CONFIG, name)
    images, labels = batch(CONFIG, contender.device, seed=0)
    contender.step(images, labels)
    with flop_counter() as counter:
        recorder = contender.recorded(images, labels, contender.kinds[0], lambda: (float(counter.get_total_flops()),))
        done = float(counter.get_total_flops())
    phases: dict[str, float] = {}
    for (phase, _), (flops,) in recorder.charged.items():
        phases[phase] = phases.get(phase, 0.0) + flops
    limit = flop_limit(contender, phases, images, labels)
    assert limit <= done
    base = 3 * sum(map(weight_gradient, LAYERS)) - weight_gradient("stem")  # images need no gradient
    if name == "sgd":
        assert limit == done == base
    elif name == "kfac":
        assert base < limit == done
    elif name == "gtddp-ekfac":  # all but the sweep
        assert limit == pytest.approx(done - phases["sweep"] - phases.get("other", 0.0))
    else:
        assert limit == base - sum(map(weight_gradient, LAYERS)) + least_products(contender, images, labels)

"""`gram_memory`: the same Gram matrices and steps, in less memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.bench.tally import Tally
from gtddp_dist.config import load_config
from gtddp_dist.errors import ConfigError, OptionError, StepError
from gtddp_dist.players import AffineGradients, Budget, prepare, sample_gradients, within

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(40, 30), (40,)),
    "tokens": (nn.Linear(40, 30), (12, 40)),
    "conv": (nn.Conv2d(16, 20, 3, padding=1), (16, 12, 12)),
    "stride": (nn.Conv2d(16, 20, 3, stride=2, padding=1, bias=False), (16, 12, 12)),
    "groups": (nn.Conv2d(16, 20, 3, groups=2, dilation=2), (16, 12, 12)),
    "depthwise": (nn.Conv2d(16, 16, 3, groups=16, padding="same"), (16, 12, 12)),
    "pointwise": (nn.Conv2d(64, 20, 1), (64, 12, 12)),
    "1d": (nn.Conv1d(16, 20, 5, padding=2), (16, 40)),
    "3d": (nn.Conv3d(4, 6, 3, padding=1), (4, 6, 6, 6)),
}
SAMPLES = 6


def part_of(name: str, factor: float = 3.0) -> AffineGradients:
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module = module.double()
    x = torch.randn(SAMPLES, *shape, dtype=torch.float64)
    y = torch.randn_like(module(x))
    part = sample_gradients(module, prepare(module, x), y.detach(), factor)
    assert isinstance(part, AffineGradients)
    return part


def metric(part: AffineGradients, diagonal: bool) -> dict[str, Any]:
    return {n: torch.rand_like(p.detach()) + 0.1 if diagonal else 0.7 for n, p in part.controls.items()}


def budget_of(part: AffineGradients, share: float) -> Budget:
    """The least, and a share of what all of S would take besides."""
    size = sum(p.numel() for p in part.controls.values()) * SAMPLES * 8
    return Budget(2 * (part.least_memory() + share * size) / 1e6 + 1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 10.0])
def test_gram_matrices_are_the_same_and_fit(name: str, diagonal: bool, share: float) -> None:
    part = part_of(name)
    inverse = metric(part, diagonal)
    expected = part.gram(inverse)
    budget = budget_of(part, share)
    with within(budget), Tally() as tally:
        found = part.gram(inverse)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    own = sum(p.numel() for p in part.controls.values()) * 8  # roots of the metric, and sums of biases' gradients
    assert tally.peak <= budget.half + own


@pytest.mark.parametrize("name", LAYERS)
def test_kept_gradients_are_the_same_and_fit(name: str) -> None:
    part = part_of(name)
    budget = budget_of(part, 1.0)
    with within(budget), Tally() as tally:
        kept = part.formed(diagonal=True, samples=SAMPLES)
    size = sum(p.numel() for p in part.controls.values()) * SAMPLES * 8
    if kept is not part:
        assert budget.kept == size and tally.peak <= budget.kept + budget.half
        for found, expected in zip(kept.per_sample().values(), part.per_sample().values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with within(budget):
        assert budget.keep(budget.half - budget.kept) and part.formed(diagonal=True, samples=SAMPLES) is part
    assert kept is not part or part.formed(diagonal=True, samples=SAMPLES) is part


def test_without_the_budget_more_is_taken() -> None:
    """What the tests above bound is not small by itself."""
    part = part_of("conv")
    with Tally() as tally:
        part.gram(metric(part, True))
    assert tally.peak > 4 * budget_of(part, 0.0).half


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def trained(name: str, base: curvature.Curvature, gram_memory: float | None, **options: Any) -> Tensor:
    model = NETS[name].model()
    optimizer = GTDDP(model, base, gauss_newton_weight=0.5, gram_memory=gram_memory, **options)
    for step in range(2):
        optimizer.zero_grad()
        for half in range(2):
            x, y = NETS[name].batch(4, 2 * step + half)
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("base", [curvature.SGD(lr=0.1), curvature.Adam(lr=0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "options",
    [{"capture": "weighted"}, {"scope": 2, "terminal": "exact"}, {"recompute": True, "rollout": "nonlinear"}],
    ids=str,
)
def test_steps_are_the_same(name: str, base: curvature.Curvature, options: dict[str, Any]) -> None:
    expected = trained(name, base, None, **options)
    try:
        found = trained(name, base, 1e-3, **options)
    except StepError as error:
        least = re.search(r"\): ([0-9.]+) are the fewest", str(error))
        assert least is not None
        found = trained(name, base, float(least[1]), **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def beyond_captured(gram_memory: float | None) -> int:
    """Bytes that a step makes at once, of a network whose layers' gradients are all kept without a budget."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 196, 3))
    options: dict[str, Any] = {"gram_memory": gram_memory, "capture": "weighted"}
    optimizer = GTDDP(model, curvature.SGD(lr=0.01), gauss_newton_weight=0.1, **options)
    with Tally() as tally:
        F.cross_entropy(model(torch.randn(8, 64, 14, 14)), torch.arange(8) % 3).backward()
        before = tally.peak = tally.alive
        optimizer.step()
    return tally.peak - before


def test_what_a_step_takes_beyond_what_was_captured() -> None:
    activation = 8 * 64 * 196 * 4
    others = 2 * activation + 10 * 8 * 8 * 8 * 7  # a weighted layer, and the matrices of the recursion
    assert beyond_captured(0.8) < 0.8e6 + others
    assert beyond_captured(None) > 1.5 * (0.8e6 + others)


def test_an_impossible_budget_names_the_smallest_possible() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))

    def step(megabytes: float) -> None:
        optimizer = GTDDP(model, curvature.Adam(lr=0.01), gram_memory=megabytes)
        F.cross_entropy(model(torch.randn(32, 3, 8, 8)), torch.arange(32) % 5).backward()
        optimizer.step()

    before = weights(model).clone()
    with pytest.raises(StepError, match=r"gram_memory=0.01 megabytes are too few .*: [0-9.]+ are the fewest") as caught:
        step(0.01)
    assert torch.equal(weights(model), before)
    found = re.search(r"\): ([0-9.]+) are the fewest", str(caught.value))
    assert found is not None
    step(float(found[1]))
    with pytest.raises(StepError):
        step(float(found[1]) - 0.02)


def test_what_cannot_be_taken_is_refused() -> None:
    with pytest.raises(OptionError, match="gram_memory=0, expected"):
        GTDDP(NETS["small_resnet"].model(), curvature.SGD(lr=0.1), gram_memory=0)
    with pytest.raises(OptionError, match=r"gram_memory=5 is for SGD.*EKFAC"):
        GTDDP(NETS["small_resnet"].model(), curvature.EKFAC(lr=0.1), gram_memory=5)
    with pytest.raises(ConfigError, match="gram_memory is not offered on ranks"):
        load_config("digits", ["optimizer.gram_memory=5.0", "parallel.data=2"])
    with pytest.raises(ConfigError, match="ekfac needs all of a layer's inputs"):
        load_config("digits", ["optimizer.name=gtddp-ekfac", "optimizer.gram_memory=5.0"])

"""`recompute`: the steps are those of an optimizer that keeps its layers' inputs, and less is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.bench.tally import counted
from gtddp_dist.config import load_config
from gtddp_dist.errors import ConfigError, ModelError, OptionError
from gtddp_dist.recompute import runs_of

BASES = {
    "sgd": curvature.SGD(lr=0.1, momentum=0.9),
    "adam": curvature.Adam(lr=0.01),
    "kfac": curvature.KFAC(lr=0.05),
    "ekfac": curvature.EKFAC(lr=0.05, factors="spatially_uncorrelated"),
}


class Counting(nn.Module):
    """Scales by a buffer that it changes: run again with what the buffer has become, it would give other numbers."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.calls
        self.calls = self.calls + 0.125
        return scaled


class Deep(nn.Module):
    """Convolutions with BatchNorm, dropout and a shortcut over a boundary between runs; nine players."""

    def __init__(self, dropout: float = 0.3, counting: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout))
            for _ in range(6)
        )
        self.counting = Counting() if counting else nn.Identity()
        self.norm, self.hidden, self.head = nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        x = self.counting(x)
        return self.head(torch.tanh(self.hidden(self.norm(x.mean((2, 3))))))


def trained(
    recompute: bool,
    base: str = "sgd",
    *,
    micro: int = 1,
    autocast: bool = False,
    counting: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, buffers and the random state after three steps."""
    torch.manual_seed(3)
    model = Deep(counting=counting).double()
    if autocast:
        model = model.float()
    taken = {"gauss_newton_weight": 0.5, "capture": "weighted", "plain_modules": ["counting"], **options}
    optimizer = GTDDP(model, BASES[base], **taken, recompute=recompute)
    assert len(optimizer.capture.runs) == (4 if recompute else 0)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(micro):
            x = torch.randn(4, 2, 6, 6, dtype=torch.float64).to(model.stem.weight.dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), torch.randint(3, (4,))) / micro
            loss.backward()
        optimizer.step()
    assert optimizer.steps == 3
    flat = [torch.cat([t.detach().flatten().double() for t in each]) for each in (model.parameters(), model.buffers())]
    return flat[0], flat[1], torch.get_rng_state()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capture": "gradient", "scope": 2},
        {"rollout": "nonlinear"},
        {"rollout": "nonlinear", "metric": "previous", "scope": "micro_batch"},
        {"terminal": "sampled"},
        {"clip_norm": 0.1, "metric": "previous"},
        {"terminal": "exact", "rollout": "nonlinear", "value_hessian": "block_diagonal", "control_hessian": "replace"},
    ],
    ids=str,
)
def test_steps_are_the_same(base: str, options: dict[str, Any]) -> None:
    """With BatchNorm, whose running statistics count a batch once, and dropout, whose masks stay the same."""
    kept, anew = (trained(recompute, base, micro=2, **options) for recompute in (False, True))
    torch.testing.assert_close(anew[0], kept[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(anew[1], kept[1], rtol=1e-9, atol=1e-11)
    assert torch.equal(anew[2], kept[2])


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_buffers_that_change_the_forward_pass_are_what_they_were(rollout: str) -> None:
    kept, anew = (trained(recompute, counting=True, rollout=rollout) for recompute in (False, True))
    for one, other in zip(anew, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_under_autocast(rollout: str) -> None:
    kept, anew = (trained(recompute, autocast=True, rollout=rollout) for recompute in (False, True))
    torch.testing.assert_close(anew[0], kept[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(anew[1], kept[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_networks_with_shortcuts(name: str) -> None:
    ends = []
    for recompute in (False, True):
        model = NETS[name].model()
        optimizer = GTDDP(model, curvature.Adam(lr=0.01), gauss_newton_weight=0.5, recompute=recompute)
        for step in range(2):
            x, y = NETS[name].batch(4, step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward(retain_graph=step == 1)
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-11)


def test_two_backward_passes_add_up() -> None:
    ends = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Deep(dropout=0.0).double()
        optimizer = GTDDP(model, curvature.SGD(lr=0.1), gauss_newton_weight=0.5, recompute=recompute)
        loss = F.cross_entropy(model(torch.randn(4, 2, 6, 6, dtype=torch.float64)), torch.randint(3, (4,)))
        (loss / 4).backward(retain_graph=True)
        (loss * 3 / 4).backward()
        optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-11)


def peak_bytes(recompute: bool) -> int:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(25):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 3))
    options: dict[str, Any] = {"scope": 8, "capture": "weighted", "recompute": recompute}
    optimizer = GTDDP(model, curvature.SGD(lr=0.01), gauss_newton_weight=0.1, **options)
    x, y = torch.randn(64, 16, 8, 8), torch.randint(3, (64,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    return counted(step).peak_bytes


def test_memory_is_that_of_the_output_gradients_and_of_one_run() -> None:
    """Of 26 stages of 256 KB each: 25 output gradients, what goes into 6 runs, and one run's five stages twice."""
    kept, anew = peak_bytes(False), peak_bytes(True)
    tensor = 64 * 16 * 64 * 4
    assert kept > 50 * tensor
    assert anew < (25 + 6 + 2 * 5 + 4) * tensor


def test_runs_cover_all_stages() -> None:
    for stages in range(1, 60):
        runs = runs_of(stages)
        assert [stage for run in runs for stage in run] == list(range(stages))
        assert max(map(len, runs)) <= len(runs) and min(map(len, runs)) >= 1


def test_a_copy_and_evaluation_are_left_alone() -> None:
    model = Deep().double()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), recompute=True)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    copied = copy.deepcopy(model)
    copied(x).sum().backward()
    model.eval()
    model(x).sum().backward()
    assert optimizer.capture.take() == []
    optimizer.detach()
    assert "forward" not in vars(model)


class InPlace(nn.Module):
    """The second stage changes what went into it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.one(x))
        b = self.two(a)
        a.mul_(2.0)
        return self.three(b + a)


def test_what_cannot_be_taken_is_refused() -> None:
    with pytest.raises(OptionError, match=r"recompute=True and inspect=True.*recompute=False"):
        GTDDP(Deep(), curvature.SGD(lr=0.1), recompute=True, inspect=True)
    with pytest.raises(OptionError, match=r"parameter 'stem.weight' belongs to no player.*rollout='linear'"):
        GTDDP(Deep(), curvature.SGD(lr=0.1), recompute=True, rollout="nonlinear", plain_modules=["stem"])
    with pytest.raises(ConfigError, match="recompute is not offered on ranks: take recompute=false"):
        load_config("digits", ["optimizer.recompute=true", "parallel.data=2"])
    model = InPlace()
    GTDDP(model, curvature.SGD(lr=0.1), recompute=True)
    with pytest.raises(ModelError, match="changed in place by a later stage"):
        model(torch.randn(2, 3))


def test_parameters_of_no_player() -> None:
    ends = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Deep().double()
        optimizer = GTDDP(
            model, curvature.Adam(lr=0.01), gauss_newton_weight=0.5, recompute=recompute, plain_modules=["blocks.1.0"]
        )
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 2, 6, 6, dtype=torch.float64)), torch.randint(3, (4,))).backward()
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-11)

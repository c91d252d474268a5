"""GTDDP as a torch optimizer: schedulers, scaling, clipping, saving; and bad input that changes nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.errors import ModelError, OptionError, StepError
from gtddp_dist.terminal import sample_labels

NET = NETS["small_resnet"]


def backward(model: nn.Module, seed: int = 0, samples: int = 4) -> Tensor:
    x, y = NET.batch(samples, seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def snapshot(model: nn.Module, optimizer: GTDDP) -> tuple[Tensor, str]:
    return weights(model), repr(sorted((i, sorted(s)) for i, s in enumerate(optimizer.state.values())))


def assert_unchanged(model: nn.Module, optimizer: GTDDP, before: tuple[Tensor, str]) -> None:
    after = snapshot(model, optimizer)
    assert torch.equal(after[0], before[0]) and after[1] == before[1]


# --- as a torch optimizer -------------------------------------------------------------------------------------


def test_schedulers_set_the_rate() -> None:
    """Two rates by a scheduler, or by hand, the latter as a tensor as torch.optim also takes them."""
    ends = []
    for scheduled in (True, False):
        model = NET.model()
        optimizer = GTDDP(model, curvature.SGD(lr=0.4), gauss_newton_weight=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1) if scheduled else None
        for step in range(3):
            if scheduler is None:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.4 * 0.1**step, dtype=torch.float64)
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_clipping_p_grad_is_the_option_clip_norm(momentum: float) -> None:
    ends = []
    for by_option in (True, False):
        model = NET.model()
        base = curvature.SGD(lr=0.5, momentum=momentum)
        optimizer = GTDDP(model, base, gauss_newton_weight=0.5, clip_norm=0.05 if by_option else None)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            if not by_option:
                assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.1
            optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("terminal", ["loss_gradient", "sampled"])
def test_clipping_p_grad_with_several_groups(terminal: str) -> None:
    """Each group's own gradient is captured data: it must be clipped alike."""
    ends = []
    for by_option in (True, False, None):
        model = NET.model()
        base = curvature.Adam(lr=0.05)
        clip = 0.05 if by_option else None
        optimizer = GTDDP(model, base, gauss_newton_weight=0.5, scope=2, terminal=terminal, clip_norm=clip)
        backward(model)
        if by_option is False:
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.1
        optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-4)


def test_other_changes_of_p_grad_with_several_groups_are_refused() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), scope=2)
    before = snapshot(model, optimizer)
    backward(model)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.clamp_(-1e-3, 1e-3)
    with pytest.raises(StepError, match="scaled as a whole"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("terminal", ["loss_gradient", "sampled"])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_leaves_the_step_as_it_is(unscale_first: bool, terminal: str) -> None:
    ends = []
    for scaled in (True, False):
        model = NET.model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        optimizer = GTDDP(
            model,
            curvature.Adam(lr=0.01),
            gauss_newton_weight=0.5,
            rollout="nonlinear",
            terminal=terminal,
            grad_scaler=scaler,
        )
        for step in range(4):
            x, y = NET.batch(4, step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if scaled:
                scaler.scale(loss).backward()
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        ends.append(weights(model))
        assert optimizer.steps == 4
        if scaled:
            assert scaler.get_scale() == 4096.0
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_grad_scaler_skips_an_overflow() -> None:
    model = NET.model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    optimizer = GTDDP(model, curvature.SGD(lr=0.1))
    before = snapshot(model, optimizer)
    x, y = NET.batch(4)
    scaler.scale(1e300 * F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_unchanged(model, optimizer, before)
    assert optimizer.skipped_steps == 1 and scaler.get_scale() == 2.0**99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_autocast_is_near_float32(dtype: torch.dtype, rollout: str) -> None:
    ends = []
    for enabled in (True, False):
        model = NET.model().float()
        optimizer = GTDDP(model, curvature.SGD(lr=0.1), gauss_newton_weight=0.5, rollout=rollout)
        x, y = NET.batch(4)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        ends.append(weights(model) - weights(NET.model()))
    assert 0 < float((ends[0] - ends[1]).norm() / ends[1].norm()) < 0.03


def test_state_dict_restores_a_run_exactly() -> None:
    for base in (
        curvature.SGD(lr=0.1, momentum=0.9),
        curvature.RMSprop(lr=0.01, momentum=0.5),
        curvature.Adam(lr=0.01),
    ):
        unbroken, model = NET.model(), NET.model()
        options: dict[str, Any] = {"gauss_newton_weight": 0.5, "metric": "previous", "terminal": "sampled"}
        long = GTDDP(unbroken, base, **options)
        short = GTDDP(model, base, **options)
        for step in range(6):
            if step == 3:
                saved = copy.deepcopy((model.state_dict(), short.state_dict()))
                model = NET.model(seed=9)
                short = GTDDP(model, base, **options)
                model.load_state_dict(saved[0])
                short.load_state_dict(saved[1])
            for net, optimizer in ((unbroken, long), (model, short)):
                optimizer.zero_grad()
                backward(net, step)
                optimizer.step()
        assert torch.equal(weights(model), weights(unbroken))
        assert short.steps == 6


def test_a_base_optimizers_state_can_be_taken_over() -> None:
    model = NET.model()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    backward(model)
    base.step()
    continued = copy.deepcopy(model)
    optimizer = GTDDP(continued, curvature.Adam(lr=0.01), gauss_newton_weight=0.0)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    for net, any_optimizer in ((model, base), (continued, optimizer)):
        any_optimizer.zero_grad()
        backward(net, 1)
        any_optimizer.step()
    torch.testing.assert_close(weights(continued), weights(model), rtol=1e-12, atol=1e-12)


def test_closure_is_called_and_its_loss_returned() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1))

    def closure() -> float:
        optimizer.zero_grad()
        return float(backward(model).detach())

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first is not None and second is not None and second < first


def test_evaluation_and_no_grad_capture_nothing() -> None:
    model = NET.model()
    for rollout in ("linear", "nonlinear"):
        optimizer = GTDDP(model, curvature.SGD(lr=0.1), rollout=rollout, capture="weighted")
        x, _ = NET.batch(4)
        model.eval()
        assert model(x).requires_grad  # parameters are as the user left them
        with torch.no_grad():
            model.train()(x)
        with pytest.raises(StepError, match="without a backward pass"):
            optimizer.step()
        assert all(p.requires_grad for p in model.parameters())


def test_a_forward_without_backward_leaves_nothing_behind() -> None:
    ends = []
    for extra in (True, False):
        model = NET.model()
        optimizer = GTDDP(model, curvature.SGD(lr=0.1), gauss_newton_weight=1.0)
        for step in range(2):
            optimizer.zero_grad()
            if extra:
                model(NET.batch(3, 7)[0])
            backward(model, step)
            optimizer.step()
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])


def test_zero_grad_forgets_earlier_backward_passes_and_may_stand_anywhere() -> None:
    ends = []
    for extra in (True, False):
        model = NET.model()
        optimizer = GTDDP(model, curvature.SGD(lr=0.1), gauss_newton_weight=1.0)
        if extra:
            backward(model, 5)
        x, y = NET.batch(4)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])


class Small(nn.Module):
    """A convolution and a norm whose per-sample gradients are smaller than what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


def small(**options: object) -> tuple[Small, GTDDP, Tensor, Tensor]:
    torch.manual_seed(1)
    model = Small().double()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), gauss_newton_weight=1.0, **options)  # type: ignore[arg-type]
    return model, optimizer, torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randint(4, (6,))


def test_micro_batches_of_which_one_alone_is_formed_at_once() -> None:
    """The choice depends on the samples, which a last batch has fewer of."""
    ends = []
    for sizes in ((4, 2), (4,), ()):
        model, optimizer, x, y = small(capture="weighted")
        optimizer.capture._forms = lambda samples, sizes=sizes: len(samples.inputs) in sizes  # type: ignore[misc]
        for some in (slice(0, 4), slice(4, 6)):
            (F.cross_entropy(model(x[some]), y[some], reduction="sum") / 6).backward()
        optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("capture", ["gradient", "weighted"])
def test_small_per_sample_gradients_are_formed_in_the_backward_pass(capture: str) -> None:
    """Only sums over rows are left of what they are made of; the step is that of formed layers late."""
    ends = []
    for early in (True, False):
        model, optimizer, x, y = small(capture=capture)
        optimizer.forms_early = "all" if early else "norms"
        F.cross_entropy(model(x), y).backward()
        (kept,) = optimizer.capture._micro_batches
        shapes = [kept.inputs[m].shape + kept.derivatives["gradient"][m].shape for m in (model.conv, model.norm)]
        assert shapes == [(6, 6) if early else (6, 2, 8, 8, 6, 3, 8, 8), (6, 6)]
        assert set(kept.formed["gradient"]) == ({model.conv, model.norm} if early else {model.norm})
        optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


def test_several_backward_passes_through_one_graph_add_up() -> None:
    ends = []
    for together in (True, False):
        model, optimizer, x, y = small()
        logits = model(x)
        first, second = F.cross_entropy(logits, y), 0.3 * F.cross_entropy(logits[:, [1, 0, 3, 2]], y)
        if together:
            (first + second).backward()
        else:
            first.backward(retain_graph=True)
            second.backward()
        optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_after_the_data_were_let_go_is_refused() -> None:
    """With capture="weighted" autograd itself keeps nothing of a lone convolution, and would not object."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    GTDDP(model, curvature.SGD(lr=0.1), capture="weighted")
    output = model(torch.randn(6, 2, 8, 8))
    output.backward(torch.ones_like(output))
    with pytest.raises(ModelError, match=r"second backward pass reached module '0'.*retain_graph=True"):
        output.backward(torch.ones_like(output))


def test_weighted_capture_fills_no_p_grad_and_restores_requires_grad() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), capture="weighted")
    before = weights(model)
    backward(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    optimizer.step()
    assert not torch.equal(weights(model), before)
    with pytest.raises(RuntimeError):  # torch's own: wrong number of channels, after the first hook
        model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert all(p.requires_grad for p in model.parameters())


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.norm(self.a(x))))
        return self.c(F.dropout(torch.tanh(self.b(h)), 0.3, self.training))


def test_the_second_forward_changes_no_buffer_and_reuses_the_masks() -> None:
    """A nonlinear rollout at lr = 0: the real delta z is zero only if every mask is the first pass's."""
    torch.manual_seed(0)
    model = Dropped()
    x, y = torch.randn(6, 3), torch.tensor([0, 1] * 3)
    optimizer = GTDDP(model, curvature.SGD(lr=0.0), rollout="nonlinear", gauss_newton_weight=1.0)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        (F.cross_entropy(model(part_x), part_y) / 2).backward()
    buffers = [b.clone() for b in model.buffers()]
    random_state = torch.get_rng_state()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert optimizer.diagnostics()["predicted_decrease"] == 0.0


def test_copies_of_the_model_do_not_feed_the_optimizer() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), rollout="nonlinear")
    average = torch.optim.swa_utils.AveragedModel(model)
    x, y = NET.batch(4)
    torch.testing.assert_close(average(x), model(x), rtol=0, atol=0)
    F.cross_entropy(average(x), y).backward()
    with pytest.raises(StepError, match="without a backward pass"):
        optimizer.step()


def test_a_newer_optimizer_takes_the_model_over() -> None:
    model = NET.model()
    old = GTDDP(model, curvature.SGD(lr=0.1), rollout="nonlinear")
    new = GTDDP(model, curvature.SGD(lr=0.1))
    assert "forward" not in model.__dict__
    backward(model)
    with pytest.raises(StepError, match="newer GTDDP"):
        old.step()
    new.step()
    new.detach()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_batch_of_one_works() -> None:
    for options in (
        {},
        {"scope": 1, "rollout": "nonlinear"},
        {"control_hessian": "replace", "value_hessian": "block_diagonal"},
    ):
        model = NET.model()
        optimizer = GTDDP(model, curvature.Adam(lr=0.01), **options)
        backward(model, samples=1)
        optimizer.step()
        assert torch.isfinite(weights(model)).all() and optimizer.steps == 1


def test_diagnostics_of_a_step() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.01), gauss_newton_weight=0.5, rollout="nonlinear")
    assert optimizer.diagnostics() == {"skipped_steps": 0.0}
    loss = float(backward(model).detach())
    grad2 = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None)
    optimizer.step()
    figures = optimizer.diagnostics()
    x, y = NET.batch(4)
    actual = loss - float(F.cross_entropy(model(x), y).detach())
    assert actual > 0
    assert figures["predicted_decrease"] == pytest.approx(actual, rel=0.2)
    assert 0 < figures["open_gain"] <= 1.001 * math.sqrt(0.01 * grad2)
    assert 0 < figures["feedback_ratio"] < 1
    assert -1e-12 < figures["gram_min"] < figures["gram_max"]
    assert "radius" not in figures


def test_sampled_labels_follow_the_softmax() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).expand(30_000, 3)
    labels = sample_labels(probabilities, seed=1, step=2, first=0)
    shares = torch.bincount(labels, minlength=3) / 30_000
    torch.testing.assert_close(shares.double(), probabilities[0], rtol=0, atol=0.01)
    assert not torch.equal(labels, sample_labels(probabilities, seed=1, step=3, first=0))
    certain = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert sample_labels(certain, 0, 0, 0).tolist() == [2, 0]


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gauss_newton_weight": -1.0}, "gauss_newton_weight=-1.0"),
        ({"gauss_newton_weight": math.nan}, "gauss_newton_weight=nan"),
        ({"gauss_newton_weight": "1/b"}, "gauss_newton_weight='1/b'"),
        ({"control_hessian": "proximol"}, "control_hessian='proximol', expected one of 'proximal', 'replace'"),
        ({"terminal": "exactly"}, "terminal='exactly'"),
        ({"scope": 0}, "scope=0"),
        ({"scope": True}, "scope=True"),
        ({"scope": "minibatch"}, "scope='minibatch'"),
        ({"statistics": "value", "metric": "previous"}, "statistics='value' needs metric='current'"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"replica_groups": 0}, "replica_groups=0"),
        ({"roll_out": "linear"}, "roll_out"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        GTDDP(NET.model(), curvature.SGD(), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: curvature.SGD(lr=-1.0), "lr=-1.0"),
        (lambda: curvature.SGD(nesterov=True), "nesterov"),
        (lambda: curvature.Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: curvature.RMSprop(eps=-1e-8), "eps"),
    ],
)
def test_bad_curvature_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_bad_parameter_groups_are_named() -> None:
    model = NET.model()
    parameters = dict(model.named_parameters())
    first, *others = parameters.values()
    with pytest.raises(OptionError, match=f"'{next(iter(parameters))}' is in none"):
        GTDDP(model, curvature.SGD(), param_groups=[{"params": others}])
    with pytest.raises(OptionError, match="no trainable parameter of the model"):
        GTDDP(model, curvature.SGD(), param_groups=[{"params": [first, nn.Parameter(torch.ones(2))]}])
    optimizer = GTDDP(model, curvature.SGD())
    with pytest.raises(OptionError, match="cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_step_without_backward() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.Adam(lr=0.1))
    before = snapshot(model, optimizer)
    with pytest.raises(StepError, match="without a backward pass"):
        optimizer.step()
    backward(model)
    optimizer.step()
    after = snapshot(model, optimizer)
    with pytest.raises(StepError, match="without a backward pass"):
        optimizer.step()
    assert not torch.equal(before[0], after[0])
    assert_unchanged(model, optimizer, after)


def test_a_parameter_frozen_after_construction() -> None:
    for capture in ("gradient", "weighted"):
        model = NET.model()
        optimizer = GTDDP(model, curvature.SGD(lr=0.1), capture=capture)
        name, parameter = list(model.named_parameters())[2]
        parameter.requires_grad_(False)
        before = snapshot(model, optimizer)
        backward(model)
        with pytest.raises(StepError, match=f"'{name}' was frozen"):
            optimizer.step()
        assert_unchanged(model, optimizer, before)


def test_a_lost_gradient() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1))
    backward(model)
    name, parameter = next(iter(model.named_parameters()))
    parameter.grad = None
    before = snapshot(model, optimizer)
    with pytest.raises(StepError, match=f"'{name}' has no gradient"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)


def test_a_partial_batch_that_the_scope_does_not_divide() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), scope=2)
    before = snapshot(model, optimizer)
    backward(model, samples=3)
    with pytest.raises(StepError, match=r"scope=2 does not divide a micro-batch of 3 samples.*drop_last"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), replica_groups=2)
    backward(model, samples=3)
    with pytest.raises(StepError, match="replica_groups=2"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("where", ["data", "weight", "loss"])
@pytest.mark.parametrize("capture", ["gradient", "weighted"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_step_is_refused_and_counted(where: str, capture: str, value: float) -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.Adam(lr=0.01), capture=capture, statistics="value")
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for count in (1, 2):
        x, y = NET.batch(4)
        if where == "data":
            x[0, 0, 0, 0] = value
        healthy = weights(model)
        if where == "weight":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = value
        loss = F.cross_entropy(model(x), y) * (value if where == "loss" else 1.0)
        loss.backward()
        if where == "weight":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = healthy[0]
        optimizer.step()
        optimizer.zero_grad()
        assert_unchanged(model, optimizer, before)
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
        assert optimizer.skipped_steps == optimizer.skipped_in_a_row == count
    backward(model)
    optimizer.step()
    assert optimizer.skipped_steps == 2 and optimizer.skipped_in_a_row == 0 and optimizer.steps == 2


def test_grad_scaler_used_in_ways_that_hide_the_scale() -> None:
    model = NET.model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = GTDDP(model, curvature.SGD(lr=0.1))
    before = snapshot(model, optimizer)
    x, y = NET.batch(4)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(StepError, match="grad_scaler=scaler"):
        scaler.step(optimizer)
    assert_unchanged(model, optimizer, before)
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), capture="weighted")
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(StepError, match="capture='weighted'"):
        scaler.step(optimizer)
    assert_unchanged(model, optimizer, before)


def test_a_module_called_twice_at_run_time() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last, self.turns = nn.Linear(3, 3), nn.Linear(3, 2), 1

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.turns):
                x = torch.tanh(self.layer(x))
            return self.last(x)

    model = Looped()
    GTDDP(model, curvature.SGD())
    model(torch.randn(2, 3))
    model.turns = 2
    with pytest.raises(ModelError, match=r"module 'layer' was called twice in one forward"):
        model(torch.randn(2, 3))


def test_inspecting_without_inspect() -> None:
    model = NET.model()
    optimizer = GTDDP(model, curvature.SGD(lr=0.1))
    backward(model)
    optimizer.step()
    with pytest.raises(OptionError, match="inspect=True"):
        optimizer.value(0)


def test_a_sampled_terminal_needs_logits() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))
    GTDDP(model, curvature.SGD(lr=0.1), terminal="sampled")
    with pytest.raises(ModelError, match="logits"):
        model(torch.randn(2, 3))

"""Simulated time, counted costs, cuts, cost files and `gtddp plan`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gtddp_dist.build import plain_parts
from gtddp_dist.config import Config, load_config
from gtddp_dist.config_schema import ModelConfig
from gtddp_dist.errors import UserError
from gtddp_dist.models.resnet import build_resnet18
from gtddp_dist.parts import build_model, load_data
from gtddp_dist.pipeline.costs import (
    Counting,
    Metric,
    StageCosts,
    balanced_cuts,
    check_cuts,
    count_stages,
    read_costs,
    segment_costs,
    write_costs,
)
from gtddp_dist.pipeline.instructions import Instruction, Op
from gtddp_dist.pipeline.order import StepShape, one_forward_one_backward, rank_orders, zero_bubble
from gtddp_dist.pipeline.parts import prepare
from gtddp_dist.pipeline.plan import Plan, describe, plan_step, report, run_plan, stage_costs
from gtddp_dist.pipeline.simulate import Link, RankCosts, simulate
from gtddp_dist.tracing import trace
from gtddp_dist.training_step import Precision

INSTANT = Link(math.inf, 0.0)

# ----------------------------------------------------------------------------------------------------------
# Simulation


def test_simulated_times_by_hand() -> None:
    """Two ranks, two micro-batches, messages of 2 bytes at 4 bytes a second and a latency of 0.5."""
    costs = [RankCosts(forward=1, backward=2, activation_bytes=2), RankCosts(forward=1, backward=2, gradient_bytes=2)]
    timeline = simulate(one_forward_one_backward(2, 2, costs, Link(4, 0.5)), costs, Link(4, 0.5))
    found = {(e.rank, e.op, e.unit): (e.start, e.end) for e in timeline.events if e.op is not Op.AGREE}
    assert found == {
        (0, Op.FORWARD, 0): (0, 1),
        (0, Op.FORWARD, 1): (1, 2),
        (1, Op.FORWARD, 0): (2, 3),  # 1 + 0.5 + 0.5
        (1, Op.BACKWARD, 0): (3, 5),
        (0, Op.BACKWARD, 0): (6, 8),  # 5 + 0.5 + 0.5
        (1, Op.FORWARD, 1): (5, 6),
        (1, Op.BACKWARD, 1): (6, 8),
        (0, Op.BACKWARD, 1): (9, 11),
    }
    assert timeline.seconds == 12  # an agreement of two ranks: up and down one link
    assert [*timeline.work, *timeline.idle, *timeline.busy] == [6, 6, 6, 6, 0.5, 0.5]
    assert timeline.over_largest_work == 2
    assert timeline.link_bytes == {(0, 1, "activation"): 4, (1, 0, "gradient"): 4}


def test_messages_share_a_link() -> None:
    """A second message waits for the first to be out of the way."""
    orders = (
        [Instruction(Op.SEND_ACTIVATION, 0), Instruction(Op.SEND_FEEDBACK, 0)],
        [Instruction(Op.RECV_FEEDBACK, 0), Instruction(Op.RECV_ACTIVATION, 0), Instruction(Op.UPDATE)],
    )
    costs = [RankCosts(activation_bytes=8, feedback_bytes=4), RankCosts(update=1)]
    assert simulate(orders, costs, Link(4, 0.25)).seconds == 2 + 1 + 0.25 + 1


def test_sum_over_replicas_is_a_ring() -> None:
    costs = [RankCosts(parameter_bytes=400)]
    assert simulate([[Instruction(Op.REDUCE)]], costs, Link(100, 0.5), data=4).seconds == 2 * 3 * (0.5 + 100 / 100)
    assert simulate([[Instruction(Op.REDUCE)]], costs, Link(100, 0.5)).seconds == 0


def test_training_has_the_order_that_is_planned() -> None:
    """Counted costs are the same in every process."""
    config = load_config(
        "digits", ["parallel.pipe=2", "parallel.data=2", "train.micro_batches=8", "train.batch_size=64"]
    )
    first, again = prepare(config), prepare(config, prepare(config).cuts)
    assert first.expected == again.expected and first.expected.digest() == again.expected.digest()
    precision = Precision("float32", torch.device("cpu"))
    subject = describe(config, build_model(config, first.data, precision), first.trajectory, first.data.classes)
    stages, unit = stage_costs(config, subject, first.data.train_images.shape[1:], precision)
    assert unit == "operations"
    plan = plan_step(stages, subject.shape, subject.counting, first.expected.link, speed=10e12, data=2)
    assert plan.costs == first.expected.costs and plan.cuts == first.cuts
    assert (plan.link.bandwidth, plan.link.latency) == pytest.approx((10e9, 20e-6))
    slower = prepare(load_config("digits", ["parallel.pipe=2", "plan.latency_us=30"]))
    assert slower.expected.digest() != first.expected.digest()


def test_peak_memory() -> None:
    cost = RankCosts(kept_bytes=10, captured_bytes=4, parameter_bytes=100, optimizer_bytes=50)
    fixed = 2 * 100 + 50
    one = simulate(one_forward_one_backward(2, 8), [dataclasses.replace(cost, captured_bytes=0)] * 2, INSTANT)
    assert list(one.peak_bytes) == [fixed + 20, fixed + 10]
    by_step = simulate(rank_orders(StepShape(1, 8, by="step")), [cost], INSTANT)
    assert list(by_step.peak_bytes) == [fixed + 7 * 4 + 10]  # the last backward pass, all the others captured
    order = [Instruction(op) for op in (Op.FORWARD, Op.BACKWARD, Op.WEIGHT)]
    assert simulate([order], [cost], INSTANT).peak_bytes == (fixed + 10.0,)
    twice = [Instruction(op, unit) for unit in (0, 1) for op in (Op.FORWARD, Op.BACKWARD, Op.WEIGHT)]
    thrice = [*twice, Instruction(Op.STATISTICS), *(Instruction(step.op, 2) for step in twice[:3])]
    assert simulate([thrice], [cost], INSTANT).peak_bytes == (fixed + 10.0,)
    factors = dataclasses.replace(cost, statistics_bytes=1)  # made of all micro-batches' data
    assert simulate([thrice], [factors], INSTANT).peak_bytes == (fixed + 10.0 + 4.0,)


def test_ranks_that_wait_for_each_other() -> None:
    orders = ([Instruction(Op.RECV_GRADIENT)], [Instruction(Op.RECV_ACTIVATION)])
    with pytest.raises(ValueError, match="rank 0 at 'receive gradient 0', rank 1 at 'receive activation 0'"):
        simulate(orders, [RankCosts()] * 2, INSTANT)


@pytest.mark.parametrize(
    ("pipe", "n_micro", "plain", "deferred"), [(4, 4, 57, 84), (4, 8, 73, 91), (4, 16, 84, 95), (8, 16, 70, 90)]
)
def test_utilisation(pipe: int, n_micro: int, plain: int, deferred: int) -> None:
    """With F = B = G = W = 1: 1F1B's known utilisation, and what deferred Gram matrices and weights make of it."""
    unit = RankCosts(forward=1, backward=1)
    one = simulate(one_forward_one_backward(pipe, n_micro), [unit] * pipe, INSTANT)
    assert round(100 * one.busy[0]) == plain
    costs = [dataclasses.replace(unit, gram=1, weight=1, sweep=0.05, feedback=0.05)] * pipe
    link = Link(1, 0.01)
    timeline = simulate(rank_orders(StepShape(pipe, n_micro), costs, link), costs, link)
    assert 100 * min(timeline.busy) >= deferred - 1
    zero = simulate(zero_bubble(pipe, n_micro), [dataclasses.replace(unit, weight=1)] * pipe, INSTANT)
    assert one.busy[0] < zero.busy[0] < 1


def test_statistics_fill_gaps() -> None:
    """Statistics of ranks that have time left do not lengthen the step."""
    even = RankCosts(forward=1, backward=1, gram=1, weight=1, sweep=0.05, feedback=0.05)
    largest = dataclasses.replace(even, gram=2)
    costs = [even, largest, even, even]
    more = [dataclasses.replace(cost, statistics=3.0 * (cost is even)) for cost in costs]
    link, shape = Link(1, 0.01), StepShape(4, 8)
    without = simulate(rank_orders(shape, costs, link), costs, link).seconds
    filled = simulate(rank_orders(shape, more, link), more, link).seconds
    assert filled <= 1.01 * without


def test_scales() -> None:
    """A grid of 64 x 1024 ranks takes no longer than its pipe."""
    costs = [RankCosts(forward=1, backward=1, gram=1, weight=1, sweep=0.05, feedback=0.05, parameter_bytes=1e9)] * 64
    link = Link(1e9, 1e-3)
    orders = rank_orders(StepShape(64, 64), costs, link)
    few, many = (simulate(orders, costs, link, data) for data in (2, 1024))
    assert few.work == many.work and few.reducing[0] < many.reducing[0] < 2 * few.reducing[0] + 3


# ----------------------------------------------------------------------------------------------------------
# Counting


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


def test_counts_by_hand() -> None:
    stages = count_stages(trace(TwoConvs()), torch.empty(4, 3, 6, 6))
    first, second, head = stages
    B, L = 4, 36
    assert first.forward == 2 * B * L * 8 * 27 and second.forward == 2 * B * L * 8 * 72
    assert head.forward == 2 * B * 8 * 10
    # Nobody asks for the gradient of the images.
    assert (first.backward, second.backward, head.backward) == (0, second.forward, head.forward)
    # The norm's: weights times per-sample gradients of 8 scales and 8 shifts.
    assert [s.weight for s in stages] == [first.forward + 2 * 2 * B * 8, second.forward, head.forward]
    # Per-sample gradients formed and multiplied, or sums over pairs of positions; then bias and norm, 8 numbers each.
    assert first.gram == 2 * (B * L * 27 * 8 + B * B * 27 * 8) + 3 * 2 * B * B * 8
    assert head.gram == 2 * B * B * (8 + 10) + 2 * B * B * 10
    assert (first.live_bytes, second.live_bytes, head.live_bytes) == (4 * B * 3 * L, 4 * B * 8 * L, 4 * B * 8)
    assert second.gradient_bytes == 4 * B * 8 * L
    assert first.parameter_bytes == 4 * (27 * 8 + 8 + 16)
    # Inputs and output gradients of the convolution, per-sample gradients of the norm.
    assert first.captured_bytes == 4 * B * (L * (3 + 8) + 8 + 8)


@pytest.mark.parametrize("name", ["small-resnet", "nested-resnet", "coop-net", "vit"])
def test_counts_add_up_to_a_real_step(name: str) -> None:
    """Stages together: the operations and the kept bytes of the whole network's forward and backward pass."""
    config = load_config("digits", [f"model.name={name}"])
    precision = Precision("float32", torch.device("cpu"))
    model = build_model(config, load_data(config), precision)
    trajectory = trace(model, **plain_parts(model, config))
    images = torch.randn(4, 1, 8, 8)
    stages = count_stages(trajectory, images)
    with FlopCounterMode(display=False) as forward:
        output = model(images)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert sum(s.forward for s in stages) == forward.get_total_flops()
    # Scales and shifts of normalisation layers take products that autograd has none for.
    assert sum(s.backward + s.weight for s in stages) == pytest.approx(backward.get_total_flops(), rel=1e-3)
    assert sum(s.parameter_bytes for s in stages) == sum(p.nbytes for p in model.parameters())
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        model(images)
    assert sum(s.kept_bytes for s in stages) == pytest.approx(sum(storages.values()), rel=0.02)


def test_counting_changes_nothing() -> None:
    model = TwoConvs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    count_stages(trace(model), torch.empty(4, 3, 6, 6))
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert type(tensor) is Tensor and torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_meta_device() -> None:
    """The same counts from a model without memory, and from a sample without."""
    with torch.device("meta"):
        without_memory = TwoConvs()
    counts = count_stages(trace(without_memory), torch.empty(4, 3, 6, 6, device="meta"))
    assert counts == count_stages(trace(TwoConvs()), torch.empty(4, 3, 6, 6, device="meta"))


@pytest.mark.parametrize("metric", ["number", "diagonal", "kfac", "ekfac"])
def test_grams_are_counted_as_the_metric_takes_them(metric: Metric) -> None:
    B, L, I, O = 4, 36, 72, 8  # noqa: E741
    second = count_stages(trace(TwoConvs()), torch.empty(B, 3, 6, 6), Counting(metric=metric))[1]
    formed, multiplied, bias = 2 * B * L * I * O, 2 * B * B * I * O, 2 * B * B * O
    with_bias = I + 1
    rotated = 2 * B * L * (with_bias**2 + O**2)
    rotated_formed = 2 * B * O * (with_bias**2 + with_bias * O)  # fewer outputs than positions: formed, then rotated
    of_all = 2 * B * L * with_bias * O + 2 * B * B * with_bias * O
    expected = {
        "number": formed + multiplied + bias,
        "diagonal": formed + multiplied + bias,
        "kfac": rotated + of_all,
        "ekfac": formed + rotated_formed + 2 * B * B * with_bias * O,
    }
    assert second.gram == expected[metric]
    assert (second.statistics > 0) == (metric in ("kfac", "ekfac"))
    assert second.factor_bytes == (4 * (with_bias**2 + O**2) if metric in ("kfac", "ekfac") else 0)


def test_base_optimizers_have_no_grams() -> None:
    trajectory, images = trace(TwoConvs()), torch.empty(4, 3, 6, 6)
    base = count_stages(trajectory, images, Counting(feedback=False))
    for own, full in zip(base, count_stages(trajectory, images), strict=True):
        # Nor are the norm's per-sample gradients formed before there is a weight to sum them with.
        assert own.captured_bytes >= full.captured_bytes
        assert own == dataclasses.replace(full, gram=0, sweep=0, feedback=0, captured_bytes=own.captured_bytes)


def test_grams_of_larger_and_smaller_recursions() -> None:
    """Products of samples grow with the recursion, their gradients do not."""
    trajectory, images = trace(TwoConvs()), torch.empty(8, 3, 6, 6)

    def gram(samples: int | None) -> float:
        return count_stages(trajectory, images, Counting(recursion_samples=samples))[1].gram

    def expected(n: int) -> float:
        return 8 / n * (2 * n * 36 * 72 * 8 + 2 * n * n * 8 * 73)

    assert [gram(2), gram(None), gram(32)] == [expected(2), expected(8), expected(32)]


# ----------------------------------------------------------------------------------------------------------
# Cuts and segments


def stage(work: float, live: int = 0) -> StageCosts:
    zeros = {f.name: 0 for f in dataclasses.fields(StageCosts)}
    return StageCosts(**{**zeros, "player": "p", "samples": 4, "forward": work, "live_bytes": live})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_balanced_cuts_are_the_best_of_all(stages: list[tuple[int, int]], pipe: int) -> None:
    costs = [stage(*each) for each in stages]
    if pipe > len(costs):
        return

    def badness(cuts: Sequence[int]) -> tuple[float, int]:
        bounds = [0, *cuts, len(costs)]
        largest = max(sum(s.work for s in costs[a:b]) for a, b in itertools.pairwise(bounds))
        return largest, sum(costs[cut].live_bytes for cut in cuts)

    cuts = balanced_cuts(costs, pipe)
    check_cuts(cuts, pipe, len(costs))
    assert badness(cuts) == min(map(badness, itertools.combinations(range(1, len(costs)), pipe - 1)))


def test_more_ranks_than_stages() -> None:
    with pytest.raises(UserError, match=r"parallel.pipe=4: more ranks than stages; the network has 3 stages"):
        balanced_cuts([stage(1)] * 3, 4)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((1,), "3 segments need 2 cuts"),
        ((2, 9), "9 is no stage that a segment can begin with; the network has 5 stages, so take 1 to 4"),
        ((0, 2), "0 is no stage"),
        ((3, 2), "increasing order"),
        ((2, 2), "increasing order"),
    ],
)
def test_cuts_that_do_not_exist(cuts: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_cuts(cuts, 3, 5)


def test_costs_of_segments() -> None:
    counting = Counting(full_value=True)
    stages = count_stages(trace(TwoConvs()), torch.empty(4, 3, 6, 6), counting)
    first, last = segment_costs(stages, (1,), StepShape(2, 8), counting, speed=2.0)
    assert first.forward == stages[0].forward / 2
    assert last.gram == (stages[1].gram + stages[2].gram) / 2
    live = stages[1].live_bytes
    assert (first.activation_bytes, first.gradient_bytes, first.value_bytes, first.feedback_bytes) == (live, 0, 0, 32)
    assert (last.activation_bytes, last.gradient_bytes, last.value_bytes) == (0, live, 8 * (4 + 16))
    by_step, _ = segment_costs(stages, (1,), StepShape(2, 8, by="step"), counting, speed=2.0)
    assert by_step.gram == 8 * first.gram and by_step.forward == first.forward
    base, _ = segment_costs(stages, (1,), StepShape(2, 8, feedback=False), counting, speed=2.0)
    assert base.backward == first.backward + first.weight and base.gram == base.weight == 0


# ----------------------------------------------------------------------------------------------------------
# Cost files


def test_cost_file_round_trip(tmp_path: Path) -> None:
    stages = count_stages(trace(TwoConvs()), torch.empty(4, 3, 6, 6))
    write_costs(tmp_path / "costs.json", stages, "operations")
    file = read_costs(tmp_path / "costs.json")
    assert file.stages == stages and file.unit == "operations"


def changed(path: Path, change: dict[str, object], stage_change: dict[str, object]) -> Path:
    write_costs(path, [stage(1), stage(2)], "seconds")
    content = json.loads(path.read_text())
    content["stages"][1].update(stage_change)
    content.update(change)
    for part in (content, content["stages"][1] if isinstance(content["stages"], list) and content["stages"] else {}):
        for key in [key for key, value in part.items() if value == "absent"]:
            del part[key]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "stage_change", "message"),
    [
        ({"format": "other"}, {}, "format is 'other', expected 'gtddp-costs'"),
        ({"version": 2}, {}, "version is 2, expected 1"),
        ({"version": True}, {}, "version is True"),
        ({"unit": "days"}, {}, "unit is 'days'"),
        ({"extra": 1}, {}, "unknown key 'extra'"),
        ({"unit": "absent"}, {}, "missing key 'unit'"),
        ({"stages": []}, {}, "at least one stage"),
        ({}, {"speed": 1}, r"stages\[1\]: unknown key 'speed'"),
        ({}, {"gram": "absent"}, r"stages\[1\]: missing key 'gram'"),
        ({}, {"gram": "1"}, r"stages\[1\].gram is '1', expected a number >= 0"),
        ({}, {"gram": -1}, r"stages\[1\].gram is -1"),
        ({}, {"gram": float("nan")}, "NaN is no number of JSON"),
        ({}, {"gram": True}, r"stages\[1\].gram is True"),
        ({}, {"live_bytes": 1.5}, r"stages\[1\].live_bytes is 1.5, expected a whole number >= 0"),
        ({}, {"samples": 0}, r"stages\[1\].samples is 0"),
        ({}, {"samples": 8}, "samples: expected the same number in every stage"),
    ],
)
def test_cost_files_are_read_strictly(
    tmp_path: Path, change: dict[str, object], stage_change: dict[str, object], message: str
) -> None:
    path = changed(tmp_path / "costs.json", change, stage_change)
    with pytest.raises(UserError, match=message) as error:
        read_costs(path)
    assert str(path) in str(error.value)


def test_cost_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_costs(tmp_path / "missing.json")
    (tmp_path / "text.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="no JSON"):
        read_costs(tmp_path / "text.json")


# ----------------------------------------------------------------------------------------------------------
# The plan


def resnet18_plan(link: Link, cuts: tuple[int, ...] | None = (5, 9, 13)) -> Plan:
    """ResNet18 for 32 x 32 pixels, batch 128 on pipe=4 with 8 micro-batches; gtddp-sgd at 10 TFLOP/s a rank.

    It is cut after the first layer of a larger channel number, where images are small already; None: balanced.
    """
    with torch.device("meta"):
        model = build_resnet18(ModelConfig(name="resnet18"), in_channels=3, classes=100, image_size=32)
    counting = Counting(n_micro=8)
    stages = count_stages(trace(model), torch.empty(16, 3, 32, 32, device="meta"), counting)
    return plan_step(stages, StepShape(4, 8), counting, link, speed=10e12, cuts=cuts)


def test_resnet18_schedule_is_near_its_bound() -> None:
    """A step takes at most 1.10 times the largest work of a rank; messages add at most 1 % to back-propagation's."""
    plan = resnet18_plan(Link(100e9, 20e-6))
    assert plan.step.over_largest_work <= 1.10
    assert plan.step.over_largest_work < plan.zero_bubble.over_largest_work
    assert plan.step.over_largest_work < plan.one_forward_one_backward.over_largest_work
    sent, plain = (sum(t.link_bytes.values()) for t in (plan.step, plan.one_forward_one_backward))
    assert plain < sent <= 1.01 * plain


def test_balanced_cuts_give_a_shorter_step() -> None:
    """With less idle time at hand: the largest work is smaller, and a step is 1.103 times that."""
    link = Link(100e9, 20e-6)
    balanced, later = resnet18_plan(link, None), resnet18_plan(link)
    assert balanced.cuts == (4, 8, 12)
    assert balanced.step.seconds < 0.95 * later.step.seconds
    assert balanced.step.over_largest_work <= 1.11


def test_counted_work_does_not_depend_on_the_device() -> None:
    counted = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = build_resnet18(ModelConfig(name="resnet18"), in_channels=3, classes=100, image_size=32)
            stages = count_stages(trace(model), torch.empty(8, 3, 32, 32), Counting(n_micro=4))
        counted.append([(stage.forward, stage.backward, stage.gram, stage.weight) for stage in stages])
    assert counted[0] == counted[1]


def test_slow_links_are_what_limits() -> None:
    """At 10 GB/s, messages of the first cut take as long as its forward pass: more in flight would hide them."""
    plan = resnet18_plan(Link(10e9, 20e-6))
    assert 1.10 < plan.step.over_largest_work < 1.20
    assert plan.instant.over_largest_work <= 1.10 and plan.doubled.over_largest_work <= 1.10


def planned(words: Sequence[str]) -> StepShape:
    config = load_config("digits-sgd", words)
    data = load_data(config)
    model = build_model(config, data, Precision("float32", torch.device("cpu")))
    return describe(config, model, trace(model), data.classes).shape


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optimizer.scope=micro_batch"], StepShape(2, 4)),
        (["optimizer.scope=4"], StepShape(2, 4)),
        ([], StepShape(2, 4, by="step")),
        (["optimizer.scope=micro_batch", "train.clip_norm=1"], StepShape(2, 4, by="step", mean_first=True)),
        (["optimizer.name=gtddp-adam", "optimizer.scope=4"], StepShape(2, 4, by="step", mean_first=True)),
        (["optimizer.name=gtddp-adam", "optimizer.scope=4", "optimizer.metric=previous"], StepShape(2, 4)),
        (["optimizer.scope=4", "optimizer.terminal=sampled"], StepShape(2, 4, cotangents=True)),
        (["optimizer.scope=4", "optimizer.rollout=nonlinear"], StepShape(2, 4, by="step", rollout="nonlinear")),
        (["optimizer.gauss_newton_weight=0", "optimizer.terminal=sampled"], StepShape(2, 4, feedback=False)),
        (["optimizer.name=adam", "optimizer.gauss_newton_weight=null"], StepShape(2, 4, feedback=False)),
        (
            ["optimizer.name=kfac", "optimizer.fisher=sampled", "optimizer.gauss_newton_weight=null"],
            StepShape(2, 4, feedback=False, cotangents=True),
        ),
    ],
)
def test_step_of_a_configuration(words: list[str], expected: StepShape) -> None:
    assert planned(["parallel.pipe=2", "train.micro_batches=4", *words]) == expected


def digits(*words: str) -> Config:
    return load_config("digits", ["optimizer.name=gtddp-sgd", "optimizer.scope=micro_batch", *words])


def test_plan_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = digits("parallel.pipe=2", "parallel.data=2", "parallel.cuts=[2]", "train.micro_batches=4")
    assert run_plan(config, "digits", tmp_path / "step.png") == 0
    printed = capsys.readouterr().out
    assert "5 stages, grid pipe=2,data=2" in printed
    assert "batch 32: 4 micro-batches of 4 a replica; recursion: by micro-batch" in printed
    for word in ("0 to 1", "2 to last", "busy (%)", "peak memory", "replicas of 0", "zero-bubble", "step / work"):
        assert word in printed
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["gtddp-adam", "gtddp-ekfac", "sgd"])
def test_plan_of_other_optimizers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"optimizer.name={name}", "parallel.pipe=3", "train.micro_batches=2", "optimizer.gauss_newton_weight=null"]
    config = load_config("digits", words)
    assert run_plan(config, "digits", tmp_path / "step.svg") == 0
    assert f"{name} on small-resnet" in capsys.readouterr().out


def test_one_rank_has_nothing_to_wait_for() -> None:
    stages = count_stages(trace(TwoConvs()), torch.empty(4, 3, 6, 6))
    plan = plan_step(stages, StepShape(1, 4), Counting(), Link(1e9, 1e-5), speed=1e9)
    assert plan.step.over_largest_work == pytest.approx(1)
    assert "nothing is sent" in report(plan, "gtddp-sgd")


def test_plan_from_measured_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = digits("parallel.pipe=2", "train.micro_batches=4")
    path = tmp_path / "costs.json"
    stages = [dataclasses.replace(stage(0.001), samples=8)] * 5
    write_costs(path, stages, "seconds")
    measured = dataclasses.replace(config, plan=dataclasses.replace(config.plan, costs=str(path)))
    assert run_plan(measured, "digits", tmp_path / "step.png") == 0
    printed = capsys.readouterr().out
    assert f"measured, {path}" in printed and "12.000" in printed  # 3 stages x 4 micro-batches of 1 ms
    write_costs(path, stages[1:], "seconds")
    with pytest.raises(UserError, match="has 4 stages, small-resnet as configured 5"):
        run_plan(measured, "digits", tmp_path / "step.png")
    write_costs(path, [stage(0.001)] * 5, "seconds")
    with pytest.raises(UserError, match="micro-batches of 4 samples, the configuration has 8"):
        run_plan(measured, "digits", tmp_path / "step.png")


def test_plans_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more ranks than stages; the network has 5 stages"):
        run_plan(digits("parallel.pipe=6"), "digits", tmp_path / "step.png")
    with pytest.raises(UserError, match=r"parallel.cuts=\[7\]: 7 is no stage"):
        run_plan(digits("parallel.pipe=2", "parallel.cuts=[7]"), "digits", tmp_path / "step.png")
    with pytest.raises(UserError, match=r"is written as \.png"):
        run_plan(digits(), "digits", tmp_path / "step.gif")
    with pytest.raises(UserError, match="there is no folder"):
        run_plan(digits(), "digits", tmp_path / "none" / "step.png")
    assert not list(tmp_path.iterdir())


def test_documented_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of docs/plan.md prints the tables that stand there, and draws its picture."""
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(page.split("```python\n")[1].split("```")[0], "docs/plan.md", "exec"), {})
    tables = capsys.readouterr().out.rstrip().split("\n\n")
    assert len(tables) == 3 and all(f"```\n{table}\n```" in page for table in tables)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")

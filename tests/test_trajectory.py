"""Stages, players, cuts and live tensors of ordinary models; and the errors of models that cannot be taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import ALL_NETS, PROJECTION, PROJECTION_FIRST, SEPARATE_NETS, Net
from torch import Tensor, nn

from gtddp_dist import GTDDP, curvature
from gtddp_dist.errors import ModelError, OptionError
from gtddp_dist.models.torchvision_import import import_torchvision
from gtddp_dist.pipeline.segment import Segment, check_segments
from gtddp_dist.tracing import trace
from gtddp_dist.trajectory import PlainParts, Trajectory, from_stages


def players(trajectory: Trajectory) -> list[list[str]]:
    return [list(player.modules) for player in trajectory.players]


def live(trajectory: Trajectory) -> list[int]:
    return [len(stage.live_before) for stage in trajectory.stages]


def traced(net: Net) -> tuple[nn.Module, Trajectory]:
    model = net.model()
    return model, trace(model, projection="separate" if net.name in SEPARATE_NETS else "cooperative")


@pytest.mark.parametrize("net", ALL_NETS.values(), ids=ALL_NETS)
def test_stages_are_those_a_reader_would_write(net: Net) -> None:
    """Players, their controls and the number of live tensors at every cut, against stages written by hand."""
    _, trajectory = traced(net)
    assert [set(p.controls()) for p in trajectory.players] == [set(stage.parameters) for stage in net.stages]
    assert live(trajectory) == [len(stage.live) for stage in net.stages]


@pytest.mark.parametrize("net", ALL_NETS.values(), ids=ALL_NETS)
def test_running_the_stages_is_running_the_model(net: Net) -> None:
    model, trajectory = traced(net)
    x, _ = net.batch(3)
    values = trajectory.bind(x)
    for stage in trajectory.stages:
        assert len(values) == len(stage.live_before)
        values = stage.run(values)
    torch.testing.assert_close(trajectory.assemble(values), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "stages", "projected"),
    [("resnet34", 34, "layer2.0.conv2"), ("resnet50", 50, "layer1.0.conv3")],
)
def test_larger_resnets_as_they_are(name: str, stages: int, projected: str) -> None:
    """A stage for every convolution of the main path and the last layer; one state between blocks, two inside."""
    with torch.device("meta"):
        model = getattr(import_torchvision("torchvision.models"), name)(num_classes=10)
    trajectory = trace(model)
    assert len(trajectory.stages) == stages
    assert not trajectory.plain_parameters
    (first, *_) = (player for player in trajectory.players if player.shortcut)
    assert next(iter(first.modules)) == projected
    inside = stages // 3 * 2 if name == "resnet50" else stages // 2 - 1
    assert sorted(live(trajectory)) == [1] * (stages - inside) + [2] * inside
    separate = trace(model, projection="separate")
    projections = 4 if name == "resnet50" else 3
    assert len(separate.stages) == stages + projections
    assert sum("downsample.0" in player.name for player in separate.players) == projections


def test_resnet18_as_it_is() -> None:
    trajectory = trace(import_torchvision("torchvision.models").resnet18(num_classes=10))
    assert len(trajectory.stages) == 18
    assert players(trajectory)[0] == ["conv1", "bn1"]
    assert players(trajectory)[6] == [
        "layer2.0.conv2",
        "layer2.0.bn2",
        "layer2.0.downsample.0",
        "layer2.0.downsample.1",
    ]
    assert trajectory.players[6].shortcut == ("layer2.0.downsample.0", "layer2.0.downsample.1")
    # One state between blocks, two inside: the residual state crosses the first stage of every block.
    assert live(trajectory) == [1, *([1, 2] * 8), 1]
    table = str(trajectory)
    for word in ("layer4.1.conv2", "BatchNorm2d", "maxpool, layer1_0_relu", "layer3.0.downsample.0"):
        assert word in table


def test_two_layers_with_one_input_and_one_sum_are_one_player() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(torch.tanh(self.a(h).add(self.b(h))))

    assert players(trace(Sum())) == [["first"], ["a", "b"], ["last"]]


def test_a_shortcut_whose_branch_is_read_elsewhere_stays_a_player_of_its_own() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.u, self.v, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            projected = self.v(h)
            return self.last(torch.tanh(self.u(h * projected) + projected))

    assert players(trace(Tapped())) == [["first"], ["v"], ["u"], ["last"]]


def test_normalisation_joins_only_what_it_directly_follows() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 2)
    )
    assert players(trace(model)) == [["0", "1"], ["3"], ["5"]]


def test_frozen_modules_are_operations() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    assert players(trace(model)) == [["0"], ["4"]]


def test_flags_sizes_and_a_tracing_that_leaves_the_model_alone() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 2, 3), nn.Linear(32, 2)

        def forward(self, x: Tensor, features_only: bool = False) -> Tensor:
            batch, _, _, _ = x.shape
            h = torch.relu(self.first(x)).reshape(batch, -1)
            return h if features_only else self.last(h)

    model = Flagged().eval()
    model.first.train()
    trajectory = trace(model)
    assert not model.training and model.first.training and not model.last.training
    assert players(trajectory) == [["first"], ["last"]]
    model.train()
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), rollout="nonlinear")
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.steps == 1


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that torch.fx cannot pass
            return self.layer(x)
        return self.layer(-x)


def test_an_untraceable_model_is_told_where_and_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Dynamic(), nn.Linear(4, 2))
    with pytest.raises(ModelError) as error:
        GTDDP(model, curvature.SGD(lr=0.1))
    message = str(error.value)
    assert "module '1' (Dynamic)" in message
    assert "test_trajectory.py:" in message and "if x.sum() > 0" in message
    assert "plain_modules=['1']" in message and "GTDDP(model, stages=" in message


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.norm, self.how = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), how
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x)) + torch.tensor(0.25) * torch.ones(4)
        match self.how:
            case "function":
                x = F.dropout(x, training=self.training)
            case "branch" if self.training:
                x = self.norm(x)
            case "evaluation" if not self.training:
                x = 2 * x
            case "untraceable in evaluation" if not self.training:
                x = -x if x.sum() > 0 else x
            case "module":
                x = self.dropout(self.norm(x))
            case "always":
                x = F.dropout(x)
        return x


def in_block(how: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Block(how), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("function", "(x = F.dropout(x, training=self.training)) in module '1' (Block)"),
        ("branch", "(x = self.norm(x)) in module '1.norm' (BatchNorm1d)"),
        ("evaluation", "(x = 2 * x) in module '1' (Block)"),
        ("untraceable in evaluation", "in evaluation mode torch.fx stopped in module '1' (Block) at "),
        ("module", ""),
        ("always", ""),
    ],
)
def test_where_a_forward_pass_depends_on_training_mode(how: str, place: str) -> None:
    model = in_block(how)
    model[1].eval()
    attributes = set(vars(model))
    found = trace(model).only_training
    assert (place in found and f"{__file__}:" in found) if place else found == ""
    modes = {name: module.training for name, module in model.named_modules()}
    assert [modes[name] for name in ("", "0", "1", "1.norm")] == [True, True, False, False]
    assert {name.rstrip("0123456789") for name in set(vars(model)) - attributes} <= {"_tensor_constant"}
    again = len(vars(model))
    trace(model)
    assert len(vars(model)) <= again + 1  # no more than the constant that the stages read


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_one_process_evaluates_a_model_that_depends_on_training_mode(rollout: str) -> None:
    """It runs the model's own forward pass; but the nonlinear rollout cannot have a part of it in evaluation mode."""
    model, x = in_block("function"), torch.randn(6, 3)
    expected = model.eval()(x)
    GTDDP(model, curvature.SGD(lr=0.1), rollout=rollout)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(x), expected)
    model[1].eval()
    if rollout == "linear":
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    else:
        with pytest.raises(ModelError, match=r"depends on training mode at .*F\.dropout"):
            model(x)


class Wrapped(nn.Module):
    """A stage that is none of the model's modules."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.inner:
            x = module(x)
        return F.dropout(x, training=self.training)


def test_a_segment_tells_stages_by_hand_its_mode() -> None:
    """And refuses a trace that holds in training mode alone."""
    model, x = in_block("module"), torch.randn(6, 3)
    stages = [Wrapped(model[0]), Wrapped(model[1]), model[2]]
    expected = model.eval()(x)
    segment = Segment(model, from_stages(model, stages), (), 0)
    torch.testing.assert_close(segment.eval()(x), expected)
    assert not torch.allclose(segment.train()(x), segment(x))
    check_segments(in_block("module"), trace(in_block("module")), (1,))
    with pytest.raises(ModelError, match="ranks run what was traced in training mode"):
        check_segments(in_block("function"), trace(in_block("function")), (1,))


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_stages_by_hand_take_the_same_step_as_the_trace(rollout: str) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    traced, by_hand = build(), build()
    for model, stages in ((traced, None), (by_hand, [by_hand[0:2], by_hand[2:4], by_hand[4]])):
        optimizer = GTDDP(model, curvature.Adam(lr=0.1), stages=stages, rollout=rollout)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(traced.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_untraceable_model_trains_with_stages_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Dynamic(), nn.Linear(4, 2))
    optimizer = GTDDP(model, curvature.SGD(lr=0.1), stages=list(model), rollout="nonlinear")
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05


def test_bad_stages_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"no stage holds module '2'"):
        GTDDP(model, curvature.SGD(), stages=[model[0]])
    with pytest.raises(ModelError, match=r"stages\[1\] \(Tanh\) has no trainable"):
        GTDDP(model, curvature.SGD(), stages=list(model))
    with pytest.raises(ModelError, match=r"stages\[1\].*in an earlier stage"):
        GTDDP(model, curvature.SGD(), stages=[model[0:2], model])
    with pytest.raises(ModelError, match=r"stages\[1\].*not a module of the model"):
        GTDDP(model, curvature.SGD(), stages=[model, nn.Linear(2, 2)])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_parameter_of_an_unsupported_module_is_named_and_can_be_plain() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), Scaled(), nn.Tanh(), nn.Linear(4, 2)).double()

    with pytest.raises(ModelError, match=r"'1\.scale' belongs to module '1' \(Scaled\).*plain_modules=\['1'\]"):
        GTDDP(build(), curvature.SGD())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    for rollout in ("linear", "nonlinear"):
        for capture in ("gradient", "weighted"):
            ours, theirs = build(), build()
            optimizer = GTDDP(
                ours,
                curvature.SGD(lr=0.1),
                plain_modules=["1"],
                rollout=rollout,
                capture=capture,
                gauss_newton_weight=1.0,
            )
            assert "base update without feedback: 1.scale" in str(optimizer.trajectory)
            F.cross_entropy(ours(x), y).backward()
            optimizer.step()
            F.cross_entropy(theirs(x), y).backward()
            torch.optim.SGD(theirs.parameters(), lr=0.1).step()
            torch.testing.assert_close(ours.get_parameter("1.scale"), theirs.get_parameter("1.scale"))
            assert not torch.allclose(ours.get_parameter("3.weight"), theirs.get_parameter("3.weight"), rtol=1e-6)


class ScaledBlock(nn.Module):
    """A residual block with a learned scale, read through a view and by two stages: no layer owns it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 1), nn.Linear(width + 1, width)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1)
        return x + gamma * self.down(torch.tanh(self.up(x * gamma)))


class Embedded(nn.Module):
    """Parameters of the model itself, of a module with layers inside, of a leaf, and of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.position = nn.Parameter(torch.linspace(-0.5, 0.5, 4))
        self.block = ScaledBlock(4)
        self.leaf = Scaled()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.leaf(self.block(torch.tanh(self.first(x)) + self.position))[:, None]
        return self.last(h[:, 0] + self.attention(h, h, h, need_weights=False)[0][:, 0])


PLAIN_OF_EMBEDDED: PlainParts = {
    "plain_modules": ["leaf", "attention"],
    "plain_parameters": ["position", "block.gamma"],
}


def test_plain_parameters_keep_the_players_of_their_module() -> None:
    trajectory = trace(Embedded(), **PLAIN_OF_EMBEDDED)
    assert players(trajectory) == [["first"], ["block.up"], ["block.down"], ["last"]]
    # The scale is a parameter, not a state: it is live at no cut, though two stages read it.
    assert [stage.live_before for stage in trajectory.stages] == [
        ("x",),
        ("add", "mul"),
        ("add", "tanh_1"),
        ("add_2",),
    ]
    attention = [f"attention.{name}" for name, _ in nn.MultiheadAttention(4, 2).named_parameters()]
    assert set(trajectory.plain_parameters) == {"position", "block.gamma", "leaf.scale", *attention}


def test_running_the_stages_is_running_a_model_with_plain_parameters() -> None:
    torch.manual_seed(0)
    model = Embedded().double()
    trajectory = trace(model, **PLAIN_OF_EMBEDDED)
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        values = trajectory.bind(x)
        for stage in trajectory.stages:
            values = stage.run(values)
        torch.testing.assert_close(trajectory.assemble(values), model(x), rtol=0, atol=0)
        model.block.gamma.data *= 2  # a stage reads the parameters that are in force when it runs


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("capture", ["gradient", "weighted"])
def test_plain_parameters_take_the_base_step(rollout: str, capture: str) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Embedded().double())
    ours, theirs = models
    optimizer = GTDDP(
        ours,
        curvature.SGD(lr=0.1),
        gauss_newton_weight=1.0,
        rollout=rollout,
        capture=capture,
        **PLAIN_OF_EMBEDDED,
    )
    F.cross_entropy(ours(x), y).backward()
    optimizer.step()
    F.cross_entropy(theirs(x), y).backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    plain = optimizer.trajectory.plain_parameters
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name in plain:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            continue
        assert not torch.allclose(a, b, rtol=1e-6, atol=0), name


def test_every_parameter_without_a_player_is_told_at_once_and_how() -> None:
    with pytest.raises(ModelError) as error:
        GTDDP(Embedded(), curvature.SGD())
    message = str(error.value)
    assert "'position' belongs to the model itself (Embedded)" in message
    assert "6 more parameters have no player either" in message
    # The module with layers inside is traced through, torch's own attention and the leaf are not.
    assert "plain_modules=['leaf', 'attention'], plain_parameters=['position', 'block.gamma']" in message

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale

    message = r"'scale' belongs to the model itself \(Direct\).*plain_parameters=\['scale'\] gives it the base"
    with pytest.raises(ModelError, match=message):
        GTDDP(Direct(), curvature.SGD())


def test_plain_parameters_with_stages_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), ScaledBlock(4), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"plain_parameters=\['1.gamma'\]"):
        GTDDP(model, curvature.SGD(), stages=list(model))
    optimizer = GTDDP(model, curvature.SGD(), stages=list(model), plain_parameters=["1.gamma"])
    assert players(optimizer.trajectory) == [["0"], ["1.up", "1.down"], ["2"]]
    assert optimizer.trajectory.plain_parameters == ("1.gamma",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plain_parameters": ["positions"]}, "plain_parameters: the model has no parameter 'positions'"),
        ({"plain_parameters": ["first"]}, "plain_parameters: the model has no parameter 'first'"),
        (
            {"plain_parameters": ["last.bias"]},
            r"'last\.bias' is a control of module 'last' \(Linear\).*plain_modules=\['last'\]",
        ),
        ({"plain_parameters": "position"}, r"plain_parameters='position' is one name; give a list"),
        ({"plain_modules": "leaf"}, r"plain_modules='leaf' is one name; give a list"),
        ({"plain_modules": [""]}, r"'' is the whole model; name its own parameters in plain_parameters"),
        ({"plain_modules": ["position"]}, "plain_modules: the model has no module 'position'"),
    ],
)
def test_bad_names_of_plain_parts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GTDDP(Embedded(), curvature.SGD(), **options)


def test_a_returned_parameter_and_a_buffer_changed_in_place() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            calls = self.calls.add_(1)
            return self.last(self.first(x) * calls) * calls, 2 * self.scale

    model = Counting()
    trajectory = trace(model, plain_parameters=["scale"])
    model.calls.fill_(2)
    x = torch.randn(4, 3)
    values = trajectory.bind(x)
    for stage in trajectory.stages:
        values = stage.run(values)
    returned: Any = trajectory.assemble(values)
    assert float(model.calls) == 3.0 and returned[1].item() == 1.0  # counted once, though two stages read it
    torch.testing.assert_close(returned[0], 3 * model.last(3 * model.first(x)))


def test_a_separate_projection_is_a_stage_of_its_own() -> None:
    """Where forward computes it; its input and the end of the main path are live on its two sides."""
    together = trace(PROJECTION.model())
    assert players(together) == [["stem"], ["conv1"], ["conv2", "project"], ["head"]]
    assert together.players[2].shortcut == ("project",)

    behind = trace(PROJECTION.model(), projection="separate")
    assert players(behind) == [["stem"], ["conv1"], ["conv2"], ["project"], ["head"]]
    assert live(behind) == [1, 1, 2, 2, 1]
    before = trace(PROJECTION_FIRST.model(), projection="separate")
    assert players(before) == [["stem"], ["project"], ["conv1"], ["conv2"], ["head"]]
    assert live(before) == [1, 1, 2, 2, 1]
    for trajectory, net in ((behind, PROJECTION), (before, PROJECTION_FIRST)):
        assert all(player.shortcut == () for player in trajectory.players)
        x, _ = net.batch(3)
        values = trajectory.bind(x)
        for stage in trajectory.stages:
            values = stage.run(values)
        torch.testing.assert_close(trajectory.assemble(values), net.model()(x), rtol=0, atol=0)


def test_an_identity_module_is_no_live_tensor_of_its_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v, self.shortcut, self.end = nn.Linear(3, 4), nn.Linear(4, 3), nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.shortcut(x) + self.v(torch.tanh(self.u(x))))

    model = nn.Sequential(nn.Linear(2, 3), Block(), nn.Linear(3, 2), nn.Identity())
    trajectory = trace(model)
    assert [stage.live_before for stage in trajectory.stages] == [("input_1",), ("_0",), ("_0", "tanh"), ("add",)]
    x = torch.randn(4, 2)
    values = trajectory.bind(x)
    for stage in trajectory.stages:
        values = stage.run(values)
    torch.testing.assert_close(trajectory.assemble(values), model(x), rtol=0, atol=0)


def test_a_learned_scale_on_the_shortcut_leaves_it_a_projection() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.u, self.v, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.gate = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(torch.tanh(self.u(h) + self.gate.view(1, -1) * self.v(h)))

    trajectory = trace(Gated(), plain_parameters=["gate"])
    assert players(trajectory) == [["first"], ["u", "v"], ["last"]]
    assert trajectory.players[1].shortcut == ("v",)


def test_a_bad_projection_is_refused() -> None:
    model = PROJECTION.model()
    with pytest.raises(OptionError, match="projection='apart', expected one of 'cooperative', 'separate'"):
        GTDDP(model, curvature.SGD(), projection="apart")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"projection='separate' with stages=\[...\]"):
        GTDDP(nn.Sequential(nn.Linear(2, 2)), curvature.SGD(), stages=[nn.Linear(2, 2)], projection="separate")


def test_weight_tying_is_refused() -> None:
    shared = nn.Linear(3, 3)
    with pytest.raises(ModelError, match=r"module '0' is called twice in one forward"):
        GTDDP(nn.Sequential(shared, nn.Tanh(), shared), curvature.SGD())
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ModelError, match=r"'2\.weight' is the same tensor as '0\.weight'"):
        GTDDP(tied, curvature.SGD())


def test_a_wrapped_model_is_asked_for_plain() -> None:
    with pytest.raises(ModelError, match=r"wrapped \(torch.compile\).*model\._orig_mod"):
        GTDDP(torch.compile(nn.Sequential(nn.Linear(2, 2))), curvature.SGD())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"wrapped \(DataParallel\).*model\.module"):
        GTDDP(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), curvature.SGD())


def test_a_single_layer_is_asked_for_in_a_sequence() -> None:
    with pytest.raises(ModelError, match=r"itself one Linear; put it into nn\.Sequential"):
        GTDDP(nn.Linear(2, 2), curvature.SGD())


def test_nothing_to_train_lazy_modules_and_unknown_names() -> None:
    with pytest.raises(ModelError, match="nothing to train"):
        GTDDP(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), curvature.SGD())
    with pytest.raises(ModelError, match=r"'0\.weight' is not initialised"):
        GTDDP(nn.Sequential(nn.LazyLinear(2)), curvature.SGD())
    with pytest.raises(ModelError, match="no module 'attention'"):
        GTDDP(nn.Sequential(nn.Linear(2, 2)), curvature.SGD(), plain_modules=["attention"])


def test_samples_must_stay_in_dimension_0() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(-1, 3))

    model = Merged()
    GTDDP(model, curvature.SGD())
    with pytest.raises(ModelError, match=r"module 'layer' saw 20 rows where the batch has 4 samples"):
        model(torch.randn(4, 5, 3))


def test_a_live_tensor_changed_in_place_is_found() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            g = h + torch.tanh(self.b(h * 1.0))
            return torch.relu_(h) + g  # not before the sum has read the old h

    model = InPlace()
    GTDDP(model, curvature.SGD(), rollout="nonlinear")
    with pytest.raises(ModelError, match=r"live tensor 'tanh' at cut 1 was changed in place"):
        model(torch.randn(4, 3))

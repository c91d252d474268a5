"""Vanishing gradients: their norms by layer in a deep net of sigmoids or tanhs, base against GT-DDP."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import curvature
from ..checkpoint import JSON
from ..data import network_input
from ..data.batches import BatchOrder
from ..environment import prepare_cpu, select_device
from ..optimizer import GTDDP
from ..parts import build_model, load_data
from ..training_step import Precision
from .bases import BASES, NAMES, base, gtddp
from .cell import Cell
from .page import Findings, Rows, Table
from .plan import Plan, Settings, config_of
from .statistics import SIGNIFICANT, p_of_pairs
from .training import trained_run, what_came_of
from .unit import Result, Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTION = "gtddp_dist.experiments.vanishing:train_and_probe"
BLOCKS, WIDTH = 4, 8
ACTIVATIONS = ("tanh", "sigmoid")
ON = ("sgd", "adam")
NETS: Mapping[str, str] = {"plain-net": "without shortcuts", "small-resnet": "with shortcuts"}
VARIANTS: Mapping[str, str] = {"base": "base", "ddpnopt": "DDPNOpt", "gtddp": "GT-DDP"}
KINDS: Mapping[str, str] = {"g": "|g|", "paper": "|Q_u|, Q_uu = R, rho = 1/B", "default": "|Q_u|, proximal, rho = 0.1"}
FACTOR = 10.0
"""How many times less Q_u is to vanish than g for the claim to hold."""


@dataclass(frozen=True)
class Case:
    """A network, its non-linearity, and what trains it."""

    net: str
    activation: str
    base: str
    variant: str

    @property
    def alone(self) -> Case:
        """The same with the base by itself."""
        return replace(self, variant="base")

    def settings(self) -> tuple[Settings, Settings]:
        """Network and optimizer."""
        network: Settings = {
            "model.name": self.net,
            "model.blocks": BLOCKS,
            "model.width": WIDTH,
            "model.channels": [WIDTH] * BLOCKS,
            "model.batch_norm": False,
            "model.activation": self.activation,
        }
        rate = BASES[self.base]
        match self.variant:
            case "base":
                return network, base(self.base, rate)
            case "gtddp":
                return network, gtddp(self.base, rate)
            case _:
                return network, {**base(f"ddpnopt-{self.base}", rate), "optimizer.gauss_newton_weight": "1/B"}


CASES = [
    Case(net, activation, on, variant)
    for net, activation, on, variant in itertools.product(NETS, ACTIVATIONS, ON, VARIANTS)
    if net == "plain-net" or (on == "adam" and variant != "ddpnopt")
]


def train_and_probe(settings: Settings) -> dict[str, JSON]:
    """A training, as `training.train_once` has it, and the norms by layer before and after it."""
    config = config_of(settings)
    prepare_cpu(config.train.threads)
    precision = Precision("float64", select_device("cpu"))
    data = load_data(config)
    torch.manual_seed(config.train.seed)
    model = build_model(config, data, precision)
    order = BatchOrder(len(data.train_labels), config.train.batch_size, config.train.seed)
    images, labels = data.batch(order.batch_indices(0), config.train.seed, 0)
    images = network_input(images, torch.float64)
    start = probe(model, images, labels)
    with trained_run(settings) as (run, code):
        found = what_came_of(run, code)
        end = None
        if not found["diverged"]:
            weights, _ = run.read_model()
            model.load_state_dict({name: value.double() for name, value in weights.items()})
            end = probe(model, images, labels)
    return {**found, "start": start, "end": end}


def probe(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, JSON]:
    """Norm of every player's mean gradient g and of its Q_u = F_u^T V_z', in SGD's metric; networks without BatchNorm.

    V_z' is what the sweep carries: sample b's own derivative times 1/B + c_b.
    """
    B = len(labels)
    losses = F.cross_entropy(model(images), labels, reduction="none")
    names: list[str] = []
    found: dict[str, list[JSON]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        own = copy.deepcopy(model)
        optimizer = GTDDP(
            own,
            curvature.SGD(lr=BASES["sgd"]),
            inspect=True,
            gauss_newton_weight="1/B" if kind == "paper" else 0.1,
            control_hessian="replace" if kind == "paper" else "proximal",
            value_hessian="block_diagonal" if kind == "paper" else "batch",
            replace_guard=False,
        )
        F.cross_entropy(own(images), labels).backward()
        optimizer.step()
        players = optimizer.trajectory.players
        names = [next(iter(player.modules)).removesuffix(".conv") for player in players]
        parameters = dict(model.named_parameters())
        for player in players:
            beyond = torch.zeros(B) if kind == "g" else optimizer.sample_value(player.index + 1).slope
            controls = [parameters[name] for name in player.controls()]
            slopes = torch.autograd.grad(losses @ (1 / B + beyond).to(losses), controls, retain_graph=True)
            norm = float(torch.cat([slope.flatten() for slope in slopes]).norm())
            found[kind].append(norm if math.isfinite(norm) else None)
    return {"layers": cast(list[JSON], names), **{kind: norms for kind, norms in found.items()}}


class Vanishing:
    """Trainings of deep nets, and norms by layer before and after."""

    question = (
        "DDPNOpt's authors say that updates made of the value function suffer less from vanishing gradients than "
        "the gradient does. How fast do gradients shrink from the last layer to the first in a deep net of sigmoids or "
        "tanhs, does Q_u, the derivative of the value function by a layer's weights, shrink less, and who trains?"
    )
    varies = (
        "model.name", "model.blocks", "model.width", "model.channels", "model.batch_norm", "model.activation",
        "optimizer.name", "optimizer.lr", "optimizer.gauss_newton_weight", "train.seed", "schedule.",
    )  # fmt: skip

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in self.cells(plan).values() for unit in units]

    def cells(self, plan: Plan) -> dict[Case, list[Unit]]:
        """Case -> its trainings, by seed."""
        length: Settings = {"train.steps": 2, "log.every": 1} if plan.quick else {"train.epochs": 3}
        cases = [c for c in CASES if c.variant != "gtddp" and c.base == "sgd"] if plan.quick else CASES
        found = {}
        for case in cases:
            settings = [plan.settings(*case.settings(), {"train.seed": seed}, length) for seed in range(plan.seeds)]
            found[case] = [Unit.of(FUNCTION, each) for each in settings]
        return found

    def findings(self, plan: Plan, results: Results) -> Findings:
        raw = {case: [results.of(unit) for unit in units] for case, units in self.cells(plan).items()}
        runs = {case: Cell.of(units, results) for case, units in self.cells(plan).items()}
        losses, layers = _losses(runs), _layers(raw)
        ratios = _ratios(layers)
        return Findings(
            setting=_setting(plan),
            conclusion=_conclusion(runs, losses, ratios),
            tables=[losses, ratios, layers, _curves(runs)],
            figures={"": _norms_picture(layers), "curves": _curves_picture(runs)},
            captions={
                "": "Norms by layer, geometric means over seeds; solid: at the start; dotted: after training with the "
                "base (SGD; with shortcuts Adam). Where only one line is seen, Q_u has the norm of g.",
                "curves": "Training loss, mean over the seeds that stayed finite (networks without shortcuts).",
            },
        )


def _setting(plan: Plan) -> str:
    layers = 1 + 2 * BLOCKS
    return (
        f"Data set {plan.data}; {layers} convolutions of {WIDTH} channels and two linear layers; {plan.seeds} seeds; "
        f"{'2 steps' if plan.quick else '3 epochs'}; shared rates, "
        f"{', '.join(f'{NAMES[on]} {BASES[on]:g}' for on in ON)}. With shortcuts: the same layers in `small-resnet`. "
        "Norms are those on the first batch, in float64, of a layer's weights and bias together; Q_u = F_u' V_z' by "
        "gtddp's sweep in SGD's metric (identity over the rate), with the paper's options and with the defaults. A run "
        "trains where its loss in the last epoch is below half of that of guessing."
    )


def _losses(runs: Mapping[Case, Cell]) -> Table:
    columns = {
        "network": "", "activation": "", "base": "", "optimizer": "", "train loss": ".4f", "deviation": ".4f",
        "validation accuracy (%)": ".1f", "trains": "d", "of": "d", "diverged": "d", "p against base": ".2g",
    }  # fmt: skip
    rows: Rows = []
    for case, cell in runs.items():
        loss = cell.loss
        p = None if case.variant == "base" else p_of_pairs(cell.losses, runs[case.alone].losses)
        rows.append(
            [
                NETS[case.net], case.activation, NAMES[case.base], VARIANTS[case.variant], loss.mean, loss.deviation,
                cell.accuracy.mean, cell.training, len(cell.runs), loss.diverged, p,
            ]
        )  # fmt: skip
    return Table("", "Who trains", columns, rows)


def _layers(raw: Mapping[Case, Sequence[Result]]) -> Table:
    columns = {"network": "", "activation": "", "trained with": "", "layer": "", "number": "d"}
    rows: Rows = []
    for case, members in raw.items():
        for when in ("start", "end"):
            if when == "start" and case != _first_of(raw, case):
                continue  # all variants begin with the same weights
            probes = [cast(Mapping[str, list[JSON]], each[when]) for each in members if each[when] is not None]
            trained = "" if when == "start" else f"{NAMES[case.base]}, {VARIANTS[case.variant]}"
            for number, layer in enumerate(probes[0]["layers"] if probes else []):
                means = [_geometric([probe[kind][number] for probe in probes]) for kind in KINDS]
                rows.append([NETS[case.net], case.activation, trained, str(layer), number, *means])
    return Table("layers", "Norms by layer", columns | dict.fromkeys(KINDS.values(), ".3g"), rows, on_page=False)


def _first_of(raw: Mapping[Case, object], case: Case) -> Case:
    return next(each for each in raw if (each.net, each.activation) == (case.net, case.activation))


def _geometric(values: Sequence[JSON]) -> float | None:
    """The geometric mean of those that are numbers above zero."""
    found = [float(value) for value in values if isinstance(value, int | float) and value > 0]
    return statistics.geometric_mean(found) if found else None


def _ratios(layers: Table) -> Table:
    """First convolution's norm over the last one's."""
    columns = {"network": "", "activation": "", "trained with": "", "|g| of the first convolution": ".2g"}
    columns |= {f"first over last: {kind}": ".2g" for kind in KINDS.values()}
    columns |= {"|Q_u| over |g|, first, Q_uu = R": ".3f", "the same, proximal": ".3f"}
    rows: Rows = []
    for key, group in itertools.groupby(layers.rows, key=lambda row: tuple(row[:3])):
        convolutions = [row for row in group if str(row[3]).startswith(("stem", "blocks"))]
        first, last = ([cast(float, cell) for cell in convolutions[index][5:]] for index in (0, -1))
        if all(first) and all(last):
            ratios = [a / b for a, b in zip(first, last, strict=True)]
            rows.append([*key, first[0], *ratios, first[1] / first[0], first[2] / first[0]])
    return Table("ratios", "How much is left at the first convolution", columns, rows)


def _conclusion(runs: Mapping[Case, Cell], losses: Table, ratios: Table) -> str:
    said = []
    for row in ratios.rows:
        if row[0] == NETS["plain-net"] and row[2] == "":
            g, paper, default = (cast(float, cell) for cell in row[4:7])
            less = max(paper, default) >= FACTOR * g
            said.append(
                f"With {row[1]} and no shortcuts, at the start, the first convolution's gradient is {g:.2g} times the "
                f"last one's; for Q_u that is {paper:.2g} (Q_uu = R) and {default:.2g} (proximal): the claim that "
                f"Q_u vanishes less {'holds' if less else 'does not hold'} (asked: {FACTOR:g} times less)."
            )
    pairs = [case for case in runs if case.variant != "base" and case.net == "plain-net"]
    lower = [case for case in pairs if runs[case].lower_than(runs[case.alone])]
    more = [case for case in pairs if runs[case].training > runs[case.alone].training]
    p_values = {case: row[10] for case, row in zip(runs, losses.rows, strict=True)}
    sure = [case for case in lower if isinstance(p := p_values[case], float) and p < SIGNIFICANT]
    said.append(
        f"Without shortcuts the mean training loss of DDPNOpt or GT-DDP is lower than its base's in {len(lower)} of "
        f"{len(pairs)} cases, in {len(sure)} of them with p < {SIGNIFICANT}, and more of its runs train in "
        f"{len(more)} of them."
    )
    return " ".join(said)


def _curves(runs: Mapping[Case, Cell]) -> Table:
    columns = {
        "network": "", "activation": "", "base": "", "optimizer": "", "step": "d", "train loss": ".4f",
    }  # fmt: skip
    rows: Rows = [
        [NETS[case.net], case.activation, NAMES[case.base], VARIANTS[case.variant], step, loss]
        for case, cell in runs.items()
        for step, loss, _ in zip(*cell.mean_curve("train/loss"), strict=True)
    ]
    return Table("curves", "Training loss by step, mean over seeds", columns, rows, on_page=False)


def _norms_picture(layers: Table) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    grid = figure.subplots(2, 2, squeeze=False, sharey=True)
    looks = {0: ("C0", "o"), 1: ("C3", "s"), 2: ("C2", "^")}
    for row, activation in zip(grid, ACTIVATIONS, strict=True):
        for axes, net in zip(row, NETS.values(), strict=True):
            mine = [each for each in layers.rows if each[:2] == [net, activation]]
            trained = next((str(each[2]) for each in mine if each[2]), "")
            for when, style in (("", "-"), (trained, ":")):
                at = [each for each in mine if each[2] == when]
                for index, kind in enumerate(KINDS.values()):
                    color, marker = looks[index]
                    values = [cast(float, each[5 + index]) for each in at]
                    label = f"{kind}, {f'after {when}' if when else 'start'}"
                    numbers = [cast(int, each[4]) for each in at]
                    axes.plot(numbers, values, style, color=color, marker=marker, markersize=4, label=label)
            axes.set_yscale("log")
            axes.set(title=f"{activation}, {net}", xlabel="layer (0: first; the last two are linear)")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("norm (nats per unit of weight)")
    grid[0][0].legend(fontsize=8)
    return figure


def _curves_picture(runs: Mapping[Case, Cell]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(len(ACTIVATIONS), len(ON), squeeze=False)
    styles = {"base": ("C0", "-"), "ddpnopt": ("C3", "--"), "gtddp": ("C2", "-.")}
    for row, activation in zip(grid, ACTIVATIONS, strict=True):
        for axes, on in zip(row, ON, strict=True):
            for variant, (color, style) in styles.items():
                case = Case("plain-net", activation, on, variant)
                if case in runs:
                    label = NAMES[on] if variant == "base" else f"{VARIANTS[variant]} on {NAMES[on]}"
                    steps, losses, _ = runs[case].mean_curve("train/loss")
                    axes.plot(steps, losses, style, color=color, label=label)
            axes.set(title=f"{activation}, rate {BASES[on]:g}", xlabel="training step", ylabel="training loss (nats)")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
    return figure


EXPERIMENT = Vanishing()

"""Fig. 6 of the paper: training curves with the share of feedback, and the variance over seeds, for bases and rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import robustness, table2
from .bases import BASES, NAMES
from .cell import Cell, described
from .page import Findings, Rows, Table, TableCell, number_of
from .plan import Plan
from .statistics import p_of_spreads
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = ("base", "gtddp")
_EPSILON = 1e-12


class Fig6:
    """The trainings of table2 (a, b) and of robustness (c), looked at for feedback and variance."""

    question = (
        "The paper's Fig. 6 says that feedback is a real part of the update during training, and that it reduces "
        "the variance of training "
        "over seeds, most of all at large learning rates. (a) Training curves with the ratio of feedback to open "
        "gain; (b) the deviation "
        "over seeds for each base; (c) the same over learning rates."
    )
    varies = ("optimizer.name", "optimizer.lr", "optimizer.preset", "train.seed", "train.epochs", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        groups = [*_curves(plan).values(), *robustness.cells(plan).values()]
        return [unit for units in groups for unit in units]

    def findings(self, plan: Plan, results: Results) -> Findings:
        curves = {key: Cell.of(units, results) for key, units in _curves(plan).items()}
        rates = {key: Cell.of(units, results) for key, units in robustness.cells(plan).items()}
        feedback: Rows = [
            [NAMES[name], step, ratio, deviation]
            for name in BASES
            for step, ratio, deviation in zip(*curves[name, "gtddp"].mean_curve("gtddp/feedback_ratio"), strict=True)
        ]
        variance = [_variance([NAMES[name]], curves[name, "base"], curves[name, "gtddp"]) for name in BASES]
        over_rates = [
            _variance([NAMES[name], factor], rates[name, factor, "base"], rates[name, factor, "gtddp"])
            for name, factor in dict.fromkeys((name, factor) for name, factor, _ in rates)
        ]
        measured = {
            "base: deviation of loss": ".4f", "GT-DDP: deviation of loss": ".4f", "ratio": ".3g", "p": ".2g",
            "base: deviation of accuracy": ".2f", "GT-DDP: deviation of accuracy": ".2f", "base: diverged": "d",
            "GT-DDP: diverged": "d", "base trains": "", "GT-DDP trains": "",
        }  # fmt: skip
        first = next(iter(curves.values())).runs[0]
        return Findings(
            setting=(
                f"{described(first, plan)} Panels (a) and (b): the runs of [table2](table2.md), each base at its "
                "best rate; "
                "(c): those of [robustness](robustness.md). Deviations are those over seeds, of the training "
                "loss of the last "
                "epoch (nats) and of the final validation accuracy (points). p: Pitman and Morgan's test of "
                "equal variances. "
                "The feedback ratio compares the lengths of K delta z and k over all players, in the metric of "
                "the sweep."
            ),
            conclusion=_conclusion(feedback, variance, over_rates),
            tables=[
                Table("b", "(b) Deviation over seeds, at the base's best rate", {"base": "", **measured}, variance),
                Table(
                    "c",
                    "(c) Deviation over seeds, over learning rates",
                    {"base": "", "times best rate": "g", **measured},
                    over_rates,
                ),
                Table(
                    "a",
                    "(a) Feedback ratio over training, mean and deviation over seeds",
                    {"base": "", "step": "d", "feedback ratio": ".4g", "deviation": ".3g"},
                    feedback,
                    on_page=False,
                ),
            ],
            figures={"a": _picture_a(curves), "b": _picture_b(variance), "c": _picture_c(over_rates)},
            captions={
                "a": "(a) Above: training loss, bands of one deviation over seeds. Below: feedback over open gain.",
                "b": "(b) Deviation over seeds of training loss and validation accuracy.",
                "c": "(c) Deviation over seeds of the training loss, at rates at which the optimizer trains.",
            },
        )


def _curves(plan: Plan) -> dict[tuple[str, str], list[Unit]]:
    return {key: units for key, units in table2.cells(plan).items() if key[1] in _KINDS}


def _variance(key: list[TableCell], base: Cell, ours: Cell) -> list[TableCell]:
    a, b = base.loss.deviation, ours.loss.deviation
    return [
        *key, a, b, None if a is None or b is None or a < _EPSILON else b / a, p_of_spreads(ours.losses, base.losses),
        base.accuracy.deviation, ours.accuracy.deviation, base.loss.diverged, ours.loss.diverged,
        base.trains, ours.trains,
    ]  # fmt: skip


def _conclusion(
    feedback: Rows,
    variance: Rows,
    rates: Rows,
) -> str:
    names = dict.fromkeys(row[0] for row in feedback)
    largest = {name: max(number_of(row[2]) for row in feedback if row[0] == name) for name in names}
    shares = ", ".join(f"{name} {share:.3g}" for name, share in largest.items())
    lower = [str(row[0]) for row in variance if isinstance(row[3], float) and row[3] < 1]
    counted = [row for row in rates if isinstance(row[4], float) and row[-1] is row[-2] is True]
    less = sum(isinstance(row[4], float) and row[4] < 1 for row in counted)
    alone = sum(row[-1] is True and row[-2] is False for row in rates)
    return (
        f"(a) The largest mean ratio of feedback to open gain during training: {shares}. (b) At the base's best "
        "rate the deviation of the "
        f"training loss over seeds is lower with GT-DDP for {len(lower)} of {len(variance)} bases "
        f"({', '.join(lower) or 'none'}). "
        f"(c) Of {len(counted)} rates at which both train it is lower at {less}; only GT-DDP trains at {alone} more."
    )


def _picture_a(curves: Mapping[tuple[str, str], Cell]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, len(BASES), sharex="col", height_ratios=(2, 1))
    for column, name in enumerate(BASES):
        loss, ratio = panels[0][column], panels[1][column]
        for number, kind in enumerate(_KINDS):
            steps, mean, deviation = curves[name, kind].mean_curve("train/loss")
            label = table2.VARIANTS[kind]
            loss.plot(steps, mean, color=f"C{number}", linestyle=("--", "-")[number], label=label)
            low = [max(m - d, 0.2 * m) for m, d in zip(mean, deviation, strict=True)]
            loss.fill_between(
                steps,
                low,
                [m + d for m, d in zip(mean, deviation, strict=True)],
                color=f"C{number}",
                alpha=0.15,
                linewidth=0,
            )
        steps, mean, _ = curves[name, "gtddp"].mean_curve("gtddp/feedback_ratio")
        ratio.plot(steps, mean, color="C2")
        loss.set(yscale="log", title=NAMES[name])
        ratio.set(xlabel="training step")
        for axes in (loss, ratio):
            axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("training loss (nats)")
    panels[1][0].set_ylabel("feedback / open gain")
    panels[0][0].legend()
    return figure


def _picture_b(variance: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, columns, label in zip(
        figure.subplots(1, 2), ((1, 2), (5, 6)), ("training loss (nats)", "validation accuracy (points)"), strict=True
    ):
        for number, (column, kind) in enumerate(zip(columns, _KINDS, strict=True)):
            heights = [value if isinstance(value := row[column], float) else 0.0 for row in variance]
            places = [x + 0.38 * (number - 0.5) for x in range(len(variance))]
            style = {"color": f"C{number}", "hatch": ("", "//")[number], "edgecolor": "white"}
            axes.bar(places, heights, 0.36, label=table2.VARIANTS[kind], **style)
        axes.set_xticks(range(len(variance)), [str(row[0]) for row in variance])
        axes.set(ylabel=f"deviation over seeds of\n{label}")
        axes.grid(axis="y", alpha=0.25)
    figure.axes[0].legend()
    return figure


def _picture_c(rates: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(BASES)), NAMES.values(), strict=True):
        rows = [row for row in rates if row[0] == name]
        for number, (column, kind) in enumerate(zip((2, 3), _KINDS, strict=True)):
            trains = [row for row in rows if row[column] is not None and row[number - 2] is True]
            points = [(number_of(row[1]), number_of(row[column])) for row in trains]
            points = [(x, y) for x, y in points if y > _EPSILON]
            style = {"color": f"C{number}", "marker": "os"[number], "linestyle": ("--", "-")[number]}
            label = table2.VARIANTS[kind]
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, markersize=5, **style)
        # A logarithmic axis needs something to show.
        scale = "log" if any(len(line.get_xdata()) for line in axes.lines) else "linear"
        axes.set(xscale=scale, yscale=scale, title=name, xlabel="rate / best rate of the base")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("deviation of training loss (nats)")
    figure.axes[0].legend()
    return figure


EXPERIMENT = Fig6()

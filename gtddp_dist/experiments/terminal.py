"""Which curvature cotangent at the output, and which weight rho, pays for each base."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .bases import BASES, NAMES, base, gtddp
from .cell import Cell, described, runs_table, units_of
from .page import Findings, Rows, Table, number_of
from .plan import Plan, Settings
from .robustness import rounded
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERMINALS: Mapping[str, str] = {
    "loss_gradient": "loss gradient (paper)",
    "sampled": "sampled labels",
    "exact": "exact, every class",
}
WEIGHTS = (0.03, 0.1, 0.3)
FACTORS = (3.0,)

Key = tuple[str, float, str, float]
"""Base, factor of its best rate, terminal ("base" for the base alone) and rho (0 for the base alone)."""


def _cells(plan: Plan) -> dict[Key, list[Unit]]:
    length: Settings = {"train.epochs": 4, **plan.pick({}, {"train.steps": 3})}
    factors = plan.pick(FACTORS, (3.0,))
    weights = plan.pick(WEIGHTS, (0.1,))
    found: dict[Key, list[Unit]] = {}
    for (name, rate), factor in itertools.product(BASES.items(), factors):
        at = rounded(rate * factor)
        found[name, factor, "base", 0.0] = units_of(plan, base(name, at), length)
        for terminal, weight in itertools.product(TERMINALS, weights):
            options = gtddp(name, at, terminal=terminal, gauss_newton_weight=weight)
            found[name, factor, terminal, weight] = units_of(plan, options, length)
    return found


class Terminal:
    """All cotangents and a few weights, at three times the base's best rate, where GT-DDP is used."""

    question = (
        "The paper takes the loss gradient for the curvature at the output. Others are labels sampled from the "
        "model's own "
        "softmax, and all columns of the exact softmax Hessian. Which of them, with which weight rho, pays for "
        "which base?"
    )
    varies = (
        "optimizer.name", "optimizer.lr", "optimizer.preset", "optimizer.terminal", "optimizer.gauss_newton_weight",
        "train.seed", "train.epochs", "schedule.",
    )  # fmt: skip

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in _cells(plan).values() for unit in units]

    def findings(self, plan: Plan, results: Results) -> Findings:
        found = {key: Cell.of(units, results) for key, units in _cells(plan).items()}
        rows: Rows = []
        for (name, factor, terminal, weight), cell in found.items():
            loss, accuracy = cell.loss, cell.accuracy
            rows.append(
                [
                    NAMES[name], factor, TERMINALS.get(terminal, "base alone"), weight, loss.mean, loss.deviation,
                    accuracy.mean, loss.diverged,
                ]
            )  # fmt: skip
        columns = {
            "base": "", "times best rate": "g", "terminal": "", "rho": "g", "train loss": ".4f", "deviation": ".4f",
            "validation accuracy (%)": ".2f", "diverged": "d",
        }  # fmt: skip
        best = _best(found)
        return Findings(
            setting=(
                f"{described(next(iter(found.values())).runs[0], plan)} Constant rates; GT-DDP with its defaults "
                "but for "
                "the terminal cotangent and rho. A terminal's best rho is the one with the lowest mean loss; one "
                "with a "
                "diverged run comes last."
            ),
            conclusion=_conclusion(best),
            tables=[
                Table(
                    "best",
                    "Each terminal with its best rho",
                    {
                        "base": "",
                        "times best rate": "g",
                        "terminal": "",
                        "best rho": "g",
                        "train loss": ".4f",
                        "diverged": "d",
                    },
                    best,
                ),
                Table("", "All of them", columns, rows),
                runs_table(("base", "times best rate", "terminal", "rho"), found.items()),
            ],
            figures={"": _picture(found)},
            captions={"": "Mean training loss against rho, with the deviation over seeds. Dashed: the base alone."},
        )


def _best(found: Mapping[Key, Cell]) -> Rows:
    rows: Rows = []
    for (name, factor), terminal in itertools.product(
        dict.fromkeys((n, f) for n, f, *_ in found), ("base", *TERMINALS)
    ):
        cells = {rho: cell for (n, f, t, rho), cell in found.items() if (n, f, t) == (name, factor, terminal)}
        rho, best = min(cells.items(), key=lambda item: item[1].rank)
        loss = best.loss
        rows.append([NAMES[name], factor, TERMINALS.get(terminal, "base alone"), rho, loss.mean, loss.diverged])
    return rows


def _conclusion(best: Rows) -> str:
    sentences = []
    for name, factor in dict.fromkeys((row[0], row[1]) for row in best):
        rows = [row for row in best if (row[0], row[1]) == (name, factor) and row[2] != "base alone"]
        row = min(rows, key=lambda row: (number_of(row[5]), float("inf") if row[4] is None else number_of(row[4])))
        sentences.append(f"{name} at {factor:g} times its best rate: {row[2]}, rho {row[3]:g}.")
    return "The lowest mean training loss has, for " + " ".join(sentences)


def _picture(found: Mapping[Key, Cell]) -> Figure:
    from matplotlib.figure import Figure

    factors = list(dict.fromkeys(factor for _, factor, *_ in found))
    weights = sorted({rho for _, _, terminal, rho in found if terminal != "base"})
    figure = Figure(figsize=(13, 3.7 * len(factors)), layout="constrained")
    panels = figure.subplots(len(factors), len(BASES), squeeze=False)
    for (row, factor), (column, name) in itertools.product(enumerate(factors), enumerate(BASES)):
        axes = panels[row][column]
        alone = found[name, factor, "base", 0.0].loss.mean
        if alone is not None:
            axes.axhline(alone, color="0.3", linestyle="--", linewidth=1, label="base alone")
        for number, (terminal, label) in enumerate(TERMINALS.items()):
            cells = {rho: c for (n, f, t, rho), c in found.items() if (n, f, t) == (name, factor, terminal)}
            shown = {rho: c.loss for rho, c in cells.items() if c.loss.mean is not None}
            axes.errorbar(
                list(shown),
                [loss.mean for loss in shown.values()],
                yerr=[min(loss.deviation or 0.0, 0.9 * (loss.mean or 0.0)) for loss in shown.values()],
                marker="osD"[number], color=f"C{number}", label=label, capsize=2, markersize=5,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=f"{NAMES[name]}, {factor:g} x best rate", xlabel="rho")
        axes.set_xticks(weights, [f"{rho:g}" for rho in weights])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25, which="both")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss (nats)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


EXPERIMENT = Terminal()

"""Which learning rates train: each base alone, and GT-DDP on it, from 0.1 to 30 times the base's best rate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .bases import BASES, NAMES
from .cell import TRAINS_SHARE, Cell, described, runs_table, units_of
from .page import Findings, Rows, Table
from .plan import Plan, Settings
from .table2 import variant
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
KINDS: Mapping[str, str] = {"base": "base", "gtddp": "GT-DDP"}

Key = tuple[str, float, str]
"""Base, factor of its best rate, and kind."""


def cells(plan: Plan) -> dict[Key, list[Unit]]:
    """The trainings; fig6 shows the same."""
    length: Settings = {"train.epochs": 4, **plan.pick({}, {"train.steps": 4})}
    factors = plan.pick(FACTORS, (1.0, 30.0))
    return {
        (name, factor, kind): units_of(plan, variant(kind, name, rounded(rate * factor)), length)
        for (name, rate), factor, kind in itertools.product(BASES.items(), factors, KINDS)
    }


def rounded(rate: float) -> float:
    """A rate without the tail of binary arithmetic."""
    return float(f"{rate:.6g}")


class Robustness:
    """Training loss against learning rate."""

    question = (
        "The promise is a far wider range of learning rates. At which rates, from 0.1 to 30 times the best of "
        "the base alone, does the "
        "base train, and at which GT-DDP on it?"
    )
    varies = ("optimizer.name", "optimizer.lr", "optimizer.preset", "train.seed", "train.epochs", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in cells(plan).values() for unit in units]

    def findings(self, plan: Plan, results: Results) -> Findings:
        found = {key: Cell.of(units, results) for key, units in cells(plan).items()}
        rows: Rows = []
        for (name, factor, kind), cell in found.items():
            loss, accuracy = cell.loss, cell.accuracy
            rows.append(
                [
                    NAMES[name], KINDS[kind], factor, rounded(BASES[name] * factor), loss.mean, loss.deviation,
                    accuracy.mean, accuracy.deviation, loss.diverged, 100 * cell.share_that_trains,
                ]
            )  # fmt: skip
        columns = {
            "base": "", "optimizer": "", "times best rate": "g", "rate": "g", "train loss": ".4f",
            "deviation of loss": ".4f", "validation accuracy (%)": ".2f", "deviation of accuracy": ".2f",
            "diverged": "d", "train (%)": ".0f",
        }  # fmt: skip
        first = next(iter(found.values())).runs[0]
        largest = _largest(found)
        return Findings(
            setting=(
                f"{described(first, plan)} Constant rates, no warm-up; GT-DDP with its defaults. A run trains "
                "where its "
                "loss in the last epoch is below half of that of guessing; a rate trains where at least "
                f"{TRAINS_SHARE:.0%} of the seeds do."
            ),
            conclusion=_conclusion(largest),
            tables=[
                Table(
                    "largest",
                    "The largest rate that trains, and the lowest mean loss of all rates",
                    {
                        "base": "", "base: largest rate": "g", "GT-DDP: largest rate": "g", "ratio": ".3g",
                        "base: lowest loss": ".4f", "at rate": "g", "GT-DDP: lowest loss": ".4f", "at its rate": "g",
                    },
                    largest,
                ),
                Table("", "Every rate", columns, rows),
                runs_table(("base", "times best rate", "optimizer"), found.items()),
            ],
            figures={"": _picture(found)},
            captions={
                "": "Mean training loss of the last epoch; bands from the lowest to the highest seed; a cross at the "
                "top: a seed diverged there. The dotted line is half the loss of guessing."
            },
        )  # fmt: skip


def _largest(found: Mapping[Key, Cell]) -> Rows:
    rows: Rows = []
    for name, rate in BASES.items():
        of_kind = {
            kind: {factor: cell for (n, factor, k), cell in found.items() if (n, k) == (name, kind)} for kind in KINDS
        }
        top = {
            kind: max((factor for factor, cell in cells.items() if cell.trains), default=None)
            for kind, cells in of_kind.items()
        }
        best = {kind: min(cells.items(), key=lambda item: item[1].rank)[0] for kind, cells in of_kind.items()}
        losses = {kind: cells[best[kind]].loss.mean for kind, cells in of_kind.items()}
        both = top["base"], top["gtddp"]
        rows.append(
            [
                NAMES[name],
                *(None if factor is None else rounded(factor * rate) for factor in both),
                None if both[0] is None or both[1] is None else both[1] / both[0],
                *itertools.chain.from_iterable((losses[k], rounded(best[k] * rate)) for k in KINDS),
            ]
        )
    return rows


def _conclusion(largest: Rows) -> str:
    sentences = []
    for name, alone, ours, ratio, *_ in largest:
        if alone is None or ours is None or not isinstance(ratio, float):
            who = [kind for kind, rate in (("the base", alone), ("GT-DDP", ours)) if rate is None]
            sentences.append(f"{name}: at no rate here {' and '.join(who)} trained.")
        elif ratio > 1:
            sentences.append(f"{name}: GT-DDP trains up to a rate {ratio:.3g} times as large as the base.")
        elif ratio == 1:
            sentences.append(f"{name}: no wider range, both train up to {alone:g}; the claim does not hold here.")
        else:
            sentences.append(f"{name}: a narrower range, {ratio:.3g} of the base's; the claim does not hold here.")
    return " ".join(sentences) + " The grid of rates has steps of about 3, and so have these ratios."


def _picture(found: Mapping[Key, Cell]) -> Figure:
    from matplotlib.figure import Figure

    from .plan import loss_of_guessing

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    panels = figure.subplots(2, 2).flat
    run = next(iter(found.values())).runs[0]
    half = loss_of_guessing(run.config.data.name) / 2
    for axes, (name, rate) in zip(panels, BASES.items(), strict=True):
        for number, kind in enumerate(KINDS):
            cells = {factor: cell for (n, factor, k), cell in found.items() if (n, k) == (name, kind)}
            finite = {f: [x for x in cell.losses if x < float("inf")] for f, cell in cells.items()}
            shown = [f for f in finite if finite[f]]
            rates = [f * rate for f in shown]
            style = {"color": f"C{number}", "marker": "os"[number], "linestyle": ("--", "-")[number]}
            axes.plot(rates, [sum(finite[f]) / len(finite[f]) for f in shown], label=KINDS[kind], markersize=5, **style)
            low, high = [min(finite[f]) for f in shown], [max(finite[f]) for f in shown]
            axes.fill_between(rates, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            crosses = [f * rate for f, cell in cells.items() if cell.loss.diverged]
            height = [0.97 - 0.04 * number] * len(crosses)
            axes.plot(crosses, height, "x", color=f"C{number}", transform=axes.get_xaxis_transform())
        axes.axhline(half, color="0.5", linestyle=":", linewidth=1)
        axes.axvline(rate, color="0.8", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="training loss (nats)", title=NAMES[name])
        axes.set_ylim(top=min(axes.get_ylim()[1], 50 * half))
        axes.grid(alpha=0.25)
    figure.axes[0].legend()
    return figure


EXPERIMENT = Robustness()

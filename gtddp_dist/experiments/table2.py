"""Table 2 of the paper: each base against GT-DDP on it, at the same settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .bases import BASES, NAMES, base, gtddp
from .cell import Cell, described, runs_table, units_of
from .page import Findings, Rows, Table
from .plan import Plan, Settings, loss_of_guessing
from .statistics import SIGNIFICANT, p_of_pairs, p_of_spreads
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS: Mapping[str, str] = {"base": "base", "gtddp": "GT-DDP", "paper": "GT-DDP, paper's preset"}


def variant(kind: str, name: str, rate: float) -> Settings:
    """Settings of the optimizer of a column: "base", "gtddp" (the defaults) or "paper"."""
    match kind:
        case "base":
            return base(name, rate)
        case "gtddp":
            return gtddp(name, rate)
        case _:
            return gtddp(name, rate, preset="paper")


def cells(plan: Plan) -> dict[tuple[str, str], list[Unit]]:
    """Base and variant -> its trainings, by seed; fig6 shows the same."""
    length: Settings = plan.pick({}, {"train.steps": 10, "log.every": 2})
    return {
        (name, kind): units_of(plan, variant(kind, name, rate), length)
        for (name, rate), kind in itertools.product(BASES.items(), VARIANTS)
    }


class Table2:
    """Three optimizers for each of the four bases, with the same rate, seeds, weights and data order."""

    question = (
        "The paper's Table 2 compares each base optimizer with GT-DDP on it at shared hyper-parameters. Is "
        "GT-DDP's training "
        "loss lower, does it vary less over seeds, and how does validation accuracy compare?"
    )
    varies = ("optimizer.name", "optimizer.lr", "optimizer.preset", "train.seed", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in cells(plan).values() for unit in units]

    def findings(self, plan: Plan, results: Results) -> Findings:
        found = {key: Cell.of(units, results) for key, units in cells(plan).items()}
        rows: Rows = []
        lower, steadier = list[str](), list[str]()
        for (name, kind), cell in found.items():
            alone, compared = found[name, "base"], kind != "base"
            loss, accuracy = cell.loss, cell.accuracy
            if kind == "gtddp" and cell.lower_than(alone):
                lower.append(name)
            if kind == "gtddp" and cell.steadier_than(alone):
                steadier.append(name)
            rows.append(
                [
                    NAMES[name], VARIANTS[kind], BASES[name], loss.mean, loss.deviation, loss.median, accuracy.mean,
                    accuracy.deviation, loss.diverged, ("(+)" if cell.lower_than(alone) else "(-)") if compared else "",
                    p_of_pairs(cell.losses, alone.losses) if compared else None,
                    p_of_spreads(cell.losses, alone.losses) if compared else None,
                ]
            )  # fmt: skip
        columns = {
            "base": "", "optimizer": "", "rate": "g", "train loss": ".4f", "deviation of loss": ".4f",
            "median loss": ".4f", "validation accuracy (%)": ".2f", "deviation of accuracy": ".2f", "diverged": "d",
            "against base": "", "p (loss)": ".2g", "p (variance)": ".2g",
        }  # fmt: skip
        return Findings(
            setting=(
                f"{described(next(iter(found.values())).runs[0], plan)} Constant rates, no warm-up. The "
                "optimizers of "
                "one base share rate, seeds, initial weights and data order. p (loss): Wilcoxon's signed-rank "
                "test on the "
                "pairs of runs of one seed; p (variance): Pitman and Morgan's test of equal variances on the "
                "same pairs. "
                "Loss is the mean over the last epoch, accuracy that at the end."
            ),
            conclusion=self._conclusion(rows, lower, steadier),
            tables=[
                Table("", "Training loss and validation accuracy", columns, rows),
                _claims(len(BASES), lower, steadier, rows),
                runs_table(("base", "optimizer"), found.items()),
            ],
            figures={"": _picture(found)},
            captions={
                "": "A point is a seed, a bar the mean of the runs that stayed finite; above the frame: see the table."
            },
        )

    def _conclusion(self, rows: Sequence[Sequence[object]], lower: list[str], steadier: list[str]) -> str:
        def named(names: Sequence[str]) -> str:
            return f" ({', '.join(NAMES[name] for name in names)})" if names else ""

        n = len(BASES)
        sure = [row for row in rows if row[1] == "GT-DDP" and isinstance(row[10], float) and row[10] < SIGNIFICANT]
        return (
            f"With the defaults GT-DDP's mean training loss is lower for {len(lower)} of {n} bases{named(lower)}; "
            f"{len(sure)} of the {n} differences, in either direction, have p < {SIGNIFICANT}. It varies less "
            "over seeds "
            f"for {len(steadier)} of {n}{named(steadier)}. (+) says that the mean loss is lower than the base's, "
            "(-) that it "
            "is not, whether or not the difference is significant. The rates are those at which the *base* does "
            "best: what GT-DDP "
            "does at others is on [the page about robustness](robustness.md)."
        )


def _claims(bases: int, lower: Sequence[str], steadier: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    def at(column: int) -> str:
        found = [f"{row[0]} {row[column]:.2g}" for row in rows if row[1] == "GT-DDP" and isinstance(row[column], float)]
        return ", ".join(found) or "-"

    return Table(
        "claims",
        "The claims",
        {"claim": "", "bases for which it holds": "d", "of": "d", "p": ""},
        [
            ["GT-DDP's training loss is lower", len(lower), bases, at(10)],
            ["its variance over seeds is lower", len(steadier), bases, at(11)],
        ],
    )


def _picture(found: Mapping[tuple[str, str], Cell]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for column, (name, (offset, kind)) in enumerate(itertools.product(BASES, enumerate(VARIANTS))):
        members, color = found[name, kind].runs, f"C{offset}"
        x = column // len(VARIANTS) + 0.25 * (offset - 1)
        for axes, values in (
            (loss, [run.train_loss for run in members if not run.diverged]),
            (accuracy, [run.val_accuracy for run in members if run.val_accuracy is not None]),
        ):
            axes.plot([x] * len(values), values, "o", color=color, alpha=0.45, markersize=4, linewidth=0)
            if values:
                mean = sum(values) / len(values)
                label = VARIANTS[kind] if name == next(iter(BASES)) else None
                axes.plot([x - 0.09, x + 0.09], [mean, mean], color=color, linewidth=2.5, label=label)
    run = next(iter(found.values())).runs[0]
    top = 10 * loss_of_guessing(run.config.data.name)
    loss.set_yscale("log")
    if loss.get_ylim()[1] > top:
        loss.set_ylim(top=top)  # runs that blew up, and stayed finite, would hide all others
    loss.set(ylabel="training loss of the last epoch (nats)", title="Training loss")
    accuracy.set(ylabel="validation accuracy at the end (%)", title="Validation accuracy")
    for axes in (loss, accuracy):
        axes.set_xticks(range(len(BASES)), [f"{NAMES[name]}\nrate {rate:g}" for name, rate in BASES.items()])
        axes.grid(axis="y", alpha=0.3)
    loss.legend()
    return figure


EXPERIMENT = Table2()

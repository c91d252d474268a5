"""Table 2 of the paper: each base against GT-DDP on it, at the same settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from .bases import BASES, NAMES, base, gtddp
from .page import Findings, Table
from .plan import Plan, Settings, seeds_of
from .statistics import Spread, p_of_pairs, p_of_spreads
from .training import Trained, training
from .unit import Results, Unit

VARIANTS: Mapping[str, str] = {"base": "base", "gtddp": "GT-DDP", "paper": "GT-DDP, paper's preset"}
SIGNIFICANT = 0.05


def variant(kind: str, name: str, rate: float) -> Settings:
    """Settings of the optimizer of a column: "base", "gtddp" (the defaults) or "paper"."""
    match kind:
        case "base":
            return base(name, rate)
        case "gtddp":
            return gtddp(name, rate)
        case _:
            return gtddp(name, rate, preset="paper")


class Table2:
    """Three optimizers for each of the four bases, with the same rate, seeds, weights and data order."""

    question = (
        "The paper's Table 2 compares each base optimizer with GT-DDP on it at shared hyper-parameters. Is "
        "GT-DDP's training "
        "loss lower, does it vary less over seeds, and how does validation accuracy compare?"
    )
    varies = ("optimizer.name", "optimizer.lr", "optimizer.preset", "train.seed", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in self.cells(plan).values() for unit in units]

    def cells(self, plan: Plan) -> dict[tuple[str, str], list[Unit]]:
        """Base and variant -> its trainings, by seed."""
        quick: Settings = {"train.steps": 12, "log.every": 4} if plan.quick else {}
        return {
            (name, kind): [
                training(plan, variant(kind, name, rate), {"train.seed": seed}, quick) for seed in seeds_of(plan)
            ]
            for (name, rate), kind in itertools.product(BASES.items(), VARIANTS)
        }

    def findings(self, plan: Plan, results: Results) -> Findings:
        runs = {cell: [Trained(unit, results.of(unit)) for unit in units] for cell, units in self.cells(plan).items()}
        rows, lower, steadier = [], list[str](), list[str]()
        for name, kind in runs:
            ours, alone = runs[name, kind], runs[name, "base"]
            losses, base_losses = [run.train_loss for run in ours], [run.train_loss for run in alone]
            loss, accuracy = Spread.of(losses), Spread.of([run.val_accuracy for run in ours])
            reference = Spread.of(base_losses)
            compared = kind != "base"
            p = p_of_pairs(losses, base_losses) if compared else None
            p_spread = p_of_spreads(losses, base_losses) if compared else None
            better = _is_lower(loss, reference)
            if kind == "gtddp" and better:
                lower.append(name)
            if kind == "gtddp" and _varies_less(loss, reference):
                steadier.append(name)
            rows.append(
                [
                    NAMES[name], VARIANTS[kind], BASES[name], loss.mean, loss.deviation, accuracy.mean,
                    accuracy.deviation, loss.diverged, ("(+)" if better else "(-)") if compared else "", p, p_spread,
                ]
            )  # fmt: skip
        columns = {
            "base": "", "optimizer": "", "rate": "g", "train loss": ".4f", "deviation of loss": ".4f",
            "validation accuracy (%)": ".2f", "deviation of accuracy": ".2f", "diverged": "d",
            "against base": "", "p (loss)": ".2g", "p (variance)": ".2g",
        }  # fmt: skip
        main = Table("", "Training loss and validation accuracy", columns, rows)
        return Findings(
            setting=_setting(plan, runs),
            conclusion=self._conclusion(plan, rows, lower, steadier),
            tables=[main, _claims(len(BASES), lower, steadier, rows), _all_runs(runs)],
            figures={"": _picture(runs)},
            captions={
                "": "A point is a seed, a bar the mean of the runs that stayed finite. Lower is better on the left."
            },
        )

    def _conclusion(self, plan: Plan, rows: Sequence[Sequence[object]], lower: list[str], steadier: list[str]) -> str:
        def named(names: Sequence[str]) -> str:
            return f" ({', '.join(NAMES[name] for name in names)})" if names else ""

        n = len(BASES)
        sure = [row for row in rows if row[1] == "GT-DDP" and isinstance(row[9], float) and row[9] < SIGNIFICANT]
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


def _is_lower(ours: Spread, alone: Spread) -> bool:
    """Whether more runs stayed finite, or as many with a lower mean."""
    if ours.diverged != alone.diverged or ours.mean is None or alone.mean is None:
        return ours.diverged < alone.diverged
    return ours.mean < alone.mean


def _varies_less(ours: Spread, alone: Spread) -> bool:
    if ours.diverged != alone.diverged or ours.deviation is None or alone.deviation is None:
        return ours.diverged < alone.diverged
    return ours.deviation < alone.deviation


def _setting(plan: Plan, runs: Mapping[tuple[str, str], Sequence[Trained]]) -> str:
    run = next(iter(runs.values()))[0]
    model, train = run.config.model, run.config.train
    return (
        f"{model.name} on {plan.data}, {run.steps} steps of {train.batch_size} samples at a constant rate, "
        f"{plan.seeds} seeds from 0 on. "
        "The optimizers of one base share rate, seeds, initial weights and data order. p (loss): Wilcoxon's "
        "signed-rank test on the "
        "pairs of runs of one seed; p (variance): Pitman and Morgan's test of equal variances on the same pairs. "
        "Loss is the mean "
        "over the last epoch, accuracy that at the end."
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
            ["GT-DDP's training loss is lower", len(lower), bases, at(9)],
            ["its variance over seeds is lower", len(steadier), bases, at(10)],
        ],
    )


def _all_runs(runs: Mapping[tuple[str, str], Sequence[Trained]]) -> Table:
    return Table(
        "runs",
        "Every run",
        {"base": "", "optimizer": "", "seed": "d", "train loss": "", "validation accuracy (%)": "", "diverged": ""},
        [
            [
                name, kind, run.config.train.seed, None if run.diverged else run.train_loss, run.val_accuracy,
                run.diverged,
            ]
            for (name, kind), members in runs.items()
            for run in members
        ],
        on_page=False,
    )  # fmt: skip


def _picture(runs: Mapping[tuple[str, str], Sequence[Trained]]):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for column, (name, (offset, kind)) in enumerate(itertools.product(BASES, enumerate(VARIANTS))):
        members, color = runs[name, kind], f"C{offset}"
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
    loss.set_yscale("log")
    loss.set(ylabel="training loss of the last epoch (nats)", title="Training loss")
    accuracy.set(ylabel="validation accuracy at the end (%)", title="Validation accuracy")
    for axes in (loss, accuracy):
        axes.set_xticks(range(len(BASES)), [f"{NAMES[name]}\nrate {rate:g}" for name, rate in BASES.items()])
        axes.grid(axis="y", alpha=0.3)
    loss.legend()
    return figure


EXPERIMENT = Table2()

"""Methods of optimal control side by side: MSA, E-MSA, DDPNOpt and SGD, and stage-wise Newton against DDP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from .bases import BASES, gtddp
from .cell import TRAINS_SHARE, Cell, units_of
from .page import Findings, Rows, Table, TableCell
from .plan import Plan, Settings, loss_of_guessing
from .robustness import rounded
from .training import Trained, training
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRIALS: Mapping[str, Sequence[Settings]] = {
    "sgd": [{"optimizer.name": "sgd", "optimizer.lr": rate} for rate in (0.1, 0.3, 1.0, 3.0)],
    "ddpnopt": [
        {"optimizer.name": "ddpnopt-sgd", "optimizer.lr": rate, "optimizer.gauss_newton_weight": "1/B"}
        for rate in (0.1, 0.3, 1.0, 3.0)
    ],
    "emsa": [
        {"optimizer.name": "emsa", "optimizer.emsa_weight": weight, "optimizer.emsa_iterations": 5}
        for weight in (0.1, 0.3, 1.0, 3.0)
    ],
    "msa": [
        {
            "optimizer.name": "msa",
            "optimizer.weight_decay": decay,
            "optimizer.lr": share,
            "optimizer.emsa_iterations": 5,
        }
        for decay, share in ((0.001, 0.001), (0.01, 0.001), (0.01, 0.01), (0.1, 0.1))
    ],
}
"""Method -> what is tried; the same number for each."""
NAMES: Mapping[str, str] = {"sgd": "SGD", "ddpnopt": "DDPNOpt", "emsa": "E-MSA", "msa": "MSA"}
LOOKS: Mapping[str, tuple[str, str]] = {
    "sgd": ("C0", "-"), "ddpnopt": ("C3", "--"), "emsa": ("C2", "-."), "msa": ("0.35", ":"),
}  # fmt: skip
STARTS: Mapping[str, float] = {"ordinary": 1.0, "near the saddle": 0.3}
"""Start -> factor of the initial weights; where all are zero, every gradient but the last bias's is."""
TUNING_SEED = 1000
FORMS: Mapping[str, str] = {"paper": "paper's preset", "default": "defaults"}
ROLLOUTS: Mapping[str, str] = {"linear": "stage-wise Newton (linear rollout)", "nonlinear": "DDP (nonlinear rollout)"}
FACTORS = (1.0, 3.0, 10.0, 30.0)
"""Rates of GT-DDP on SGD, over SGD's good one."""
STEPS = 100
_LOSS = "train/loss"


class Control:
    """Each method at its own best of four settings; then the two rollouts over step sizes."""

    question = (
        "E-MSA's authors say that it gains more per iteration than gradient descent, above all from bad starts near a "
        "saddle, at a higher price of an iteration; DDPNOpt claims to be nearly as cheap as a gradient step. Per "
        "iteration and per second, how do MSA, E-MSA, DDPNOpt and SGD compare, each at its own best of as many "
        "trials? And does DDP, whose feedback sees the states that the new weights lead to, train at larger steps than "
        "stage-wise Newton, which sees their linearisation?"
    )
    varies = (
        "model.name", "model.blocks", "model.width", "model.channels", "model.batch_norm", "model.activation",
        "model.init_scale", "optimizer.", "schedule.", "train.seed", "train.steps", "train.epochs", "train.batch_size",
    )  # fmt: skip

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        trials = {(s, m): self.trials(plan, s, m) for s, m in self._pairs(plan)}
        units = [unit for found in trials.values() for unit in found]
        units += [unit for found in self.stability(plan).values() for unit in found]
        if all(unit.key in results for unit in units):
            units += [unit for found in self.finals(plan, results).values() for unit in found]
            units += list(self.timings(plan, results).values())
        return units

    def _pairs(self, plan: Plan) -> list[tuple[str, str]]:
        return list(itertools.product(STARTS, TRIALS))

    def trials(self, plan: Plan, start: str, method: str) -> list[Unit]:
        """Every setting of a method from a start, with a seed of its own."""
        given = TRIALS[method][1:3] if plan.quick else TRIALS[method]
        return [training(plan, self._common(plan, start), trial, {"train.seed": TUNING_SEED}) for trial in given]

    def best(self, plan: Plan, results: Results, start: str, method: str) -> Settings:
        """The setting with the lowest training loss."""
        given = TRIALS[method][1:3] if plan.quick else TRIALS[method]
        losses = [Trained(unit, results.of(unit)).train_loss for unit in self.trials(plan, start, method)]
        return given[losses.index(min(losses))]

    def finals(self, plan: Plan, results: Results) -> dict[tuple[str, str], list[Unit]]:
        """Start and method -> its best setting, by seed."""
        return {
            (start, method): units_of(plan, self._common(plan, start), self.best(plan, results, start, method))
            for start, method in self._pairs(plan)
        }

    def timings(self, plan: Plan, results: Results) -> dict[tuple[str, str], Unit]:
        """The same for a few steps, with nothing beside it."""
        few: Settings = {"train.steps": plan.pick(12, 3), "eval.every": plan.pick(12, 3)}
        return {
            (start, method): training(
                plan,
                self._common(plan, start),
                self.best(plan, results, start, method),
                {"train.seed": TUNING_SEED + 1},
                few,
                alone=True,
            )
            for start, method in self._pairs(plan)
        }

    def stability(self, plan: Plan) -> dict[tuple[str, str, float], list[Unit]]:
        """Form, rollout and rate -> trainings, by seed."""
        found = {}
        for form, rollout, factor in itertools.product(FORMS, ROLLOUTS, FACTORS[:1] if plan.quick else FACTORS):
            rate = rounded(BASES["sgd"] * factor)
            options = {"rollout": rollout} | ({"preset": "paper"} if form == "paper" else {})
            found[form, rollout, rate] = units_of(plan, self._common(plan, "ordinary"), gtddp("sgd", rate, **options))
        return found

    def _common(self, plan: Plan, start: str) -> Settings:
        steps = plan.pick(STEPS, 3)
        return {
            "model.name": "plain-net",
            "model.blocks": 1,
            "model.width": 4,
            "model.channels": None,
            "model.batch_norm": False,
            "model.activation": "tanh",
            "model.init_scale": STARTS[start],
            "train.steps": steps,
            "train.batch_size": 32,
            "log.every": plan.pick(5, 1),
            "eval.every": steps,
        }

    def findings(self, plan: Plan, results: Results) -> Findings:
        runs = {key: Cell.of(units, results) for key, units in self.finals(plan, results).items()}
        seconds = {
            cell: Trained(unit, results.of(unit)).seconds_per_step for cell, unit in self.timings(plan, results).items()
        }
        steady = {key: Cell.of(units, results) for key, units in self.stability(plan).items()}
        best = {cell: self.best(plan, results, *cell) for cell in runs}
        half = loss_of_guessing(plan.data) / 2
        main, stability = _main(runs, seconds, best, half), _stability(steady)
        rates = _largest_rates(stability)
        return Findings(
            setting=self._setting(plan, half),
            conclusion=_conclusion(main, rates),
            tables=[main, self._trials(plan, results), stability, rates, _curves(runs, seconds)],
            figures={"": _picture(runs, seconds), "stability": _stability_picture(stability)},
            captions={
                "": "Training loss, mean over the seeds that stayed finite, each method at its own best setting; left "
                "by iteration, right by seconds, measured with nothing beside it.",
                "stability": "Mean training loss of the runs that stayed finite, against the rate; a cross: some "
                "diverged.",
            },
        )

    def _setting(self, plan: Plan, half: float) -> str:
        count = len(self.trials(plan, "ordinary", "sgd"))
        return (
            f"Data set {plan.data}; `plain-net` with one block of width 4, tanh; batch 32, {plan.pick(STEPS, 3)} "
            "steps, "
            f"{plan.seeds} seeds. Starts: the usual initial weights, and these times {STARTS['near the saddle']:g} "
            "(`model.init_scale`), near the saddle where all are zero. Each method has "
            f"{count} trials from each start, with a seed that is not among those reported; the lowest loss counts. "
            "MSA and E-MSA take 5 iterations of L-BFGS a layer. "
            f"Seconds are of short runs with nothing beside them. The mark: a training loss of {half:.3g}, half of "
            "that of guessing. Stage-wise Newton and DDP are `gtddp-sgd` with a linear and a nonlinear rollout."
        )

    def _trials(self, plan: Plan, results: Results) -> Table:
        columns = {"start": "", "method": "", "setting": "", "train loss": ".4f", "diverged": ""}
        given = {method: (t[1:3] if plan.quick else t) for method, t in TRIALS.items()}
        rows: Rows = []
        for start, method in self._pairs(plan):
            for setting, unit in zip(given[method], self.trials(plan, start, method), strict=True):
                run = Trained(unit, results.of(unit))
                loss = None if run.diverged else run.train_loss
                rows.append([start, NAMES[method], _words(setting), loss, run.diverged])
        return Table("trials", "The trials", columns, rows)


def _words(setting: Settings) -> str:
    shown = {key.removeprefix("optimizer."): value for key, value in setting.items() if key != "optimizer.name"}
    shown.pop("gauss_newton_weight", None)
    shown.pop("emsa_iterations", None)
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _main(
    runs: Mapping[tuple[str, str], Cell],
    seconds: Mapping[tuple[str, str], float],
    best: Mapping[tuple[str, str], Settings],
    half: float,
) -> Table:
    columns = {
        "start": "", "method": "", "setting": "", "train loss": ".4f", "deviation": ".4f",
        "validation accuracy (%)": ".1f", "trains": "d", "of": "d", "diverged": "d", "seconds per step": ".4f",
        "steps to the mark": "d", "seconds to the mark": ".2f",
    }  # fmt: skip
    rows: Rows = []
    for (start, method), cell in runs.items():
        loss = cell.loss
        steps = next((step for step, mean, _ in zip(*cell.mean_curve(_LOSS), strict=True) if mean < half), None)
        per_step = seconds[start, method]
        rows.append(
            [
                start, NAMES[method], _words(best[start, method]), loss.mean, loss.deviation,
                cell.accuracy.mean, cell.training, len(cell.runs), loss.diverged, per_step, steps,
                None if steps is None else steps * per_step,
            ]
        )  # fmt: skip
    return Table("", "Each method at its own best", columns, rows)


def _stability(steady: Mapping[tuple[str, str, float], Cell]) -> Table:
    columns = {
        "options": "", "rollout": "", "rate": "g", "train loss": ".4f", "deviation": ".4f", "trains": "d", "of": "d",
        "diverged": "d",
    }  # fmt: skip
    rows: Rows = []
    for (form, rollout, rate), cell in steady.items():
        loss = cell.loss
        counts = (cell.training, len(cell.runs), loss.diverged)
        rows.append([FORMS[form], rollout, rate, loss.mean, loss.deviation, *counts])
    return Table("stability", "Stage-wise Newton and DDP over rates", columns, rows)


def _largest_rates(stability: Table) -> Table:
    columns = {"options": "", "rollout": "", "largest rate that trains": "g", "runs that train, all rates": "d"}
    rows: Rows = []
    for form, rollout in itertools.product(FORMS.values(), ROLLOUTS):
        mine = [row for row in stability.rows if row[:2] == [form, rollout]]
        good = [cast(float, r[2]) for r in mine if cast(int, r[5]) >= TRAINS_SHARE * cast(int, r[6])]
        rows.append([form, rollout, max(good, default=None), sum(cast(int, row[5]) for row in mine)])
    return Table("rates", "The largest rate at which nine of ten seeds train", columns, rows)


def _conclusion(main: Table, rates: Table) -> str:
    said = []
    for start in STARTS:
        rows = [row for row in main.rows if row[0] == start]
        arrived = [row for row in rows if row[10] is not None]
        if not arrived:
            said.append(f"From the start '{start}' no method's mean loss reaches the mark.")
            continue
        by_step = min(arrived, key=lambda row: cast(int, row[10]))
        by_second = min(arrived, key=lambda row: cast(float, row[11]))
        sgd = next(row for row in rows if row[1] == NAMES["sgd"])
        emsa = next(row for row in rows if row[1] == NAMES["emsa"])
        holds = emsa[10] is not None and (sgd[10] is None or cast(int, emsa[10]) < cast(int, sgd[10]))
        missing = [str(row[1]) for row in rows if row[10] is None]
        said.append(
            f"From the start '{start}' {by_step[1]} needs the fewest iterations to the mark ({by_step[10]}), and "
            f"{by_second[1]} the fewest seconds ({by_second[11]:.2f}); that E-MSA gains more per iteration than SGD "
            f"{'holds' if holds else 'does not hold'} there. "
            + (f"{', '.join(missing)} {'do' if len(missing) > 1 else 'does'} not get there." if missing else "")
        )
    for form in FORMS.values():
        newton, ddp = (next(r for r in rates.rows if r[:2] == [form, rollout]) for rollout in ROLLOUTS)
        a, b = (row[2] or 0.0 for row in (newton, ddp))
        more = cast(float, b) > cast(float, a) or (a == b and cast(int, ddp[3]) > cast(int, newton[3]))
        said.append(
            f"With the {form} the largest rate that trains is {_rate(newton[2])} for stage-wise Newton and "
            f"{_rate(ddp[2])} for DDP, and {newton[3]} and {ddp[3]} runs train in all: that DDP is the more stable "
            f"{'holds' if more else 'does not hold'}."
        )
    return " ".join(part.strip() for part in said)


def _rate(cell: TableCell) -> str:
    return "none" if cell is None else f"{cell:g}"


def _curves(runs: Mapping[tuple[str, str], Cell], seconds: Mapping[tuple[str, str], float]) -> Table:
    columns = {"start": "", "method": "", "step": "d", "seconds": ".3f", "train loss": ".4f"}
    rows: Rows = [
        [start, NAMES[method], step, step * seconds[start, method], loss]
        for (start, method), cell in runs.items()
        for step, loss, _ in zip(*cell.mean_curve(_LOSS), strict=True)
    ]
    return Table("curves", "Training loss by step and second, mean over seeds", columns, rows, on_page=False)


def _picture(runs: Mapping[tuple[str, str], Cell], seconds: Mapping[tuple[str, str], float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.4), layout="constrained")
    grid = figure.subplots(len(STARTS), 2, squeeze=False)
    for row, start in zip(grid, STARTS, strict=True):
        for method, (color, style) in LOOKS.items():
            steps, losses, _ = runs[start, method].mean_curve(_LOSS)
            row[0].plot(steps, losses, style, color=color, label=NAMES[method])
            row[1].plot([step * seconds[start, method] for step in steps], losses, style, color=color)
        row[1].set_xscale("log")
        for axes, unit in zip(row, ("training step", "seconds"), strict=True):
            axes.set_yscale("log")
            axes.set(xlabel=unit, ylabel="training loss (nats)", title=f"start: {start}")
            axes.grid(alpha=0.3)
    grid[0][0].legend()
    return figure


def _stability_picture(stability: Table) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, form in zip(figure.subplots(1, 2, sharey=True), FORMS.values(), strict=True):
        for (rollout, label), (color, style) in zip(ROLLOUTS.items(), (("C0", "o-"), ("C3", "s--")), strict=True):
            mine = [r for r in stability.rows if r[:2] == [form, rollout] and r[3] is not None]
            axes.plot([r[2] for r in mine], [r[3] for r in mine], style, color=color, label=label)
            some = [r for r in mine if r[7]]
            axes.plot([r[2] for r in some], [r[3] for r in some], "x", color=color, markersize=12)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(title=form, xlabel="rate", ylabel="training loss (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


EXPERIMENT = Control()

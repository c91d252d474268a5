"""Steps and seconds to a validation accuracy, base and GT-DDP each tuned: the comparison that the README quotes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from .cell import Cell, runs_table, units_of
from .page import Findings, Rows, Table, TableCell, number_of
from .plan import Plan, Settings
from .statistics import p_of_pairs
from .timing import timing
from .training import training
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Goal:
    """What is to be reached on a data set, and how long each batch size may take."""

    accuracy: float
    """Validation accuracy, in percent."""
    steps: Mapping[int, int]
    """Batch size -> steps of a run."""
    scope: Mapping[int, int]
    """Batch size -> samples of one of GT-DDP's recursions, where it is not the batch."""


GOALS: Mapping[str, Goal] = {
    # 1,437 is the whole training set. Gram matrices cost the square, solutions the cube of the samples of a recursion.
    "digits": Goal(95.0, {32: 352, 256: 120, 512: 120, 1437: 45}, {512: 128, 1437: 479}),
    "mnist": Goal(99.0, {128: 4700, 512: 1200, 2048: 300}, {2048: 512}),
    "svhn": Goal(88.0, {128: 11400, 512: 2900, 2048: 700}, {2048: 512}),
    "cifar10": Goal(80.0, {128: 11700, 512: 2900, 2048: 730}, {2048: 512}),
    "cifar100": Goal(50.0, {128: 11700, 512: 2900, 2048: 730}, {2048: 512}),
}

TUNING_SEED = 1000
"""Not among those of the comparison."""
ROUNDS = 15
"""Of the timing."""
WARM_UP = 6
"""The base's warm-up with cosine decay is one of so many parts of the run."""


@dataclass(frozen=True)
class Base:
    """A base, and the trials that it and GT-DDP on it are tuned with: as many for both."""

    name: str
    options: Settings
    rates: tuple[float, ...]
    gtddp: tuple[tuple[float, float], ...]
    """Rate and rho."""


BASES = (
    Base(
        "sgd",
        {"optimizer.momentum": 0.9},
        (0.02, 0.05, 0.1, 0.2),
        tuple(itertools.product((0.3, 1.0), (0.1, 0.3))),
    ),
    Base("adam", {}, (0.005, 0.01, 0.02, 0.04), tuple(itertools.product((0.03, 0.1), (0.03, 0.1)))),
)
NAMES: Mapping[str, str] = {"sgd": "SGD, momentum 0.9", "adam": "Adam"}
SCHEDULES: Mapping[str, str] = {"constant": "constant", "cosine": "cosine"}
KINDS: Mapping[str, str] = {"base": "base", "gtddp": "GT-DDP"}
Key = tuple[int, str, str, str]
"""Batch size, name of the base, schedule, kind."""


class Target:
    """Tunes each of them on a seed of its own, then compares the best over the seeds."""

    question = (
        "How many steps, and how many seconds, does it take to reach a validation accuracy, for each base and "
        "for GT-DDP on it, each at its "
        "own best rate of the same number of trials? With constant rates and with cosine decay, where the base "
        "also gets a warm-up; at small "
        "batches and at large ones, where a pilot saw half the steps."
    )
    varies = (
        "optimizer.name", "optimizer.lr", "optimizer.preset", "optimizer.momentum", "optimizer.scope",
        "optimizer.gauss_newton_weight", "train.seed", "train.steps", "train.epochs", "train.batch_size", "eval.every",
        "schedule.",
    )  # fmt: skip

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        tuning = [unit for key in _keys(plan) for unit in _tuning(plan, key).values()]
        if any(unit.key not in results for unit in tuning):
            return tuning
        best = {key: _best(plan, key, results) for key in _keys(plan)}
        runs = [unit for key, settings in best.items() for unit in units_of(plan, settings)]
        return [*tuning, *runs, *_timings(plan, best).values()]

    def findings(self, plan: Plan, results: Results) -> Findings:
        best = {key: _best(plan, key, results) for key in _keys(plan)}
        found = {key: Cell.of(units_of(plan, settings), results) for key, settings in best.items()}
        timings = {pair: cast(list[float], results.of(unit)["seconds"]) for pair, unit in _timings(plan, best).items()}
        goal = GOALS[plan.data].accuracy
        rows = [_row(key, best[key], cell, timings, goal) for key, cell in found.items()]
        compared = _compare(found, timings, goal)
        columns = {
            "batch": "d", "base": "", "schedule": "", "optimizer": "", "best rate": "g", "rho": "g",
            "steps (median)": "g", "reach it": "d", "of": "d", "ms a step": ".3g", "seconds": ".3g",
            "train loss": ".4f", "validation accuracy (%)": ".2f", "deviation of accuracy": ".2f",
        }  # fmt: skip
        trials: Rows = [
            [*_words(key), *_rate_and_weight(settings), *score]
            for key in _keys(plan)
            for settings, score in _scores(plan, key, results)
        ]
        return Findings(
            setting=_setting(plan, goal),
            conclusion=_conclusion(compared, best, goal),
            tables=[
                Table(
                    "ratio",
                    f"GT-DDP against its base: to {goal:g} % validation accuracy",
                    {
                        "batch": "d", "base": "", "schedule": "", "base: steps": "g", "GT-DDP: steps": "g",
                        "ratio of steps": ".2f", "ratio of seconds": ".2f", "p (steps)": ".2g",
                    },
                    compared,
                ),
                Table("", "Each at its best", columns, rows),
                Table(
                    "trials",
                    "The trials of the tuning",
                    {
                        "batch": "d", "base": "", "schedule": "", "optimizer": "", "rate": "g", "rho": "g",
                        "steps to target": "g", "train loss": ".4f",
                    },
                    trials,
                    on_page=False,
                ),
                runs_table(("batch", "base", "schedule", "optimizer"), [(_words(key), c) for key, c in found.items()]),
            ],
            figures={"": _picture(found, goal)},
            captions={
                "": "Mean validation accuracy over the seeds, each optimizer at its best rate. Dotted: the target."
            },
        )  # fmt: skip


def _keys(plan: Plan) -> list[Key]:
    sizes = plan.pick(list(GOALS[plan.data].steps), [512])
    schedules = plan.pick(list(SCHEDULES), ["cosine"])
    names = [base.name for base in plan.pick(BASES, BASES[1:])]
    return list(itertools.product(sizes, names, schedules, KINDS))


def _tuning(plan: Plan, key: Key) -> dict[int, Unit]:
    return {
        number: training(plan, settings, {"train.seed": TUNING_SEED})
        for number, settings in enumerate(_trials(plan, key))
    }


def _trials(plan: Plan, key: Key) -> list[Settings]:
    """The settings that are tried for a key."""
    size, name, schedule, kind = key
    goal = GOALS[plan.data]
    base = next(base for base in BASES if base.name == name)
    steps = plan.pick(goal.steps[size], 4)
    common: Settings = {
        **base.options,
        "train.batch_size": size,
        "train.steps": steps,
        "eval.every": max(1, steps // 60),
        "schedule.name": schedule,
    }
    if kind == "base":
        warm: Settings = {"schedule.warmup_steps": steps // WARM_UP} if schedule == "cosine" else {}
        options: list[Settings] = [{"optimizer.name": name, "optimizer.lr": rate, **warm} for rate in base.rates]
    else:
        scope: Settings = {"optimizer.scope": goal.scope[size]} if size in goal.scope else {}
        options = [
            {"optimizer.name": f"gtddp-{name}", "optimizer.lr": rate, "optimizer.gauss_newton_weight": rho, **scope}
            for rate, rho in base.gtddp
        ]
    return [{**common, **option} for option in plan.pick(options, options[1:3])]


def _score(unit: Unit, results: Results, goal: float) -> tuple[float | None, float | None]:
    """Steps to the target, and the training loss; None where it is not reached, and where the run diverged."""
    (run,) = Cell.of([unit], results).runs
    reached = run.steps_to(goal)
    return None if reached is None else float(reached), None if run.diverged else run.train_loss


def _scores(plan: Plan, key: Key, results: Results) -> list[tuple[Settings, tuple[float | None, float | None]]]:
    goal = GOALS[plan.data].accuracy
    units = _tuning(plan, key)
    return [(settings, _score(units[number], results, goal)) for number, settings in enumerate(_trials(plan, key))]


def _best(plan: Plan, key: Key, results: Results) -> Settings:
    """The trial that reached the target first; where several or none did, the one with the lowest loss of them."""
    infinite = float("inf")

    def rank(item: tuple[Settings, tuple[float | None, float | None]]) -> tuple[float, float]:
        steps, loss = item[1]
        return infinite if steps is None else steps, infinite if loss is None else loss

    return min(_scores(plan, key, results), key=rank)[0]


def _timings(plan: Plan, best: Mapping[Key, Settings]) -> dict[tuple[int, str], Unit]:
    """Batch size and base -> the unit that times both kinds in turn."""
    rounds = plan.pick(ROUNDS, 2)
    return {
        (size, name): timing([plan.settings(best[size, name, schedule, kind]) for kind in KINDS], rounds)
        for size, name, schedule in dict.fromkeys((size, name, schedule) for size, name, schedule, _ in best)
        if schedule == "cosine"
    }


def _words(key: Key) -> list[TableCell]:
    size, name, schedule, kind = key
    return [size, NAMES[name], SCHEDULES[schedule], KINDS[kind]]


def _steps(cell: Cell, goal: float) -> list[float]:
    """Steps to the target by seed; infinite where a run did not reach it."""
    reached = [run.steps_to(goal) for run in cell.runs]
    return [float("inf") if steps is None else float(steps) for steps in reached]


def _median(steps: Sequence[float]) -> float | None:
    value = statistics.median(steps)
    return None if value == float("inf") or value != value else value


def _rate_and_weight(settings: Settings) -> tuple[float, float]:
    return cast(float, settings["optimizer.lr"]), cast(float, settings.get("optimizer.gauss_newton_weight", 0.0))


Timings = Mapping[tuple[int, str], Sequence[float]]
"""Batch size and base -> seconds of a step of the base, and of GT-DDP."""


def _row(key: Key, settings: Settings, cell: Cell, timings: Timings, goal: float) -> list[TableCell]:
    size, name, _, kind = key
    steps = _steps(cell, goal)
    median, seconds = _median(steps), timings[size, name][list(KINDS).index(kind)]
    return [
        *_words(key), *_rate_and_weight(settings), median, sum(value < float("inf") for value in steps), len(steps),
        1000 * seconds, None if median is None else median * seconds, cell.loss.mean, cell.accuracy.mean,
        cell.accuracy.deviation,
    ]  # fmt: skip


def _compare(found: Mapping[Key, Cell], timings: Timings, goal: float) -> Rows:
    rows: Rows = []
    for size, name, schedule in dict.fromkeys((size, name, schedule) for size, name, schedule, _ in found):
        base, ours = (_steps(found[size, name, schedule, kind], goal) for kind in KINDS)
        a, b = _median(base), _median(ours)
        ratio = None if a is None or b is None else b / a
        cost = timings[size, name][1] / timings[size, name][0]
        rows.append(
            [
                size, NAMES[name], SCHEDULES[schedule], a, b, ratio, None if ratio is None else ratio * cost,
                p_of_pairs(ours, base),
            ]
        )  # fmt: skip
    return rows


def _setting(plan: Plan, goal: float) -> str:
    return (
        f"{plan.data}, {plan.seeds} seeds from 0 on, to {goal:g} % validation accuracy. Each cell was tuned with "
        "four trials on a seed of "
        "its own: four rates for the base, two rates times two weights rho for GT-DDP; the best is the one that "
        "reached the target first. "
        f"With cosine decay the base has a linear warm-up over the first 1/{WARM_UP} of the run, GT-DDP has none. "
        "Accuracy was measured about 60 "
        "times in a run, and steps to the target are the first measurement at or above it; their median counts a "
        "run that never "
        "reached it as the longest. Seconds are these steps times the median time of a step, taken with both "
        "optimizers in turn, on one "
        "thread, with nothing else running. p: Wilcoxon's signed-rank test on the steps of pairs of runs of one seed."
        + _scopes(plan)
    )


def _scopes(plan: Plan) -> str:
    scopes = GOALS[plan.data].scope.items()
    return "".join(f" Batches of {size:,} are recursions of {scope:,} samples each." for size, scope in scopes)


def _conclusion(compared: Rows, best: Mapping[Key, Settings], goal: float) -> str:
    sentences = []
    for size in dict.fromkeys(row[0] for row in compared):
        for row in (row for row in compared if row[0] == size):
            where = f"batch {size:,}, {row[1]}, {row[2]}"
            if row[5] is None:
                who = [word for word, steps in (("the base", row[3]), ("GT-DDP", row[4])) if steps is None]
                sentences.append(f"{where}: {' and '.join(who)} did not reach it in half of the runs.")
            else:
                sentences.append(f"{where}: {row[5]:.2f} of the base's steps, {row[6]:.2f} of its seconds.")
    large = [row for row in compared if number_of(row[0]) >= 256]
    half = [row for row in large if row[5] is not None and number_of(row[5]) <= 0.5]
    alone = [row for row in large if row[3] is None and row[4] is not None]
    faster = sum(number_of(row[6]) < 1 for row in compared if row[6] is not None)
    return (
        f"GT-DDP to {goal:g} %, against its tuned base:\n\n"
        + "\n".join(f"* {sentence}" for sentence in sentences)
        + f"\n\nAt batches of 256 and more GT-DDP takes at most half the steps in {len(half)} of {len(large)} "
        "comparisons, "
        f"and in {len(alone)} others it alone gets there in half of the runs or more. Fewer seconds: in {faster} of "
        f"{len(compared)}. {_at_the_edge(best)}"
    )


def _at_the_edge(best: Mapping[Key, Settings]) -> str:
    """Whose best rate is the lowest or highest that was tried, so that a better one may lie beyond."""
    counts = []
    for kind, word in KINDS.items():
        keys = [key for key in best if key[3] == kind]
        rates = {base.name: base.rates if kind == "base" else [rate for rate, _ in base.gtddp] for base in BASES}
        edge = sum(_rate_and_weight(best[key])[0] in (min(rates[key[1]]), max(rates[key[1]])) for key in keys)
        counts.append(f"{word} in {edge} of {len(keys)}")
    return f"The best rate was at an edge of those tried for the {' and for '.join(counts)} cases."


def _picture(found: Mapping[Key, Cell], goal: float) -> Figure:
    from matplotlib.figure import Figure

    sizes, names = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    figure = Figure(figsize=(3.6 * len(sizes) + 0.6, 3.4 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(sizes), squeeze=False, sharey=True)
    for (row, name), (column, size) in itertools.product(enumerate(names), enumerate(sizes)):
        axes = panels[row][column]
        for (schedule, style), (number, kind) in itertools.product(
            (("constant", "--"), ("cosine", "-")), enumerate(KINDS)
        ):
            key = (cast(int, size), cast(str, name), schedule, kind)
            if key in found:
                steps, mean, _ = found[key].mean_curve("val/accuracy")
                label = f"{KINDS[kind]}, {schedule}"
                axes.plot(steps, [100 * value for value in mean], style, color=f"C{number}", label=label, linewidth=1.4)
        axes.axhline(goal, color="0.4", linestyle=":", linewidth=1)
        axes.set(title=f"{NAMES[cast(str, name)]}, batch {size:,}", xlabel="training step")
        axes.set_ylim(max(0.0, goal - 25), 100)
        axes.grid(alpha=0.25)
    for axes in panels[:, 0]:
        axes.set_ylabel("validation accuracy (%)")
    panels[0][0].legend(fontsize=8, loc="lower right")
    return figure


EXPERIMENT = Target()

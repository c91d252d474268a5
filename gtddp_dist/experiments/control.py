"""Training as control: the methods side by side, from two kinds of starts; and stage-wise Newton against DDP."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from .cell import Cell, runs_table, units_of
from .page import Cell as TableCell
from .page import Findings, Rows, Table, number_of
from .plan import Plan, Settings
from .timing import timing
from .training import training
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: Mapping[str, tuple[str, tuple[Settings, ...]]] = {
    "sgd": ("SGD", tuple({"optimizer.name": "sgd", "optimizer.lr": rate} for rate in (0.3, 1.0, 3.0))),
    "gtddp": (
        "DDP (GT-DDP-SGD)",
        tuple({"optimizer.name": "gtddp-sgd", "optimizer.lr": rate} for rate in (0.3, 1.0, 3.0)),
    ),
    "ddpnopt": (
        "DDPNOpt-SGD",
        tuple({"optimizer.name": "ddpnopt-sgd", "optimizer.lr": rate} for rate in (0.3, 1.0, 3.0)),
    ),
    "emsa": (
        "E-MSA",
        tuple(
            {"optimizer.name": "emsa", "optimizer.lr": 1.0, "optimizer.emsa_weight": weight}
            for weight in (0.1, 1.0, 10.0)
        ),
    ),
    "msa": (
        "MSA",
        tuple(
            {"optimizer.name": "msa", "optimizer.lr": 1.0, "optimizer.weight_decay": decay}
            for decay in (0.01, 0.1, 1.0)
        ),
    ),
}
"""Method -> its name and the settings that it is tuned over: three for each."""

STARTS: Mapping[str, tuple[str, float]] = {"ordinary": ("ordinary", 1.0), "saddle": ("near a saddle", 0.3)}
"""Start -> its name and the factor of the initial weights."""

NETWORK: Settings = {
    "model.name": "plain-net",
    "model.blocks": 1,
    "model.width": 8,
    "model.channels": None,
    "model.batch_norm": False,
    "train.batch_size": 128,
    "train.steps": 40,
    "log.every": 2,
    "eval.every": 2,
}
QUICK: Settings = {"model.width": 2, "train.batch_size": 32, "train.steps": 3, "log.every": 1, "eval.every": 1}
TUNING_SEED = 1000
ROUNDS = 5

ROLLOUTS: Mapping[str, str] = {"linear": "stage-wise Newton (linear rollout)", "nonlinear": "DDP (nonlinear rollout)"}
RATES = (0.3, 1.0, 3.0, 10.0, 30.0)
WEIGHTS = (0.1, 1.0)

Key = tuple[str, str]
"""Start and method."""
NewtonKey = tuple[float, float, str]
"""rho, rate and rollout."""


class Control:
    """Tunes every method at each start on a seed of its own, then compares them over the seeds."""

    question = (
        "The same training by methods of optimal control: SGD, DDP in sample space, DDPNOpt, and the maximum "
        "principle (MSA and "
        "E-MSA); from ordinary initial weights and from near a saddle, where all weights are small, which "
        "E-MSA's paper looks at. And is "
        "DDP's nonlinear rollout more stable than the stage-wise Newton step, its linear rollout?"
    )
    varies = ("optimizer.", "model.", "train.seed", "train.steps", "train.epochs", "train.batch_size",
              "train.init_scale", "log.every", "eval.every", "schedule.")  # fmt: skip

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        newton = [unit for units in _newton(plan).values() for unit in units]
        tuning = [unit for key in _keys(plan) for unit in _tuning(plan, key)]
        if any(unit.key not in results for unit in tuning):
            return [*tuning, *newton]
        best = {key: _best(plan, key, results) for key in _keys(plan)}
        runs = [unit for settings in best.values() for unit in units_of(plan, settings)]
        return [*tuning, *newton, *runs, _timing(plan, best)]

    def findings(self, plan: Plan, results: Results) -> Findings:
        best = {key: _best(plan, key, results) for key in _keys(plan)}
        found = {key: Cell.of(units_of(plan, settings), results) for key, settings in best.items()}
        times = cast(list[float], results.of(_timing(plan, best))["seconds"])
        seconds = dict(zip(METHODS, times, strict=True))
        newton = {key: Cell.of(units, results) for key, units in _newton(plan).items()}
        rows: Rows = [
            [
                *_words(key), _setting_of(best[key]), cell.loss.mean, cell.loss.deviation, cell.loss.diverged,
                cell.accuracy.mean, 1000 * seconds[key[1]], 100 * cell.share_that_trains,
            ]
            for key, cell in found.items()
        ]  # fmt: skip
        columns = {
            "start": "", "method": "", "best of its trials": "", "train loss": ".4f", "deviation": ".4f",
            "diverged": "d", "validation accuracy (%)": ".2f", "ms an iteration": ".3g", "train (%)": ".0f",
        }  # fmt: skip
        stable: Rows = [
            [weight, rate, ROLLOUTS[rollout], cell.loss.mean, cell.loss.deviation, cell.loss.diverged,
             100 * cell.share_that_trains]
            for (weight, rate, rollout), cell in newton.items()
        ]  # fmt: skip
        run = next(iter(found.values())).runs[0]
        return Findings(
            setting=(
                f"plain-net (width {run.config.model.width}, no shortcuts) on {plan.data}, {run.steps} iterations "
                "on batches of "
                f"{run.config.train.batch_size}, {plan.seeds} seeds from 0 on. Every method was tuned at each "
                "start over three settings on a seed "
                f"of its own. Near a saddle: initial weights and biases times {STARTS['saddle'][1]:g}. Loss is "
                "the mean over the last epoch. Times "
                "of an iteration were taken with all methods in turn, on one thread, with nothing else running. "
                "Stage-wise Newton and DDP: GT-DDP-SGD "
                "with both rollouts, from ordinary starts."
            ),
            conclusion=_conclusion(rows, stable),
            tables=[
                Table("", "Each at its best", columns, rows),
                Table(
                    "stability",
                    "Stage-wise Newton against DDP",
                    {
                        "rho": "g", "rate": "g", "rollout": "", "train loss": ".4f", "deviation": ".4f",
                        "diverged": "d", "train (%)": ".0f",
                    },
                    stable,
                ),
                runs_table(("start", "method"), [(_words(key), cell) for key, cell in found.items()]),
            ],
            figures={"": _picture(found, seconds), "stability": _picture_stability(newton)},
            captions={
                "": "Mean training loss over the seeds, per iteration (left) and per second (right), from an ordinary "
                "start (above) and from near a saddle (below). A curve ends where a run diverged.",
                "stability": "Mean training loss against the rate; a cross at the top: a seed diverged there.",
            },
        )  # fmt: skip


def _keys(plan: Plan) -> list[Key]:
    return list(itertools.product(plan.pick(list(STARTS), ["ordinary"]), METHODS))


def _words(key: Key) -> list[TableCell]:
    return [STARTS[key[0]][0], METHODS[key[1]][0]]


def _trials(plan: Plan, key: Key) -> list[Settings]:
    start, method = key
    common: Settings = {**NETWORK, **plan.pick({}, QUICK), "train.init_scale": STARTS[start][1]}
    return [{**common, **options} for options in plan.pick(METHODS[method][1], METHODS[method][1][1:2])]


def _tuning(plan: Plan, key: Key) -> list[Unit]:
    return [training(plan, settings, {"train.seed": TUNING_SEED}) for settings in _trials(plan, key)]


def _best(plan: Plan, key: Key, results: Results) -> Settings:
    """The trial with the lowest loss."""
    cells = [Cell.of([unit], results) for unit in _tuning(plan, key)]
    return min(zip(_trials(plan, key), cells, strict=True), key=lambda item: item[1].rank)[0]


def _timing(plan: Plan, best: Mapping[Key, Settings]) -> Unit:
    return timing([plan.settings(best["ordinary", method]) for method in METHODS], plan.pick(ROUNDS, 1))


def _newton(plan: Plan) -> dict[NewtonKey, list[Unit]]:
    network: Settings = {**NETWORK, **plan.pick({}, QUICK)}
    grid = itertools.product(plan.pick(WEIGHTS, (1.0,)), plan.pick(RATES, (3.0,)), ROLLOUTS)
    return {
        (weight, rate, rollout): units_of(
            plan,
            network,
            {
                "optimizer.name": "gtddp-sgd",
                "optimizer.lr": rate,
                "optimizer.gauss_newton_weight": weight,
                "optimizer.rollout": rollout,
            },
        )
        for weight, rate, rollout in grid
    }


def _setting_of(settings: Settings) -> str:
    for key, word in (("emsa_weight", "r"), ("weight_decay", "weight decay"), ("lr", "rate")):
        if f"optimizer.{key}" in settings:
            return f"{word} {settings[f'optimizer.{key}']:g}"
    raise AssertionError(settings)


def _conclusion(rows: Rows, stable: Rows) -> str:
    sentences = []
    for start in dict.fromkeys(row[0] for row in rows):
        order = sorted(
            (row for row in rows if row[0] == start),
            key=lambda row: (number_of(row[5]), float("inf") if row[3] is None else number_of(row[3])),
        )
        told = ", ".join(f"{row[1]} {'-' if row[3] is None else format(row[3], '.3g')}" for row in order)
        sentences.append(f"From an {start} start" if start == "ordinary" else f"From {start}")
        sentences[-1] += f", by mean training loss after the same iterations: {told}."
    times = {str(row[1]): number_of(row[7]) for row in rows}
    slowest = max(times, key=lambda name: times[name])
    quickest = min(times, key=lambda name: times[name])
    sentences.append(
        f"An iteration costs {times[quickest]:.3g} ms ({quickest}) to {times[slowest]:.3g} ms ({slowest}), which "
        "decides per second."
    )
    pairs: dict[tuple[TableCell, TableCell], dict[TableCell, Sequence[TableCell]]] = {}
    for row in stable:
        pairs.setdefault((row[0], row[1]), {})[row[2]] = row
    linear, nonlinear = ROLLOUTS.values()
    better = [pair for pair, both in pairs.items() if number_of(both[nonlinear][6]) > number_of(both[linear][6])]
    worse = [pair for pair, both in pairs.items() if number_of(both[nonlinear][6]) < number_of(both[linear][6])]
    sentences.append(
        f"Stability: of {len(pairs)} pairs of rho and rate more seeds train by DDP in {len(better)}, more by "
        f"stage-wise Newton in {len(worse)}."
    )
    return " ".join(sentences)


def _picture(found: Mapping[Key, Cell], seconds: Mapping[str, float]) -> Figure:
    from matplotlib.figure import Figure

    starts = list(dict.fromkeys(start for start, _ in found))
    figure = Figure(figsize=(11, 3.7 * len(starts)), layout="constrained")
    panels = figure.subplots(len(starts), 2, squeeze=False, sharey="row")
    for (start, method), cell in found.items():
        steps, mean, _ = cell.mean_curve("train/loss")
        number = list(METHODS).index(method)
        style = {"color": f"C{number}", "linestyle": ("--", "-", "-.", ":", (0, (5, 1)))[number]}
        iteration, second = panels[starts.index(start)]
        iteration.plot(steps, mean, label=METHODS[method][0], **style)
        second.plot([step * seconds[method] for step in steps], mean, **style)
    for (iteration, second), start in zip(panels, starts, strict=True):
        for axes, label in ((iteration, "iteration"), (second, "seconds of computing")):
            axes.set(
                yscale="log",
                xlabel=label,
                title=f"{STARTS[start][0]} start" if start == "ordinary" else STARTS[start][0],
            )
            axes.grid(alpha=0.25)
        second.set_xscale("log")
        iteration.set_ylabel("training loss (nats)")
    panels[0][0].legend(fontsize=8)
    return figure


def _picture_stability(newton: Mapping[NewtonKey, Cell]) -> Figure:
    from matplotlib.figure import Figure

    weights = list(dict.fromkeys(weight for weight, _, _ in newton))
    figure = Figure(figsize=(4.8 * len(weights) + 0.4, 3.8), layout="constrained")
    for axes, weight in zip(figure.subplots(1, len(weights), squeeze=False)[0], weights, strict=True):
        for number, (rollout, label) in enumerate(ROLLOUTS.items()):
            cells = {rate: cell for (w, rate, r), cell in newton.items() if (w, r) == (weight, rollout)}
            shown = {rate: cell.loss.mean for rate, cell in cells.items() if cell.loss.mean is not None}
            style = {"color": f"C{number}", "marker": "os"[number], "linestyle": ("--", "-")[number]}
            axes.plot(list(shown), list(shown.values()), label=label, markersize=5, **style)
            crosses = [rate for rate, cell in cells.items() if cell.loss.diverged]
            axes.plot(
                crosses,
                [0.97 - 0.04 * number] * len(crosses),
                "x",
                color=f"C{number}",
                transform=axes.get_xaxis_transform(),
            )
        axes.set(xscale="log", yscale="log", title=f"rho {weight:g}", xlabel="rate", ylabel="training loss (nats)")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


EXPERIMENT = Control()

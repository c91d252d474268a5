"""Fig. 7 of the paper: layers that cooperate, on the network of two layers with one input and added outputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .cell import Cell, described, runs_table, units_of
from .page import Findings, Rows, Table
from .plan import Plan, Settings
from .statistics import p_of_pairs
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIMIZERS: Mapping[str, tuple[str, Settings]] = {
    "ekfac": ("EKFAC", {"optimizer.name": "ekfac"}),
    "gt-ekfac": ("GT-EKFAC (cooperation alone)", {"optimizer.name": "gt-ekfac"}),
    "gtddp-ekfac": ("GT-DDP-EKFAC (cooperation and feedback)", {"optimizer.name": "gtddp-ekfac"}),
    "gtddp-none": (
        "GT-DDP-EKFAC, no cooperation",
        {"optimizer.name": "gtddp-ekfac", "optimizer.cooperation": "none"},
    ),
}
RATES = (0.01, 0.03, 0.1)

Key = tuple[str, float]


def _cells(plan: Plan) -> dict[Key, list[Unit]]:
    length: Settings = plan.pick({}, {"train.steps": 4, "log.every": 1})
    network: Settings = {"model.name": "coop-net", "model.blocks": 1, "model.channels": None, "model.batch_norm": False}
    return {
        (name, rate): units_of(plan, network, options, {"optimizer.lr": rate}, length)
        for (name, (_, options)), rate in itertools.product(OPTIMIZERS.items(), plan.pick(RATES, (0.03,)))
    }


class Fig7:
    """EKFAC, cooperation, and cooperation with feedback."""

    question = (
        "Two layers with the same input, whose outputs are added, can decide together. The paper finds that "
        "cooperation (GT-EKFAC) "
        "improves on EKFAC, and feedback (GT-DDP-EKFAC) on that. Do they?"
    )
    varies = ("optimizer.name", "optimizer.lr", "optimizer.cooperation", "model.", "train.seed", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in _cells(plan).values() for unit in units]

    def findings(self, plan: Plan, results: Results) -> Findings:
        found = {key: Cell.of(units, results) for key, units in _cells(plan).items()}
        rows: Rows = []
        for (name, rate), cell in found.items():
            loss, accuracy = cell.loss, cell.accuracy
            p = None if name == "ekfac" else p_of_pairs(cell.losses, found["ekfac", rate].losses)
            rows.append(
                [
                    OPTIMIZERS[name][0], rate, loss.mean, loss.deviation, accuracy.mean, accuracy.deviation,
                    loss.diverged, p,
                ]
            )  # fmt: skip
        columns = {
            "optimizer": "", "rate": "g", "train loss": ".4f", "deviation of loss": ".4f",
            "validation accuracy (%)": ".2f", "deviation of accuracy": ".2f", "diverged": "d", "p against EKFAC": ".2g",
        }  # fmt: skip
        return Findings(
            setting=(
                f"{described(next(iter(found.values())).runs[0], plan)} Constant rates. p: Wilcoxon's signed-rank "
                "test on "
                "the training losses of pairs of runs of one seed. EKFAC and GT-EKFAC are rho = 0."
            ),
            conclusion=_conclusion(found),
            tables=[
                Table("", "Every rate", columns, rows),
                runs_table(("optimizer", "rate"), found.items()),
            ],
            figures={"": _picture(found)},
            captions={"": "Mean training loss over the seeds, a panel for each rate, of the runs that stayed finite."},
        )


def _of_rate(found: Mapping[Key, Cell], rate: float) -> dict[str, Cell]:
    return {name: cell for (name, at), cell in found.items() if at == rate}


def _conclusion(found: Mapping[Key, Cell]) -> str:
    sentences = []
    for rate in dict.fromkeys(rate for _, rate in found):
        order = [name for name, _ in sorted(_of_rate(found, rate).items(), key=lambda item: item[1].rank)]
        names = "; ".join(OPTIMIZERS[name][0] for name in order)
        sentences.append(f"At rate {rate:g}, from the lowest mean training loss to the highest: {names}.")
    for better, worse, claim in (
        ("gt-ekfac", "ekfac", "Cooperation improves on EKFAC"),
        ("gtddp-ekfac", "gt-ekfac", "Feedback improves on cooperation"),
    ):
        rates = list(dict.fromkeys(rate for _, rate in found))
        holds = sum(found[better, rate].lower_than(found[worse, rate]) for rate in rates)
        sentences.append(f"{claim} at {holds} of {len(rates)} rates.")
    return " ".join(sentences)


def _picture(found: Mapping[Key, Cell]) -> Figure:
    from matplotlib.figure import Figure

    rates = list(dict.fromkeys(rate for _, rate in found))
    figure = Figure(figsize=(4.3 * len(rates), 4.2), layout="constrained")
    panels = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    for axes, rate in zip(panels, rates, strict=True):
        for number, (name, (label, _)) in enumerate(OPTIMIZERS.items()):
            steps, mean, _ = found[name, rate].mean_curve("train/loss")
            axes.plot(steps, mean, label=label, color=f"C{number}", linestyle=("-", "--", "-.", ":")[number])
        axes.set(yscale="log", xlabel="training step", title=f"rate {rate:g}")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("training loss (nats)")
    panels[0].legend(fontsize=8)
    return figure


EXPERIMENT = Fig7()

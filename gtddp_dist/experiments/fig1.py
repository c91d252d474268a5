"""Fig. 1 of the paper: time and memory of a step against the batch size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from .page import Findings, Rows, Table, number_of
from .plan import Plan, Settings
from .timing import cost
from .unit import Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SGD: Settings = {"optimizer.name": "sgd", "optimizer.lr": 0.05}
_GTDDP: Settings = {"optimizer.name": "gtddp-sgd", "optimizer.lr": 0.05}

SYSTEMS: Mapping[str, tuple[str, Settings]] = {
    "sgd": ("SGD", _SGD),
    "gtddp": ("GT-DDP, full V_zz, linear rollout", _GTDDP),
    "block": ("GT-DDP, block-diagonal V_zz", {**_GTDDP, "optimizer.value_hessian": "block_diagonal"}),
    "nonlinear": ("GT-DDP, nonlinear rollout", {**_GTDDP, "optimizer.rollout": "nonlinear"}),
    "literal": ("DDPNOpt, explicit matrices", {**_SGD, "optimizer.name": "ddpnopt-literal"}),
    "emsa": ("E-MSA", {"optimizer.name": "emsa", "optimizer.lr": 0.05}),
}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
NETWORK: Settings = {
    "model.name": "plain-net",
    "model.blocks": 1,
    "model.width": 8,
    "model.channels": None,
    "model.batch_norm": False,
}
MIB = 2.0**20


class Fig1:
    """Every system on the one network that all of them take."""

    question = (
        "The paper's headline is that GT-DDP costs little more time and memory than its base, where its "
        "predecessor's explicit matrices "
        "and E-MSA cost far more. What do they cost, against the batch size?"
    )
    varies = ("optimizer.", "model.", "train.batch_size", "train.seed")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return list(_cells(plan).values())

    def findings(self, plan: Plan, results: Results) -> Findings:
        rows: Rows = []
        for (name, size), unit in _cells(plan).items():
            found = cast(Mapping[str, float], results.of(unit))
            if "refused" in found:
                rows.append([SYSTEMS[name][0], size, None, None, None, "refused: too large"])
            else:
                ratio = found["seconds"] / found["reference_seconds"]
                rows.append([SYSTEMS[name][0], size, 1000 * found["seconds"], ratio, found["bytes"] / MIB, ""])
        columns = {"system": "", "batch": "d", "ms a step": ".4g", "times SGD's": ".3g", "peak MiB": ".4g", "note": ""}
        return Findings(
            setting=(
                f"plain-net (width 8, no shortcuts, which DDPNOpt and E-MSA do not take) on {plan.data}. Each "
                "cell in a process of its own with "
                "nothing else running: the median of several steps, with steps of SGD in turn (of steps above 5 "
                "s: the first "
                "alone). Memory is the highest resident memory during the first step above that before it, after "
                "a step of SGD on two "
                "samples for what libraries take at first use. DDPNOpt's explicit matrices are refused above 8 GiB."
            ),
            conclusion=_conclusion(rows),
            tables=[Table("", "Time and memory of a step", columns, rows)],
            figures={"": _picture(rows)},
            captions={"": "Time and peak memory of a step against the batch size, both axes logarithmic."},
        )


def _cells(plan: Plan) -> dict[tuple[str, int], Unit]:
    sizes, rounds = plan.pick((SIZES, 7), ((4,), 2))
    names = plan.pick(tuple(SYSTEMS), ("sgd", "gtddp", "literal", "emsa"))
    found = {}
    for name, size in itertools.product(names, sizes):
        common: Settings = {
            **NETWORK,
            **plan.pick({}, {"model.width": 2}),
            "train.batch_size": size,
            "train.threads": 1,
        }
        settings = plan.settings(SYSTEMS[name][1], common)
        found[name, size] = cost(settings, plan.settings(_SGD, common), rounds)
    return found


def _conclusion(rows: Rows) -> str:
    sizes = sorted({number_of(row[1]) for row in rows})
    sentences = []
    for label in dict.fromkeys(str(row[0]) for row in rows):
        at = {number_of(row[1]): row for row in rows if row[0] == label and row[3] is not None}
        if label == SYSTEMS["sgd"][0] or not at:
            continue
        small, large = min(at), max(at)
        sentence = f"{label}: {at[small][3]:.3g} times SGD's step at batch {small:g}"
        if large != small:
            sentence += f", {at[large][3]:.3g} times at {large:g}"
        if large < sizes[-1]:
            sentence += f"; refused from {next(size for size in sizes if size > large):g} on"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _picture(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    for number, label in enumerate(dict.fromkeys(str(row[0]) for row in rows)):
        points = [row for row in rows if row[0] == label and row[2] is not None]
        style = {"color": f"C{number}", "marker": "os^vDX"[number], "markersize": 5, "label": label}
        sizes = [number_of(row[1]) for row in points]
        seconds.plot(sizes, [number_of(row[2]) for row in points], **style)
        memory.plot(sizes, [number_of(row[4]) for row in points], **style)
    for axes, label in ((seconds, "time of a step (ms)"), (memory, "peak memory of a step (MiB)")):
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="batch size", ylabel=label)
        axes.grid(alpha=0.25, which="both")
    seconds.legend(fontsize=8)
    return figure


EXPERIMENT = Fig1()

"""Vanishing gradients: norms by layer in a deep net of sigmoid or tanh, base against GT-DDP."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from ..checkpoint import JSON
from .cell import TRAINS_SHARE, Cell, runs_table
from .page import Findings, Rows, Table
from .plan import Plan, Settings, config_of, seeds_of
from .training import trained_run, what_came_of
from .unit import Result, Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTION = "gtddp_dist.experiments.vanishing:train_and_look"
ACTIVATIONS = ("sigmoid", "tanh")
OPTIMIZERS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "sgd": ("SGD", (0.1, 0.5, 2.0)),
    "gtddp-sgd": ("GT-DDP on SGD", (0.1, 0.5, 2.0)),
    "adam": ("Adam", (0.001, 0.004, 0.016)),
    "gtddp-adam": ("GT-DDP on Adam", (0.001, 0.004, 0.016)),
}
"""Optimizer -> name and rates, the same for a base and for GT-DDP on it."""
BLOCKS = 5
WIDTH = 8
NETWORK: Settings = {
    "model.name": "plain-net",
    "model.blocks": BLOCKS,
    "model.width": WIDTH,
    "model.channels": [WIDTH] * BLOCKS,
    "model.batch_norm": False,
}
_LOOKED_AT = 16
"""Samples that norms are taken on."""

Key = tuple[str, str, float]
"""Activation, optimizer, rate."""


class Vanishing:
    """Norms of the loss gradient and of the open gain at the start and at the end, and how far training came."""

    question = (
        "DDPNOpt's paper says that value derivatives counter the vanishing of gradients in deep nets of "
        "saturating units. How "
        "large are, layer by layer, the gradient g and the open gain k over the rate, which is -g for SGD and "
        "with GT-DDP what "
        "the value derivatives make of it? And which nets train?"
    )
    varies = ("optimizer.name", "optimizer.lr", "model.", "train.seed", "train.epochs", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in _cells(plan).values() for unit in units]

    def findings(self, plan: Plan, results: Results) -> Findings:
        units = _cells(plan)
        found = {key: Cell.of(each, results) for key, each in units.items()}
        best = _best(found)
        looks = {key: [results.of(unit) for unit in units[key]] for key in best.values()}
        layers = cast(list[str], looks[next(iter(looks))][0]["layers"])
        norms: Rows = [
            [
                key[0],
                OPTIMIZERS[key[1]][0],
                key[2],
                time,
                layer,
                *(_mean_norm(looks[key], time, kind, at) for kind in _KINDS),
            ]
            for key in looks
            for time in ("start", "end")
            for at, layer in enumerate(layers)
        ]
        summary: Rows = [
            [
                *_words(key), cell.loss.mean, cell.loss.deviation, cell.accuracy.mean,
                100 * cell.share_that_trains, _ratio(looks[key], "start", "gradient"),
                _ratio(looks[key], "start", "value"), _ratio(looks[key], "end", "gradient"),
                _ratio(looks[key], "end", "value"),
            ]
            for key, cell in ((key, found[key]) for key in best.values())
        ]  # fmt: skip
        columns = {
            "activation": "", "optimizer": "", "best rate": "g", "train loss": ".4f", "deviation": ".4f",
            "validation accuracy (%)": ".2f", "train (%)": ".0f", "g: first/last, start": ".2g",
            "k: first/last, start": ".2g", "g: first/last, end": ".2g", "k: first/last, end": ".2g",
        }  # fmt: skip
        everything: Rows = [
            [*_words(key), cell.loss.mean, cell.loss.diverged, 100 * cell.share_that_trains]
            for key, cell in found.items()
        ]
        first = next(iter(found.values())).runs[0]
        return Findings(
            setting=(
                f"plain-net of {len(layers)} layers ({2 * BLOCKS + 1} convolutions of {WIDTH} channels, two "
                "linear layers; no shortcuts, no "
                f"normalisation) on {plan.data}, {first.steps} steps of {first.config.train.batch_size} samples, "
                f"{plan.seeds} seeds from 0 on, "
                f"constant rates. A rate trains where {TRAINS_SHARE:.0%} of the seeds come below half the loss of "
                "guessing. Norms are taken on "
                f"{_LOOKED_AT} training samples, with SGD's metric at the best rate: the loss gradient g, "
                "and the open gain k over the rate "
                "with the default options. first/last: the norm at the first layer over that at the last."
            ),
            conclusion=_conclusion(summary),
            tables=[
                Table("", "Each at its best rate", columns, summary),
                Table(
                    "rates",
                    "All rates",
                    {
                        "activation": "", "optimizer": "", "rate": "g", "train loss": ".4f", "diverged": "d",
                        "train (%)": ".0f",
                    },
                    everything,
                ),
                Table(
                    "norms",
                    "Norms by layer, means over the seeds",
                    {
                        "activation": "", "optimizer": "", "rate": "g", "when": "", "layer": "", "g": ".3g",
                        "k / rate": ".3g",
                    },
                    norms,
                    on_page=False,
                ),
                runs_table(("activation", "optimizer", "rate"), found.items()),
            ],
            figures={"norms": _picture_norms(best, looks, layers), "curves": _picture_curves(best, found)},
            captions={
                "norms": "Norm of the gradient (solid) and of the open gain over the rate (dashed) by layer, at the "
                "start (grey) and after training, each optimizer at its best rate; means over the seeds.",
                "curves": "Mean training loss over the seeds, each optimizer at its best rate.",
            },
        )  # fmt: skip


_KINDS = ("gradient", "value")


def _cells(plan: Plan) -> dict[Key, list[Unit]]:
    length: Settings = {"train.epochs": 4, **plan.pick({}, {"train.steps": 4, "log.every": 1})}
    small: Settings = plan.pick({}, {"model.blocks": 2, "model.channels": [WIDTH] * 2})
    found: dict[Key, list[Unit]] = {}
    for activation, (name, (_, rates)) in itertools.product(ACTIVATIONS, OPTIMIZERS.items()):
        if plan.quick and name.endswith("adam"):
            continue
        for rate in plan.pick(rates, rates[:1]):
            optimizer: Settings = {"model.activation": activation, "optimizer.name": name, "optimizer.lr": rate}
            units = []
            for seed in seeds_of(plan):
                settings = plan.settings(NETWORK, optimizer, length, small, {"train.seed": seed})
                config_of(settings)
                units.append(Unit.of(FUNCTION, cast(Mapping[str, JSON], settings)))
            found[activation, name, rate] = units
    return found


def train_and_look(settings: Settings) -> dict[str, JSON]:
    """What a training came to, with the norms by layer before and after it."""
    import torch

    from ..parts import build, build_model
    from ..training_state import load_model_tensors

    config = config_of(settings)
    with trained_run(settings) as (run, code):
        came = what_came_of(run, code)
        tensors, _ = run.read_model() if run.model_file.exists() else ({}, 0)
    parts = build(config)
    images, labels = parts.data.batch(torch.arange(_LOOKED_AT), config.train.seed, 0)
    torch.manual_seed(config.train.seed)
    model = build_model(config, parts.data, parts.precision)
    rate = cast(float, config.optimizer.lr)
    came["start"] = cast(JSON, _norms(model, images, labels, rate))
    came["layers"] = cast(JSON, [name for name, parameter in model.named_parameters() if name.endswith("weight")])
    if tensors:
        load_model_tensors(model, tensors, "the trained model")
        came["end"] = cast(JSON, _norms(model, images, labels, rate))
    else:
        came["end"] = None
    return came


def _norms(model, images, labels, rate: float) -> dict[str, list[float | None]]:  # type: ignore[no-untyped-def]
    """By player: the norm of the mean gradient, and of the open gain over the rate; the model stays as it is."""
    import copy

    import torch
    from torch.nn import functional as F

    from .. import GTDDP, curvature

    model = copy.deepcopy(model).train()
    optimizer = GTDDP(model, curvature.SGD(lr=rate), inspect=True)
    F.cross_entropy(model(images), labels).backward()
    players = optimizer.trajectory.players
    gradients = [
        torch.cat([cast(torch.Tensor, p.grad).flatten() for p in player.controls().values()]).norm()
        for player in players
    ]
    optimizer.step()
    # k = -R^-1 g for the base, R = I / rate.
    values = [optimizer.policy(index).open_gain.norm() / rate for index in range(len(players))]
    return {
        "gradient": [_finite(float(value)) for value in gradients],
        "value": [_finite(float(value)) for value in values],
    }


def _words(key: Key) -> tuple[str, str, float]:
    return key[0], OPTIMIZERS[key[1]][0], key[2]


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if value < float("inf") else None


def _norm(result: Result, time: str, kind: str, layer: int) -> float | None:
    norms = cast(Mapping[str, Sequence[float | None]] | None, result[time])
    return None if norms is None else norms[kind][layer]


def _mean_norm(results: Sequence[Result], time: str, kind: str, layer: int) -> float | None:
    values = [value for result in results if (value := _norm(result, time, kind, layer)) is not None]
    return statistics.fmean(values) if values else None


def _ratio(results: Sequence[Result], time: str, kind: str) -> float | None:
    first, last = (_mean_norm(results, time, kind, layer) for layer in (0, -1))
    return None if first is None or not last else first / last


def _best(found: Mapping[Key, Cell]) -> dict[tuple[str, str], Key]:
    """Activation and optimizer -> the key with the rate that did best."""
    best: dict[tuple[str, str], Key] = {}
    for key, cell in found.items():
        pair = key[:2]
        if pair not in best or cell.rank < found[best[pair]].rank:
            best[pair] = key
    return best


def _conclusion(summary: Rows) -> str:
    sentences = []
    for activation in ACTIVATIONS:
        rows = [row for row in summary if row[0] == activation]
        trained = [f"{row[1]} ({row[6]:.0f} %)" for row in rows if cast(float, row[6]) > 0]
        g, value = rows[0][7], rows[0][8]
        shrink = "norms were not finite"
        if isinstance(g, float) and isinstance(value, float):
            shrink = f"at the start the first layer's gradient is {g:.2g} of the last's, its open gain {value:.2g}"
        sentences.append(
            f"{activation}: {shrink}; of the seeds train, at the best rate: {', '.join(trained) or 'none'}."
        )
    ratios = [(row[i], row[i + 1]) for row in summary for i in (7, 9)]
    pairs = [(g, value) for g, value in ratios if isinstance(g, float) and isinstance(value, float)]
    smaller = sum(value <= 1.05 * g for g, value in pairs)
    sentences.append(
        f"In {smaller} of {len(pairs)} cases the open gain decays towards the input at least as fast as the gradient."
    )
    if 2 * smaller > len(pairs):
        sentences.append(
            "So value derivatives do not counter the vanishing here. In sample space they are the per-sample "
            "gradients weighted anew, "
            "and the recursion makes the weights smaller towards the input. Where GT-DDP trains what its base "
            "does not, the "
            "reason is the rate that it can take."
        )
    return " ".join(sentences)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"


def _picture_norms(
    best: Mapping[tuple[str, str], Key], looks: Mapping[Key, Sequence[Result]], layers: Sequence[str]
) -> Figure:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, name in best))
    figure = Figure(figsize=(3.6 * len(names) + 0.5, 6.2), layout="constrained")
    panels = figure.subplots(len(ACTIVATIONS), len(names), squeeze=False, sharex=True, sharey="row")
    for (row, activation), (column, name) in itertools.product(enumerate(ACTIVATIONS), enumerate(names)):
        axes, key = panels[row][column], best[activation, name]
        for time, color in (("start", "0.55"), ("end", "C0")):
            for kind, style, label in (("gradient", "-", "g"), ("value", "--", "k / rate")):
                values = [_mean_norm(looks[key], time, kind, at) for at in range(len(layers))]
                axes.plot(
                    range(1, len(layers) + 1), values, style, color=color, label=f"{label}, {time}", linewidth=1.5
                )
        axes.set(yscale="log", title=f"{activation}, {OPTIMIZERS[name][0]}\nrate {key[2]:g}")
        axes.grid(alpha=0.25)
    for axes in panels[-1]:
        axes.set_xlabel("layer, from the input")
    for axes in panels[:, 0]:
        axes.set_ylabel("norm")
    panels[0][0].legend(fontsize=8)
    return figure


def _picture_curves(best: Mapping[tuple[str, str], Key], found: Mapping[Key, Cell]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for axes, activation in zip(figure.subplots(1, len(ACTIVATIONS)), ACTIVATIONS, strict=True):
        for number, (name, (label, _)) in enumerate(OPTIMIZERS.items()):
            if (activation, name) in best:
                key = best[activation, name]
                steps, mean, _ = found[key].mean_curve("train/loss")
                style = ("--", "-", "--", "-")[number]
                axes.plot(steps, mean, style, color=f"C{number // 2}", label=f"{label}, rate {key[2]:g}")
        axes.set(yscale="log", xlabel="training step", ylabel="training loss (nats)", title=activation)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


EXPERIMENT = Vanishing()

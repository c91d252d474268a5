"""Fig. 8 of the paper: what the feedback of convolutions looks for, back in image space."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from ..checkpoint import JSON
from .page import Findings, Rows, Table
from .plan import Plan, Settings, config_of, seeds_of
from .statistics import p_of_pairs
from .unit import Results, Unit

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

PAIRS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "digits": ((3, 8), (4, 9), (1, 7)),
    "mnist": ((3, 8), (4, 9), (1, 7)),
    "svhn": ((3, 8), (4, 9), (1, 7)),
    "cifar10": ((3, 5), (4, 7), (1, 9)),
    "cifar100": ((11, 35), (47, 52), (3, 42)),
}
"""Data set -> pairs of classes that look alike, by their numbers."""
SHOWN = 3
"""Leading eigenvectors."""
SAMPLES = 16
"""Images of a pair, half of each class; fewer where the explicit gain would not fit."""
CONTROLS = 200
"""Random directions of the state."""

FUNCTION = "gtddp_dist.experiments.fig8:leading_directions"
RATE = 0.3


class Fig8:
    """Trains by GT-DDP, then looks at one more step on images of two classes."""

    question = (
        "In the paper's Fig. 8 the leading eigenvectors of the feedback gains of convolutional layers, brought "
        "back to the image, resemble "
        "what tells two similar classes apart. Do they here?"
    )
    varies = ("optimizer.name", "optimizer.lr", "train.seed", "train.epochs", "schedule.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return list(_units(plan).values())

    def findings(self, plan: Plan, results: Results) -> Findings:
        found = {seed: results.of(unit) for seed, unit in _units(plan).items()}
        rows: Rows = []
        for pair, number in itertools.product(_pairs(plan), range(SHOWN)):
            cosines = [_numbers(result, pair, "cosines")[number] for result in found.values()]
            controls = [_numbers(result, pair, "control")[0] for result in found.values()]
            shares = [_numbers(result, pair, "shares")[number] for result in found.values()]
            rows.append(
                [
                    _name(pair), number + 1, statistics.fmean(shares), statistics.fmean(cosines), _deviation(cosines),
                    statistics.fmean(controls), p_of_pairs(cosines, controls),
                ]
            )  # fmt: skip
        columns = {
            "classes": "", "eigenvector": "d", "share of trace": ".3f", "cosine (size)": ".3f", "deviation": ".3f",
            "of random directions": ".3f", "p": ".2g",
        }  # fmt: skip
        return Findings(
            setting=(
                f"GT-DDP-SGD on {plan.data}, {plan.seeds} seeds from 0 on, each trained at rate {RATE:g}; then "
                "the policies of one more step "
                f"on images of two classes (at most {SAMPLES}). K_b is the feedback gain of the player after the "
                "first convolution on "
                "sample b's state; the eigenvectors are those of the sum of K_b^T K_b over the samples, the "
                "directions of the state that the player "
                "answers most. The transposed first convolution brings them back to the image. |cosine|: with "
                "the difference of the mean "
                "images of the two classes, both centred. Random directions: the mean over Gaussian directions "
                "of the state, "
                "brought back alike. p: Wilcoxon's signed-rank test over the seeds, eigenvector against random."
            ),
            conclusion=_conclusion(rows),
            tables=[Table("", "Resemblance to the difference of the classes", columns, rows)],
            figures={"": _picture(plan, found[0])},
            captions={
                "": "Seed 0. Left: mean images of the classes, and their difference; right: leading eigenvectors in "
                "image space. Red is positive, blue negative; signs are arbitrary, and turned to the difference's."
            },
        )


def _units(plan: Plan) -> dict[int, Unit]:
    length: Settings = {"train.epochs": 4, **plan.pick({}, {"train.steps": 5})}
    optimizer: Settings = {"optimizer.name": "gtddp-sgd", "optimizer.lr": RATE}
    found = {}
    for seed in seeds_of(plan):
        settings = plan.settings(optimizer, length, {"train.seed": seed})
        config_of(settings)
        arguments = {"settings": settings, "pairs": [list(pair) for pair in _pairs(plan)]}
        found[seed] = Unit.of(FUNCTION, cast(Mapping[str, JSON], arguments))
    return found


def _pairs(plan: Plan) -> tuple[tuple[int, int], ...]:
    pairs = PAIRS[plan.data]
    return plan.pick(pairs, pairs[:1])


def leading_directions(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    """Trains, and for each pair of classes looks at the feedback gain of the second player."""
    import torch

    from ..parts import build_model, load_data
    from ..training_state import load_model_tensors
    from ..training_step import Precision
    from .training import trained_run

    settings = cast(Settings, arguments["settings"])
    config = config_of(settings)
    with trained_run(settings) as (run, _):
        tensors, _ = run.read_model()
    precision = Precision(config.train.dtype, torch.device("cpu"))
    data = load_data(config)
    model = build_model(config, data, precision)
    load_model_tensors(model, tensors, "the trained model")
    found: dict[str, JSON] = {}
    generator = torch.Generator().manual_seed(config.train.seed)
    for pair in cast(list[tuple[int, int]], arguments["pairs"]):
        chosen = [(data.train_labels == label).nonzero().flatten()[: SAMPLES // 2] for label in pair]
        means = [data.batch((data.train_labels == label).nonzero().flatten(), 0, 0)[0].mean(0) for label in pair]
        images, labels = data.batch(torch.cat(chosen), config.train.seed, 0)
        found[_key(pair)] = _of_pair(copy.deepcopy(model), images, labels, means, generator)
    return found


def _of_pair(
    model: torch.nn.Module, images: Tensor, labels: Tensor, means: list[Tensor], generator: torch.Generator
) -> dict[str, JSON]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from .. import GTDDP, curvature
    from ..inspection import LIMIT

    model.train()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        state = first(images[:1])
    optimizer = GTDDP(model, curvature.SGD(lr=RATE), inspect=True)
    player = 1
    controls = sum(p.numel() for p in optimizer.trajectory.players[player].controls().values())
    n = state.numel()
    each = max(1, min(len(images), LIMIT // (controls * n)) // 2)
    half = len(images) // 2
    some = torch.cat([torch.arange(each), half + torch.arange(each)])
    F.cross_entropy(model(images[some]), labels[some]).backward()
    weight = first.weight.detach().clone()
    optimizer.step()
    gain_UBn = optimizer.policy(player).feedback_gain
    K = gain_UBn.flatten(0, 1)
    torch.manual_seed(0)  # the method is randomised
    _, values, vectors = torch.svd_lowrank(K, q=SHOWN + 8, niter=12)
    squares, directions = values[:SHOWN] ** 2 / K.norm() ** 2, vectors.mT[:SHOWN]

    def in_image(directions: Tensor) -> Tensor:
        maps = directions.reshape(-1, *state.shape[1:]).to(first.weight)
        size = (images.shape[2] - 1) % first.stride[0]
        return F.conv_transpose2d(
            maps, weight, stride=first.stride, padding=cast(tuple[int, ...], first.padding), output_padding=size
        ).double()

    def cosine(image: Tensor, other: Tensor) -> float:
        a, b = image.flatten().double() - image.double().mean(), other.flatten().double() - other.double().mean()
        return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))

    difference = means[0] - means[1]
    backs = in_image(directions)
    cosines = [cosine(back, difference) for back in backs]
    random = in_image(torch.randn(CONTROLS, n, generator=generator, dtype=torch.float64))
    signed = [back * (1 if value >= 0 else -1) for back, value in zip(backs, cosines, strict=True)]
    return {
        "cosines": [abs(value) for value in cosines],
        "control": [sum(abs(cosine(image, difference)) for image in random) / len(random)],
        "shares": squares.tolist(),
        "means": [_listed(image) for image in means],
        "images": [_listed(image) for image in signed],
    }


def _listed(image: Tensor) -> JSON:
    """One grey image, of the mean over channels."""
    return cast(JSON, [[float(f"{value:.4g}") for value in row] for row in image.double().mean(0).tolist()])


def _key(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


def _name(pair: tuple[int, int]) -> str:
    return f"{pair[0]} and {pair[1]}"


def _numbers(result: Mapping[str, JSON], pair: tuple[int, int], name: str) -> list[float]:
    return cast(list[float], cast(Mapping[str, JSON], result[_key(pair)])[name])


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _conclusion(rows: Rows) -> str:
    sentences = []
    for row in (row for row in rows if row[1] == 1):
        mean, control, p = cast(float, row[3]), cast(float, row[5]), row[6]
        sure = isinstance(p, float) and p < 0.05
        told = (
            f"{row[0]}: size of the cosine for the leading eigenvector {mean:.3f}, for random directions {control:.3f}"
        )
        if isinstance(p, float):
            told += f" (p = {p:.2g})"
        verdict = "it resembles the difference" if mean > control and sure else "no resemblance was shown"
        sentences.append(f"{told}: {verdict}.")
    return " ".join(sentences)


def _picture(plan: Plan, result: Mapping[str, JSON]) -> Figure:
    from matplotlib.figure import Figure

    pairs = _pairs(plan)
    figure = Figure(figsize=(1.75 * (3 + SHOWN) + 0.4, 1.95 * len(pairs)), layout="constrained")
    panels = figure.subplots(len(pairs), 3 + SHOWN, squeeze=False)
    for row, pair in zip(panels, pairs, strict=True):
        part = cast(Mapping[str, list[list[list[float]]]], result[_key(pair)])
        first, second = part["means"]
        difference = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]
        cosines = _numbers(result, pair, "cosines")
        shown = [
            (f"mean of {pair[0]}", first, "gray"),
            (f"mean of {pair[1]}", second, "gray"),
            ("difference", difference, "RdBu_r"),
            *(
                (f"eigenvector {number + 1}\ncosine {cosines[number]:.2f}", image, "RdBu_r")
                for number, image in enumerate(part["images"])
            ),
        ]
        for axes, (title, image, colours) in zip(row, shown, strict=True):
            limit = max(abs(value) for line in image for value in line) or 1.0
            low = -limit if colours == "RdBu_r" else min(value for line in image for value in line)
            axes.imshow(image, cmap=colours, vmin=low, vmax=limit)
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    return figure


EXPERIMENT = Fig8()

"""Fig. 8 of the paper: to which change of the images the feedback of a convolution responds most."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import curvature
from ..checkpoint import JSON
from ..config_schema import Config
from ..data import DataSet, network_input
from ..environment import prepare_cpu, select_device
from ..optimizer import GTDDP
from ..parts import build_model, load_data
from ..training_step import Precision
from .bases import BASES, gtddp
from .page import Findings, Rows, Table, TableCell
from .plan import Plan, Settings, config_of
from .statistics import Spread
from .training import trained_run, what_came_of
from .unit import Result, Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTION = "gtddp_dist.experiments.fig8:feedback_images"
PAIRS: Mapping[str, Sequence[tuple[int, int]]] = {
    "digits": ((3, 8), (4, 9), (1, 7)),
    "mnist": ((3, 8), (4, 9), (1, 7)),
    "svhn": ((3, 8), (4, 9), (1, 7)),
    "cifar10": ((3, 5), (1, 9), (4, 7)),
    "cifar100": ((3, 42), (8, 48), (47, 52)),
}
"""Data set -> pairs of similar classes: digits; cat and dog, car and lorry, deer and horse; bear and leopard, bicycle
and motorcycle, maple and oak."""
PLAYER = 1
"""The player whose feedback is looked at: the convolution behind the first one."""
OF_EACH = 8
"""Samples of each class of a pair."""
KINDS: Mapping[str, str] = {
    "trained": "feedback, trained",
    "start": "feedback, untrained",
    "gradient": "loss gradient, trained",
    "random": "difference of random halves",
}
"""What is compared with the difference of the classes; the last three are controls."""
CLEAR = 0.5


def feedback_images(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    """Trains, and for every pair compares the leading change of image with the difference of the classes."""
    settings = cast(Settings, arguments["settings"])
    pairs = cast(list[list[int]], arguments["pairs"])
    config = config_of(settings)
    prepare_cpu(config.train.threads)
    data = load_data(config)
    torch.manual_seed(config.train.seed)
    model = build_model(config, data, Precision("float64", select_device("cpu")))
    start = copy.deepcopy(model)
    with trained_run(settings) as (run, code):
        found = what_came_of(run, code)
        if not found["diverged"]:
            weights, _ = run.read_model()
            model.load_state_dict({name: w.double() if w.is_floating_point() else w for name, w in weights.items()})
    means = class_means(data)
    result: dict[str, JSON] = {"diverged": found["diverged"], "val_accuracy": found["val_accuracy"]}
    if found["diverged"]:
        return result
    return {**result, "pairs": [_of_pair(config, data, means, model, start, a, b) for a, b in pairs]}


def class_means(data: DataSet) -> Tensor:
    """Mean training image of every class, (classes, C, H, W), normalised as a network gets them."""
    sums, counts = torch.zeros(0), torch.zeros(data.classes, dtype=torch.float64)
    for first in range(0, len(data.train_labels), 1000):
        images, labels = _plain(data, torch.arange(first, min(first + 1000, len(data.train_labels))))
        sums = sums if len(sums) else torch.zeros(data.classes, *images.shape[1:], dtype=torch.float64)
        sums.index_add_(0, labels, images)
        counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
    return sums / counts[:, None, None, None]


def _plain(data: DataSet, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Training images as they are, without augmentation."""
    images, labels = replace(data, augment=False).batch(indices, 0, 0)
    return network_input(images, torch.float64), labels


def _of_pair(
    config: Config, data: DataSet, means: Tensor, model: nn.Module, start: nn.Module, a: int, b: int
) -> dict[str, JSON]:
    random = torch.Generator().manual_seed(config.train.seed)
    members = [torch.nonzero(data.train_labels == each)[:, 0] for each in (a, b)]
    chosen = torch.cat([each[torch.randperm(len(each), generator=random)[:OF_EACH]] for each in members])
    images, labels = _plain(data, chosen)
    everyone, _ = _plain(data, torch.randperm(len(data.train_labels), generator=random)[: 4 * OF_EACH])
    halves = everyone.chunk(2)
    gradient = _loss_gradient(model, images, labels)
    leading = {
        "trained": leading_image(model, images, labels),
        "start": leading_image(start, images, labels),
        "gradient": gradient,
        "random": halves[0].mean(0) - halves[1].mean(0),
    }
    found: dict[str, JSON] = {"classes": [a, b]}
    for kind, image in leading.items():
        found[kind] = {"cosine": likeness(image, means[a] - means[b]), "rank": rank_of_pair(image, means, a, b)}
    shown = {"first": means[a], "second": means[b], "difference": means[a] - means[b], **leading}
    for name in ("first", "second", "difference", "trained", "start"):
        found[f"{name} image"] = [[float(f"{v:.4g}") for v in row] for row in shown[name].mean(0).tolist()]
    return found


def leading_image(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The unit change of image (C, H, W), common to all samples, to which the feedback of PLAYER responds most.

    It is the first right singular vector of sum_b K_b J_b, with K the player's feedback gain on the state of sample b
    (the paper's options, in SGD's metric), and J the Jacobian of that state by the images.
    """
    own = copy.deepcopy(model)
    torch.func.replace_all_batch_norm_modules_(own)  # running statistics cannot be updated under vmap
    own.train()
    optimizer = GTDDP.paper(own, curvature.SGD(lr=BASES["sgd"]), inspect=True, rollout="linear")
    before = copy.deepcopy(own.state_dict())
    F.cross_entropy(own(images), labels).backward()
    optimizer.step()
    K_UBn = optimizer.policy(PLAYER).feedback_gain
    own.load_state_dict(before)
    stages = optimizer.trajectory.stages[:PLAYER]

    def state(x: Tensor) -> Tensor:
        live: tuple[object, ...] = (x,)
        for stage in stages:
            live = stage.run(live)
        return torch.cat([part.flatten(1) for part in live if isinstance(part, Tensor)], dim=1)

    pull_back = cast(Callable[[Tensor], tuple[Tensor]], torch.func.vjp(state, images)[1])
    response = torch.func.vmap(lambda row: pull_back(row)[0].sum(0), chunk_size=64)(K_UBn)
    _, _, right = torch.linalg.svd(response.detach().flatten(1), full_matrices=False)
    image: Tensor = right[0].view(images.shape[1:])
    return image


def _loss_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """That of the loss of telling the first class from the second: by a change of image common to all samples."""
    own = copy.deepcopy(model).train()
    x = images.clone().requires_grad_()
    F.cross_entropy(own(x), labels).backward()
    assert x.grad is not None
    return x.grad.sum(0)


def likeness(image: Tensor, other: Tensor) -> float:
    """|cosine| of the angle between two images."""
    return float(F.cosine_similarity(image.flatten(), other.flatten(), dim=0).abs())


def rank_of_pair(image: Tensor, means: Tensor, a: int, b: int) -> int:
    """The place, from 1 on, of classes a and b among all pairs by the likeness of their difference to the image."""
    own = likeness(image, means[a] - means[b])
    others = itertools.combinations(range(len(means)), 2)
    return 1 + sum(likeness(image, means[c] - means[d]) > own for c, d in others if {c, d} != {a, b})


class Fig8:
    """Pairs of similar classes, the trained network and three controls."""

    question = (
        "In its Fig. 8 the paper projects leading eigenvectors of the feedback policies of convolutions back to "
        "images: "
        "the change of image to which the update of the weights responds most. It is said to show what tells similar "
        "classes apart, such as 3 and 8. Does it resemble the difference of the classes' mean images, more than the "
        "differences of other classes, and more than controls do?"
    )
    varies = (
        "model.name", "model.width", "model.blocks", "model.channels", "optimizer.", "schedule.", "train.seed",
        "train.steps", "train.epochs",
    )  # fmt: skip

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        length: Settings = {"train.steps": 3} if plan.quick else {"train.epochs": 4}
        network: Settings = {
            "model.name": "small-resnet",
            "model.blocks": 1,
            "model.width": plan.pick(4, 2),
            "model.channels": None,
        }
        pairs: list[JSON] = [list[JSON](pair) for pair in PAIRS[plan.data]]
        return [
            Unit.of(
                FUNCTION,
                {
                    "settings": plan.settings(network, gtddp("sgd", BASES["sgd"]), length, {"train.seed": seed}),
                    "pairs": pairs,
                },
            )
            for seed in range(plan.seeds)
        ]

    def findings(self, plan: Plan, results: Results) -> Findings:
        found = [results.of(unit) for unit in self.units(plan, results)]
        good = [each for each in found if not each["diverged"]]
        rows, runs = _rows(PAIRS[plan.data], good), _runs(good)
        accuracies = [None if each["diverged"] else 100 * cast(float, each["val_accuracy"]) for each in found]
        summary = _summary(runs, Spread.of(accuracies))
        images = _images(good)
        return Findings(
            setting=self._setting(plan),
            conclusion=_conclusion(summary),
            tables=[
                Table(
                    "",
                    "Likeness to the difference of the classes",
                    {
                        "classes": "", "image": "", "|cosine|": ".3f", "deviation": ".3f", "mean rank": ".1f",
                        "seeds": "d", "diverged": "d",
                    },
                    [[*row, len(found) - len(good)] for row in rows],
                ),
                summary,
                Table("seeds", "Every seed", _RUNS, runs, on_page=False),
                images,
            ],
            figures={"": _picture(good)},
            captions={
                "": "Seed 0: mean images of two classes, their difference, and the change of image to which the "
                "feedback "
                "responds most, after training and before; signs are arbitrary there, and turned towards the "
                "difference. Channels are averaged; each image over its largest entry, 0 is grey in the last three."
            },
        )  # fmt: skip

    def _setting(self, plan: Plan) -> str:
        pairs = ", ".join(f"{a}/{b}" for a, b in PAIRS[plan.data])
        return (
            f"Data set {plan.data}; `small-resnet` with one block of width {plan.pick(4, 2)}, trained with gtddp-sgd "
            "at "
            f"rate {BASES['sgd']:g} for {'3 steps' if plan.quick else '4 epochs'}; {plan.seeds} seeds; pairs "
            f"{pairs}, a "
            f"batch of {OF_EACH} samples of each. K is the feedback gain of the second convolution, with the paper's "
            "options in SGD's metric; the image is the first right singular vector of sum_b K_b J_b, J_b the Jacobian "
            "of the state by sample b's image: the unit change, common to all samples, that changes the control most. "
            "Beside it: the same before training; the gradient of the batch's loss by such a change; the difference "
            "of the means of two random halves of samples of all classes. The rank is that of the pair's own "
            "difference "
            "among those of all pairs of classes, by |cosine|; 1 is the best."
        )


_RUNS = {"classes": "", "seed": "d", "image": "", "|cosine|": ".3f", "rank": "d"}


def _members(found: Sequence[Result]) -> list[list[Mapping[str, JSON]]]:
    return [cast(list[Mapping[str, JSON]], each["pairs"]) for each in found]


def _runs(found: Sequence[Result]) -> Rows:
    return [
        [_name(pair), seed, label, *(cast(Mapping[str, float], pair[kind])[each] for each in ("cosine", "rank"))]
        for seed, pairs in enumerate(_members(found))
        for pair in pairs
        for kind, label in KINDS.items()
    ]


def _name(pair: Mapping[str, JSON]) -> str:
    a, b = cast(list[int], pair["classes"])
    return f"{a}/{b}"


def _rows(pairs: Sequence[tuple[int, int]], found: Sequence[Result]) -> Rows:
    runs = _runs(found)
    rows: Rows = []
    for (a, b), label in itertools.product(pairs, KINDS.values()):
        mine = [run for run in runs if run[0] == f"{a}/{b}" and run[2] == label]
        cosine = Spread.of([cast(float, run[3]) for run in mine])
        rank = Spread.of([cast(float, run[4]) for run in mine])
        rows.append([f"{a}/{b}", label, cosine.mean, cosine.deviation, rank.mean, len(mine)])
    return rows


def _summary(runs: Sequence[Sequence[TableCell]], accuracy: Spread) -> Table:
    columns = {
        "image": "", "mean |cosine|": ".3f", "median rank": ".1f", "own pair is first": "d", "of": "d",
        "validation accuracy (%)": ".1f",
    }  # fmt: skip
    rows: Rows = []
    for label in KINDS.values():
        mine = [run for run in runs if run[2] == label]
        if mine:
            ranks = [cast(int, run[4]) for run in mine]
            cosine = statistics.fmean(cast(float, run[3]) for run in mine)
            rows.append([label, cosine, statistics.median(ranks), ranks.count(1), len(mine), accuracy.mean])
    return Table("summary", "Over all pairs and seeds", columns, rows)


def _conclusion(summary: Table) -> str:
    if not summary.rows:
        return "Every training diverged: nothing can be said."
    ours, *controls = summary.rows
    cosine, rank = cast(float, ours[1]), cast(float, ours[2])
    best = max(controls, key=lambda row: cast(float, row[1]))
    more = cosine > cast(float, best[1])
    holds = more and cosine > CLEAR and rank == 1
    return (
        f"The claim {'holds' if holds else 'does not hold'}, taken as: the mean |cosine| with the difference of the "
        f"classes is above {CLEAR:g} and above that of every control, and the own pair comes first for most. It is "
        f"{cosine:.3f}, the median rank {rank:.1f}, and the own pair comes first in {ours[3]} of {ours[4]} cases; the "
        f"control nearest to the difference is '{best[0]}' with {cast(float, best[1]):.3f}. With the paper's options "
        "every "
        "K_b has rank one, and its right singular vector is sample b's own loss gradient by the state: the pictures "
        "show gradients, weighted over samples."
    )


_SHOWN = ("first", "second", "difference", "trained", "start")


def _images(found: Sequence[Result]) -> Table:
    columns = {"classes": "", "image": "", "row": "d", "column": "d", "value": ""}
    rows: Rows = [
        [_name(pair), name, i, j, value]
        for pair in (_members(found)[0] if found else [])
        for name in _SHOWN
        for i, line in enumerate(cast(list[list[float]], pair[f"{name} image"]))
        for j, value in enumerate(line)
    ]
    return Table("images", "The pictured images", columns, rows, on_page=False)


def _picture(found: Sequence[Result]) -> Figure:
    from matplotlib.figure import Figure

    pairs = _members(found)[0] if found else []
    figure = Figure(figsize=(11, 2.3 * max(1, len(pairs)) + 0.4), layout="constrained")
    for row, pair in zip(figure.subplots(max(1, len(pairs)), 5, squeeze=False), pairs, strict=False):
        a, b = cast(list[int], pair["classes"])
        titles = (f"mean of {a}", f"mean of {b}", f"{a} less {b}", "feedback, trained", "feedback, untrained")
        difference = torch.tensor(cast(list[list[float]], pair["difference image"]))
        for axes, name, title in zip(row, _SHOWN, titles, strict=True):
            image = torch.tensor(cast(list[list[float]], pair[f"{name} image"]))
            if name in KINDS:
                image = image * (1 if float((image * difference).sum()) >= 0 else -1)
                title = f"{title}\n|cosine| {cast(Mapping[str, float], pair[name])['cosine']:.2f}"
            signed = name not in ("first", "second")
            bound = float(image.abs().max()) or 1.0
            low = -bound if signed else float(image.min())
            axes.imshow(image.numpy(), cmap="gray", vmin=low, vmax=bound, interpolation="nearest")
            axes.set_title(title, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    return figure


EXPERIMENT = Fig8()

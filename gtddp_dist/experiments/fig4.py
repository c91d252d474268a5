"""Fig. 4 of the paper: how much of the value Hessian of a batch lies between its samples."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import curvature
from ..checkpoint import JSON
from ..data import network_input
from ..data.batches import BatchOrder
from ..models import small_resnet
from ..optimizer import GTDDP
from ..parts import load_data
from .bases import BASES
from .dense import batch_jacobians, block_norms, off_diagonal_share, softmax_hessian, value_hessians
from .page import Findings, Rows, Table, TableCell
from .plan import Plan, Settings, config_of
from .statistics import Spread
from .unit import Result, Results, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNCTION = "gtddp_dist.experiments.fig4:whole_hessian"
IMAGE_SIZE = 8
"""Pixels to which images are averaged down, so that the matrices stay small for every data set."""
TRAINING_BATCH = 32
TILES = 12
"""Pixels of the picture of V_zz for each sample."""
RATE = BASES["sgd"]
HALF = 0.5
FORMS: Mapping[str, str] = {"paper": "Q_uu = R, rho = 1/B", "default": "Q_uu = R + F_u' V F_u, rho = 0.1"}
"""Options of the recursion -> as the page names them; R = 1 / rate in both."""


def whole_hessian(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    """V_zz of a batch at every cut, by the dense recursion, and how far gtddp's own is from it."""
    config = config_of(cast(Settings, arguments["settings"]))
    B, steps = cast(int, arguments["samples"]), cast(int, arguments["steps"])
    data, seed = load_data(config), config.train.seed

    def batch(order: BatchOrder, step: int) -> tuple[Tensor, Tensor]:
        images, labels = data.batch(order.batch_indices(step), seed, step)
        return F.adaptive_avg_pool2d(network_input(images, torch.float64), IMAGE_SIZE), labels

    torch.manual_seed(seed)
    model: nn.Module = small_resnet.build(config.model, data.in_channels, data.classes, IMAGE_SIZE).double()
    training, optimizer = (
        BatchOrder(len(data.train_labels), TRAINING_BATCH, seed),
        torch.optim.SGD(model.parameters(), RATE),
    )
    for step in range(steps):
        images, labels = batch(training, step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = batch(BatchOrder(len(data.train_labels), B, seed), 0)
    order = labels.argsort(stable=True)
    return _compared(model, images[order], labels[order], bool(arguments["picture"]))


def _compared(model: nn.Module, images: Tensor, labels: Tensor, picture: bool) -> dict[str, JSON]:
    B = len(labels)
    stages, logits = batch_jacobians(copy.deepcopy(model), images)
    found: dict[str, JSON] = {
        "cuts": [f"behind {stage.name.removesuffix('.conv')}" for stage in stages],
        "labels": [int(label) for label in labels],
    }
    for form, weight in (("paper", 1 / B), ("default", 0.1)):
        proximal = form == "default"
        values = value_hessians(stages, softmax_hessian(logits, weight), RATE, proximal=proximal)
        exact = _swept(model, images, labels, weight, proximal, "exact")
        one_row = _swept(model, images, labels, weight, proximal, "loss_gradient")
        shares, errors, of_M = list[JSON](), list[JSON](), list[JSON]()
        for cut in range(1, len(stages) + 1):
            V, ours, M = values[cut], exact.value(cut).hessian, one_row.sample_value(cut).curvature
            shares.append(off_diagonal_share(V, B))
            difference = (ours.reshape(V.shape) - V).norm() / V.norm()
            errors.append(float(difference.nan_to_num(nan=0.0)))  # behind dead units both are zero
            of_M.append(off_diagonal_share(M, B))
        found[form] = {"share": shares, "error": errors, "share_of_M": of_M}
        if picture and form == "paper":
            tiles = F.adaptive_avg_pool2d(values[1][None, None] ** 2, B * TILES)[0, 0].sqrt()
            matrices = {"V": tiles, "blocks": block_norms(values[1], B), "M": one_row.sample_value(1).curvature.abs()}
            found["picture"] = {name: _rounded(matrix / matrix.max()) for name, matrix in matrices.items()}
    return found


def _swept(model: nn.Module, images: Tensor, labels: Tensor, weight: float, proximal: bool, terminal: str) -> GTDDP:
    """gtddp's own sweep on the same weights and batch, to be inspected."""
    own = copy.deepcopy(model).train()
    optimizer = GTDDP(
        own,
        curvature.SGD(lr=RATE),
        inspect=True,
        gauss_newton_weight=weight,
        terminal=terminal,
        control_hessian="proximal" if proximal else "replace",
        replace_guard=False,
    )
    F.cross_entropy(own(images), labels).backward()
    optimizer.step()
    return optimizer


def _rounded(matrix: Tensor) -> list[JSON]:
    return [[float(f"{value:.4g}") for value in row] for row in matrix.tolist()]


class Fig4:
    """The literal Hessian with and without BatchNorm, at the start and after a short training."""

    question = (
        "The paper keeps only the diagonal blocks of the value Hessian, one for each sample of the batch, and shows in "
        "its Fig. 4 that the Hessian is nearly block-diagonal even with BatchNorm, which couples samples. How much "
        "of it lies outside "
        "these blocks, and how far is what `gtddp` carries, B x B numbers, from the literal matrix?"
    )
    varies = ("model.", "optimizer.", "schedule.", "train.")

    def units(self, plan: Plan, results: Results) -> list[Unit]:
        return [unit for units in self.cells(plan).values() for unit in units]

    def cells(self, plan: Plan) -> dict[tuple[bool, int], list[Unit]]:
        """BatchNorm or not, and steps of training before -> units, by seed."""
        samples = plan.pick(10, 4)
        return {
            (norm, steps): [
                Unit.of(
                    FUNCTION,
                    {
                        "settings": plan.settings(_network(norm), {"train.seed": seed}),
                        "samples": samples,
                        "steps": steps,
                        "picture": seed == 0 and steps > 0,
                    },
                )
                for seed in range(plan.seeds)
            ]
            for norm, steps in itertools.product((False, True), (0, plan.pick(90, 5)))
        }

    def findings(self, plan: Plan, results: Results) -> Findings:
        cells = {cell: [results.of(unit) for unit in units] for cell, units in self.cells(plan).items()}
        rows: Rows = []
        runs: Rows = []
        for (norm, steps), found in cells.items():
            for index, cut in enumerate(cast(list[str], found[0]["cuts"])[:-1]):
                cell: list[TableCell] = [norm, steps, cut]
                for form in FORMS:
                    share = Spread.of([_numbers(each, form, "share")[index] for each in found])
                    error = Spread.of([_numbers(each, form, "error")[index] for each in found])
                    of_M = Spread.of([_numbers(each, form, "share_of_M")[index] for each in found])
                    cell += [share.mean, share.deviation, error.mean, of_M.mean]
                rows.append(cell)
                runs += [
                    [
                        *(norm, steps, cut, seed, form),
                        *(_numbers(each, form, name)[index] for name in ("share", "error", "share_of_M")),
                    ]
                    for seed, each in enumerate(found)
                    for form in FORMS
                ]
        main = Table(
            "",
            "Norm outside the diagonal blocks, over that of the whole matrix",
            {
                "BatchNorm": "", "steps trained": "d", "cut": "", "share, Q_uu = R": ".4f", "deviation": ".4f",
                "gtddp's error, Q_uu = R": ".2g", "share of M, Q_uu = R": ".4f", "share, proximal": ".4f",
                "deviation, proximal": ".4f", "gtddp's error, proximal": ".2g", "share of M, proximal": ".4f",
            },
            rows,
        )  # fmt: skip
        columns = {"BatchNorm": "", "steps trained": "d", "cut": "", "seed": "d", "options": ""}
        every = {**columns, "share": ".4f", "gtddp's error": ".2g", "share of M": ".4f"}
        pictured = {norm: found[0] for (norm, _), found in cells.items() if "picture" in found[0]}
        return Findings(
            setting=self._setting(plan),
            conclusion=_conclusion(rows),
            tables=[main, _worst(rows), Table("seeds", "Every seed", every, runs, on_page=False), _blocks(pictured)],
            figures={"": _matrices(pictured), "share": _shares(cells)},
            captions={
                "": "Behind the first layer, after the short training, seed 0; Q_uu = R, exact softmax Hessian. Each "
                "matrix is over its largest entry. Samples are in the order of their class.",
                "share": "Mean over seeds of the share of the norm outside the diagonal blocks, Q_uu = R, from the "
                "cut behind the first layer to the output; bars are deviations.",
            },
        )

    def _setting(self, plan: Plan) -> str:
        forms = "; ".join(FORMS.values())
        return (
            f"Data set {plan.data}, images averaged down to {IMAGE_SIZE} x {IMAGE_SIZE} pixels; `small-resnet` with "
            f"one block of width 2; a batch of {plan.pick(10, 4)} samples, {plan.seeds} seeds; at the start, and after "
            f"{plan.pick(90, 5)} steps of SGD at rate {RATE:g}, batch {TRAINING_BATCH}. Float64. Jacobians of every "
            "stage on the state of the whole batch, BatchNorm's batch statistics differentiated; at the output "
            f"rho / B times the exact Hessian of the softmax's cross-entropy; then V = Q_zz - Q_uz' Q_uu^-1 Q_uz "
            f"({forms}; "
            "R = 1 / rate, nothing clamped). gtddp's error is the norm of the difference between its matrix "
            "(terminal=exact, value_hessian=batch) and the literal one, over the latter's; M is "
            "that of its default terminal, the loss gradient."
        )


def _network(norm: bool) -> Settings:
    return {
        "model.name": "small-resnet",
        "model.blocks": 1,
        "model.width": 2,
        "model.channels": None,
        "model.batch_norm": norm,
    }


def _numbers(found: Result, form: str, name: str) -> list[float]:
    return cast(Mapping[str, list[float]], found[form])[name]


def _worst_of(rows: Sequence[Sequence[TableCell]], norm: bool, column: int) -> float:
    return max(cast(float, row[column]) for row in rows if row[0] == norm)


def _worst(rows: Sequence[Sequence[TableCell]]) -> Table:
    columns = {"BatchNorm": "", "largest mean share, Q_uu = R": ".3f", "proximal": ".3f", "largest mean error": ".2g"}
    cells = [
        [norm, _worst_of(rows, norm, 3), _worst_of(rows, norm, 7), max(_worst_of(rows, norm, c) for c in (5, 9))]
        for norm in (False, True)
    ]
    return Table("worst", "The largest of these means, over cuts and weights", columns, cells)


def _conclusion(rows: Sequence[Sequence[TableCell]]) -> str:
    without, with_norm = (max(_worst_of(rows, norm, column) for column in (3, 7)) for norm in (False, True))
    error, norm_error = (max(_worst_of(rows, norm, column) for column in (5, 9)) for norm in (False, True))
    holds = with_norm < HALF and without < HALF
    return (
        f"The claim {'holds' if holds else 'does not hold'}, taken as: less than half of the norm lies outside the "
        f"diagonal blocks at every cut. The largest mean share is {without:.3f} without BatchNorm and {with_norm:.3f} "
        f"with it; BatchNorm {'is' if with_norm > without else 'is not'} what couples samples most. "
        f"gtddp's own matrix, which takes BatchNorm's Jacobian for block-diagonal, differs from the literal one "
        f"by up to {error:.2g} of its norm without and {norm_error:.2g} with BatchNorm."
    )


def _blocks(pictured: Mapping[bool, Result]) -> Table:
    columns = {
        "BatchNorm": "", "sample": "d", "class": "d", "other sample": "d", "other class": "d", "norm of the block": "",
        "M": "",
    }  # fmt: skip
    rows: Rows = []
    for norm, found in pictured.items():
        labels, picture = cast(list[int], found["labels"]), cast(Mapping[str, list[list[float]]], found["picture"])
        rows += [
            [norm, i, labels[i], j, labels[j], picture["blocks"][i][j], picture["M"][i][j]]
            for i, j in itertools.product(range(len(labels)), repeat=2)
        ]
    return Table("blocks", "Blocks of the pictured matrices, over the largest", columns, rows, on_page=False)


def _matrices(pictured: Mapping[bool, Result]) -> Figure:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.6), layout="constrained")
    grid = figure.subplots(2, 3, squeeze=False)
    titles = {"V": "V_zz, root mean square of tiles", "blocks": "norms of its B x B blocks", "M": "gtddp's M, B x B"}
    shown = None
    for row, (norm, found) in zip(grid, pictured.items(), strict=True):
        labels, picture = cast(list[int], found["labels"]), cast(Mapping[str, list[list[float]]], found["picture"])
        for axes, (name, title) in zip(row, titles.items(), strict=True):
            matrix = torch.tensor(picture[name]).clamp(min=1e-4)
            extent = (-0.5, len(labels) - 0.5, len(labels) - 0.5, -0.5)
            shown = axes.imshow(
                matrix.numpy(), cmap="Greys", norm=LogNorm(1e-4, 1), extent=extent, interpolation="nearest"
            )
            axes.set_title(f"{title}\n{'with' if norm else 'without'} BatchNorm")
            axes.set_xticks(range(len(labels)), labels)
            axes.set_yticks(range(len(labels)), labels)
            axes.set(xlabel="class of the sample", ylabel="class of the sample")
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, shrink=0.8)
        bar.set_label("size, over the largest (1e-4: or less)")
    return figure


def _shares(cells: Mapping[tuple[bool, int], Sequence[Result]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, ((norm, steps), found) in enumerate(cells.items()):
        cuts = cast(list[str], found[0]["cuts"])
        spreads = [Spread.of([_numbers(each, "paper", "share")[index] for each in found]) for index in range(len(cuts))]
        axes.errorbar(
            [index + 0.06 * (number - 1.5) for index in range(len(cuts))],
            [spread.mean or 0.0 for spread in spreads],
            [spread.deviation or 0.0 for spread in spreads],
            color="C3" if norm else "C0",
            marker="s" if norm else "o",
            linestyle="-" if steps else "--",
            capsize=3,
            label=f"{'with' if norm else 'without'} BatchNorm, {f'{steps} steps' if steps else 'at the start'}",
        )
    axes.set_xticks(range(len(cuts)), cuts, rotation=15)
    axes.set(ylabel="share of the norm off the diagonal blocks", ylim=(0, None), title="Coupling between samples")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


EXPERIMENT = Fig4()

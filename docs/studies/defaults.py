"""The study behind the default options: DIGITS, over seeds and rates, one row of a CSV a training run.

    python docs/studies/defaults.py --out docs/studies/defaults.csv     (hours on two cores; takes up where it stopped)
    python docs/studies/defaults.py --out docs/studies/defaults.csv --report > docs/study-defaults.md

Part "rho": every base at its rates times gauss_newton_weight. Part "options": at two rates, one option changed at a
time. A run is given as what it changes from the reference, which is the optimizer's defaults.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

from gtddp_dist import GTDDP, curvature
from gtddp_dist.config import DataConfig, ModelConfig
from gtddp_dist.data import digits
from gtddp_dist.data.batches import BatchOrder
from gtddp_dist.errors import CurvatureError
from gtddp_dist.models import small_resnet

BASES: dict[str, tuple[type[curvature.Curvature], dict[str, object], float]] = {
    # name: (curvature, its options, the base's own good rate at batch 32)
    "sgd": (curvature.SGD, {}, 0.3),
    "sgd momentum 0.9": (curvature.SGD, {"momentum": 0.9}, 0.03),
    "rmsprop": (curvature.RMSprop, {}, 0.003),
    "adam": (curvature.Adam, {}, 0.01),
    "kfac": (curvature.KFAC, {}, 0.03),
    "ekfac": (curvature.EKFAC, {}, 0.03),
}
RATES = (1.0, 3.0, 10.0)
"""Multiples of the base's own good rate."""
RHOS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
REPEATED_RHOS = (0.0, 0.03, 0.1)
"""Those that further seeds repeat."""
EPOCHS = {32: 4, 256: 20}
CHANGES: dict[str, dict[str, object]] = {
    "value_hessian=block_diagonal": {"value_hessian": "block_diagonal"},
    "scope=8": {"scope": 8},
    "momentum_of=gradient": {"momentum_of": "gradient"},
    "terminal=sampled": {"terminal": "sampled"},
    "terminal=exact": {"terminal": "exact"},
    "statistics=value": {"statistics": "value"},
    "metric=previous": {"metric": "previous"},
    "rollout=nonlinear": {"rollout": "nonlinear"},
    "cooperation=none": {"cooperation": "none"},
    "control_hessian=replace, rho=1/B": {"control_hessian": "replace", "gauss_newton_weight": "1/B"},
}
REFERENCE_RHO = 0.1


@dataclass(frozen=True)
class Run:
    """One training run."""

    part: str
    base: str
    batch: int
    rate: float
    change: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of it: mean train loss of the last epoch, final validation accuracy (%), seconds a step."""

    train_loss: float
    accuracy: float
    step_seconds: float


def runs() -> Iterator[Run]:
    """All runs, the most telling first: one seed in full, then the closest weights and the options again."""
    for batch in EPOCHS:
        yield from _weights(batch, 0, RHOS)
        yield from _options(batch, 0)
    for seed, batch in itertools.product((1, 2), EPOCHS):
        yield from _weights(batch, seed, REPEATED_RHOS)
    for batch in EPOCHS:
        yield from _options(batch, 1)


def _weights(batch: int, seed: int, rhos: tuple[float, ...]) -> Iterator[Run]:
    for base, rate, rho in itertools.product(BASES, RATES, rhos):
        yield Run("rho", base, batch, rate, f"rho={rho:g}", seed)


def _options(batch: int, seed: int) -> Iterator[Run]:
    for base, rate, change in itertools.product(BASES, (1.0, 3.0), CHANGES):
        if change == "terminal=exact" and batch > 32:
            continue  # 2,560 rows in one recursion
        if change == "cooperation=none" and "kfac" not in base:
            continue
        if change == "momentum_of=gradient" and base in ("sgd", "rmsprop", "kfac", "ekfac"):
            continue  # no momentum, nothing to keep
        if change in ("statistics=value", "metric=previous") and base.startswith("sgd"):
            continue  # a constant metric
        yield Run("options", base, batch, rate, change, seed)


def train(run: Run) -> Outcome:
    """Train the small residual network of `configs/digits.yaml`; a diverged run has a loss of NaN."""
    torch.manual_seed(run.seed)
    data = digits.load(DataConfig())
    model = small_resnet.build(ModelConfig(), data.in_channels, data.classes, data.image_size[0])
    kind, options, good_rate = BASES[run.base]
    changed: dict[str, object] = {"gauss_newton_weight": REFERENCE_RHO}
    if run.part == "rho":
        changed["gauss_newton_weight"] = float(run.change.removeprefix("rho="))
    else:
        changed.update(CHANGES[run.change])
    optimizer = GTDDP(model, kind(lr=good_rate * run.rate, **options), seed=run.seed, **changed)  # type: ignore[arg-type, call-arg]
    order = BatchOrder(len(data.train_labels), run.batch, run.seed)
    total = EPOCHS[run.batch] * order.steps_per_epoch
    losses = []
    start = time.perf_counter()
    for step in range(total):
        chosen = order.batch_indices(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_images[chosen].float()), data.train_labels[chosen])
        loss.backward()
        try:
            optimizer.step()
        except CurvatureError:
            return Outcome(math.nan, math.nan, (time.perf_counter() - start) / (step + 1))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or losses[-1] > 1e3:
            return Outcome(math.nan, math.nan, (time.perf_counter() - start) / (step + 1))
    seconds = (time.perf_counter() - start) / total
    model.eval()
    with torch.no_grad():
        predicted = model(data.validation_images.float()).argmax(1)
    accuracy = 100 * float((predicted == data.validation_labels).float().mean())
    return Outcome(statistics.fmean(losses[-order.steps_per_epoch :]), accuracy, seconds)


COLUMNS = [f.name for f in (*fields(Run), *fields(Outcome))]


def read(path: Path) -> dict[Run, Outcome]:
    """The runs that are done."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            Run(r["part"], r["base"], int(r["batch"]), float(r["rate"]), r["change"], int(r["seed"])): Outcome(
                float(r["train_loss"]), float(r["accuracy"]), float(r["step_seconds"])
            )
            for r in csv.DictReader(file)
        }


def extend(path: Path, share: int, shares: int, minutes: float) -> None:
    """Do the runs that are not there yet (every ``shares``-th of them), until the time is up."""
    end = time.monotonic() + 60 * minutes
    for index, run in enumerate(runs()):
        if index % shares != share or run in read(path):
            continue
        if time.monotonic() > end:
            return
        outcome = train(run)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            writer.writerow([*asdict(run).values(), *(f"{v:.6g}" for v in asdict(outcome).values())])


def report(done: dict[Run, Outcome]) -> str:
    """Tables: a row a base and rate, a column a change; train loss and validation accuracy, mean over seeds."""

    def cell(part: str, base: str, batch: int, rate: float, change: str, seeds: set[int] | None = None) -> str:
        found = [
            o
            for r, o in done.items()
            if (r.part, r.base, r.batch, r.rate, r.change) == (part, base, batch, rate, change)
            and (seeds is None or r.seed in seeds)
        ]
        if not found:
            return ""
        bad = sum(math.isnan(o.train_loss) for o in found)
        if bad:
            return f"diverged {bad} of {len(found)}"
        return (
            f"{statistics.fmean(o.train_loss for o in found):.3g} ({statistics.fmean(o.accuracy for o in found):.1f})"
        )

    text = []
    for batch in EPOCHS:
        text.append(f"\n## Batch {batch}, {EPOCHS[batch]} epochs\n\n### gauss_newton_weight\n")
        rows = [
            [base, f"{BASES[base][2] * rate:g}", *(cell("rho", base, batch, rate, f"rho={rho:g}") for rho in RHOS)]
            for base, rate in itertools.product(BASES, RATES)
        ]
        text.append(tabulate(rows, ["base", "rate", *(f"rho {rho:g}" for rho in RHOS)], tablefmt="github"))
        text.append(f"\n### One option changed, rho {REFERENCE_RHO}\n")
        rows = []
        for base, rate in itertools.product(BASES, (1.0, 3.0)):
            # One row, one set of seeds: those for which every option was tried.
            planned = [r for seed in (0, 1) for r in _options(batch, seed) if (r.base, r.rate) == (base, rate)]
            seeds = {r.seed for r in planned} - {r.seed for r in planned if r not in done}
            reference = cell("rho", base, batch, rate, f"rho={REFERENCE_RHO:g}", seeds)
            rows.append(
                [
                    base,
                    f"{BASES[base][2] * rate:g}",
                    str(len(seeds)),
                    reference,
                    *(cell("options", base, batch, rate, c, seeds) for c in CHANGES),
                ]
            )
        text.append(tabulate(rows, ["base", "rate", "seeds", "defaults", *CHANGES], tablefmt="github"))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file, extended")
    parser.add_argument("--share", type=int, default=0, help="which share of the runs this process does")
    parser.add_argument("--shares", type=int, default=1, help="into how many shares they are divided")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop starting runs after this time")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.report:
        print(report(read(arguments.out)))
    else:
        extend(arguments.out, arguments.share, arguments.shares, arguments.minutes)


if __name__ == "__main__":
    main()

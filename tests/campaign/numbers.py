"""Runs that meet NaN and infinity: no rank may update, training goes on or stops as configured, the log says why."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from ranks.server import Job, Server
from safetensors.torch import load_file
from torch import Tensor

from gtddp_dist import checkpoint, cli
from gtddp_dist.errors import FAILED, OK
from gtddp_dist.training_state import model_tensors_of

from .files import Done, call
from .part import Case, Kind, Part, Row, yes
from .spoilt import STEPS, Spoil, spoilt

TOTAL = 10
AT = 5
IN_A_ROW = 3
"""train.max_nonfinite."""
WORDS = (
    "train",
    "digits",
    "run.dir=run",
    "model.width=4",
    f"train.steps={TOTAL}",
    "train.micro_batches=2",
    f"train.max_nonfinite={IN_A_ROW}",
    "schedule.name=constant",
    "checkpoint.every=2",
    "log.every=1",
    "log.progress=false",
    "log.tensorboard=false",
    "parallel.lost_after_s=20",
)
BY = {
    "gram": ("optimizer.name=gtddp-sgd", "optimizer.lr=0.1"),
    "factor": ("optimizer.name=gtddp-ekfac", "optimizer.lr=0.03", "optimizer.basis_every=1"),
}
"""Optimizers; the others are trained by the one of the config, gtddp-adam."""
MICRO_BATCH = "optimizer.scope=micro_batch"
REPLACE = "optimizer.control_hessian=replace"
"""Dense algebra that fails on NaN, where that of the default passes it on."""
NAMES = {
    "data": "the data, in sample 3 of the batch",
    "weight": "the weight '",
    "activation": "the activation that goes into module '",
    "gram": "the Gram matrix of stage ",
}
COLUMNS: dict[str, Kind] = {
    "what": "group",
    "value": "text",
    "where": "text",
    "how often": "group",
    "no rank updates": "holds",
    "goes on or stops": "holds",
    "says where from": "holds",
    "said": "text",
    "weights finite": "holds",
}


@functools.cache
def server() -> Server:
    """The process that forks ranks."""
    return Server()


def close() -> None:
    """Ends it."""
    if server.cache_info().currsize:
        server().close()
        server.cache_clear()


def alone(argv: Sequence[str], spoil: Spoil, folder: Path) -> Done:
    """In this process."""
    former = os.getcwd()
    os.chdir(folder)
    try:
        with spoilt(spoil):
            return call(lambda: cli.main(list(argv)))
    finally:
        os.chdir(former)


def on_ranks(argv: Sequence[str], spoil: Spoil, folder: Path) -> Done:
    """On two ranks, a segment each."""
    job = Job(
        "campaign.spoilt:work",
        2,
        folder,
        {"argv": [*argv, "parallel.pipe=2"], "spoil": asdict(spoil)},
        within_s=400,
    )
    (ended,) = server().run(job)
    codes = {one.code for one in ended}
    return Done(codes.pop() if len(codes) == 1 else -1, "".join(one.out + one.err for one in ended))


def run_case(what: str, value: str, where: str, stays: bool, option: str, folder: Path) -> Row:
    """One run."""
    rank = 0 if where == "one process" else int(where.rpartition(" ")[2])
    spoil = Spoil(what, value, rank, AT, TOTAL if stays else AT)
    argv = [*WORDS, *BY.get(what, ()), *([option] if option else [])]
    done = (alone if where == "one process" else on_ranks)(argv, spoil, folder)
    ranks = [0] if where == "one process" else [0, 1]
    steps = [json.loads((folder / STEPS.format(rank)).read_text()) for rank in ranks]
    if what == "factor":
        return factor(value, where, stays, done, steps)
    refused = [[number for number, (bad, _) in enumerate(one, start=1) if bad] for one in steps]
    still = [all(unchanged for bad, unchanged in one if bad) for one in steps]
    # A weight that is spoilt for good is the change itself; nothing else may change.
    ends = AT + IN_A_ROW - 1 if stays else TOTAL
    expected = list(range(AT, ends + 1)) if stays else [AT]
    names = NAMES[what] if where == "one process" else f", on rank {rank} (segment {rank + 1} of 2)"
    line = next((text for text in done.said.splitlines() if "was refused" in text), "")
    lines = [json.loads(text) for text in (folder / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line.get("train/refused", "") for line in lines if "train/refused" in line]
    holds = {
        "no rank updates": all(one == expected for one in refused) and all(still),
        "goes on or stops": done.code == (FAILED if stays else OK) and all(len(one) == ends for one in steps),
        "says where from": all(NAMES[what] in text and names in text for text in (line, *logged)) and bool(logged),
    }
    weights = model_of(folder / "run")
    holds["weights finite"] = bool(weights) and all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    problems = [name for name, held in holds.items() if not held]
    if problems:
        problems.append(f"refused {refused} of {[len(one) for one in steps]}, {still}, said: {done.said[-700:]}")
    values = {
        "what": what,
        "value": value,
        "where": where + (f", {option}" if option else ""),
        "how often": "from then on" if stays else "once",
        "said": line.partition("not finite was ")[2],
        **{name: yes(held) for name, held in holds.items()},
    }
    return Row(": no; ".join(problems), values)


def model_of(run: Path) -> dict[str, Tensor]:
    """The weights that a run has ended in, or that its newest checkpoint has."""
    if (run / "model.safetensors").exists():
        return load_file(run / "model.safetensors")
    newest, _ = checkpoint.newest_valid(run / "checkpoints")
    return {} if newest is None else model_tensors_of(newest)


def factor(value: str, where: str, stays: bool, done: Done, steps: Sequence[Sequence[Sequence[bool]]]) -> Row:
    """The row of a run with a bad factor: it stops at once, since all later ones are made of it."""
    line = next((text for text in done.said.splitlines() if "gtddp: error: module '" in text), "")
    holds = {
        "no rank updates": all(len(one) == AT and one[-1][1] for one in steps),
        "goes on or stops": done.code == FAILED,
        "says where from": "factor_a of the steps before is not finite" in line,
    }
    problems = [name for name, held in holds.items() if not held]
    if problems:
        problems.append(f"{[len(one) for one in steps]} steps, said: {done.said[-700:]}")
    values = {
        "what": "factor",
        "value": value,
        "where": where,
        "how often": "from then on" if stays else "once",
        "said": line,
        **{name: yes(held) for name, held in holds.items()},
    }
    return Row(": no; ".join(problems), values)


def cases(seed: int, quick: bool) -> list[Case]:
    """Everything with everything; nothing is random. `quick`: without infinity, and few with ranks."""
    found = []
    for what in (*NAMES, "factor"):
        for value in ("nan",) if quick else ("nan", "inf"):
            for where in ("one process", "rank 0", "rank 1"):
                if what == "data" and where == "rank 1":
                    continue  # the first segment reads images
                for stays in (False, True):
                    for option in ("", MICRO_BATCH, REPLACE) if what == "gram" else ("",):
                        if quick and (where == "rank 1" or stays or option == MICRO_BATCH) and what != "activation":
                            continue
                        key = "-".join([what, value, where.replace(" ", "-"), "stays" if stays else "once"])
                        key += {"": "", MICRO_BATCH: "-micro", REPLACE: "-replace"}[option]
                        run = functools.partial(run_case, what, value, where, stays, option)
                        found.append(Case(key, run, 900.0))
    return found


PART = Part(
    "numbers",
    "NaN and infinity",
    f"A run of {TOTAL} steps in one process, and on two ranks of which one meets a value that is not finite, at step "
    f"{AT} once or from then on (`train.max_nonfinite={IN_A_ROW}`). No rank may update at such a step; the run "
    "goes on, or stops after three (with a factor at once); the "
    "run's log and the terminal say what was not finite, on which rank.",
    COLUMNS,
    cases,
    close,
)

"""Training runs on several ranks that lose a rank, or are told to stop, at a random moment."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .part import Case, Kind, Part, Row, yes
from .processes import Program, started

STEPS = 60
WORDS = (
    "digits",
    "run.dir=run",
    "model.width=4",
    f"train.steps={STEPS}",
    "train.micro_batches=2",
    "schedule.name=constant",
    "checkpoint.every=10",
    "checkpoint.keep=3",
    f"eval.every={STEPS}",
    "log.every=1",
    "log.progress=false",
    "parallel.lost_after_s=5",
)
GRIDS = {
    "pipe=2": ("parallel.pipe=2",),
    "pipe=4": ("parallel.pipe=4",),
    "pipe=2,data=2": ("parallel.pipe=2", "parallel.data=2"),
}
WORLD = {"pipe=2": 2, "pipe=4": 4, "pipe=2,data=2": 4}
DATA = {"pipe=2": 1, "pipe=4": 1, "pipe=2,data=2": 2}
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT)
EACH = 25
"""Cases of a way to start ranks."""
QUICK = {
    "gtddp": (signal.SIGKILL,),
    "torchrun": (signal.SIGINT,),
    "mpirun": (signal.SIGINT,),
}
"""The faults of the quick form. How gtddp passes signals on, tests/test_launch.py shows; torchrun takes 30 s to end a
rank that was stopped; MPICH ends ranks before they can name the one that was killed (docs/reliability/found.md)."""
STARTING = 0.25
"""Share of the faults that come before the first step."""
TRAINS_WITHIN_S = 600.0
"""Until a run has ended to which nothing happens: importing torch on busy cores takes most of it."""
ENDS_WITHIN_S = 400.0
"""Until all have ended after a fault: one in the first seconds of a start is noticed after 180 s (rendezvous.py)."""
BIN = Path(sys.executable).parent

COLUMNS: dict[str, Kind] = {
    "fault": "group",
    "grid": "text",
    "to": "text",
    "moment": "text",
    "ended": "holds",
    "seconds to the end": "number",
    "names rank": "holds",
    "names segment": "holds",
    "names host": "holds",
    "says it stops": "holds",
    "nothing left": "holds",
    "left": "text",
    "continued": "text",
    "same weights": "holds",
}


@dataclass(frozen=True)
class Fault:
    """What happens, to whom, when.

    Attributes:
        grid: of the run.
        number: the signal.
        rank: who gets it; None: the program that has started the ranks, and with Ctrl-C its process group.
        starting: when it comes, as a share of the time until the first step; None: after `step`.
        step: the step after which it comes.
        delay_s: how long after that.
    """

    grid: str
    number: signal.Signals
    rank: int | None
    starting: float | None
    step: int
    delay_s: float

    @property
    def stops(self) -> bool:
        """Whether it asks for an end with a checkpoint."""
        return self.number in (signal.SIGTERM, signal.SIGINT)

    @property
    def moment(self) -> str:
        """For people."""
        return f"step {self.step}" if self.starting is None else f"{self.starting:.0%} of the start"

    def known(self, starter: str) -> dict[str, str]:
        """What the row says of it."""
        return {
            "fault": self.number.name,
            "grid": self.grid,
            "to": f"rank {self.rank}" if self.rank is not None else starter,
            "moment": self.moment,
        }


def ranks_by(starter: str, world: int, words: Sequence[str]) -> list[str]:
    """The command that starts so many ranks of `gtddp`."""
    gtddp = [sys.executable, "-m", "gtddp_dist", *words]
    return {
        "gtddp": gtddp,
        "torchrun": [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={world}", *gtddp[1:]],
        "mpirun": [str(BIN / "mpirun"), "-n", str(world), *gtddp],
    }[starter]


def draw(starter: str, seed: int) -> list[Fault]:
    """The faults of a seed. Grids and signals take turns; the rest is random."""
    faults = []
    for i in range(EACH):
        chance = random.Random(f"{seed} {starter} {i}")
        grid, number = list(GRIDS)[i % 3], SIGNALS[i % 4]
        rank: int | None = chance.randrange(WORLD[grid])
        if number in (signal.SIGTERM, signal.SIGINT) and chance.random() < 0.5:
            rank = None
        starting = chance.random() if chance.random() < STARTING else None
        faults.append(Fault(grid, number, rank, starting, max(1, chance.randrange(STEPS)), chance.uniform(0, 0.05)))
    return faults


def steps_of(run: Path) -> int:
    """How many steps were logged."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Unbroken:
    """A run to which nothing happened."""

    weights: dict[str, Tensor]
    begins_s: float
    """Until its first step."""


@functools.cache
def unbroken(grid: str) -> Unbroken:
    """The one of a grid; made when it is first asked for."""
    with tempfile.TemporaryDirectory(prefix="gtddp-") as name:
        folder = Path(name)
        words = ["train", *WORDS, *GRIDS[grid]]
        with started(folder, "unbroken", ranks_by("gtddp", WORLD[grid], words)) as program:
            program.waits_for(lambda: steps_of(folder / "run") > 0, TRAINS_WITHIN_S)
            begins_s = time.monotonic() - program.started
            program.ends(TRAINS_WITHIN_S)
            assert program.process.returncode == 0, program.text
        return Unbroken(weights_of(folder / "run"), begins_s)


def weights_of(run: Path) -> dict[str, Tensor]:
    """Of a run that has ended."""
    return load_file(run / "model.safetensors")


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether they are equal to the bit."""
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def strike(program: Program, fault: Fault, run: Path) -> float | None:
    """Waits for the moment, and does it; when that was, or None where the run had ended before."""
    if fault.starting is None:
        there = program.waits_for(lambda: steps_of(run) >= fault.step, TRAINS_WITHIN_S)
        time.sleep(fault.delay_s)
    else:
        # A rank cannot be struck before it is there. This start may be a quicker one than the other.
        there = program.waits_for(lambda: len(program.ranks()) == WORLD[fault.grid], TRAINS_WITHIN_S)
        at = program.started + fault.starting * unbroken(fault.grid).begins_s
        there &= program.waits_for(lambda: time.monotonic() >= at or steps_of(run) > 0, TRAINS_WITHIN_S)
    if not there or program.process.poll() is not None:
        return None
    try:
        if fault.rank is not None:
            os.kill(program.ranks()[fault.rank], fault.number)
        elif fault.number == signal.SIGINT:
            os.killpg(program.process.pid, fault.number)  # as a terminal does
        else:
            os.kill(program.process.pid, fault.number)
    except (KeyError, ProcessLookupError):
        return None
    return time.monotonic()


def named(text: str, rank: int, grid: str, host: str) -> dict[str, bool]:
    """Whether a line of gtddp's own tells which rank was lost, of which segment, on which host."""
    lines = [line for line in text.splitlines() if re.match(r"(\[rank \d+\] |\[.*?\]:)?gtddp: ", line)]
    about = [line for line in lines if re.search(rf"\brank {rank}\b", line)]
    segment = rank // DATA[grid] + 1
    return {
        "names rank": bool(about),
        "names segment": any(f"(segment {segment} of " in line for line in about),
        "names host": any(host in line for line in about),
    }


def go_on(folder: Path, starter: str, grid: str) -> tuple[str, dict[str, Tensor]]:
    """Continues the run, or starts it anew where it has not begun; how, and the weights that it ends in."""
    begun = (folder / "run" / "config.yaml").exists()
    words = ["train", "--resume", "run"] if begun else ["train", *WORDS, *GRIDS[grid]]
    with started(folder, "again", ranks_by(starter, WORLD[grid], words)) as program:
        program.ends(TRAINS_WITHIN_S)
        assert program.process.returncode == 0, f"{' '.join(words)} ended so: {program.text[-1500:]}"
        left = [path.name for path in (folder / "run").rglob("*") if is_temporary(path.name)]
        assert not left, f"left in the run directory: {left}"
    return ("resumed" if begun else "started anew"), weights_of(folder / "run")


def is_temporary(name: str) -> bool:
    """Whether it is the name of a file or folder that is there only while something is written."""
    return ".partial" in name or name.startswith(("unfinished-", ".removed-"))


def run_case(starter: str, fault: Fault, folder: Path) -> Row:
    """One run, its fault, and the run that continues it."""
    expected = unbroken(fault.grid)
    run = folder / "run"
    values = fault.known(starter)
    problems = []
    argv = ranks_by(starter, WORLD[fault.grid], ["train", *WORDS, *GRIDS[fault.grid]])
    with started(folder, "first", argv) as program:
        struck = strike(program, fault, run)
        before_steps = steps_of(run) == 0
        try:
            at = program.ends(ENDS_WITHIN_S)
            values |= {"ended": "yes"}
            if struck is not None:
                values["seconds to the end"] = f"{at - struck:.1f}"
        except TimeoutError as error:
            values |= {"ended": "no"}
            problems.append(f"not ended: {error}")
            program.kill()
        left = [one for one in program.leftovers() if not is_the_starters(one)]
        values |= {"nothing left": yes(not left), "left": " ".join(left)}
        if left:
            problems.append(f"left: {' '.join(left)}")
        text = program.text
        done = program.process.returncode == 0
    if struck is None:
        values["moment"] = f"{values['moment']}, after the end"
        problems.append("nothing has befallen it: it had ended")
    elif done and (run / "model.safetensors").exists():
        values["moment"] = f"{values['moment']}, too late"
    elif fault.stops:
        says = "stopped by" in text
        values["says it stops"] = "-" if before_steps else yes(says)
        if not says and not before_steps:
            problems.append(f"does not say that it stops: {text[-600:]}")
    else:
        assert fault.rank is not None
        found = named(text, fault.rank, fault.grid, socket.gethostname())
        if before_steps:
            found.pop("names segment")  # ranks may not have met
        values |= {column: yes(holds) for column, holds in found.items()}
        problems += [f"{column}: no" for column, holds in found.items() if not holds]
    values["continued"], weights = go_on(folder, starter, fault.grid)
    values["same weights"] = yes(same(weights, expected.weights))
    if values["same weights"] == "no":
        problems.append("the run that was continued ends in other weights")
    if problems and "said" not in " ".join(problems):
        problems.append(f"said: {text[-400:]}")
    return Row("; ".join(problems), values)


def is_the_starters(left: str) -> bool:
    """Whether torchrun itself leaves this where it is told to stop: the folder of its logs, which is empty."""
    return left.startswith("$TMPDIR/torchelastic_")


def cases_of(starter: str) -> Callable[[int, bool], list[Case]]:
    """The cases of a way to start ranks."""

    def cases(seed: int, quick: bool) -> list[Case]:
        faults = draw(starter, seed)
        chosen = list(range(len(faults)))
        if quick:
            during = [i for i, fault in enumerate(faults) if fault.starting is None and fault.grid == "pipe=2"]
            chosen = [next(i for i in during if faults[i].number == number) for number in QUICK[starter]]
        within_s = 2 * TRAINS_WITHIN_S + ENDS_WITHIN_S + TRAINS_WITHIN_S
        return [
            Case(f"{starter}-{i}", functools.partial(run_case, starter, fault), within_s, known=fault.known(starter))
            for i, fault in ((i, faults[i]) for i in chosen)
        ]

    return cases


PARTS = [
    Part(
        f"kills-{starter}",
        f"Ranks killed, stopped and told to stop, started by {starter}",
        f"{EACH} runs of {STEPS} steps on DIGITS with a checkpoint every 10, each with one fault at a random moment; "
        f"a quarter of the faults come while ranks start. `parallel.lost_after_s=5`.",
        COLUMNS,
        cases_of(starter),
    )
    for starter in ("gtddp", "torchrun", "mpirun")
]

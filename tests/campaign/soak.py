"""Long runs: what a rank holds must not grow, and stopping often must change nothing."""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranks.server import Job

from gtddp_dist import train
from gtddp_dist.config import load_config
from gtddp_dist.errors import OK, REQUEUE

from . import numbers
from .files import call, resume, stopped_at
from .kills import ranks_by, same, steps_of, weights_of
from .part import Case, Kind, Part, Row, yes
from .processes import Program, started

STEPS, QUICK_STEPS = 5000, 200
CYCLES, QUICK_CYCLES = 50, 5
RANKS_CYCLES = 50
EVERY = 2
"""Steps of a cycle."""
SAMPLES = 200
WARM = 0.2
"""Share of the steps in which caches fill."""
GROWS_MB = 20.0
"""Memory that a rank may gain over the steps after that."""
SLOWER = 1.25
"""CPU time a step in the last third, as a multiple of that in the first one."""
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

COLUMNS: dict[str, Kind] = {
    "what": "group",
    "steps": "number",
    "memory MB": "number",
    "MB gained over 1000 steps": "number",
    "descriptors": "number",
    "threads": "number",
    "ms a step": "number",
    "CPU ms a step": "number",
    "CPU ms gained over 1000 steps": "number",
    "first and last": "text",
    "flat": "holds",
    "same weights": "holds",
}
WORDS = (
    "model.width=4",
    "train.micro_batches=2",
    "schedule.name=constant",
    "log.progress=false",
)


@dataclass(frozen=True)
class Sample:
    """What a process holds after some steps."""

    step: int
    memory_mb: float
    descriptors: int
    threads: int
    cpu_s: float
    at_s: float


def sample(process: int, step: int) -> Sample:
    """Now."""
    folder = Path(f"/proc/{process}")
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    memory_mb = int((folder / "statm").read_text().split()[1]) * PAGE_MB
    cpu_s = (int(fields[11]) + int(fields[12])) * TICK_S
    return Sample(step, memory_mb, len(os.listdir(folder / "fd")), int(fields[17]), cpu_s, time.monotonic())


def slope(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    """By how much it grows over 1000 steps: least squares."""
    steps = [one.step for one in samples]
    found = statistics.linear_regression(steps, [of(one) for one in samples])
    return 1000 * found.slope


def pace(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    """Milliseconds a step between the first and the last of them."""
    return 1000 * (of(samples[-1]) - of(samples[0])) / max(1, samples[-1].step - samples[0].step)


def watched(program: Program, run: Path, steps: int, log_every: int) -> dict[int, list[Sample]]:
    """Samples of each rank, about `SAMPLES` over the run."""
    found: dict[int, list[Sample]] = {}
    wanted = 0

    def look() -> bool:
        nonlocal wanted
        step = steps_of(run) * log_every
        if step <= wanted and step < steps:
            time.sleep(0.1)
            return False
        try:
            for rank, process in program.ranks().items():
                if step < steps:
                    found.setdefault(rank, []).append(sample(process, step))
        except FileNotFoundError:  # it has just ended
            return True
        wanted = step + max(0, steps // SAMPLES - log_every)
        return step >= steps

    program.waits_for(look, 3000.0)
    return found


def long_run(steps: int, folder: Path) -> Row:
    """Two ranks, for many steps."""
    log_every = max(1, steps // SAMPLES)
    words = [
        "train",
        "digits",
        *WORDS,
        "run.dir=run",
        "parallel.pipe=2",
        f"train.steps={steps}",
        f"log.every={log_every}",
        f"checkpoint.every={steps // 20}",
        f"eval.every={steps // 10}",
    ]
    with started(folder, "run", ranks_by("gtddp", 2, words)) as program:
        ranks = watched(program, folder / "run", steps, log_every)
        program.ends(300.0)
        code = program.process.returncode
        left = program.leftovers()
    problems = [] if code == OK else [f"exit code {code}: {program.text[-500:]}"]
    if left:
        problems.append(f"left: {left}")
    worst: dict[str, float] = {}
    told = []
    for rank, every in sorted(ranks.items()):
        warm = [one for one in every if one.step >= WARM * steps]
        third = len(warm) // 3
        early, late = (pace(part, lambda one: one.cpu_s) for part in (warm[:third], warm[-third:]))
        memory = slope(warm, lambda one: one.memory_mb)
        gained = memory * (1 - WARM) * steps / 1000
        descriptors, threads = (
            (max(get(one) for one in warm[:third]), max(get(one) for one in warm[-third:]))
            for get in (lambda one: one.descriptors, lambda one: one.threads)
        )
        told.append(
            f"rank {rank}: {warm[0].memory_mb:.1f} to {warm[-1].memory_mb:.1f} MB, {descriptors[0]} to "
            f"{descriptors[1]} descriptors, {threads[0]} to {threads[1]} threads, {early:.1f} to {late:.1f} CPU ms a "
            "step"
        )
        if gained > GROWS_MB or descriptors[1] > descriptors[0] or threads[1] > threads[0] or late > SLOWER * early:
            problems.append(told[-1])
        for name, value in {
            "memory MB": warm[-1].memory_mb,
            "MB gained over 1000 steps": memory,
            "descriptors": descriptors[1],
            "threads": threads[1],
            "ms a step": pace(warm, lambda one: one.at_s),
            "CPU ms a step": pace(warm, lambda one: one.cpu_s),
            "CPU ms gained over 1000 steps": (late - early) / (warm[-1].step - warm[0].step) * 1000,
        }.items():
            worst[name] = max(worst.get(name, value), value)
    values = {
        "what": "pipe=2, the larger of its ranks",
        "steps": str(steps),
        **{name: f"{value:.4g}" for name, value in worst.items()},
        "first and last": "; ".join(told),
        "flat": yes(not problems),
    }
    return Row("; ".join(problems), values)


def cycles(count: int, folder: Path) -> Row:
    """One process that is stopped after every `EVERY` steps by a signal, and continued."""
    steps = EVERY * (count + 1)
    words = [
        *WORDS,
        f"train.steps={steps}",
        f"checkpoint.every={steps}",
        f"eval.every={steps}",
        "log.every=1",
        "log.tensorboard=false",
    ]
    for name in ("whole", "cycles"):
        config = load_config("digits", [*words, f"run.dir={folder / name}"])
        if name == "whole":
            done = call(lambda config=config: train.run_training(config, "digits"))  # type: ignore[misc]
            assert done.code == OK, done.said
            continue
        with stopped_at(EVERY):
            done = call(lambda config=config: train.run_training(config, "digits"))  # type: ignore[misc]
        assert done.code == REQUEUE, done.said
    first = sample(os.getpid(), 0)
    for number in range(2, count + 1):
        with stopped_at(EVERY * number):
            done = resume(folder / "cycles")
        assert done.code == REQUEUE, f"cycle {number}: {done.said}"
    last = sample(os.getpid(), steps)
    done = resume(folder / "cycles")
    assert done.code == OK, done.said
    equal = same(weights_of(folder / "cycles"), weights_of(folder / "whole"))
    logged = steps_logged(folder / "cycles") == list(range(1, steps + 1))
    problems = [] if equal and logged else [f"same weights {equal}, each step logged once {logged}"]
    values = {
        "what": f"{count} times stopped and continued, one process",
        "steps": str(steps),
        "first and last": f"{first.memory_mb:.1f} to {last.memory_mb:.1f} MB, {first.descriptors} to "
        f"{last.descriptors} descriptors, {first.threads} to {last.threads} threads",
        "same weights": yes(equal),
    }
    return Row("; ".join(problems), values)


def steps_logged(run: Path) -> list[int]:
    """In their order."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def cycles_on_ranks(count: int, folder: Path) -> Row:
    """The same on two ranks."""
    steps = EVERY * (count + 1)
    argv = [
        "train",
        "digits",
        *WORDS,
        f"train.steps={steps}",
        f"checkpoint.every={steps}",
        f"eval.every={steps}",
        "log.every=1",
        "log.tensorboard=false",
        "run.dir=run",
        "parallel.pipe=2",
        "parallel.lost_after_s=20",
    ]

    def on_ranks(name: str, argv: Sequence[str], stop_at: int | None, code: int) -> None:
        arguments: dict[str, object] = {"argv": list(argv)}
        if stop_at is not None:
            arguments["stop_at"] = stop_at
        (ended,) = numbers.server().run(Job("ranks.command:work", 2, folder / name, arguments, within_s=400))
        assert [one.code for one in ended] == [code, code], "".join(one.out + one.err for one in ended)

    on_ranks("whole", argv, None, OK)
    on_ranks("cycles", argv, EVERY, REQUEUE)
    for number in range(2, count + 1):
        on_ranks("cycles", ["train", "--resume", "run"], EVERY * number, REQUEUE)
    on_ranks("cycles", ["train", "--resume", "run"], None, OK)
    equal = same(weights_of(folder / "cycles" / "run"), weights_of(folder / "whole" / "run"))
    logged = steps_logged(folder / "cycles" / "run") == list(range(1, steps + 1))
    problems = [] if equal and logged else [f"same weights {equal}, each step logged once {logged}"]
    values = {
        "what": f"{count} times stopped and continued, two ranks",
        "steps": str(steps),
        "same weights": yes(equal),
    }
    return Row("; ".join(problems), values)


def cases(seed: int, quick: bool) -> list[Case]:
    """Three; nothing is random."""
    if quick:
        return [Case(f"cycles-{QUICK_CYCLES}", functools.partial(cycles, QUICK_CYCLES), 600.0)]
    return [
        Case(f"cycles-{CYCLES}", functools.partial(cycles, CYCLES), 1800.0),
        Case(f"cycles-ranks-{RANKS_CYCLES}", functools.partial(cycles_on_ranks, RANKS_CYCLES), 1800.0),
        Case(f"steps-{STEPS}", functools.partial(long_run, STEPS), 3600.0),
    ]


PART = Part(
    "soak",
    "Long runs",
    f"{STEPS} steps on DIGITS on two ranks, about {SAMPLES} looks at each: after the first {WARM:.0%} of the steps "
    f"memory may grow by {GROWS_MB:.0f} MB, descriptors and threads not at all, CPU time a step by a quarter. (The "
    "time of a step also depends on what else the machine does; it is told, and not judged.) And runs that are stopped "
    "by a signal every second step and continued: they have to end in the weights of one that was not.",
    COLUMNS,
    cases,
    numbers.close,
)

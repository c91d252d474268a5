"""Checkpoints that are damaged, and folders that cannot be written: nothing may be lost but the work since the last
checkpoint that is whole, and it has to be said."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm.cluster import PACE, ROOT

from gtddp_dist import checkpoint, train
from gtddp_dist.checkpoint import INDEX
from gtddp_dist.config import load_config
from gtddp_dist.errors import BAD_INPUT, FAILED, OK, REQUEUE, UserError
from gtddp_dist.training_state import Progress

from .kills import is_temporary, ranks_by, same, weights_of
from .part import Case, Kind, Part, Row, yes
from .processes import started

STEPS, STOPPED, EVERY = 12, 10, 3
"""Of a run with checkpoints at 3, 6, 9, that was stopped at 10."""
WORDS = (
    "model.width=4",
    f"train.steps={STEPS}",
    "schedule.name=constant",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=3",
    f"eval.every={STEPS}",
    "log.every=1",
    "log.progress=false",
    "log.tensorboard=false",
    "parallel.lost_after_s=5",
)
TWO = ("train.micro_batches=2", "parallel.pipe=2")
CASE_S = 300.0
PROCESSES_S = 900.0

COLUMNS: dict[str, Kind] = {
    "what": "group",
    "where": "text",
    "refused": "holds",
    "says so": "holds",
    "continues at": "text",
    "lost steps": "number",
    "same weights": "holds",
}


@dataclass(frozen=True)
class Done:
    """A call in this process: its exit code, or that of the UserError that it raised, and all that it said."""

    code: int
    said: str


def call(work: Callable[[], int]) -> Done:
    """Does it, as the command would."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = work()
        except UserError as error:
            code = error.exit_code
            print(f"gtddp: error: {error}", file=sys.stderr)
    return Done(code, said.getvalue())


def begin(run: Path, *words: str) -> Done:
    """Trains in a new run directory, in this process."""
    config = load_config("digits", [*WORDS, *words, f"run.dir={run}"])
    return call(lambda: train.run_training(config, "digits"))


def resume(run: Path) -> Done:
    """Continues a run, in this process."""
    return call(lambda: train.resume_training(run))


@contextmanager
def before_each_step(do: Callable[[int], None]) -> Iterator[None]:
    """Has this process do something whenever a step has been taken: `do` gets its number."""
    count = Progress.count

    def counted(progress: Progress, *arguments: object) -> None:
        count(progress, *arguments)  # type: ignore[arg-type]
        do(progress.step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "count", counted)
        yield


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Has a run in this process be stopped with a checkpoint of that step, by a real signal."""

    def stop(at: int) -> None:
        if at == step:
            os.kill(os.getpid(), 15)

    with before_each_step(stop):
        yield


@dataclass(frozen=True)
class Runs:
    """Two runs that all cases share: one that nothing happened to, and one that was stopped."""

    folder: Path

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    @property
    def stopped(self) -> Path:
        return self.folder / "stopped"

    def same(self, run: Path) -> bool:
        """Whether a run has ended in the weights of the whole one."""
        return same(weights_of(run), weights_of(self.whole))


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gtddp-"))


@functools.cache
def runs() -> Runs:
    """Those of one process."""
    found = Runs(_folder())
    done = begin(found.whole)
    assert done.code == OK, done.said
    with stopped_at(STOPPED):
        done = begin(found.stopped)
    assert done.code == REQUEUE, done.said
    return found


def gtddp(folder: Path, name: str, *words: str) -> Done:
    """The command, as processes of its own."""
    with started(folder, name, ranks_by("gtddp", 1, words)) as program:
        program.ends(PROCESSES_S / 3)
        return Done(program.process.returncode, program.text)


@functools.cache
def runs_on_ranks() -> Runs:
    """Those of two ranks."""
    found = Runs(_folder() / "ranks")
    found.folder.mkdir()
    for name, at in (("whole", None), ("stopped", STOPPED)):
        words = ["train", "digits", *WORDS, *TWO, f"run.dir={name}"]
        if at is None:
            done = gtddp(found.folder, name, *words)
            assert done.code == OK, done.said
            continue
        # A run of as many steps is one that was stopped there, but for its configuration.
        done = gtddp(found.folder, name, *[f"train.steps={at}" if "train.steps" in w else w for w in words])
        assert done.code == OK, done.said
        file = found.stopped / "config.yaml"
        file.write_text(file.read_text().replace(f"steps: {at}", f"steps: {STEPS}"))
        for ended in ("summary.json", "model.safetensors", "curves.png"):
            (found.stopped / ended).unlink()
    return found


def close() -> None:
    """Removes what the cases have shared."""
    shutil.rmtree(_folder(), ignore_errors=True)
    for cached in (_folder, runs, runs_on_ranks):
        cached.cache_clear()


def newest(run: Path) -> Path:
    """Folder of the checkpoint at which it was stopped."""
    return checkpoint.folder_of(run / "checkpoints", STOPPED)


def continued(what: str, where: str, file: str, done: Done, run: Path, expected: Runs, *, harmless: bool) -> Row:
    """The row of a run that had a damaged checkpoint, and was continued. `harmless`: its content may be as before."""
    problems = []
    refused = "checkpoint not used" in done.said
    says = file in done.said and newest(run).name in done.said
    at = next((step for step in range(STEPS + 1) if f" at step {step} of" in done.said), None)
    equal = done.code == OK and expected.same(run)
    if done.code != OK:
        problems.append(f"exit code {done.code}")
    if not harmless and (at, refused, says) != (STOPPED - STOPPED % EVERY, True, True):
        problems.append("it was not said, or the checkpoint before was not used")
    if not equal:
        problems.append("ends in other weights")
    if left := [path.name for path in run.rglob("*") if is_temporary(path.name)]:
        problems.append(f"left: {left}")
    if problems:
        problems.append(f"said: {done.said[-500:]}")
    values = {
        "what": what,
        "where": where,
        "refused": yes(refused),
        "says so": yes(says) if refused else "-",
        "continues at": str(at),
        "lost steps": "-" if at is None else str(STOPPED - at),
        "same weights": yes(equal),
    }
    return Row("; ".join(problems), values)


def damaged(what: str, number: int, seed: int, folder: Path) -> Row:
    """Truncates a file of the newest checkpoint at a random offset, or flips a random byte of it."""
    chance = random.Random(f"{seed} {what} {number}")
    run = folder / "run"
    shutil.copytree(runs().stopped, run)
    files = sorted(newest(run).iterdir())
    file = chance.choices(files, [1.0 if path.name == INDEX else 3.0 for path in files])[0]
    content = bytearray(file.read_bytes())
    offset = chance.randrange(len(content))
    harmless = False
    if what == "truncated":
        del content[offset:]
        # The index ends with a line end that says nothing.
        harmless = file.name == INDEX and offset == len(file.read_bytes()) - 1
    else:
        content[offset] ^= chance.randrange(1, 256)
        harmless = file.name == INDEX and bytes([file.read_bytes()[offset], content[offset]]).isspace()
    file.write_bytes(content)
    return continued(what, f"{file.name} at {offset}", file.name, resume(run), run, runs(), harmless=harmless)


def missing(what: str, folder: Path) -> Row:
    """Takes away a file of the newest checkpoint of two ranks."""
    run = folder / "run"
    shutil.copytree(runs_on_ranks().stopped, run)
    name = {
        "shard missing": "shard-00001-of-00002.safetensors",
        "first shard missing": "shard-00000-of-00002.safetensors",
        "index missing": INDEX,
    }[what]
    (newest(run) / name).unlink()
    done = gtddp(folder, "resumed", "train", "--resume", "run")
    return continued(what, name, name, done, run, runs_on_ranks(), harmless=False)


def all_damaged(folder: Path) -> Row:
    """No checkpoint is whole: refused, and nothing is changed."""
    run = folder / "run"
    shutil.copytree(runs().stopped, run)
    for index in run.glob(f"checkpoints/*/{INDEX}"):
        index.write_text("{}")
    before = content_of(run)
    return refusal("every checkpoint damaged", resume(run), run, before, INDEX, BAD_INPUT)


def content_of(run: Path) -> Mapping[str, bytes]:
    """All files, but the history and the lock, which a start that is refused may write."""
    kept = (path for path in run.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in kept if path.name != "history.jsonl"}


def refusal(what: str, done: Done, run: Path, before: Mapping[str, bytes], names: str, code: int) -> Row:
    """The row of something that has to be refused, with nothing changed."""
    problems = []
    if done.code != code:
        problems.append(f"exit code {done.code}")
    if names not in done.said:
        problems.append(f"does not name {names}")
    if content_of(run) != before:
        problems.append("files were changed")
    if problems:
        problems.append(f"said: {done.said[-500:]}")
    values = {"what": what, "refused": yes(done.code == code), "says so": yes(names in done.said)}
    return Row("; ".join(problems), values)


def mount(*words: str) -> None:
    """As root."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, f"mount {' '.join(words)}: {done.stderr}"


@contextmanager
def mounted(at: Path, *words: str) -> Iterator[Path]:
    """A file system there, as long as the block runs."""
    at.mkdir(exist_ok=True)
    mount(*words, str(at))
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=False, timeout=20)


def full_disk(checkpoints: float, folder: Path) -> Row:
    """A disk with room for so many checkpoints; then it gets more room, and the run goes on."""
    size = sum(path.stat().st_size for path in newest(runs().stopped).iterdir())
    other = sum(p.stat().st_size for p in runs().stopped.iterdir() if p.is_file())
    blocks = int((checkpoints * size + other) / 4096) + 8
    with mounted(folder / "disk", "-t", "tmpfs", "-o", f"size={blocks * 4096}", "gtddp") as disk:
        run = disk / "run"
        done = begin(run)
        problems = []
        says = "No space left on device" in done.said and "gtddp: error" in done.said
        if done.code == OK:
            problems.append("it did not fail")
        elif done.code not in (FAILED, BAD_INPUT) or not says:
            problems.append(f"exit code {done.code}, or it does not say so: {done.said[-500:]}")
        whole, _ = checkpoint.newest_valid(run / "checkpoints")
        mount("-o", "remount,size=64m", str(disk))
        again = resume(run) if (run / "config.yaml").exists() else begin(run)
        equal = again.code == OK and runs().same(run)
        if not equal:
            problems.append(f"with more room: exit code {again.code}, or other weights: {again.said[-500:]}")
        if left := [path.name for path in run.rglob("*") if is_temporary(path.name)]:
            problems.append(f"left: {left}")
    values = {
        "what": "disk full while training",
        "where": f"room for {checkpoints} checkpoints",
        "refused": "-",
        "says so": yes(says),
        "continues at": "begins" if whole is None else str(whole.step),
        "same weights": yes(equal),
    }
    return Row("; ".join(problems), values)


def read_only(how: str, folder: Path) -> Row:
    """A read-only bind mount: what root cannot write either."""
    run = folder / "run"
    if how == "in the middle":
        return _read_only_later(run)
    shutil.copytree(runs().stopped, run)
    before = content_of(run)
    with mounted(run, "--bind", str(run)):
        mount("-o", "remount,ro,bind", str(run))
        done = resume(run) if how == "resumed" else begin(run / "new")
        return refusal(f"read-only, {how}", done, run, before, str(run), BAD_INPUT)


def _read_only_later(run: Path) -> Row:
    checkpoints = run / "checkpoints"

    def lock_away(step: int) -> None:
        if step == EVERY + 1:  # what is open for writing elsewhere would keep a mount of the whole directory busy
            mount("--bind", str(checkpoints), str(checkpoints))
            mount("-o", "remount,ro,bind", str(checkpoints))

    try:
        with before_each_step(lock_away):
            done = begin(run)
    finally:
        subprocess.run(["umount", "--lazy", str(checkpoints)], check=False, timeout=20)
    says = "Read-only file system" in done.said and "gtddp: error" in done.said
    problems = [] if done.code == FAILED and says else [f"exit code {done.code}, or not said: {done.said[-500:]}"]
    again = resume(run)
    equal = again.code == OK and runs().same(run)
    if not equal:
        problems.append(f"writable again: exit code {again.code}, or other weights: {again.said[-500:]}")
    values = {"what": "read-only, in the middle", "says so": yes(says), "same weights": yes(equal)}
    return Row("; ".join(problems), values)


def second_run(ranks: bool, resumes: bool, folder: Path) -> Row:
    """Another process wants a directory in which one trains: it is refused, and the first ends as it would have."""
    words = ["train", "digits", *WORDS, *(TWO if ranks else ()), "run.dir=run"]
    expected = runs_on_ranks() if ranks else runs()
    run = folder / "run"
    slowly = {"PACE_S": "2", "PYTHONPATH": os.pathsep.join([str(PACE), str(ROOT), str(ROOT / "tests")])}
    with started(folder, "first", ranks_by("gtddp", 1, words), slowly) as first:
        first.waits_for((run / "metrics.jsonl").exists, PROCESSES_S / 3)
        done = gtddp(folder, "second", *(["train", "--resume", "run"] if resumes else words))
        ends_later = first.process.poll() is None
        first.ends(PROCESSES_S / 3)
        problems = [] if done.code == BAD_INPUT and "run" in done.said else [f"exit code {done.code}: {done.said}"]
        if not ends_later:
            problems.append("the first had ended already: no test")
        equal = first.process.returncode == OK and expected.same(run)
        if not equal:
            problems.append(f"the first: exit code {first.process.returncode}: {first.text[-500:]}")
    values = {
        "what": "two runs in one directory",
        "where": f"{'ranks' if ranks else 'one process'}, {'resumed' if resumes else 'new'}",
        "refused": yes(done.code == BAD_INPUT),
        "says so": yes("run" in done.said),
        "same weights": yes(equal),
    }
    return Row("; ".join(problems), values)


def cases(seed: int, quick: bool) -> list[Case]:
    """All; of the quick ones those in this process, and one with ranks."""
    each = 2 if quick else 50
    found = [
        Case(f"{what}-{i}", functools.partial(damaged, what, i, seed), CASE_S)
        for what in ("truncated", "flipped")
        for i in range(each)
    ]
    found.append(Case("every-checkpoint-damaged", all_damaged, CASE_S))
    found += [
        Case(f"full-disk-{room}", functools.partial(full_disk, room), CASE_S, needs_root=True)
        for room in ((1.5,) if quick else (0.5, 1.5, 2.5, 3.5))
    ]
    found += [
        Case(f"read-only-{how.replace(' ', '-')}", functools.partial(read_only, how), CASE_S, needs_root=True)
        for how in ("resumed", "new", "in the middle")
    ]
    if quick:
        return found
    found += [
        Case(what.replace(" ", "-"), functools.partial(missing, what), PROCESSES_S)
        for what in ("shard missing", "first shard missing", "index missing")
    ]
    found += [
        Case(
            f"two-runs-{'ranks' if ranks else 'alone'}-{'resumed' if resumes else 'new'}",
            functools.partial(second_run, ranks, resumes),
            PROCESSES_S,
        )
        for ranks in (False, True)
        for resumes in (False, True)
    ]
    return found


PART = Part(
    "files",
    "Damaged checkpoints, full and read-only disks",
    f"A run of {STEPS} steps with a checkpoint every {EVERY} was stopped at step {STOPPED}; its newest checkpoint is "
    "damaged, and the run continued. It has to say which checkpoint it cannot use, go on at the one before, and end in "
    "the weights of a run to which nothing happened. Disks are small file systems in memory; mounts need root.",
    COLUMNS,
    cases,
    close,
)

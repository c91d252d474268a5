"""Does units of work in worker processes, and keeps what they come to."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import cast

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..checkpoint import JSON
from ..environment import describe_environment, prepare_cpu
from ..errors import UserError
from ..launch import StopRequest
from ..launch.local import end_with_parent
from .unit import Result, Results, Unit

RESULTS = "results.jsonl"
LOCK = ".lock"
_LOOK_S = 0.5
"""Seconds after which a stop is noticed."""


class Stopped(Exception):
    """The command was asked to stop; what is done is kept."""


@dataclass(frozen=True)
class Origin:
    """Where and when a result was measured."""

    date: str
    revision: str
    cpu: str
    versions: str

    @classmethod
    def here(cls) -> Origin:
        """This machine and code, today."""
        facts = describe_environment()
        git = cast(Mapping[str, JSON] | None, facts["git"])
        changed = " with changes" if git is not None and git["changed"] else ""
        revision = "no git checkout" if git is None else f"{str(git['revision'])[:12]}{changed}"
        cpu = cast(Mapping[str, JSON], facts["cpu"])
        gpus = [str(cast(Mapping[str, JSON], gpu)["name"]) for gpu in cast(list[JSON], facts["gpus"])]
        machine = ", ".join([f"{cpu['model']}, {cpu['usable_cores']} cores", *gpus])
        versions = f"Python {facts['python']}, torch {torch.__version__}"
        return cls(f"{datetime.now(timezone.utc):%Y-%m-%d}", revision, machine, versions)


class Pool:
    """Results of units in `OUT/results.jsonl`, and processes that add to them.

    Use it as a context: a second command on the same folder is kept out, and no process is left behind.

    Args:
        out: the folder; it is made.
        jobs: units at a time.

    Raises:
        UserError: the folder cannot be made or is in use, or its results cannot be read.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        self.file, self.jobs = out / RESULTS, jobs
        self.results = Results()
        self.origins: dict[str, Origin] = {}
        self._origin = Origin.here()
        self._stack = contextlib.ExitStack()
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.file.parent} cannot be made: {error}") from error
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.file.parent))
            self._read()
            self._stop = stack.enter_context(StopRequest())
            stack.push(self._end_workers)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def do(self, units: Sequence[Unit], label: str) -> None:
        """Does those that have no result yet. Raises Stopped where the command was asked to stop, and whatever a unit
        raises."""
        missing = list({unit.key: unit for unit in units if unit.key not in self.results}.values())
        crowd, alone = [u for u in missing if not u.alone], [u for u in missing if u.alone]
        with tqdm(total=len(missing), desc=label, unit="unit", disable=not missing or None) as bar:
            self._do(crowd, self.jobs, bar)
            self._do(alone, 1, bar)

    def _do(self, units: Sequence[Unit], at_once: int, bar: tqdm[None]) -> None:
        waiting, running = list(reversed(units)), dict[Future[Result], Unit]()
        while waiting or running:
            while waiting and len(running) < at_once:
                unit = waiting.pop()
                running[self._workers().submit(unit.do)] = unit
            done, _ = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
            if self._stop.requested:
                raise Stopped
            for future in done:
                unit = running.pop(future)
                self._keep(unit, future.result())
                bar.update()

    def _workers(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Spawned: a forked process would have torch's threads half alive.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                self.jobs, context, initializer=_begin, initargs=(self.jobs, os.getpid())
            )
        return self._executor

    def _end_workers(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is not None:
            for process in multiprocessing.active_children() if kind is not None else ():
                process.terminate()  # who trains ends after its step
            self._executor.shutdown(cancel_futures=True)

    def _keep(self, unit: Unit, result: Result) -> None:
        try:
            json.dumps(result, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{unit.function}({unit.arguments}): a result that is not finite") from error
        self.results[unit.key] = result
        self.origins[unit.key] = self._origin
        line = {
            "key": unit.key,
            "function": unit.function,
            "arguments": json.loads(unit.arguments),
            "origin": vars(self._origin),
            "result": result,
        }
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        """Takes what is in the file; a last line that somebody was stopped in is cut off."""
        if not self.file.exists():
            return
        text = self.file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(self.file, whole)
        for number, line in enumerate(text[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.results[entry["key"]] = entry["result"]
                self.origins[entry["key"]] = Origin(**entry["origin"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.file}, line {number}: is no result of gtddp reproduce ({error!r}): remove the line, "
                    "or the "
                    "file, to measure anew"
                ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another gtddp reproduce is at work in {folder}: wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _begin(jobs: int, parent: int) -> None:
    """A worker's start: an even share of the cores, where a configuration names no number of threads."""
    end_with_parent(parent)  # a pool that is killed cannot end it
    prepare_cpu(max(1, len(os.sched_getaffinity(0)) // jobs))

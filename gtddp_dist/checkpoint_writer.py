"""Checkpoints of many ranks, written while training goes on.

    rank 0   save -> copy | shard, note ... all notes are there -> index.json -> rename -> prune
    rank r   save -> copy | shard, note

What is right of the bar happens in a thread. Ranks talk through files in the shared folder alone: a collective
outside the main thread could meet one of the training step and hang both.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TypedDict, cast

from torch import Tensor

from . import checkpoint
from .checkpoint import JSON, CheckpointWriteError, ShardEntry
from .files import write_text_atomically
from .launch.pause import Pause

_LOG = logging.getLogger(__name__)


class _Note(TypedDict):
    """What a rank puts beside its shard for the one that writes the index."""

    attempt: str
    rank: int
    world: int
    shard: ShardEntry | None
    """None where the rank has no tensors."""
    values: dict[str, JSON]
    problem: str
    """Why there is no shard; empty where all went well."""


class Writer:
    """Writes the checkpoints of a run, one at a time, in a thread of every rank.

    Each save is written in a folder whose name holds `attempt`, a word that all ranks give it and no other save has;
    only when complete is that folder renamed to the one that is loaded. So no rank has to wait for another to make
    or to clear the folder, and what an interrupted write of the same step left (of as many ranks or of other
    numbers of them, however slow their file system) lies in another folder, where nobody looks for it.

    Args:
        directory: that of the checkpoints; one folder that all ranks see.
        rank: this rank. Rank 0 completes the checkpoints and removes old ones.
        world: how many ranks write.
        keep: how many complete checkpoints stay.
        timeout_s: how long, in seconds, rank 0 waits for the shards of the others once its own is written.
        grace_s: how long, in seconds, an exception that leaves the `with` block waits for a save that goes on.

    Not to be used by several threads at once. Leaving the `with` block waits for the last save.
    """

    def __init__(
        self, directory: Path, rank: int, world: int, keep: int, *, timeout_s: float = 600.0, grace_s: float = 30.0
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world} ranks")
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least the newest checkpoint has to stay")
        self._directory, self._rank, self._world, self._keep = directory, rank, world, keep
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed: Path | None = None
        self._given_up = threading.Event()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, JSON],
        *,
        rank_values: Mapping[str, JSON] | None = None,
        attempt: str | None = None,
    ) -> None:
        """Copies the state, and has it written while the caller goes on. Waits for the save before.

        Args:
            step: training steps done; the same on all ranks.
            tensors: those of this rank, by global name. No other rank has one of them; it may be none at all.
            values: what is no tensor. Rank 0 gives it, the others give {}.
            rank_values: as `values`, what this rank alone knows. In the checkpoint it is united with `values` and with
                that of the other ranks, object by object; a value that is there twice is an error.
            attempt: letters, digits, '.', '_' and '-', the same on all ranks, another for every save, also after a
                restart. May be left out where there is one rank.

        Raises what `wait` raises for the save before, in which case nothing was begun; ValueError or TypeError for
        values that JSON cannot hold exactly, and for arguments that contradict the above.
        """
        self.wait()
        if attempt is None:
            if self._world > 1:
                raise ValueError("attempt is missing: ranks that write together have to agree on one")
            attempt = secrets.token_hex(8)
        if values and self._rank != 0:
            raise ValueError(
                f"rank {self._rank} gives values ({min(values)!r}, ...): only rank 0 does, see rank_values"
            )
        folder = checkpoint.unfinished_folder_of(self._directory, step, attempt)
        # JSON, as the index is: a copy, and what it cannot hold is found here rather than in the thread.
        plain = json.dumps([dict(values), dict(rank_values or {})], allow_nan=False)
        copies = checkpoint.snapshot(tensors)

        def write() -> None:
            shared, own = json.loads(plain)
            try:
                self._write(folder, step, attempt, copies, shared, own)
            except Exception as error:  # whatever it is, it is raised again in the thread that waits
                self._error, self._failed = error, folder

        # A daemon, so that a disk that never answers cannot keep a process from ending.
        self._thread = threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns once the last save is written: on rank 0 the whole checkpoint, on others their shard.

        Raises, once, what kept it from being written: CheckpointWriteError that names the file, and the ranks that
        did not write theirs; ValueError where two ranks give the same tensor or value. Earlier checkpoints are as
        they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
            return
        thread = self._thread
        if thread is not None:
            thread.join(self._grace_s)
            self._given_up.set()
            thread.join(1.0)  # of all it does, the wait for other ranks ends at once
            if thread.is_alive():
                _LOG.warning("%s: still not written after %.0f s, left unfinished", thread.name, self._grace_s)
        if self._error is not None:
            _LOG.warning("checkpoint not written: %s", self._error)

    # In the thread

    def _write(
        self,
        folder: Path,
        step: int,
        attempt: str,
        tensors: dict[str, Tensor],
        values: dict[str, JSON],
        rank_values: dict[str, JSON],
    ) -> None:
        if self._rank == 0:
            self._remove_failed()
        note: _Note = {
            "attempt": attempt,
            "rank": self._rank,
            "world": self._world,
            "shard": None,
            "values": rank_values,
            "problem": "",
        }
        try:
            checkpoint.begin(self._directory, step, attempt)
            if tensors:
                note["shard"] = checkpoint.write_snapshot(folder, tensors, rank=self._rank, world=self._world)
            if self._rank != 0:
                _write_note(folder, note)
                return
        except CheckpointWriteError as error:
            self._tell_problem(folder, note, error)
            raise
        except OSError as error:
            told = _cannot_write(folder, error)
            self._tell_problem(folder, note, told)
            raise told from error
        try:
            notes = [note, *self._notes_of_others(folder, attempt)]
            merged = values
            for one in notes:
                merged = _united(merged, one["values"], f"rank {one['rank']}", "")
            shards = [one["shard"] for one in notes if one["shard"] is not None]
            checkpoint.write_index(folder, step, shards, merged)
            for path in folder.glob(_NOTE.format("*")):
                path.unlink()
            checkpoint.publish(folder)
            checkpoint.prune(self._directory, self._keep)
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def _remove_failed(self) -> None:
        """Gives back the room of the save before, where it failed."""
        if self._failed is not None:
            # Others may still write there, in vain: what cannot be removed is removed with the next checkpoint.
            shutil.rmtree(self._failed, ignore_errors=True)
            self._failed = None

    def _tell_problem(self, folder: Path, note: _Note, error: Exception) -> None:
        """Spares rank 0 the wait for this rank."""
        if self._rank != 0:
            try:
                _write_note(folder, {**note, "shard": None, "values": {}, "problem": str(error)})
            except OSError:
                _LOG.warning("%s: not even a note could be written there", folder)

    def _notes_of_others(self, folder: Path, attempt: str) -> list[_Note]:
        """In the order of ranks. Raises CheckpointWriteError with the ranks that wrote none."""
        notes: dict[int, _Note] = {}
        deadline, pause = time.monotonic() + self._timeout_s, Pause(0.005, 0.5)
        while True:
            # Listed rather than asked for by name: a network file system remembers that a name was not there.
            there = {entry.name for entry in os.scandir(folder)}
            for rank in range(1, self._world):
                name = _NOTE.format(f"{rank:05d}")
                if rank not in notes and name in there:
                    note = _read_note(folder / name, attempt, rank, self._world)
                    if note is not None:
                        notes[rank] = note
            problems = [f"rank {rank}: {note['problem']}" for rank, note in sorted(notes.items()) if note["problem"]]
            if problems:
                raise CheckpointWriteError(f"{folder}: not completed: {'; '.join(problems)}")
            if len(notes) == self._world - 1:
                return [notes[rank] for rank in sorted(notes)]
            stopped = self._given_up.is_set()
            if stopped or time.monotonic() > deadline:
                missing = [str(rank) for rank in range(1, self._world) if rank not in notes]
                after = "when the run ended" if stopped else f"after {self._timeout_s:.0f} s"
                raise CheckpointWriteError(
                    f"{folder}: not completed: nothing was written by rank{'s' if len(missing) > 1 else ''} "
                    f"{', '.join(missing)} of {self._world} {after}: look for errors there, and whether all ranks see "
                    "this folder"
                )
            pause()


_NOTE = "note-{}.json"


def _write_note(folder: Path, note: _Note) -> None:
    write_text_atomically(folder / _NOTE.format(f"{note['rank']:05d}"), json.dumps(note, allow_nan=False))


def _read_note(path: Path, attempt: str, rank: int, world: int) -> _Note | None:
    """The note of a rank; None where it belongs to another write."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointWriteError(f"{path}: is not JSON: {error}") from error
    ours = isinstance(note, dict) and (note.get("attempt"), note.get("rank"), note.get("world"))
    return cast(_Note, note) if ours == (attempt, rank, world) else None


def _united(left: Mapping[str, JSON], right: Mapping[str, JSON], who: str, where: str) -> dict[str, JSON]:
    """Both, object by object. Raises ValueError for a value that both have."""
    united = dict(left)
    for key, value in right.items():
        if key not in united:
            united[key] = value
            continue
        former = united[key]
        if not (isinstance(former, dict) and isinstance(value, dict)):
            raise ValueError(f"the value {where}{key!r} is given by {who}, and already there")
        united[key] = _united(former, value, who, f"{where}{key!r} / ")
    return united


def _cannot_write(folder: Path, error: OSError) -> CheckpointWriteError:
    return CheckpointWriteError(f"{folder}: cannot be written: {error}")

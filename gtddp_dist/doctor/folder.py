"""Whether all ranks see one folder: what rank 0 writes, every rank reads, and the other way round."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Protocol

from ..launch.pause import Pause
from .checks import Check, told_by


class Meeting(Protocol):
    """How ranks exchange texts: `gtddp_dist.launch.Rendezvous`."""

    def allgather(self, key: str, text: str, within_s: float | None = None) -> list[str]:
        """The texts of all ranks, in their order."""
        ...


def check_folder(directory: Path, rank: int, meeting: Meeting, within_s: float) -> Check:
    """The same on all ranks, which all call it. Files may take up to `within_s` seconds to be seen. Leaves nothing."""
    token = meeting.allgather("folder", secrets.token_hex(8))[0]
    place = directory / f".gtddp-doctor-{token}"
    try:
        problem = _make(place) if rank == 0 else ""
        problem = meeting.allgather("folder made", problem)[0]
        if problem:
            return _found({0: problem}, 0.0)
        # Rank 0's file is looked for before this rank writes one: a folder made here would hide that there is another.
        started = time.monotonic()
        first = "" if rank == 0 else _look(place, 0, token, within_s)
        seconds = time.monotonic() - started
        if not first and rank != 0:
            first = _write(place, rank, token)
        answers = meeting.allgather("folder seen", json.dumps([first, seconds]), 2 * within_s)
        told = [json.loads(text) for text in answers]
        problems = {other: text for other, (text, _) in enumerate(told) if text}
        unseen: dict[str, str] = {}
        started = time.monotonic()
        if rank == 0:
            deadline = started + within_s
            for other in range(1, len(told)):
                if other not in problems:
                    text = _look(place, other, token, max(0.0, deadline - time.monotonic()))
                    unseen |= {str(other): f"its file is not seen by rank 0: {text}"} if text else {}
        answers = meeting.allgather("folder back", json.dumps([unseen, time.monotonic() - started]), 2 * within_s)
        back = json.loads(answers[0])
        problems |= {int(other): text for other, text in back[0].items()}
        return _found(problems, max(back[1], *(seconds for _, seconds in told)))
    finally:
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)


def _found(problems: dict[int, str], seconds: float) -> Check:
    if not problems:
        text = f"what a rank writes there is seen by the others within {max(seconds, 0.1):.1f} s"
        return Check("shared folder", "ok", text)
    return Check(
        "shared folder",
        "problem",
        told_by(problems),
        "give a folder that exists and is mounted, writable, on every host (--dir, run.dir)",
    )


def _make(place: Path) -> str:
    try:
        place.mkdir()
    except OSError as error:
        return f"{place.parent}: cannot be written: {error.strerror}"
    return _write(place, 0, place.name.rpartition("-")[2])


def _write(place: Path, rank: int, token: str) -> str:
    """Why this rank cannot write there; empty where it can."""
    try:
        (place / f".{rank}").write_text(f"{token} {rank}", encoding="ascii")
        os.replace(place / f".{rank}", place / f"rank-{rank}")
    except OSError as error:
        return f"{place.parent}: cannot be written: {error.strerror}"
    return ""


def _look(place: Path, rank: int, token: str, within_s: float) -> str:
    """Why this rank does not see the file of another; empty where it does."""
    deadline, pause = time.monotonic() + within_s, Pause(0.002, 0.5)
    while True:
        why = f"{place.parent}: not the folder of rank {rank}, or not the same on every host"
        try:
            # Listed first: a network file system remembers for a while that a name was not there.
            if f"rank-{rank}" in os.listdir(place):
                found = (place / f"rank-{rank}").read_text(encoding="ascii")
                return "" if found == f"{token} {rank}" else f"{place / f'rank-{rank}'}: has other content"
        except FileNotFoundError:
            if not place.parent.is_dir():
                why = f"{place.parent}: does not exist"
        except OSError as error:
            why = f"{place.parent}: cannot be read: {error.strerror}"
        if time.monotonic() > deadline:
            return why
        pause()

"""The ranks of a run, met, and its directory, opened for all of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from .config_schema import Config
from .doctor.folder import check_folder
from .errors import ToldElsewhere, UserError
from .launch import Ranks, StopRequest
from .launch.ranks import host_name
from .liveness import NOTE_WITHIN_S
from .parts import Parts, build
from .run_directory import RunDirectory
from .team import SOLO, Team
from .watchdog import Witness

SHARED_WITHIN_S = 20.0
"""How long a network file system may take to show one host what another has written."""


class Builder(Protocol):
    """Builds the parts of runs on the ranks that are there."""

    team: Team
    layout: tuple[int, ...] | None
    """Where the network is cut; None in one process."""
    witness: Witness
    """Who hears of it where steps do not end."""

    def prepare_for_loss(self, advice: str, note: Callable[[str], None]) -> None:
        """Once a rank is lost, from now on: `advice` says what to do, and `note` is called with who it was."""
        ...

    def build(self, config: Config) -> Parts:
        """Parts of a run at its start."""
        ...


class SoloBuilder:
    """Builds runs of one process."""

    team: Team = SOLO
    layout: tuple[int, ...] | None = None

    def __init__(self) -> None:
        self.witness: Witness = self
        self.who = f"rank 0 (the whole network, host {host_name()})"
        self._note: Callable[[str], None] | None = None

    def prepare_for_loss(self, advice: str, note: Callable[[str], None]) -> None:
        """There is no other rank to lose, but this one can fail."""
        self._note = note

    def give_up(self, reason: str) -> None:
        """Leaves it to the history."""
        if self._note is not None:
            noting = threading.Thread(target=self._note, args=(reason,), daemon=True)
            noting.start()
            noting.join(NOTE_WITHIN_S)

    def once_stalled(self, write: Callable[[], object] | None) -> None:
        """Nothing: nobody else's watchdog ends the run."""

    def build(self, config: Config) -> Parts:
        return build(config)


@contextlib.contextmanager
def assembled(
    config: Config,
    ranks: Ranks,
    stop: StopRequest,
    cuts: Sequence[int] | None = None,
    advice: str = "nothing was written yet: start the run again",
) -> Iterator[Builder]:
    """The ranks of a run, met, while the block runs.

    Args:
        config: of the run.
        ranks: this one among the others.
        stop: what asks it to stop: it does not wait for the others for long then.
        cuts: where the network was cut by an earlier start of the run on the same grid.
        advice: what to do once a rank is lost.
    """
    if ranks.world == 1:
        yield SoloBuilder()
        return
    try:
        from .pipeline.parts import met
    except ModuleNotFoundError as error:
        raise UserError(
            f"training on {ranks.world} ranks needs {error.name}, which is not installed: pip install "
            "'gtddp-dist[cluster]'"
        ) from error
    with met(config, ranks, stop, cuts, advice) as builder:
        yield builder


@contextlib.contextmanager
def opened(
    team: Team, open_run: Callable[[], AbstractContextManager[RunDirectory]], *, new: bool = False
) -> Iterator[RunDirectory]:
    """A run directory that rank 0 opens, and holds the lock of, for all ranks.

    Raises UserError where not all of them see it; a `new` one is removed again then.
    """
    with contextlib.ExitStack() as stack:
        path, problem = "", ""
        if team.rank == 0:
            try:
                path = str(stack.enter_context(open_run()).path.absolute())
            except UserError as error:
                problem = str(error)
        path, problem = json.loads(team.gather_text(json.dumps([path, problem]))[0])
        if problem:
            raise UserError(problem) if team.rank == 0 else ToldElsewhere
        own = Path(path)
        if team.rank == 0 and own.is_relative_to(Path.cwd()):
            own = own.relative_to(Path.cwd())
        problem = unshared(team, own)
        if problem:
            if new and team.rank == 0:
                shutil.rmtree(own)
            raise UserError(problem) if team.rank == 0 else ToldElsewhere
        yield RunDirectory(own)


def unshared(team: Team, path: Path) -> str:
    """What is wrong where ranks do not all see one directory under this path; empty where they do."""
    if team.world == 1:
        return ""
    hosts = [f"rank {rank} is on {name}" for rank, name in enumerate(team.gather_text(host_name()))]
    found = check_folder(path, team.rank, TeamMeeting(team), SHARED_WITHIN_S)
    if found.status == "ok":
        return ""
    return (
        f"the run directory is not shared by all ranks: {found.text} ({', '.join(hosts)}): give run.dir "
        "on a file system that all hosts have"
    )


class TeamMeeting:
    """How the ranks of a team exchange texts in a check of `gtddp doctor`."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def allgather(self, key: str, text: str, within_s: float | None = None) -> list[str]:
        return self._team.gather_text(text)

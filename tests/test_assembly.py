"""Opening a run's directory for all of its ranks: threads stand for ranks, folders for what hosts see under a name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gtddp_dist import assembly
from gtddp_dist.errors import ToldElsewhere, UserError
from gtddp_dist.run_directory import RunDirectory
from gtddp_dist.team import Team


class Threads:
    """A team of threads; this is one of them."""

    writes_state = True

    def __init__(self, rank: int, texts: list[str], barrier: threading.Barrier) -> None:
        self.rank, self.world = rank, barrier.parties
        self._texts, self._barrier = texts, barrier

    def gather_text(self, text: str) -> list[str]:
        self._texts[self.rank] = text
        self._barrier.wait(10)
        texts = list(self._texts)
        self._barrier.wait(10)
        return texts

    def any(self, *flags: bool) -> list[bool]:
        raise NotImplementedError

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        raise NotImplementedError


def on_ranks(work: Callable[[Team], str], world: int = 2) -> list[str]:
    """What `work` returns on each rank."""
    texts, barrier = [""] * world, threading.Barrier(world)
    with ThreadPoolExecutor(world) as pool:
        return [item.result(20) for item in [pool.submit(work, Threads(r, texts, barrier)) for r in range(world)]]


def test_a_folder_that_a_rank_does_not_see_is_told_with_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "SHARED_WITHIN_S", 0.2)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    for folder in ("shared", "other"):
        (tmp_path / folder).mkdir()
    assert on_ranks(lambda team: assembly.unshared(team, tmp_path / "shared")) == ["", ""]
    places = (tmp_path / "shared", tmp_path / "other")  # one name, two file systems
    told = on_ranks(lambda team: assembly.unshared(team, places[team.rank]))
    assert told[0] == told[1]
    assert "not shared by all ranks: rank 1: " in told[0] and "rank 1 is on node7" in told[0]
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_new_directory_that_is_not_shared_is_removed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "unshared", lambda team, path: "rank 1 does not see it")

    @contextlib.contextmanager
    def made(name: str) -> Iterator[RunDirectory]:
        (tmp_path / name).mkdir(exist_ok=True)
        yield RunDirectory(tmp_path / name)

    def opened(team: Team, name: str, new: bool) -> str:
        try:
            with assembly.opened(team, lambda: made(name), new=new):
                return "opened"
        except ToldElsewhere:
            return "told elsewhere"
        except UserError as error:
            return str(error)

    for name, new in (("begun", True), ("continued", False)):
        assert on_ranks(lambda team, name=name, new=new: opened(team, name, new)) == [  # type: ignore[misc]
            "rank 1 does not see it",
            "told elsewhere",
        ]
    assert not (tmp_path / "begun").exists() and (tmp_path / "continued").exists()

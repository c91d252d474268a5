"""A step that does not end ends the run: real processes whose network hangs in the middle of a step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import stalling

from gtddp_dist.errors import FAILED, OK
from gtddp_dist.jobs import history
from gtddp_dist.watchdog import Watchdog

TESTS = Path(__file__).resolve().parent
HOST = socket.gethostname()
COMMON = [
    "train",
    "digits",
    "model.name=stalling",
    "model.width=4",
    "train.steps=6",
    "checkpoint.every=2",
    "log.progress=false",
    "log.tensorboard=false",
    "train.stalled_after_s=3",
]


def start(folder: Path, argv: list[str], **variables: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "ranks.stalling", *argv],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each; none is left."""
    try:
        errors = [process.communicate(timeout=250)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_a_process_that_hangs_in_a_step_is_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    [(code, err)] = outcome([start(tmp_path, [*COMMON, "run.dir=run"], STALL_RANK="0", STALL_STEP="5")])
    assert code == FAILED, err
    [line] = [line for line in err.splitlines() if line.startswith("gtddp: error")]
    assert f"rank 0 (the whole network, host {HOST}): no step has ended for " in line
    assert "train.stalled_after_s" in line and "in step 5;" in line
    assert f"it was at {stalling.__file__}:" in line and "(never_returns)" in line
    assert "its stacks are in run/stalled/rank-0.txt" in line
    stacks = (run / "stalled" / "rank-0.txt").read_text()
    assert f"rank 0 (the whole network, host {HOST})" in stacks and "step 5" in stacks
    assert "in never_returns" in stacks and "in _watch" in stacks  # every thread's
    last = history.read(run)[-1]
    assert isinstance(last, history.Ended) and last.code == FAILED and "no step has ended for" in last.reason
    [(code, err)] = outcome([start(tmp_path, ["train", "--resume", "run"], STALL_RANK="none", STALL_STEP="0")])
    assert code == OK, err


def test_ranks_are_ended_with_the_stacks_of_all(tmp_path: Path) -> None:
    """Rank 1 hangs, rank 0 waits for it. Whoever's watchdog is first, both are told of it, and both write."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = [*COMMON, "run.dir=run", "parallel.pipe=2"]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    stall = {"STALL_RANK": "1", "STALL_STEP": "5", **meeting}
    ended = outcome([start(tmp_path, argv, RANK=str(rank), LOCAL_RANK=str(rank), **stall) for rank in (0, 1)])
    assert [code for code, _ in ended] == [FAILED, FAILED], ended
    folder = tmp_path / "run" / "stalled"
    assert "in never_returns" in (folder / "rank-1.txt").read_text()
    assert "in never_returns" not in (folder / "rank-0.txt").read_text()
    for rank, segment in ((0, 1), (1, 2)):
        assert f"rank {rank} (segment {segment} of 2: stage" in (folder / f"rank-{rank}.txt").read_text()
    told = [line for _, err in ended for line in err.splitlines() if "no step has ended for" in line]
    [culprit] = [line for line in told if line.startswith("gtddp: error: rank 1 (segment 2 of 2: ")]
    assert f"host {HOST}" in culprit and "(never_returns)" in culprit and "run/stalled/rank-1.txt" in culprit
    last = history.read(tmp_path / "run")[-1]
    assert isinstance(last, history.Ended) and last.code == FAILED and "no step has ended for" in last.reason


class Alone:
    """A process whose end is only noted."""

    def __init__(self) -> None:
        self.who = "rank 0"
        self.reasons: list[str] = []

    def give_up(self, reason: str) -> None:
        self.reasons.append(reason)

    def once_stalled(self, write: object) -> None:
        """Nothing."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which this process would have ended; the first step has no longer than others."""
    codes: list[int] = []
    monkeypatch.setattr("gtddp_dist.watchdog.os._exit", codes.append)
    monkeypatch.setattr("gtddp_dist.watchdog.FIRST_STEP_S", 0.0)
    return codes


def test_steps_that_end_keep_it_quiet(tmp_path: Path, ended: list[int]) -> None:
    steps, witness = 0, Alone()
    with Watchdog(tmp_path, 0, witness, 1.0, lambda: steps):
        for _ in range(8):
            time.sleep(0.3)
            steps += 1
    assert (ended, witness.reasons) == ([], [])


def test_without_a_limit_nothing_is_watched(tmp_path: Path, ended: list[int]) -> None:
    with Watchdog(tmp_path, 0, Alone(), None, lambda: 0):
        time.sleep(1.2)
    assert ended == []


def test_stacks_go_to_stderr_where_there_is_no_directory_for_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watchdog = Watchdog(tmp_path / "gone", 0, Alone(), 1.0, lambda: 0)
    assert "its stacks are above: " in watchdog.write_stacks()
    assert "test_stacks_go_to_stderr" in capfd.readouterr().err

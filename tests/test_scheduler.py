"""Questions to the scheduler, answered by stand-ins of squeue and sacct: shell scripts on the PATH."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_ins import Cluster

from gtddp_dist.errors import UserError
from gtddp_dist.jobs import scheduler
from gtddp_dist.jobs.scheduler import JobState, Scheduler

ME = os.getuid()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


QUEUE = """\
12_0|13|RUNNING|None|node[0-1]
12_1|14|PENDING|Resources|
12_2|12|COMPLETED|None|node0
15|15|PENDING|Priority|
"""


def test_one_question_for_all_jobs(cluster: Cluster) -> None:
    cluster.squeue(QUEUE)
    states = Scheduler().states(["12_0", "12_1", "12_2", "15", "14"], [ME, 4711])
    assert states["12_0"] == JobState(job="12_0", state="RUNNING", nodes="node[0-1]")
    assert states["12_1"] == JobState(job="12_1", state="PENDING", reason="Resources")
    assert states["14"] == states["12_1"]  # as a script that asks its environment knows it
    assert [states[job].over for job in ("12_0", "12_1", "12_2", "15")] == [False, False, True, False]
    [call] = cluster.calls("squeue")
    assert "--states=all" in call and "--array" in call and f"--user={','.join(map(str, sorted({ME, 4711})))}" in call
    assert cluster.calls("sacct") == []


def test_nothing_to_ask(cluster: Cluster) -> None:
    assert Scheduler().states([], [ME]) == {}
    assert cluster.calls("squeue") == []


def test_other_processes_are_served_from_one_answer(cluster: Cluster) -> None:
    """Also for jobs that the first one did not ask for."""
    cluster.squeue(QUEUE)
    assert Scheduler(interval_s=600).states(["12_0"], [ME])["12_0"].state == "RUNNING"
    cluster.squeue(QUEUE.replace("RUNNING", "COMPLETED"))
    for job in ("12_0", "12_1", "15"):
        assert Scheduler(interval_s=600).states([job], [ME])[job].state in ("RUNNING", "PENDING")
    assert len(cluster.calls("squeue")) == 1


def test_a_question_that_the_answer_does_not_cover_waits(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(scheduler, "time", SimpleNamespace(time=lambda: now[0], sleep=sleep))
    cluster.squeue(QUEUE)
    asker = Scheduler(interval_s=5)
    asker.states(["15"], [ME])
    now[0] += 1
    cluster.squeue(QUEUE + "16|16|PENDING|None|\n")
    assert asker.states(["16"], [ME])["16"].state == "PENDING"
    assert 1005 <= now[0] < 1006
    now[0] += 5
    asker.states(["15"], [ME])
    assert len(cluster.calls("squeue")) == 3


def test_two_at_once_ask_once(cluster: Cluster) -> None:
    cluster.squeue(QUEUE)
    threads = [threading.Thread(target=Scheduler(interval_s=600).states, args=(["15"], [ME])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cluster.calls("squeue")) == 1


def test_clusters_have_answers_of_their_own(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.squeue(QUEUE)
    Scheduler(interval_s=600).states(["15"], [ME])
    monkeypatch.setenv("SLURM_CONF", "/elsewhere/slurm.conf")
    cluster.squeue("15|15|RUNNING|None|node7\n")
    assert Scheduler(interval_s=600).states(["15"], [ME])["15"].nodes == "node7"


def test_forgotten_jobs_are_looked_up_at_once_and_one_time(cluster: Cluster) -> None:
    cluster.squeue("15|15|RUNNING|None|node0\n")
    cluster.sacct("11_0|FAILED|node0|1:0\n11_1|CANCELLED by 1000|None assigned|0:15\n9|NODE_FAIL|node1|0:0\n")
    asker = Scheduler(interval_s=0)
    states = asker.states(["15", "11_0", "11_1", "9"], [ME])
    assert states["11_0"] == JobState(job="11_0", state="FAILED", nodes="node0", reason="exit code 1:0")
    assert states["11_1"] == JobState(job="11_1", state="CANCELLED", reason="exit code 0:15")
    assert states["9"] == JobState(job="9", state="NODE_FAIL", nodes="node1")
    [call] = cluster.calls("sacct")
    assert call.endswith("--jobs=11,9")  # the array is one word
    assert Scheduler(interval_s=0).states(["11_0", "9"], [ME])["11_0"].state == "FAILED"
    assert len(cluster.calls("sacct")) == 1  # what has ended stays so


@pytest.mark.parametrize("accounting", [None, "Slurm accounting storage is disabled"])
def test_without_accounting(cluster: Cluster, accounting: str | None) -> None:
    if accounting is not None:
        cluster.sacct("", code=1, error=accounting)
    state = Scheduler().states(["7"], [ME])["7"]
    assert state.state == scheduler.UNKNOWN and state.over
    assert (accounting or "there is no sacct") in state.reason


def test_many_ids_are_asked_for_in_arguments_that_linux_takes(cluster: Cluster) -> None:
    cluster.sacct("")
    jobs = [str(10_000_000 + number) for number in range(20_000)]
    assert len(Scheduler().states(jobs, [ME])) == 20_000
    calls = cluster.calls("sacct")
    assert len(calls) == 2 and sum(call.count(",1") for call in calls) == 20_000 - 2


def test_errors_are_slurms_own(cluster: Cluster) -> None:
    message = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    cluster.squeue("", code=1, error=message)
    with pytest.raises(UserError, match="squeue failed: slurm_load_jobs error: Unable to contact"):
        Scheduler().states(["1"], [ME])


def test_a_scheduler_that_does_not_answer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster.bin / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(scheduler, "TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="did not answer"):
        Scheduler().states(["1"], [ME])


def test_defaults_of_the_user_do_not_leave_jobs_out(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    cluster.squeue(QUEUE)
    Scheduler().states(["15"], [ME])
    assert (tmp_path / "env.log").read_text() == ""


def test_a_damaged_answer_is_told_and_replaced(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.squeue(QUEUE)
    Scheduler(interval_s=600).states(["15"], [ME])
    [kept] = (tmp_path / "cache" / "gtddp").glob("*.json")
    kept.write_text('{"time": "soon"}')
    assert Scheduler(interval_s=600).states(["15"], [ME])["15"].state == "PENDING"
    assert f"{kept} is not used" in capsys.readouterr().err
    assert json.loads(kept.read_text())["queue"]["15"]["state"] == "PENDING"


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not Scheduler.is_there()

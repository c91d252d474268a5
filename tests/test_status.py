"""`gtddp status`: what it makes of run directories and of the scheduler's answer. Slurm is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_ins import Cluster

from gtddp_dist import cli
from gtddp_dist.config import load_config, to_yaml
from gtddp_dist.errors import BAD_INPUT, FAILED, OK, REQUEUE, UserError
from gtddp_dist.jobs import status, tail
from gtddp_dist.jobs.facts import read_facts
from gtddp_dist.jobs.history import Decided, Ended, Event, Started, Submitted, record
from gtddp_dist.jobs.scheduler import Scheduler
from gtddp_dist.jobs.status import RunStatus, find_runs, survey, table, watch
from gtddp_dist.jobs.tail import newest_values
from gtddp_dist.run_folder import CONFIG

CONFIG_TEXT = to_yaml(load_config("digits", ["train.epochs=4"]))
SUBMITTED = Submitted(job="12_3", executor="slurm")
STARTED = Started(step=0, job="15", restart=0, hosts=["node0", "node1"])


def ended(code: int, reason: str = "") -> Ended:
    return Ended(step=20, code=code, reason=reason)


def decided(code: int, requeued: bool, reason: str = "") -> Decided:
    return Decided(job="12", restart=0, code=code, step=20, requeued=requeued, reason=reason)


def make_run(path: Path, *events: Event, metrics: str = "", summary: Mapping[str, object] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / CONFIG).write_text(CONFIG_TEXT)
    for event in events:
        record(path, event)
    if metrics:
        (path / "metrics.jsonl").write_text(metrics)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, "epoch": step / 45, **{k.replace("__", "/"): v for k, v in values.items()}}) + "\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.mark.parametrize(
    ("events", "queue", "state", "reason"),
    [
        ([], "", "new", ""),
        ([SUBMITTED], "PENDING|Resources|", "pending", "Resources"),
        ([SUBMITTED], "RUNNING|None|node0", "running", ""),
        ([SUBMITTED], "CANCELLED|None|", "failed", "its job ended before it started: CANCELLED"),
        ([SUBMITTED, STARTED], "RUNNING|None|node[0-1]", "running", ""),
        ([SUBMITTED, STARTED], "COMPLETING|None|node[0-1]", "completing", ""),
        ([SUBMITTED, STARTED], "NODE_FAIL|None|node[0-1]", "killed", "its processes ended without a word: NODE_FAIL"),
        ([SUBMITTED, STARTED], "", "killed", "squeue has forgotten the job"),
        ([SUBMITTED, STARTED, ended(OK)], "RUNNING|None|node0", "done", ""),
        # Its script may still put it back; if it does not, it has failed.
        ([SUBMITTED, STARTED, ended(FAILED, "lost rank 1")], "RUNNING|None|node0", "running", ""),
        ([SUBMITTED, STARTED, ended(FAILED, "lost rank 1")], "FAILED|None|node0", "failed", "lost rank 1"),
        ([SUBMITTED, STARTED, ended(REQUEUE, "stopped by SIGTERM")], "CANCELLED|None|", "stopped", "SIGTERM"),
        (
            [SUBMITTED, STARTED, decided(FAILED, True, "failed at step 20")],
            "PENDING|BeginTime|",
            "pending",
            "BeginTime",
        ),
        (
            [SUBMITTED, STARTED, decided(137, True, "restart 1")],
            "CANCELLED|None|",
            "failed",
            "restart 1; then: CANCELLED",
        ),
        (
            [SUBMITTED, STARTED, ended(FAILED), decided(FAILED, False, "twice at step 20")],
            "",
            "failed",
            "twice at step 20",
        ),
        (
            [SUBMITTED, STARTED, ended(REQUEUE), decided(REQUEUE, False, "ended by SIGTERM")],
            "",
            "stopped",
            "by SIGTERM",
        ),
        ([STARTED], "", "killed", "squeue has forgotten the job"),  # by a script of Slurm's
        ([STARTED, ended(BAD_INPUT, "no such data"), SUBMITTED], "PENDING|None|", "pending", ""),
    ],
)
def test_states(events: list[Event], queue: str, state: str, reason: str, tmp_path: Path, cluster: Cluster) -> None:
    run = make_run(tmp_path / "run", *events)
    cluster.squeue(f"12_3|15|{queue}\n" if queue else "")
    [found], note = survey([run], Scheduler())
    assert (found.state, note) == (state, "")
    assert reason in found.reason and bool(found.reason) == bool(reason)
    assert found.over == (state in ("new", "done", "stopped", "failed", "killed"))


def test_no_question_about_runs_that_have_ended(tmp_path: Path, cluster: Cluster) -> None:
    runs = [
        make_run(tmp_path / "done", SUBMITTED, STARTED, ended(OK)),
        make_run(tmp_path / "failed", SUBMITTED, STARTED, ended(FAILED), decided(FAILED, False, "twice")),
        make_run(tmp_path / "by_hand", Started(step=0, job=None, restart=0, hosts=["here"]), ended(FAILED, "diverged")),
        make_run(tmp_path / "old", summary={"finished": True}),
    ]
    states = [found.state for found in survey(runs, Scheduler())[0]]
    assert states == ["done", "failed", "failed", "done"]
    assert cluster.calls("squeue") == []


def test_local_jobs_are_looked_up_by_their_process(tmp_path: Path, cluster: Cluster) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        job = Submitted(job=str(process.pid), executor="local")
        waits = make_run(tmp_path / "waits", job)
        runs = make_run(tmp_path / "runs", job, Started(step=0, job=None, restart=0, hosts=["here"]))
        assert [found.state for found in survey([waits, runs], Scheduler())[0]] == ["pending", "running"]
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its parent does not know yet
        found = survey([waits, runs], Scheduler())[0]
    assert [item.state for item in found] == ["failed", "killed"]
    assert "its process is gone" in found[1].reason
    assert cluster.calls("squeue") == []


def test_the_last_words_of_a_job_without_an_end(tmp_path: Path, cluster: Cluster) -> None:
    alone = make_run(tmp_path / "alone", SUBMITTED)
    trial = make_run(tmp_path / "sweep" / "trials" / "000", SUBMITTED, STARTED)
    for folder, text in (
        (alone / "job", "module: command not found\n\n"),
        (tmp_path / "sweep" / "jobs", "x\nOut of memory\n"),
    ):
        folder.mkdir()
        (folder / "12_3_0_log.out").write_text(text)
    first, second = (found.reason for found in survey([alone, trial], Scheduler())[0])
    assert first.endswith(f"the last line of {alone}/job/12_3_0_log.out: module: command not found")
    assert second.endswith("jobs/12_3_0_log.out: Out of memory")


def test_an_end_that_is_written_while_the_scheduler_is_asked(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", SUBMITTED, STARTED)
    cluster.squeue("12_3|15|COMPLETED|None|node0\n")
    ask = Scheduler.states

    def slow(self: Scheduler, *wanted: object) -> object:
        record(run, ended(OK))
        return ask(self, *wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "states", slow)
    assert survey([run], Scheduler())[0][0].state == "done"


def test_without_a_scheduler_directories_speak_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for number in range(3):
        make_run(tmp_path / f"runs/{number}", SUBMITTED, STARTED)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == OK
    out, err = capsys.readouterr()
    assert out.count("running") == 4  # three rows and their number
    assert err == "gtddp: squeue is not on the PATH: states are what the run directories say\n"


def test_figures(tmp_path: Path, cluster: Cluster) -> None:
    metrics = line(10, train__loss=2.0, throughput=90.5) + line(45, val__accuracy=0.5)
    metrics += line(50, train__loss=1.5, throughput=100.25) + '{"step": 60, "train/lo'
    run = make_run(tmp_path / "run", SUBMITTED, STARTED, decided(137, True), STARTED, metrics=metrics)
    cluster.squeue("12_3|15|RUNNING|None|node[0-1]\n")
    [found], _ = survey([run], Scheduler())
    assert found == RunStatus(
        run=str(run),
        job="12_3",
        state="running",
        nodes="node[0-1]",
        step=50,
        total=180,
        loss=1.5,
        accuracy=0.5,
        throughput=100.25,
        restarts=1,
        reason="",
    )
    text = table([found])
    for part in ("node[0-1]", "50/180", "1.5", "50.00%", "100.2", "1 runs: 1 running"):
        assert part in text


def test_steps_count_over_epochs_and_nothing_is_known_before_the_first_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert read_facts(run).total is None and read_facts(run).step is None
    (run / CONFIG).write_text(to_yaml(load_config("digits", ["train.steps=7"])))
    assert read_facts(run).total == 7


def test_newest_values_are_read_from_the_end(tmp_path: Path) -> None:
    """The last accuracy is far behind; the file's beginning is not even read."""
    file = tmp_path / "metrics.jsonl"
    filler = "".join(line(step, train__loss=step, more=1e-9) for step in range(2, 1500))
    text = "no JSON" * 100_000 + "\n" + line(1, val__accuracy=0.25) + filler
    file.write_text(text)
    assert len(filler) > 8 * tail._TAIL
    assert newest_values(file, ("step", "val/accuracy", "train/loss")) == {
        "step": 1499.0,
        "val/accuracy": 0.25,
        "train/loss": 1499.0,
    }
    assert newest_values(file, ("step", "lr")) == {"step": 1499.0}
    file.write_text(line(1, val__accuracy=0.25) + line(2))
    assert newest_values(file, ("val/accuracy",)) == {"val/accuracy": 0.25}  # the very first line
    file.write_text(line(1) + json.dumps({"step": 2, "long": "x" * tail._TAIL, "lr": 0.5}) + "\n")
    assert newest_values(file, ("lr",)) == {"lr": 0.5}  # a line whose beginning is read later
    file.write_text('{"step": 3, "lr": }\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl.*no number lr"):
        newest_values(file, ("lr",))


def test_runs_of_sweeps_and_of_the_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/b", "runs/a", "runs/sweep/trials/001", "runs/sweep/trials/000", "elsewhere/one"):
        make_run(tmp_path / name)
    (tmp_path / "runs" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    everything = ["runs/a", "runs/b", "runs/sweep/trials/000", "runs/sweep/trials/001"]
    assert [str(run) for run in find_runs([])] == everything
    assert [str(run) for run in find_runs([Path("elsewhere/one"), Path("runs/sweep")])] == [
        "elsewhere/one",
        *everything[2:],
    ]
    with pytest.raises(UserError, match="runs/notes is neither a run directory"):
        find_runs([Path("runs/notes")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="there is no folder runs here"):
        find_runs([])


def test_json(tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", SUBMITTED, STARTED, ended(FAILED, "diverged"), decided(FAILED, False, "diverged"))
    assert cli.main(["status", str(run), "--json"]) == OK
    [found] = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["reason"], found["job"]) == (str(run), "failed", "diverged", "12_3")
    assert cli.main(["status", str(run), "--json", "--watch"]) == BAD_INPUT
    assert cli.main(["status", str(run), "--watch", "0"]) == BAD_INPUT


def test_slurms_error_is_the_users(tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", SUBMITTED)
    cluster.squeue("", code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    assert cli.main(["status", str(run)]) == BAD_INPUT
    assert "squeue failed: slurm_load_jobs error: Unable to contact slurm controller" in capsys.readouterr().err


def test_watch_goes_on_until_all_have_ended(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while Slurm's controller is away."""
    runs = [make_run(tmp_path / "one", SUBMITTED), make_run(tmp_path / "two", SUBMITTED, STARTED, ended(OK))]
    cluster.squeue("12_3|15|PENDING|Priority|\n")
    passed: list[float] = []

    def sleep(seconds: float) -> None:
        passed.append(seconds)
        match len(passed):
            case 1:
                cluster.squeue("", code=1, error="Socket timed out")
            case 2:
                cluster.squeue("12_3|15|RUNNING|None|node1\n")
                record(runs[0], STARTED)
            case 3:
                record(runs[0], ended(OK))

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep))
    assert [found.state for found in watch(runs, Scheduler(interval_s=0), 3.0)] == ["done", "done"]
    assert passed == [3.0] * 3
    text = capsys.readouterr().out
    pending = "2 runs: 1 pending, 1 done"
    told = [pending, pending, "squeue failed: Socket timed out", "2 runs: 1 running, 1 done"]
    assert text.splitlines()[:4] == told
    assert text.splitlines()[-1] == "2 runs: 2 done" and text.count("restarts") == 1


def test_watch_draws_on_a_terminal(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "one", SUBMITTED)
    cluster.squeue("12_3|15|PENDING|Priority|\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=lambda seconds: record(run, ended(OK))))
    watch([run], Scheduler(interval_s=0), 3.0)
    first, second = capsys.readouterr().out.split("\033[2J\033[H")[1:]
    assert "Priority" in first and "1 runs: 1 pending" in first
    assert "1 runs: 1 done" in second


def test_a_short_terminal_shows_what_needs_attention() -> None:
    def one(run: str, state: str) -> RunStatus:
        return RunStatus(
            run=run,
            job=None,
            state=state,
            nodes="",
            step=None,
            total=None,
            loss=None,
            accuracy=None,
            throughput=None,
            restarts=0,
            reason="",
        )

    states = ["done"] * 20 + ["running", "pending", "failed"] + ["done"] * 20
    text = table([one(f"run{at}", state) for at, state in enumerate(states)], rows=3)
    assert all(part in text for part in ("run20", "run21", "run22", "not shown: 40", "40 done"))
    assert "run19" not in text


def test_a_thousand_trials(tmp_path: Path, cluster: Cluster) -> None:
    """One question, few files, little of each; and well below two seconds on an idle machine."""
    metrics = "".join(line(step, train__loss=1.0, throughput=50.0, val__accuracy=0.5) for step in range(1, 500))
    for number in range(1000):
        job = Submitted(job=f"12_{number}", executor="slurm")
        make_run(tmp_path / "sweep" / "trials" / f"{number:04d}", job, STARTED, metrics=metrics)
    cluster.squeue("".join(f"12_{number}|{13 + number}|RUNNING|None|node0\n" for number in range(1000)))
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        found, _ = survey(find_runs([tmp_path / "sweep"]), Scheduler(tmp_path / f"cache{len(times)}"))
        text = table(found)
        times.append(time.perf_counter() - start)
    assert text.count("running") == 1001 and "1000 runs: 1000 running" in text
    assert len(cluster.calls("squeue")) == 3 and cluster.calls("sacct") == []
    assert min(times) < 2, times

    opened: list[str] = []

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and counting:
            opened.append(Path(str(arguments[0])).name)

    counting = True
    sys.addaudithook(count)
    try:
        survey(find_runs([tmp_path / "sweep" / "trials" / "0000"]), Scheduler(tmp_path / "cache0"))
    finally:
        counting = False
    of_the_run = [name for name in opened if name in (CONFIG, "history.jsonl", "metrics.jsonl", "summary.json")]
    assert sorted(of_the_run) == sorted((CONFIG, "history.jsonl", "metrics.jsonl", "summary.json"))


def test_no_torch() -> None:
    modules = "gtddp_dist.jobs.status, gtddp_dist.trials.run, gtddp_dist.tensorboard"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

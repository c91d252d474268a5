"""Jobs: the history of a run, what is decided at a job's end, submission. Slurm's commands are stand-ins here; the real
ones are in tests/slurm/."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gtddp_dist import cli
from gtddp_dist.config import ConfigError, load_config
from gtddp_dist.errors import UserError
from gtddp_dist.jobs import submit
from gtddp_dist.jobs.history import Decided, Ended, Event, Started, Submitted, read, record
from gtddp_dist.jobs.requeue import decide, is_settled
from gtddp_dist.jobs.scheduler import Scheduler
from gtddp_dist.jobs.script import minutes, ranks_per_node, sbatch_options, slurm_parameters
from gtddp_dist.jobs.submit import Prepared, script_of
from gtddp_dist.jobs.tail import last_step
from gtddp_dist.jobs.task import shares

SUBMITTED = Submitted(job="7", executor="slurm")


def started(step: int = 0, restart: int = 0) -> Started:
    return Started(step=step, job="7", restart=restart, hosts=["node0"])


def ended(code: int, step: int, *signals: str, reason: str = "") -> Ended:
    return Ended(step=step, code=code, reason=reason, signals=list(signals))


def decided(code: int, step: int, requeued: bool = True) -> Decided:
    return Decided(job="7", restart=0, code=code, step=step, requeued=requeued, reason="")


def test_history_is_read_back_as_it_was_recorded(tmp_path: Path) -> None:
    events: list[Event] = [SUBMITTED, started(), ended(75, 8, "SIGUSR2"), decided(75, 8)]
    for event in events:
        record(tmp_path, event)
    assert read(tmp_path) == events
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"event": "sta')  # died while writing
    assert read(tmp_path) == events


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    record(tmp_path, SUBMITTED)
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"time": "now", "event": "exploded"}\n')
    with pytest.raises(UserError, match=r"history\.jsonl, line 2: is not an event"):
        read(tmp_path)
    assert read(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "events, exit_code, step, requeue, reason",
    [
        ([SUBMITTED, started(), ended(0, 9)], 0, 9, False, "done"),
        # How the run says that it ended counts over srun's exit code, which mixes those of all tasks.
        ([SUBMITTED, started(), ended(75, 9, "SIGUSR2")], 1, 9, True, "stopped by SIGUSR2 at step 9"),
        ([SUBMITTED, started(), ended(75, 9, "SIGTERM", "SIGUSR2")], 75, 9, True, "SIGUSR2"),
        ([SUBMITTED, started(), ended(75, 9, "SIGTERM")], 75, 9, False, "ended by SIGTERM"),
        ([SUBMITTED, started(), ended(75, 9)], 75, 9, False, "ended by a request"),
        ([SUBMITTED, started(), ended(2, 0, reason="no data")], 2, 0, False, "bad input.*no data"),
        ([SUBMITTED], 2, 0, False, "bad input"),
        # Killed: there is no end.
        ([SUBMITTED, started()], 137, 5, True, r"failed at step 5 \(exit code 137\); restart 1 of at most 2"),
        ([SUBMITTED], 1, 0, True, "failed to start"),
        # An end of an earlier start is no end of this one.
        ([SUBMITTED, started(), ended(75, 5, "SIGUSR2"), decided(75, 5), started()], 1, 6, True, "failed at step 6"),
        (
            [SUBMITTED, started(), ended(75, 5, "SIGUSR2"), decided(75, 5), started(), ended(75, 5, "SIGUSR2")],
            75,
            5,
            False,
            "two starts in a row were stopped at step 5",
        ),
        (
            [SUBMITTED, started(), ended(75, 5, "SIGUSR2"), decided(75, 5), started(), ended(75, 6, "SIGUSR2")],
            75,
            6,
            True,
            "stopped",
        ),
        ([SUBMITTED, started(), decided(1, 5), started()], 1, 5, False, "second time in a row at this step"),
        ([SUBMITTED, started(), decided(1, 5), started()], 1, 6, True, "restart 2 of at most 2"),
        (
            [SUBMITTED, started(), decided(1, 5), started(), decided(1, 6), started()],
            1,
            7,
            False,
            "max_restarts = 2 is used up",
        ),
        # Time limits and preemptions do not use restarts up, and a step made in between makes another failure.
        (
            [SUBMITTED, started(), decided(75, 3), started(), decided(75, 4), started(), decided(75, 5), started()],
            1,
            6,
            True,
            "restart 1 of at most 2",
        ),
        # A new submission begins to count anew.
        ([SUBMITTED, started(), decided(1, 5), SUBMITTED, started()], 1, 5, True, "restart 1"),
    ],
)
def test_decisions(events: list[Event], exit_code: int, step: int, requeue: bool, reason: str) -> None:
    decision = decide(events, exit_code, step, max_restarts=2)
    assert decision.requeue is requeue
    assert re.search(reason, decision.reason), decision.reason


def test_a_run_is_settled_until_it_is_submitted_again() -> None:
    assert not is_settled([SUBMITTED, started()])
    assert not is_settled([SUBMITTED, started(), decided(75, 1)])
    assert is_settled([SUBMITTED, started(), decided(2, 0, requeued=False)])
    assert not is_settled([SUBMITTED, started(), decided(2, 0, requeued=False), SUBMITTED])


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(5000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50')
    assert last_step(tmp_path) == 4999


@pytest.mark.parametrize(
    "limit, expected",
    [(90, 90), ("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-12", 2160), ("1-12:30", 2190), ("1-0:0:1", 1441)],
)
def test_time_limits(limit: str | int, expected: int) -> None:
    assert minutes(limit) == expected


def test_options_of_sbatch_with_a_key_of_their_own_are_refused() -> None:
    launch = load_config("digits", ["launch.sbatch=[mail-type=END, --hold]"]).launch
    assert sbatch_options(launch) == {"mail-type": "END", "hold": True}
    launch = load_config("digits", ["launch.sbatch=[time=5]"]).launch
    with pytest.raises(UserError, match=r"--time follows from launch\.time"):
        sbatch_options(launch)


def test_nodes_and_ranks_must_make_up_the_grid() -> None:
    assert ranks_per_node(load_config("digits", ["parallel.pipe=4", "launch.nodes=2"])) == 2
    for words in (["launch.nodes=2"], ["parallel.pipe=4", "launch.nodes=2", "launch.ranks_per_node=1"]):
        with pytest.raises(UserError, match="does not make up the"):
            ranks_per_node(load_config("digits", words))


@pytest.mark.parametrize(
    "word, message",
    [
        ("launch.executer=local", "nearest: launch.executor"),
        ("launch.executor=cloud", "'slurm', 'local' or 'debug'"),
        ("launch.time=soon", "launch.time = 'soon'"),
    ],
)
def test_unknown_launch_options_are_errors(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("digits", [word])


def test_the_script_of_a_job(tmp_path: Path) -> None:
    words = [
        "parallel.pipe=2",
        "parallel.data=4",
        "launch.nodes=2",
        "launch.gpus_per_node=4",
        "launch.memory_gb=64",
        "launch.time=1-00:00:00",
        "launch.partition=gpu",
        "launch.account=lab",
        "launch.constraint=v100",
        "launch.signal_before_s=300",
        'launch.setup=["module load cuda"]',
        "launch.sbatch=[mail-type=END]",
        "parallel.lost_after_s=60",
    ]
    path = tmp_path / "with space"
    text = script_of(Prepared(path, load_config("digits", words)), "mine")
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--mem=65536MB",
        "--time=1440",
        "--partition=gpu",
        "--account=lab",
        "--constraint=v100",
        "--signal=USR2@300",
        "--mail-type=END",
        "--requeue",
        "--open-mode=append",
        "--job-name=mine",
        "--cpus-per-task=4",
    ):
        assert f"#SBATCH {line}\n" in text, line
    before, srun, after = text.partition("\nsrun --unbuffered")
    assert srun and "module load cuda\n" in before and f"runs=('{path}')" in before
    assert "--kill-on-bad-exit=0 --wait=90" in after
    assert 'requeue "${runs[@]}" --exit-code "$1"; exit $?; }\n' in before and after.rstrip().endswith("\nended $?")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_pack_gets_cores_for_all_its_ranks_and_gpus_are_shared_out() -> None:
    config = load_config("digits", ["parallel.pipe=2", "launch.pack=3", "launch.cpus_per_rank=2"])
    parameters = slurm_parameters(config, "packed")
    assert (parameters["ntasks_per_node"], parameters["cpus_per_task"]) == (1, 12)
    assert shares("0,1,2,3", 2) == ["0,1", "2,3"] and shares("4,7,9", 2) == ["4", "7"]
    assert shares("0", 2) == shares("", 2) == [None, None]


SLURM = {
    "sbatch": """
echo "sbatch $*" >>"$FAKE/calls"
if [ -e "$FAKE/refuse" ]; then echo "sbatch: error: $(cat "$FAKE/refuse")" >&2; exit 1; fi
cp "${!#}" "$FAKE/script"
echo "Submitted batch job 41"
""",
    "srun": "exit 0",
    "squeue": 'cat "$FAKE/queue" 2>/dev/null || true',
    "scontrol": """
echo "scontrol $*" >>"$FAKE/calls"
case "$*" in
    "show config") echo "MaxArraySize            = 4" ;;
    *"show job"*) echo "JobId=41 JobName=x Restarts=$(cat "$FAKE/restarts" 2>/dev/null || echo 0)" ;;
    requeue*) if [ -e "$FAKE/refuse" ]; then cat "$FAKE/refuse" >&2; exit 1; fi ;;
esac
""",
}
"""Stand-ins for Slurm's commands; FAKE is their folder."""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake = tmp_path / "slurm"
    fake.mkdir()
    for name, text in SLURM.items():
        (fake / name).write_text(f"#!/bin/bash\n{text}")
        (fake / name).chmod(0o755)
    (fake / "calls").touch()
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return fake


def test_submit_makes_the_run_directory_and_hands_it_to_slurm(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", "digits", "run.dir=runs/a", "launch.partition=gpu", "train.steps=7"]) == 0
    run = tmp_path / "runs/a"
    assert "runs/a: job 41" in capsys.readouterr().out
    assert load_config(str(run / "config.yaml")).train.steps == 7
    assert read(run) == [Submitted(job="41", executor="slurm")]
    assert (run / "job/41_submission.sh").read_text() == (slurm / "script").read_text()
    assert "#SBATCH --partition=gpu\n" in (slurm / "script").read_text()
    # The first start writes what any run has; the same directory is not submitted as a new run again.
    assert cli.main(["submit", "digits", "run.dir=runs/a"]) == 2
    assert "runs/a is not empty" in capsys.readouterr().err
    (slurm / "queue").write_text("41|41|PENDING|Priority|\n")
    monkeypatch.setattr(submit, "Scheduler", lambda: Scheduler(tmp_path, 0.0))
    assert cli.main(["submit", "--resume", "runs/a", "launch.partition=urgent"]) == 2
    assert "its job 41 is pending" in capsys.readouterr().err
    (slurm / "queue").unlink()
    assert cli.main(["submit", "--resume", "runs/a", "launch.partition=urgent"]) == 0
    assert "#SBATCH --partition=urgent\n" in (slurm / "script").read_text()
    assert load_config(str(run / "config.yaml")).launch.partition == "urgent"
    assert cli.main(["submit", "--resume", "runs/a", "train.steps=9"]) == 2
    assert "leave out 'train.steps=9'" in capsys.readouterr().err


def test_what_slurm_refuses_is_said_in_its_words_and_leaves_nothing(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "refuse").write_text("invalid partition specified: none")
    assert cli.main(["submit", "digits", "run.dir=runs/a", "launch.partition=none"]) == 2
    assert capsys.readouterr().err == "gtddp: error: Slurm does not take the job: invalid partition specified: none\n"
    assert not (tmp_path / "runs/a").exists()


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["submit", "digits"]) == 2
    assert "sbatch, srun, scontrol not on the PATH" in capsys.readouterr().err
    assert cli.main(["submit", "digits", "--dry-run", "run.dir=a"]) == 0  # the script can be seen anywhere
    assert "#SBATCH --signal=USR2@120" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["submit", "digits", "launch.executor=local", "launch.nodes=2"]) == 2
    assert "has this host only" in capsys.readouterr().err
    assert cli.main(["requeue", "a", "--exit-code=1"]) == 2
    assert "needs SLURM_JOB_ID" in capsys.readouterr().err


@pytest.fixture
def run(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submitted run whose job this process seems to be in."""
    assert cli.main(["submit", "digits", "run.dir=a", "launch.max_restarts=1"]) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    (slurm / "calls").write_text("")
    return tmp_path / "a"


def calls(slurm: Path) -> list[str]:
    return [line for line in (slurm / "calls").read_text().splitlines() if "requeue" in line]


def test_requeue_puts_a_job_back_until_its_restarts_are_used_up(
    slurm: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(run, started())
    assert cli.main(["requeue", "a", "--exit-code=137"]) == 0
    assert calls(slurm) == ["scontrol requeue 41"]
    assert "put back into the queue" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (slurm / "restarts").write_text("1")
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    record(run, started(3, restart=1))
    assert cli.main(["requeue", "a", "--exit-code=137"]) == 137
    assert calls(slurm) == ["scontrol requeue 41"]
    assert "launch.max_restarts = 1 is used up: not put back" in capsys.readouterr().err
    last = read(run)[-1]
    assert isinstance(last, Decided) and not last.requeued and last.step == 3 and last.code == 137


def test_a_signal_to_a_run_that_is_done_does_not_fail_its_job(slurm: Path, run: Path) -> None:
    record(run, started())
    record(run, ended(0, 7))
    assert cli.main(["requeue", "a", "--exit-code=140"]) == 0  # SIGUSR2 while Python was ending
    assert calls(slurm) == []


def test_one_task_of_an_array_is_put_back(slurm: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last task that starts has the number of the array as its own.
    for name, value in (("SLURM_ARRAY_JOB_ID", "41"), ("SLURM_ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(name, value)
    record(run, started())
    assert cli.main(["requeue", "a", "--exit-code=137"]) == 0
    assert calls(slurm) == ["scontrol requeue 41_3"]


def test_a_script_that_slurm_has_given_up_does_nothing(
    slurm: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "restarts").write_text("1")
    record(run, started())
    before = read(run)
    assert cli.main(["requeue", "a", "--exit-code=1"]) == 1
    assert calls(slurm) == [] and read(run) == before
    assert "left alone" in capsys.readouterr().err


def test_a_pack_is_put_back_for_the_runs_that_need_it(slurm: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "b"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    record(run, started())
    record(run, ended(2, 0, reason="no data"))
    record(other, SUBMITTED)
    record(other, started())
    record(other, ended(75, 4, "SIGUSR2"))
    assert cli.main(["requeue", "a", "b", "--exit-code=75"]) == 0
    assert calls(slurm) == ["scontrol requeue 41"]
    assert is_settled(read(run)) and not is_settled(read(other))
    record(other, started(4))
    record(other, ended(0, 8))
    assert cli.main(["requeue", "a", "b", "--exit-code=0"]) == 0
    assert calls(slurm) == ["scontrol requeue 41"]


def test_a_requeue_that_slurm_refuses_is_a_failure(slurm: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, started())
    record(run, ended(75, 4, "SIGUSR2"))
    (slurm / "refuse").write_text("Job is not requeueable")
    assert cli.main(["requeue", "a", "--exit-code=75"]) == 1
    assert "Job is not requeueable" in capsys.readouterr().err


def test_wait_ends_when_the_job_is_gone(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "WAIT_POLL_S", 0.05)
    monkeypatch.setattr(submit, "WAIT_QUERY_S", 0.1)
    assert cli.main(["submit", "digits", "run.dir=a", "--wait"]) == 1  # squeue knows nothing of it


def gtddp(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ: Mapping[str, str] = {**os.environ, **variables}
    command = [sys.executable, "-m", "gtddp_dist", *words]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False)


def eventually(found: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


TINY = ("train.threads=1", "log.tensorboard=false", "log.progress=false")


def test_a_local_job_trains_on_its_own_and_can_be_waited_for(tmp_path: Path) -> None:
    words = ["run.dir=a", "launch.executor=local", "train.steps=3", *TINY]
    done = gtddp("submit", "digits", *words, "--wait", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "a"
    assert [type(event) for event in read(run)] == [Submitted, Started, Ended]
    assert (run / "model.safetensors").exists()
    assert "begins a: 3 steps" in "".join(log.read_text() for log in (run / "job").glob("*_log.out"))


def test_a_job_in_this_process_has_the_exit_code_of_its_run(tmp_path: Path) -> None:
    words = ["run.dir=a", "launch.executor=debug", "optimizer.lr=1e30", "train.max_nonfinite=1", *TINY]
    done = gtddp("submit", "digits", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    last = read(tmp_path / "a")[-1]
    assert isinstance(last, Ended) and "was not finite" in last.reason
    # What keeps a run from starting is in its history too.
    words = ["run.dir=b", "launch.executor=debug", "parallel.pipe=2", "parallel.cuts=[99]", *TINY]
    done = gtddp("submit", "digits", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    last = read(tmp_path / "b")[-1]
    assert isinstance(last, Ended) and last.code == 2 and "parallel.cuts" in last.reason


def test_a_signal_while_torch_is_imported_waits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gtddp_dist", "train", "digits", "run.dir=a", "train.epochs=500", *TINY]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        status = Path(f"/proc/{process.pid}/status")
        mask = 1 << (signal.SIGUSR2 - 1)
        eventually(lambda: bool(int(re.findall(r"SigBlk:\s*(\w+)", status.read_text())[0], 16) & mask), 20)
        process.send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, output
    last = read(tmp_path / "a")[-1]
    assert isinstance(last, Ended) and last.code == 75 and last.signals == ["SIGUSR2"]

"""`gtddp sweep`: its file, its trials, its directory and its report; one sweep is run for real on this host."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.image import imread
from stand_ins import Cluster

from gtddp_dist import cli
from gtddp_dist.config import ConfigError, from_yaml
from gtddp_dist.errors import BAD_INPUT, FAILED, OK, REQUEUE
from gtddp_dist.jobs import history
from gtddp_dist.jobs.history import Decided, Ended, Started, Submitted, record
from gtddp_dist.jobs.scheduler import Scheduler
from gtddp_dist.jobs.submit import Prepared
from gtddp_dist.jobs.tail import last_step
from gtddp_dist.tensorboard import served
from gtddp_dist.trials import run as sweeping
from gtddp_dist.trials.folder import SweepFolder
from gtddp_dist.trials.picture import _axis, _curve
from gtddp_dist.trials.report import report
from gtddp_dist.trials.result import Result
from gtddp_dist.trials.space import Configured, trials_of
from gtddp_dist.trials.spec import dump_sweep, parse_sweep, read_sweep, shipped_sweeps

RATES = """\
config: digits-sgd
set:
  train.epochs: 1
variants:
  sgd: {optimizer.name: sgd, optimizer.gauss_newton_weight: null}
  gtddp-sgd: {}
parameters:
  optimizer.lr: [0.1, 1.0]
seeds: [0, 7]
"""


@pytest.fixture
def rates(tmp_path: Path) -> str:
    path = tmp_path / "rates.yaml"
    path.write_text(RATES)
    return str(path)


def trials(path: str, *overrides: str) -> list[Configured]:
    return trials_of(read_sweep(path, overrides))


def test_grid(rates: str) -> None:
    """All combinations, by variants, parameters, seeds; each with its configuration."""
    found = trials(rates)
    assert [item.trial.name for item in found] == [
        "000-sgd-lr0.1-seed0",
        "001-sgd-lr0.1-seed7",
        "002-sgd-lr1-seed0",
        "003-sgd-lr1-seed7",
        "004-gtddp-sgd-lr0.1-seed0",
        "005-gtddp-sgd-lr0.1-seed7",
        "006-gtddp-sgd-lr1-seed0",
        "007-gtddp-sgd-lr1-seed7",
    ]
    trial, config = found[3].trial, found[3].config
    assert trial.label == "sgd" and trial.values == {"optimizer.lr": 1.0, "train.seed": 7}
    assert (config.optimizer.name, config.optimizer.lr, config.train.seed, config.train.epochs) == ("sgd", 1.0, 7, 1)
    assert found[4].config.optimizer.gauss_newton_weight == 0.1  # of the config


def test_the_command_line_counts_over_all(rates: str) -> None:
    """A parameter that it fixes is varied no more."""
    found = trials(rates, "optimizer.lr=0.5", "train.epochs=3", "train.seed=2")
    assert [item.trial.name for item in found] == ["000-sgd", "001-gtddp-sgd"]
    for item in found:
        assert (item.config.optimizer.lr, item.config.train.epochs, item.config.train.seed) == (0.5, 3, 2)
    sweep = read_sweep(rates, ["optimizer.lr=0.5"])
    assert parse_sweep(dump_sweep(sweep.spec), "")[0] == sweep.spec
    assert [item.config for item in trials(rates, "optimizer.lr=0.5")] == [item.config for item in trials_of(sweep)]


def test_random(tmp_path: Path) -> None:
    """Draws within their ranges, the same for each variant and seed; more of them begin with the same ones."""
    path = tmp_path / "random.yaml"
    text = (
        "config: digits-sgd\nmethod: random\ntrials: 30\nseed: 5\nseeds: [0, 1]\n"
        "variants: {a: {}, b: {model.width: 8}}\n"
        "parameters:\n  optimizer.lr: {log_uniform: [1e-3, 1]}\n  optimizer.momentum: {uniform: [0.5, 0.9]}\n"
        "  train.epochs: {int: [1, 3]}\n  train.batch_size: [32, 64]\n"
    )
    path.write_text(text)
    found = trials(str(path))
    assert len(found) == 30 * 2 * 2
    draws = [{**item.trial.values, "train.seed": 0} for item in found if item.trial.label == "a"]
    assert draws == [{**item.trial.values, "train.seed": 0} for item in found if item.trial.label == "b"]
    assert draws[::2] == draws[1::2]
    rates = [item.config.optimizer.lr or 0 for item in found]
    assert all(1e-3 <= rate <= 1 for rate in rates) and 5 < sum(rate < 0.0316 for rate in rates[:60:2]) < 25
    assert all(0.5 <= (item.config.optimizer.momentum or 0) <= 0.9 for item in found)
    assert {item.config.train.epochs for item in found} == {1, 2, 3}
    assert {item.config.train.batch_size for item in found} == {32, 64}
    assert len({item.trial.name for item in found}) == len(found)
    path.write_text(text.replace("trials: 30", "trials: 40"))
    more = [{**item.trial.values, "train.seed": 0} for item in trials(str(path)) if item.trial.label == "a"]
    assert more[:60] == draws
    path.write_text(text.replace("seed: 5", "seed: 6"))
    assert trials(str(path))[0].trial.values != found[0].trial.values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- a", ["must hold the keys of a sweep"]),
        ("config: digits\nconfig: digits", ["line 2: config is given twice"]),
        ("parameters: {optimizer.lr: [1.0]}", ["config (s.yaml): is missing"]),
        ("config: digits\nmetods: grid\nmetric: f1", ["metods (s.yaml, line 2)", "method", "metric (s.yaml, line 3)"]),
        ("config: digits\nseeds: [0, -1]", ["seeds", "line 2", "greater than or equal to 0"]),
        ("config: digits\nseeds: [1, 1]", ["a seed is given twice"]),
        ("config: digits\ntrials: 3", ["a grid has all combinations"]),
        ("config: digits\nmethod: random", ["needs a number of draws", "needs parameters to draw"]),
        ("config: digits\nparameters: {optimizer.lr: []}", ["at least one value"]),
        ("config: digits\nparameters: {optimizer.lr: [1, 1]}", ["a value is given twice"]),
        ("config: digits\nparameters: {optimizer.lr: 1}", ["expected a list of values, or one of {uniform:"]),
        (
            "config: digits\nparameters: {optimizer.lr: {uniform: [0, 1]}}",
            ["a grid needs a list", "parameters.optimizer.lr"],
        ),
        (
            "config: digits\nmethod: random\ntrials: 1\nparameters:\n  a.b: {log_uniform: [0, 1]}\n"
            "  a.c: {int: [0, 1.5]}\n"
            "  a.d: {uniform: [2, 1]}\n  a.e: {normal: [0, 1]}",
            ["greater than 0", "line 6", "two integers", "the first number must be the smaller", "{log_uniform:"],
        ),
        ("config: digits\nparameters: {train.seed: [0, 1]}", ["seeds: [0, 1, 2]"]),
        ("config: digits\nparameters: {launch.nodes: [1, 2]}", ["all trials are launched alike"]),
        ("config: digits\nset: {run.dir: x}", ["every trial has a directory of its own"]),
    ],
)
def test_what_is_wrong_with_a_sweep(text: str, parts: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_sweep(text, "s.yaml")
    for part in parts:
        assert part in str(raised.value)


def test_all_problems_of_all_trials_at_once_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "config: digits-sgd\nset:\n  optimizer.lrr: 1\nvariants:\n  adam: {optimizer.name: adam}\n  gtddp-sgd: {}\n"
        "parameters:\n  train.micro_batches: [1, 5]\n  optimizer.lr: [0.1, -1.0]\n"
    )
    assert cli.main(["sweep", str(path), "--dir", str(tmp_path / "sweep")]) == BAD_INPUT
    err = capsys.readouterr().err
    assert f"all trials: optimizer.lrr ({path}, line 3): unknown key" in err
    assert f"optimizer.lr = -1.0 ({path}, line 9): expected a number greater than 0" in err
    assert "trial 001-adam-micro_batches1-lr-1 and 3 more" in err
    path.write_text(path.read_text().replace("optimizer.lrr: 1", "train.epochs: 1").replace(", -1.0", ""))
    assert cli.main(["sweep", str(path), "--dir", str(tmp_path / "sweep")]) == BAD_INPUT
    err = capsys.readouterr().err
    assert "trial 000-adam-micro_batches1 and 1 more" in err and "adam takes no option gauss_newton_weight" in err
    assert "trial 001-adam-micro_batches5 and 1 more: train.batch_size = 32" in err
    assert "must be a multiple of micro_batches" in err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["wrong.yaml"]


def test_two_trials_that_are_the_same(rates: str) -> None:
    with pytest.raises(ConfigError, match=r"trial 004-gtddp-sgd-lr0\.1-seed0: has the same configuration as 000-sgd"):
        trials(rates, "optimizer.name=sgd", "optimizer.gauss_newton_weight=null")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "sweep needs a sweep before any key=value. Shipped sweeps: "),
        (["optimizer.lr=1"], "sweep needs a sweep"),
        (["digits-rl"], "Shipped sweeps: digits-lr"),
        (["no/such.yaml"], "cannot read the sweep no/such.yaml"),
        (["digits-lr", "optimizer.lrr=1"], "optimizer.lrr (command line): unknown key"),
        (["digits-lr", "word"], "expected key=value"),
        (["digits-lr", "run.dir=x"], "that of the sweep is --dir"),
        (["digits-lr", "launch.nodes=2"], "launch.executor=local has this host only"),
        (["--resume", "x", "train.epochs=1"], "leave out 'train.epochs=1'"),
        (["--resume", "x", "--dir", "y"], "leave out --dir"),
        (["--report", "x", "--wait"], "leave out '--wait'"),
        (["--report", "x"], "x is not a sweep"),
    ],
)
def test_bad_input(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", *words]) == BAD_INPUT
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_sweeps())
def test_shipped_sweeps_are_valid(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["sweep", name, "--check"]) == OK
    assert f"trials of {name}" in capsys.readouterr().out


def test_the_config_of_a_sweep_is_looked_for_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text("train: {steps: 3}\n")
    (tmp_path / "sub" / "sweep.yaml").write_text("config: mine.yaml\nparameters: {optimizer.lr: [0.1, 0.2]}\n")
    monkeypatch.chdir(tmp_path)
    assert [item.config.train.steps for item in trials("sub/sweep.yaml")] == [3, 3]


# What a sweep does with its trials, by their states. Slurm is a stand-in, and nothing is trained.


class Submissions:
    """Stands in for `submit_runs`: notes what is handed over, and records it in the runs' histories."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.launches: list[str | int] = []

    def __call__(self, runs: Sequence[Prepared], folder: Path, name: str) -> list[str]:
        self.calls.append([run.path.name for run in runs])
        self.launches += [run.config.launch.time for run in runs]
        jobs = [f"{10 * len(self.calls)}_{number}" for number in range(len(runs))]
        for run, job in zip(runs, jobs, strict=True):
            assert (run.path / "config.yaml").is_file()
            record(run.path, Submitted(job=job, executor="slurm"))
        return jobs


@pytest.fixture
def submissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submissions:
    made = Submissions()
    monkeypatch.setattr(sweeping, "submit_runs", made)
    return made


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path)
    for program in ("sbatch", "srun", "scontrol"):
        (made.bin / program).symlink_to(str(shutil.which("true")))
    monkeypatch.setenv("PATH", str(made.bin))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sweeping, "Scheduler", lambda: Scheduler(interval_s=0))
    return made


def finish(run: Path, accuracy: float, loss: float = 1.0) -> None:
    """What a run leaves that is done."""
    record(run, Started(step=0, job="1", restart=0, hosts=["node0"]))
    record(run, Ended(step=45, code=OK, reason=""))
    summary = {"finished": True, "val/accuracy": accuracy, "val/loss": loss, "train/loss": None}
    (run / "summary.json").write_text(json.dumps(summary))


def fail(run: Path, reason: str) -> None:
    record(run, Started(step=0, job="1", restart=0, hosts=["node0"]))
    record(run, Ended(step=3, code=FAILED, reason=reason))
    record(run, Decided(job="1", restart=0, code=FAILED, step=3, requeued=False, reason=reason))
    # One that stops because its loss is not finite has a summary too. It is not to win.
    (run / "summary.json").write_text(json.dumps({"finished": False, "val/accuracy": 0.99}))


def test_only_what_failed_is_submitted_again(
    rates: str, tmp_path: Path, cluster: Cluster, submissions: Submissions, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    command = ["sweep", rates, "launch.time=5", "--dir", str(folder.path)]
    cluster.squeue("".join(f"10_{number}|{number}|PENDING|Priority|\n" for number in range(8)))
    assert cli.main(command) == OK
    _, made = folder.read()
    names = [trial.name for trial in made]
    runs = [folder.run(trial) for trial in made]
    assert submissions.calls == [names] and set(submissions.launches) == {5}
    out = capsys.readouterr().out
    assert "8 runs: 8 pending" in out and f"gtddp sweep --report {folder.path}" in out
    assert from_yaml((runs[3] / "config.yaml").read_text()).optimizer.lr == 1.0

    assert cli.main(command) == OK  # all are in the queue
    assert len(submissions.calls) == 1

    for run in runs[:4]:
        finish(run, 0.5)
    fail(runs[4], "lost rank 1")
    cluster.squeue("10_5|15|RUNNING|None|node0\n10_6|16|PENDING|Priority|\n10_7|17|CANCELLED|None|\n")
    capsys.readouterr()
    assert cli.main(["sweep", "--resume", str(folder.path), "launch.time=1:00:00"]) == OK
    out = capsys.readouterr().out
    assert submissions.calls[1:] == [[names[4], names[7]]] and submissions.launches[8:] == ["1:00:00"] * 2
    assert from_yaml((runs[4] / "config.yaml").read_text()).launch.time == "1:00:00"
    assert "submitted again, 2 of 8" in out
    assert f"{names[4]}: failed: lost rank 1" in out and f"{names[7]}: failed: its job ended before" in out

    for run in runs[4:]:
        finish(run, 0.9)
    assert cli.main(command) == OK  # all done: nothing is submitted, and the tables are there
    assert len(submissions.calls) == 2 and folder.table_csv.is_file()
    assert "8 runs: 8 done" in capsys.readouterr().out


def test_another_sweep_in_the_directory(
    rates: str, tmp_path: Path, cluster: Cluster, submissions: Submissions, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.squeue("".join(f"10_{number}|{number}|PENDING|Priority|\n" for number in range(8)))
    directory = tmp_path / "sweep"
    assert cli.main(["sweep", rates, "--dir", str(directory)]) == OK
    assert cli.main(["sweep", rates, "train.epochs=2", "--dir", str(directory)]) == BAD_INPUT
    assert "'  train.epochs: 1' there, '  train.epochs: 2' now" in capsys.readouterr().err
    assert cli.main(["sweep", rates, "--dir", str(tmp_path)]) == BAD_INPUT
    assert "is not empty and holds no sweep" in capsys.readouterr().err
    with SweepFolder(directory).locked():
        assert cli.main(["sweep", "--resume", str(directory)]) == BAD_INPUT
    assert "another gtddp sweep is at work" in capsys.readouterr().err
    (directory / "trials.json").unlink()
    assert cli.main(["sweep", "--resume", str(directory)]) == BAD_INPUT
    assert "was not made to its end" in capsys.readouterr().err
    assert len(submissions.calls) == 1


def test_trials_with_other_numbers_of_ranks_are_other_arrays(
    tmp_path: Path, cluster: Cluster, submissions: Submissions
) -> None:
    path = tmp_path / "grids.yaml"
    path.write_text("config: digits-ranks\nparameters: {parallel.pipe: [1, 2], optimizer.lr: [0.1, 0.2]}\n")
    assert cli.main(["sweep", str(path), "--dir", str(tmp_path / "sweep")]) == FAILED  # squeue knows none of the jobs
    assert [[name[:9] for name in call] for call in submissions.calls] == [
        ["000-pipe1", "001-pipe1"],
        ["002-pipe2", "003-pipe2"],
    ]


@pytest.fixture
def ended(rates: str, tmp_path: Path, cluster: Cluster, submissions: Submissions) -> SweepFolder:
    """A sweep of eight trials that have ended, the one with gtddp-sgd, rate 1 and seed 0 badly."""
    folder = SweepFolder(tmp_path / "sweep")
    cluster.squeue("".join(f"10_{number}|{number}|RUNNING|None|node0\n" for number in range(8)))
    assert cli.main(["sweep", rates, "--dir", str(folder.path)]) == OK
    for number, trial in enumerate(folder.read()[1]):
        if number == 6:
            fail(folder.run(trial), "the loss was not finite")
        else:
            finish(folder.run(trial), accuracy=0.1 * (number + 1), loss=1 / (number + 1))
    return folder


def test_report(ended: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["sweep", "--report", str(ended.path)]) == OK
    out = capsys.readouterr().out
    rows = list(csv.DictReader(ended.table_csv.open()))
    assert [row["trial"][:3] for row in rows] == ["007", "005", "004", "003", "002", "001", "000", "006"]
    assert rows[0]["optimizer.lr"] == "1" and rows[0]["train.seed"] == "7" and rows[0]["label"] == "gtddp-sgd"
    assert float(rows[0]["val/accuracy"]) == pytest.approx(0.8) and rows[0]["train/loss"] == ""
    assert rows[7]["state"] == "failed" and rows[7]["reason"] == "the loss was not finite"
    text = ended.table_md.read_text()
    assert "| gtddp-sgd |              1 |          1/2 |              80.00% |   80.00% |    80.00% |" in text
    assert "| sgd       |            0.1 |          2/2 |              15.00% |   10.00% |    20.00% |" in text
    assert "* 006-gtddp-sgd-lr1-seed0: failed: the loss was not finite" in text and "(curves.png)" in text
    assert "006-gtddp-sgd-lr1-seed0: failed: the loss was not finite" in out
    assert imread(ended.picture).shape[1] > 600


def test_curves(ended: SweepFolder) -> None:
    """Means over seeds at each rate; a trial that failed is no point."""
    spec, made = ended.read()
    statuses = sweeping._survey(ended, made)
    results = [
        Result(trial, status, {"val/accuracy": 0.99 if number == 6 else 0.1 * (number + 1)})
        for number, (trial, status) in enumerate(zip(made, statuses, strict=True))
    ]
    keys = ["optimizer.lr", "train.seed"]
    assert _axis(results, keys) == "optimizer.lr"
    curves = {
        label: _curve([result for result in results if result.trial.label == label], spec, "optimizer.lr", [])
        for label in ("sgd", "gtddp-sgd")
    }
    assert rounded(curves["sgd"]) == [(0.1, [0.1, 0.2]), (1.0, [0.3, 0.4])]
    assert rounded(curves["gtddp-sgd"]) == [(0.1, [0.5, 0.6]), (1.0, [0.8])]
    # With the seed as a further setting the better one counts.
    best = _curve(results[:4], spec, "optimizer.lr", ["train.seed"])
    assert rounded(best) == [(0.1, [0.2]), (1.0, [0.4])]
    assert _axis(results[6:7], keys) is None


def rounded(curve: list[tuple[float, list[float]]]) -> list[tuple[float, list[float]]]:
    return [(rate, [round(value, 6) for value in values]) for rate, values in curve]


def test_hparams_view(ended: SweepFolder) -> None:
    """What TensorBoard's HParams page is drawn from: settings and result of each trial."""
    report(ended, sweeping._survey(ended, ended.read()[1]))
    with served([ended.path], port=0) as address:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        found: dict[str, tuple[float, float]] = {}
        deadline = time.monotonic() + 60
        while len(found) < 3 and time.monotonic() < deadline:
            states = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "RUNNING", "FAILURE")]
            question = {
                "startIndex": 0,
                "sliceSize": 100,
                "colParams": [],
                "allowedStatuses": states,
            }
            request = urllib.request.Request(
                f"{address}data/plugin/hparams/session_groups",
                json.dumps(question).encode(),
                {"Content-Type": "application/json"},
            )
            with opener.open(request, timeout=60) as answer:
                groups = json.loads(answer.read()).get("sessionGroups", [])
            found = {
                f"{group['hparams']['label']} {group['hparams']['train.seed']:g}": (
                    group["hparams"]["optimizer.lr"],
                    round({value["name"]["tag"]: value["value"] for value in group["metricValues"]}[_ACCURACY], 5),
                )
                for group in groups
                if group["hparams"]["optimizer.lr"] == 1 and group["metricValues"]
            }
    assert found == {"sgd 0": (1, 0.3), "sgd 7": (1, 0.4), "gtddp-sgd 7": (1, 0.8)}


_ACCURACY = "result/val accuracy"


def test_a_sweep_on_this_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three trials in processes of their own, two at once, one of which fails by design; then that one alone."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "config: digits-sgd\nset: {train.steps: 3, log.every: 1, launch.executor: local, launch.max_parallel: 2, "
        "train.max_nonfinite: 1,\n  optimizer.name: sgd, optimizer.gauss_newton_weight: null, log.progress: false}\n"
        "parameters: {optimizer.lr: [0.1, 1.0e+38, 0.3]}\n"
    )
    folder = SweepFolder(tmp_path / "sweep")
    assert cli.main(["sweep", str(path), "--dir", str(folder.path)]) == FAILED
    out = capsys.readouterr().out
    assert "3/3" in out and "3 runs: 2 done, 1 failed" in out
    rows = {row["trial"]: row for row in csv.DictReader(folder.table_csv.open())}
    assert [rows[name]["state"] for name in sorted(rows)] == ["done", "failed", "done"]
    assert "not finite" in rows["001-lr1e+38"]["reason"]
    assert starts(folder) == {"000-lr0.1": 1, "001-lr1e+38": 1, "002-lr0.3": 1}
    assert cli.main(["sweep", "--resume", str(folder.path)]) == FAILED
    assert "submitted again, 1 of 3" in capsys.readouterr().out
    assert starts(folder) == {"000-lr0.1": 1, "001-lr1e+38": 2, "002-lr0.3": 1}


def starts(folder: SweepFolder) -> dict[str, int]:
    """How often each trial was started."""
    return {
        trial.name: sum(isinstance(event, Started) for event in history.read(folder.run(trial)))
        for trial in folder.read()[1]
    }


def test_ctrl_c_while_a_trial_is_submitted_is_heard_afterwards() -> None:
    """Also where another thread, which holds no signal, is given it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    held = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    for others in (0, 3):
        end = threading.Event()
        threads = [threading.Thread(target=end.wait) for _ in range(others)]
        for thread in threads:
            thread.start()
        submitted = ""
        try:
            with pytest.raises(KeyboardInterrupt), sweeping._deaf():
                os.kill(os.getpid(), signal.SIGINT)
                submitted = subprocess.run(
                    [sys.executable, "-c", held], capture_output=True, text=True, timeout=60
                ).stdout
        finally:
            end.set()
        assert submitted == "True\n"
    signal.signal(signal.SIGINT, former)


def test_an_interrupted_sweep_on_this_host(tmp_path: Path) -> None:
    """The trial that runs writes a checkpoint and ends; the one that waits is not begun."""
    (tmp_path / "long.yaml").write_text(
        "config: digits-sgd\nset: {train.steps: 1000000, log.every: 1, log.progress: false, launch.executor: local}\n"
        "parameters: {optimizer.lr: [0.1, 0.2]}\n"
    )
    command = [sys.executable, "-m", "gtddp_dist", "sweep", "long.yaml", "--dir", "sweep"]
    first, second = (tmp_path / "sweep" / "trials" / name for name in ("000-lr0.1", "001-lr0.2"))
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while last_step(first) == 0 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all processes of the terminal
            _, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == REQUEUE and "to go on: gtddp sweep --resume sweep" in err
    assert "Traceback" not in err  # of submitit's process, which would kill the trial a second later
    events = history.read(first)
    assert isinstance(events[-1], Ended) and events[-1].code == REQUEUE and events[-1].step > 0
    assert (first / "checkpoints" / f"step-{events[-1].step:08d}" / "index.json").is_file()
    assert history.read(second) == []

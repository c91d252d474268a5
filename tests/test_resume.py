"""A run that was stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtddp_dist import checkpoint
from gtddp_dist.chronicle import Chronicle
from gtddp_dist.config import Config, load_config
from gtddp_dist.errors import OK, REQUEUE, UserError
from gtddp_dist.launch import StopRequest
from gtddp_dist.parts import build
from gtddp_dist.run_directory import new_run
from gtddp_dist.run_folder import fill
from gtddp_dist.team import SOLO
from gtddp_dist.train import resume_training, run_training, train

STEPS = 20


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configure(run_dir: str, *overrides: str) -> Config:
    """20 steps; an epoch has 14 (batches of 100), so that step 10 is in the middle of the first one."""
    return load_config(
        "digits",
        [
            "model.width=4",
            "optimizer.name=sgd",
            "optimizer.gauss_newton_weight=null",
            "optimizer.lr=0.02",
            "schedule.name=constant",
            f"train.steps={STEPS}",
            "train.batch_size=100",
            "log.every=4",
            "eval.every=3",
            "log.progress=false",
            "log.tensorboard=false",
            f"run.dir={run_dir}",
            *overrides,
        ],
    )


class StopAt(StopRequest):
    """Asks to stop at a step of the run."""

    def __init__(self, step: int, progress: Any) -> None:
        super().__init__()
        self._step = step
        self._progress = progress

    @property
    def requested(self) -> bool:
        return self._progress.step >= self._step


def train_until(config: Config, step: int) -> None:
    """Trains from the start and is asked to stop at a step."""
    parts = build(config)
    stop = StopAt(step, parts.state.progress)
    with new_run(config, "digits") as run, Chronicle(run.path, SOLO, stop) as chronicle:
        assert chronicle.ends(train(parts, run, stop)) == REQUEUE


def metrics(run_dir: str) -> list[dict[str, float]]:
    """Lines without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "throughput"} for line in lines]


def assert_equal_runs(run_dir: str, expected_dir: str) -> None:
    """Weights, optimizer state, random state and log of two runs that have ended are equal to the bit."""
    got, expected = load_file(f"{run_dir}/model.safetensors"), load_file(f"{expected_dir}/model.safetensors")
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    last = [checkpoint.newest_valid(Path(each) / "checkpoints")[0] for each in (run_dir, expected_dir)]
    assert last[0] is not None and last[1] is not None
    assert last[0].step == last[1].step
    assert last[0].tensors.keys() == last[1].tensors.keys()
    for name, tensor in last[1].tensors.items():
        assert torch.equal(last[0].tensors[name], tensor), name
    for values in (last[0].values, last[1].values):
        progress = values["progress"]
        assert isinstance(progress, dict)
        del progress["seconds"], progress["window_seconds"]
    assert last[0].values == last[1].values
    assert metrics(run_dir) == metrics(expected_dir)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=adam"],
        ["optimizer.momentum=0.9", "schedule.name=cosine", "schedule.warmup_steps=12", "model.batch_norm=true"],
        ["optimizer.name=gtddp-adam", "optimizer.gauss_newton_weight=0.1", "train.micro_batches=2"],
        ["optimizer.name=gtddp-sgd", "optimizer.terminal=sampled", "optimizer.momentum=0.9"],
        # Bases made at steps 0, 8 and 16, factors every other step: the stop at 10 is between two of each.
        ["optimizer.name=gtddp-ekfac", "optimizer.basis_every=8", "optimizer.factor_every=2", "optimizer.momentum=0.5"],
        ["optimizer.name=gt-kfac", "optimizer.basis_every=8", "optimizer.fisher=sampled"],
        # Those begun at step 8 are used from step 12 on.
        ["optimizer.name=gtddp-ekfac", "optimizer.basis_every=8", "optimizer.basis_lag=4", "optimizer.basis_method=qr"],
        ["optimizer.name=gtddp-sgd", "optimizer.recompute=true", "train.channels_last=true", "optimizer.momentum=0.9"],
    ],
    ids=[
        "adam",
        "momentum-cosine-batchnorm",
        "gtddp-adam",
        "gtddp-sgd-sampled",
        "gtddp-ekfac",
        "gt-kfac-sampled",
        "ekfac-lag",
        "channels-last-recompute",
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(dtype: str, overrides: list[str]) -> None:
    options = [f"train.dtype={dtype}", *overrides]
    assert run_training(configure("unbroken", *options), "digits") == OK
    train_until(configure("resumed", *options), 10)  # mid-epoch, and between two lines of the log
    torch.manual_seed(12345)
    torch.rand(7)
    assert resume_training(Path("resumed")) == OK
    assert_equal_runs("resumed", "unbroken")


def test_a_run_can_be_resumed_many_times_and_at_its_ends() -> None:
    config = ["optimizer.name=adam", "model.batch_norm=true"]
    assert run_training(configure("unbroken", *config), "digits") == OK
    train_until(configure("resumed", *config), 0)  # before its first step
    for step in (1, 13, 14, 19):
        resume_until("resumed", step)
    assert resume_training(Path("resumed")) == OK
    assert_equal_runs("resumed", "unbroken")
    environment = json.loads(Path("resumed/environment.json").read_text())
    assert environment["step"] == 0
    assert [entry["step"] for entry in environment["resumes"]] == [0, 1, 13, 14, 19]


def resume_until(run_dir: str, step: int) -> None:
    from gtddp_dist import train as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module,
            "train",
            lambda parts, run, stop, from_step: train(parts, run, StopAt(step, parts.state.progress), from_step),
        )
        assert resume_training(Path(run_dir)) == REQUEUE


def test_a_run_that_died_between_two_checkpoints_loses_only_what_came_after(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ["optimizer.name=adam", "checkpoint.every=5", "log.every=1", "log.tensorboard=true"]
    assert run_training(configure("unbroken", *config), "digits") == OK

    class Killed(Exception):
        pass

    class KillAt(StopAt):
        @property
        def requested(self) -> bool:
            if self._progress.step >= self._step:
                raise Killed  # no checkpoint, no goodbye
            return False

    parts = build(configure("resumed", *config))
    with pytest.raises(Killed), new_run(configure("resumed", *config), "digits") as run:
        train(parts, run, KillAt(13, parts.state.progress))
    assert metrics("resumed")[-1]["step"] == 13
    assert resume_training(Path("resumed")) == OK
    assert "continues resumed at step 10 of 20" in capsys.readouterr().out
    assert_equal_runs("resumed", "unbroken")

    # TensorBoard shows one curve: each step once, with the numbers of the unbroken run.
    assert scalars("resumed") == scalars("unbroken")
    assert [step for step, _ in scalars("resumed")["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in scalars("resumed")["val/accuracy"]] == [3, 6, 9, 12, 15, 18, 20]


def scalars(run_dir: str) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard draws of a run."""
    reader = EventAccumulator(f"{run_dir}/tb", size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag != "throughput"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def test_a_damaged_newest_checkpoint_is_said_once_and_the_one_before_it_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ["checkpoint.every=5", "checkpoint.keep=3"]
    assert run_training(configure("unbroken", *config), "digits") == OK
    train_until(configure("resumed", *config), 15)
    shard = next(Path("resumed/checkpoints/step-00000015").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    Path("resumed/checkpoints/step-00000010/index.json").unlink()
    capsys.readouterr()

    resume_until("resumed", 7)
    said = capsys.readouterr()
    assert "continues resumed at step 5 of 20" in said.out
    assert said.err.count("warning: checkpoint not used") == 2
    assert "step-00000015/shard-00000-of-00001.safetensors: has" in said.err
    assert "step-00000010: has no index.json" in said.err
    assert Path("resumed/checkpoints/refused-step-00000015").is_dir()

    assert resume_training(Path("resumed")) == OK
    assert "not used" not in capsys.readouterr().err
    assert_equal_runs("resumed", "unbroken")


def test_a_finished_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(configure("run", "train.steps=2"), "digits") == OK
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    assert resume_training(Path("run")) == OK
    assert capsys.readouterr().out == "run has ended already: nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.name != ".lock"} == before


def test_a_run_that_died_after_its_last_step_is_finished() -> None:
    assert run_training(configure("unbroken"), "digits") == OK
    shutil.copytree("unbroken", "resumed")
    for name in ("summary.json", "model.safetensors", "curves.png"):
        Path("resumed", name).unlink()
    assert resume_training(Path("resumed")) == OK
    assert_equal_runs("resumed", "unbroken")
    summaries = [json.loads(Path(name, "summary.json").read_text()) for name in ("resumed", "unbroken")]
    assert summaries[0] == summaries[1]
    assert Path("resumed/curves.png").exists()


def spoil_nothing(run: Path) -> None:
    shutil.rmtree(run)


def spoil_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def spoil_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def spoil_every_index(run: Path) -> None:
    for index in run.glob("checkpoints/*/index.json"):
        index.write_text("{}")


def change_the_model(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("width: 4", "width: 8"))


def test_a_start_that_died_before_its_first_checkpoint_is_begun_anew() -> None:
    """`gtddp submit` makes the directory, and a job may be killed at any time."""
    assert run_training(configure("unbroken"), "digits") == OK
    prepared = Path("run")
    prepared.mkdir()
    fill(prepared, configure("run"))
    (prepared / "metrics.jsonl").write_text('{"step": 1, "train/loss": 77.0}\n')  # of a start that was killed
    unfinished = prepared / "checkpoints" / "step-00000000.unfinished"
    unfinished.mkdir(parents=True)
    assert resume_training(prepared) == OK
    assert metrics("run") == metrics("unbroken")
    assert_equal_runs("run", "unbroken")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing, "there is no run directory run"),
        (spoil_config, r"run is not a run directory: cannot read its config\.yaml"),
        (spoil_checkpoints, r"run cannot be continued: of its checkpoints \(run/checkpoints\) there is none"),
        (spoil_every_index, r"run cannot be continued: of its checkpoints .* none can be used"),
        (change_the_model, r"step-00000002: '\S+' is .*, in the model it is .*: was the configuration changed\?"),
    ],
)
def test_what_cannot_be_resumed_is_refused(spoil: Callable[[Path], None], message: str) -> None:
    train_until(configure("run"), 2)
    spoil(Path("run"))
    with pytest.raises(UserError, match=message):
        resume_training(Path("run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_stops_the_command_with_a_checkpoint_to_be_requeued(number: signal.Signals) -> None:
    # Long enough that it is in the middle when the signal comes; the unbroken run repeats as many steps as it did.
    options = ["optimizer.name=adam", "train.steps=3000", "log.every=1", "eval.every=1000"]
    config = configure("resumed", *options)
    words = [f"{group}.{name}={json.dumps(value)}" for group, name, value in _settings(config)]
    words.append("schedule.name=constant")  # the default, which `words` leaves out, but not that of digits.yaml
    process = subprocess.Popen(
        [sys.executable, "-m", "gtddp_dist", "train", "digits", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = Path("resumed/metrics.jsonl")
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") >= 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == REQUEUE == 75, said
    assert f"stopped by {number.name} at step" in said
    assert "continue with: gtddp train --resume resumed" in said

    stopped = metrics("resumed")[-1]["step"]
    assert 5 <= stopped < 3000
    end = int(stopped) + 10
    for name in ("resumed", "unbroken"):
        shorter = configure(name, *options, f"train.steps={end}")
        if name == "resumed":
            Path("resumed/config.yaml").write_text(_yaml(shorter))
            assert resume_training(Path("resumed")) == OK
        else:
            assert run_training(shorter, "digits") == OK
    assert_equal_runs("resumed", "unbroken")


def _settings(config: Config) -> list[tuple[str, str, object]]:
    chosen = {
        "model": ("width",),
        "optimizer": ("name", "gauss_newton_weight", "lr"),
        "train": ("steps", "batch_size"),
        "log": ("every", "progress", "tensorboard"),
        "eval": ("every",),
        "run": ("dir",),
    }
    return [(group, name, getattr(getattr(config, group), name)) for group, names in chosen.items() for name in names]


def _yaml(config: Config) -> str:
    from gtddp_dist.config import to_yaml

    return to_yaml(config)


def test_a_killed_command_frees_its_run_directory() -> None:
    # The lock belongs to the process, so nothing is left to be removed by hand.
    config = configure("run", "train.steps=3000", "log.every=1")
    words = [f"{group}.{name}={json.dumps(value)}" for group, name, value in _settings(config)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gtddp_dist", "train", "digits", *words], stdout=subprocess.DEVNULL
    )
    log = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is training in run"):
        resume_training(Path("run"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    Path("run/config.yaml").write_text(_yaml(configure("run", "train.steps=2")))
    for later in Path("run/checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > 0:
            shutil.rmtree(later)
    assert resume_training(Path("run")) == OK
    assert metrics("run")[-1]["step"] == 2

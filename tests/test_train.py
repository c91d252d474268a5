"""Training: what a run writes, how it treats bad steps, and how it is started and asked to stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gtddp_dist import registry
from gtddp_dist.config import Config, DataConfig, ScheduleConfig, from_yaml, load_config
from gtddp_dist.data import DataSet
from gtddp_dist.data.digits import load as load_digits
from gtddp_dist.environment import _check_kernels, describe_environment, select_device
from gtddp_dist.errors import FAILED, OK, REQUEUE, UserError
from gtddp_dist.launch import StopRequest
from gtddp_dist.launch.stop import STOP_SIGNALS
from gtddp_dist.parts import Parts, build
from gtddp_dist.run_directory import MetricsLog, RunDirectory, existing_run, new_run, read_metrics
from gtddp_dist.schedule import factor
from gtddp_dist.train import evaluate_run, resume_training, run_training, train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(*overrides: str, run_dir: str = "run") -> Config:
    """A few steps of a small network on DIGITS; later overrides count over earlier ones."""
    return load_config(
        "digits",
        [
            "model.width=4",
            "optimizer.name=sgd",
            "optimizer.gauss_newton_weight=null",
            "optimizer.lr=0.05",
            "schedule.name=constant",
            "train.steps=6",
            "log.every=2",
            "log.progress=false",
            "log.tensorboard=false",
            f"run.dir={run_dir}",
            *overrides,
        ],
    )


def model_of(run_dir: str) -> dict[str, Tensor]:
    return load_file(Path(run_dir) / "model.safetensors")


def metrics_of(run_dir: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def with_bad_samples(bad: int | slice) -> DataSet:
    data = load_digits(DataConfig())
    images = data.train_images.clone()
    images[bad] = float("nan")
    return replace(data, train_images=images)


def load_with_one_bad_sample(config: DataConfig) -> DataSet:
    return with_bad_samples(3)


def load_with_only_bad_samples(config: DataConfig) -> DataSet:
    return with_bad_samples(slice(None))


@pytest.fixture
def bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, loader in (
        ("one-bad", "load_with_one_bad_sample"),
        ("all-bad", "load_with_only_bad_samples"),
    ):
        entry = registry.DataEntry((), f"{__name__}:{loader}")
        monkeypatch.setitem(registry.DATA_SETS, name, entry)


# What a run writes -------------------------------------------------------------------------------------------


def test_a_run_writes_all_that_it_promises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    config = small("log.tensorboard=true", "eval.every=3", "optimizer.name=gtddp-sgd", "train.steps=7")
    assert run_training(config, "digits") == OK
    run = RunDirectory(Path("run"))
    written = {path.name for path in run.path.iterdir() if not path.name.startswith(".")}
    assert sorted(written - {"source.patch"}) == [  # there where the checkout has changes
        "checkpoints",
        "config.yaml",
        "curves.png",
        "environment.json",
        "history.jsonl",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "tb",
    ]
    assert from_yaml(run.config_file.read_text()) == config

    lines = metrics_of("run")
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 7]
    assert [line["step"] for line in lines if "val/accuracy" in line] == [3, 6, 7]
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] / 44)
        if "train/loss" in line:
            assert {"train/accuracy", "throughput", "lr", "gtddp/actual_decrease"} <= line.keys()
            assert line["throughput"] > 0 and line["lr"] == 0.05

    summary = json.loads(run.summary_file.read_text())
    assert summary["steps"] == 7 and summary["optimizer"] == "gtddp-sgd" and summary["skipped_steps"] == 0
    assert summary["val/accuracy"] == lines[-1]["val/accuracy"]
    assert summary["val/accuracy_best"] == max(line.get("val/accuracy", 0.0) for line in lines)
    # Windows of 2, 2, 2 and 1 steps.
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert summary["train/loss"] == pytest.approx((2 * sum(losses[:3]) + losses[3]) / 7)

    environment = run.environment_file.read_text()
    assert json.loads(environment)["packages"]["torch"] == torch.__version__
    assert "a-secret-value" not in environment and "SOME_TOKEN" not in environment

    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-00000000", "step-00000007"]
    assert "blocks.0.shortcut.conv.weight" in model_of("run")
    assert run.curves.read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for expected in ("run: gtddp-sgd, small-resnet, digits, 7 steps", "run/curves.png", "gtddp tensorboard run"):
        assert expected in printed


def test_the_logged_loss_is_the_mean_of_the_steps_since_the_line_before() -> None:
    assert run_training(small("log.every=1", run_dir="each"), "digits") == OK
    assert run_training(small("log.every=3", run_dir="third"), "digits") == OK
    each = [line["train/loss"] for line in metrics_of("each")]
    third = [line["train/loss"] for line in metrics_of("third")]
    assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])


def test_the_default_run_directory_is_new_each_time() -> None:
    config = replace(small(), run=replace(small().run, dir=None))
    with new_run(config, "some/where/my-config.yaml") as first, new_run(config, "my-config") as second:
        assert first.path != second.path
        for run in (first, second):
            assert re.fullmatch(r"runs/my-config-\d{8}T\d{6}Z(-2)?", str(run.path))


def test_a_run_directory_is_not_used_twice() -> None:
    Path("run").mkdir()
    assert run_training(small(), "digits") == OK  # an empty one is fine
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run\.dir = run is not empty: .*--resume run"):
        run_training(small(), "digits")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_two_processes_do_not_share_a_run_directory() -> None:
    with new_run(small(), "digits") as run:
        with pytest.raises(UserError, match="another process is training in run"):
            resume_training(run.path)
        with pytest.raises(UserError, match=r"run\.dir = run is not empty"):
            run_training(small(), "digits")
    with existing_run(Path("run")):  # free again
        pass


def test_what_cannot_be_built_leaves_no_run_directory() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size is 2000"):
        run_training(small("train.batch_size=2000"), "digits")
    assert not Path("run").exists()
    Path("theirs").mkdir()
    Path("theirs/notes").touch()
    with pytest.raises(UserError, match="theirs is not empty"):
        run_training(small(run_dir="theirs"), "digits")
    assert [path.name for path in Path("theirs").iterdir()] == ["notes"]
    Path("file").touch()
    with pytest.raises(UserError, match=r"run\.dir = file/run cannot be made"):
        run_training(small(run_dir="file/run"), "digits")


def test_metrics_stay_json_when_numbers_are_not_finite() -> None:
    Path("run").mkdir()
    run = RunDirectory(Path("run"))
    with MetricsLog(run, tensorboard=False) as log:
        log.write(1, {"a": 0.5, "b": float("nan"), "c": float("-inf")})
    line = run.metrics_file.read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "a": 0.5,
        "nonfinite": ["b", "c"],
    }
    assert read_metrics(run) == [{"step": 1, "a": 0.5}]


def test_lines_after_the_checkpoint_are_dropped_and_a_torn_last_line_too() -> None:
    Path("run").mkdir()
    run = RunDirectory(Path("run"))
    run.metrics_file.write_text('{"step": 1, "a": 0.1}\n{"step": 2, "a": 0.2}\n{"step": 3, "a": 0.3}\n{"step": 4, "a"')
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
    with MetricsLog(run, tensorboard=False, from_step=2) as log:
        log.write(3, {"a": 0.7})
    assert run.metrics_file.read_text() == '{"step": 1, "a": 0.1}\n{"step": 2, "a": 0.2}\n{"step": 3, "a": 0.7}\n'
    run.metrics_file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: is not JSON"):
        read_metrics(run)


def test_evaluation_of_a_run_prints_the_numbers_of_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(small("model.batch_norm=true"), "digits") == OK
    summary = json.loads(Path("run/summary.json").read_text())
    Path("run/.lock").chmod(0o400)  # evaluation needs no lock
    capsys.readouterr()
    assert evaluate_run(Path("run")) == OK
    for_people, for_programs = capsys.readouterr().out.splitlines()
    assert "run/model.safetensors, step 6" in for_people and f"{summary['val/accuracy']:.2%}" in for_people
    assert json.loads(for_programs) == {
        "step": 6,
        "val/loss": summary["val/loss"],
        "val/accuracy": summary["val/accuracy"],
    }

    Path("run/model.safetensors").unlink()  # as if training had not ended
    assert evaluate_run(Path("run")) == OK
    for_people, again = capsys.readouterr().out.splitlines()
    assert "step-00000006" in for_people and again == for_programs

    shutil.rmtree("run/checkpoints")
    with pytest.raises(UserError, match=r"of its checkpoints \(run/checkpoints\) there is none"):
        evaluate_run(Path("run"))
    with pytest.raises(UserError, match="there is no run directory nowhere"):
        evaluate_run(Path("nowhere"))


def test_evaluation_refuses_a_model_that_is_not_the_configured_one() -> None:
    assert run_training(small(), "digits") == OK
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("width: 4", "width: 8"))
    with pytest.raises(
        UserError, match=r"model\.safetensors: 'blocks\.0\.first\.conv\.bias' is .* \[4\], in the model"
    ):
        evaluate_run(Path("run"))
    Path("run/model.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"model\.safetensors: is not a model"):
        evaluate_run(Path("run"))


# One step ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    for run_dir, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_training(small(f"train.seed={seed}", run_dir=run_dir), "digits") == OK
        torch.rand(5)  # what was drawn before a run does not matter
    a, b, c = (model_of(name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["hidden.weight"], c["hidden.weight"])


@pytest.mark.parametrize("chunks", ["train.micro_batches=4", "train.replica_groups=2"])
def test_chunks_of_a_batch_add_up_to_its_mean_gradient(chunks: str) -> None:
    assert run_training(small("train.dtype=float64", run_dir="whole"), "digits") == OK
    assert run_training(small("train.dtype=float64", chunks, run_dir="cut"), "digits") == OK
    whole, cut = model_of("whole"), model_of("cut")
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-11, atol=1e-13)
    assert metrics_of("cut")[-1]["train/loss"] == pytest.approx(metrics_of("whole")[-1]["train/loss"], rel=1e-12)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    assert run_training(small("train.steps=1", run_dir="free"), "digits") == OK
    assert run_training(small("train.steps=1", "train.clip_norm=0.25", run_dir="clipped"), "digits") == OK
    start = build(small("train.steps=1")).model.state_dict()
    free = torch.cat([(value - start[name]).flatten() for name, value in model_of("free").items()])
    clipped = torch.cat([(value - start[name]).flatten() for name, value in model_of("clipped").items()])
    assert free.norm() > 0.05 * 0.3
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.05 * 0.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "gtddp-adam"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_arithmetic_trains(dtype: str, optimizer: str) -> None:
    config = small(f"train.dtype={dtype}", f"optimizer.name={optimizer}", "optimizer.lr=0.01", "train.steps=15")
    assert run_training(config, "digits") == OK
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert all(tensor.dtype == expected for tensor in model_of("run").values())
    lines = [line for line in metrics_of("run") if "train/loss" in line]
    assert lines[-1]["train/loss"] < 0.9 * lines[0]["train/loss"]
    saved = json.loads(Path("run/checkpoints/step-00000015/index.json").read_text())["values"]
    assert ("scaler" in saved) == (dtype == "float16")


def test_measuring_the_decrease_changes_nothing() -> None:
    config = small("model.batch_norm=true", "train.micro_batches=2")
    parts = build(config)
    images, labels = parts.data.train_images[:32], parts.data.train_labels[:32]
    result = parts.step(images, labels)
    state = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    random_state = torch.get_rng_state()
    after = parts.step.loss_now(images, labels)
    assert after < result.loss  # it is the loss of the new weights
    assert torch.equal(torch.get_rng_state(), random_state)
    now = parts.model.state_dict()
    assert all(torch.equal(now[name], state[name]) for name in state)
    assert parts.step(images, labels).loss == pytest.approx(after, rel=1e-6)  # and the one the next step sees


def test_the_rate_follows_the_schedule() -> None:
    config = small("schedule.name=cosine", "schedule.warmup_steps=2", "schedule.min_factor=0.1", "log.every=1")
    assert run_training(config, "digits") == OK
    expected = [0.05 * factor(config.schedule, step, 6) for step in range(6)]
    assert [line["lr"] for line in metrics_of("run")] == expected


def test_schedules() -> None:
    warm = ScheduleConfig(warmup_steps=4)
    assert [factor(warm, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = ScheduleConfig(name="cosine", min_factor=0.2)
    assert [factor(cosine, step, 8) for step in (0, 4, 8)] == pytest.approx([1.0, 0.6, 0.2])
    after_warm_up = ScheduleConfig(name="cosine", warmup_steps=2)
    assert [factor(after_warm_up, step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    falling = [factor(after_warm_up, step, 10) for step in range(2, 11)]
    assert falling == sorted(falling, reverse=True)
    steps = ScheduleConfig(name="step", milestones=(3, 5), gamma=0.5)
    assert [factor(steps, step, 9) for step in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


# Steps that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "gtddp-sgd"])
@pytest.mark.parametrize("batch_norm", ["false", "true"])
def test_a_step_that_is_not_finite_is_refused_and_training_goes_on(
    bad_data: None, optimizer: str, batch_norm: str
) -> None:
    config = small(
        "data.name=one-bad",
        f"optimizer.name={optimizer}",
        f"model.batch_norm={batch_norm}",
        "optimizer.lr=0.1",
        "train.batch_size=128",
        "train.steps=22",
        "log.every=4",
    )
    order = build(config).order
    bad_steps = [step for step in range(22) if 3 in order.batch_indices(step)]
    assert len(bad_steps) == 2  # 11 steps an epoch
    assert run_training(config, "digits") == OK
    lines = metrics_of("run")
    assert [(x["step"], x["train/skipped"]) for x in lines if "train/skipped" in x] == [
        (step + 1, count) for count, step in enumerate(bad_steps, start=1)
    ]
    assert all("nonfinite" not in line for line in lines)  # the mean is over the steps that were taken
    assert all(tensor.isfinite().all() for tensor in model_of("run").values())  # running statistics, too
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]  # the other steps were taken
    assert json.loads(Path("run/summary.json").read_text())["skipped_steps"] == 2


@pytest.mark.parametrize("optimizer", ["adam", "gtddp-adam"])
def test_a_refused_step_changes_nothing(bad_data: None, optimizer: str) -> None:
    config = small("data.name=one-bad", f"optimizer.name={optimizer}", "model.batch_norm=true")
    parts = build(config)
    good = slice(8, 40)
    parts.step(parts.data.train_images[good], parts.data.train_labels[good])
    before = {name: tensor.clone() for name, tensor in parts.state.collect()[0].items()}
    assert parts.step(parts.data.train_images[:32], parts.data.train_labels[:32]).refused
    after = parts.state.collect()[0]
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("optimizer", ["adam", "gtddp-adam"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_too_many_refused_steps_in_a_row_end_training_with_a_checkpoint(
    bad_data: None, capsys: pytest.CaptureFixture[str], optimizer: str, dtype: str
) -> None:
    config = small(
        "data.name=all-bad",
        f"optimizer.name={optimizer}",
        f"train.dtype={dtype}",
        "train.max_nonfinite=3",
    )
    assert run_training(config, "digits") == FAILED
    message = capsys.readouterr().err
    assert re.search(r"stopped at step 3: .* last\s+3 steps \(train\.max_nonfinite\) was not finite", message)
    assert Path("run/checkpoints/step-00000003/index.json").exists()
    lines = metrics_of("run")
    assert [line.get("train/skipped") for line in lines] == [1, 2, 3]
    assert lines[1]["nonfinite"] == ["train/loss", "train/accuracy"]
    assert json.loads(Path("run/summary.json").read_text())["finished"] is False
    assert not Path("run/model.safetensors").exists()
    # Resuming does not start the count again.
    assert resume_training(Path("run")) == FAILED
    assert metrics_of("run")[-1]["step"] == 4


# The baseline ------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_base_optimizer_at_the_same_settings(capsys: pytest.CaptureFixture[str]) -> None:
    config = small(
        "optimizer.name=gtddp-sgd",
        "optimizer.momentum=0.9",
        "optimizer.gauss_newton_weight=0.1",
        "optimizer.control_hessian=proximal",
        "run.baseline=true",
        "schedule.name=cosine",
    )
    assert run_training(config, "digits") == OK
    base = from_yaml(Path("run/baseline/config.yaml").read_text())
    assert base.optimizer.name == "sgd" and base.optimizer.momentum == 0.9 and base.optimizer.lr == 0.05
    assert base.optimizer.gauss_newton_weight is None and base.optimizer.control_hessian is None
    assert replace(base, run=config.run, optimizer=config.optimizer) == config

    # It is what the base optimizer does when it is configured by itself.
    by_itself = small("optimizer.momentum=0.9", "schedule.name=cosine", run_dir="alone")
    assert run_training(by_itself, "digits") == OK
    alone, beside = model_of("alone"), model_of("run/baseline")
    assert all(torch.equal(alone[name], beside[name]) for name in alone)

    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["baseline"]["val/accuracy"] == json.loads(Path("alone/summary.json").read_text())["val/accuracy"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row for row in rows if row and row[0] in ("gtddp-sgd", "sgd")}
    for name, numbers in (("gtddp-sgd", summary), ("sgd", summary["baseline"])):
        assert f"{numbers['train/loss']:.4g}" in table[name]
        assert f"{numbers['val/accuracy']:.2%}" in table[name]


def test_a_baseline_that_diverges_is_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gtddp_dist import assembly as module

    def with_a_bad_baseline(config: Config) -> Parts:
        parts = build(config)
        if config.optimizer.name == "sgd":
            parts.data.train_images.fill_(float("nan"))
        return parts

    monkeypatch.setattr(module, "build", with_a_bad_baseline)
    config = small("optimizer.name=gtddp-sgd", "run.baseline=true", "train.max_nonfinite=2")
    assert run_training(config, "digits") == OK
    printed = capsys.readouterr()
    assert "sgd" in printed.out and "(stopped at step 2)" in printed.out
    assert "error: stopped at step 2" in printed.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["finished"] is True and summary["val/accuracy"] > 0
    assert summary["baseline"]["finished"] is False and summary["baseline"]["train/loss"] is None
    assert resume_training(Path("run")) == OK
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_that_was_stopped_in_its_baseline_continues_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("optimizer.name=gtddp-sgd", "run.baseline=true", "checkpoint.every=2")
    assert run_training(replace(config, run=replace(config.run, dir="whole")), "digits") == OK

    from gtddp_dist import train as module

    def train_until_4(parts: Any, run: RunDirectory, stop: StopRequest, from_step: int | None = None) -> int:
        if run.path.name == "baseline" and from_step is None:
            return train(parts, run, StopAt(4, parts.state.progress), from_step)
        return train(parts, run, stop, from_step)

    monkeypatch.setattr(module, "train", train_until_4)
    assert run_training(config, "digits") == REQUEUE
    assert "continue with: gtddp train --resume run\n" in capsys.readouterr().err
    assert "baseline" not in json.loads(Path("run/summary.json").read_text())
    assert resume_training(Path("run")) == OK
    assert resume_training(Path("run")) == OK  # nothing left to do
    whole, continued = model_of("whole/baseline"), model_of("run/baseline")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["baseline"]["optimizer"] == "sgd"


class StopAt(StopRequest):
    """Asks to stop at a step of the run."""

    def __init__(self, step: int, progress: Any) -> None:
        super().__init__()
        self._step = step
        self._progress = progress

    @property
    def requested(self) -> bool:
        return self._progress.step >= self._step


# How a run is started and asked to stop ----------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_sets_the_flag_and_the_former_handlers_come_back(number: signal.Signals) -> None:
    former = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequest() as stop:
        requested = [stop.requested]
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        requested.append(stop.requested)
        assert requested == [False, True] and stop.reason == number.name
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == former


def test_a_second_interrupt_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_request_outside_the_main_thread_installs_no_handlers() -> None:
    seen: list[Any] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(signal.getsignal(signal.SIGTERM))
            stop.request()
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL, True]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto").type == select_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"train\.device=cuda, but torch sees no GPU"):
        select_device("cuda")
    _check_kernels((7, 0), ["sm_70", "sm_80"])
    _check_kernels((8, 6), ["sm_70", "sm_80"])  # a later minor version runs its major version's kernels
    _check_kernels((12, 0), ["sm_90", "compute_90"])  # intermediate code is compiled for later ones
    for capability, built in (((7, 0), ["sm_75", "sm_80", "sm_90"]), ((9, 0), ["sm_80"]), ((8, 0), [])):
        with pytest.raises(UserError, match=rf"no kernels for the GPU here, of .* {capability[0]}\.{capability[1]}"):
            _check_kernels(capability, built)
    with pytest.raises(UserError, match=r"constraints/v100\.txt"):
        _check_kernels((7, 0), ["sm_75"])


def test_the_environment_is_described_with_the_revision_of_a_checkout_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gtddp_dist import source

    text = json.dumps(describe_environment())
    assert json.loads(text)["cpu"]["cores"] >= 1
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "source.py").touch()

    def git(*words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert source.git_revision(package) is None  # no repository
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody else's")
    assert source.git_revision(package) is None  # in a repository, but not of it
    git("add", ".")
    git("commit", "-q", "-m", "now of it")
    found = source.git_revision(package)
    assert isinstance(found, dict)
    assert found["changed"] is False and re.fullmatch(r"[0-9a-f]{40}", str(found["revision"]))
    (package / "source.py").write_text("changed")
    found = source.git_revision(package)
    assert isinstance(found, dict) and found["changed"] is True


def sbatch(words: Sequence[str], gtddp: str, tmp_path: Path, **variables: str) -> tuple[int, str]:
    """Runs the job script with stand-ins for gtddp and Slurm's commands; its exit code, and what was called."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    calls.write_text("")
    for name, body in (
        ("gtddp", gtddp),
        ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'),
    ):
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{body}\n')
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), *words],
        env={**kept, "PATH": f"{programs}:{os.environ['PATH']}", "VIRTUAL_ENV": "set", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, calls.read_text()


RUN = "runs/digits-17"


def test_the_job_script_requeues_a_stopped_run_and_resumes_it(tmp_path: Path) -> None:
    makes = f"mkdir -p {RUN}; touch {RUN}/config.yaml; "
    ends = "case $1 in requeue) exit 0 ;; *) exit 75 ;; esac"
    code, calls = sbatch(["digits", "train.epochs=9"], makes + ends, tmp_path, SLURM_JOB_ID="17")
    assert calls.splitlines() == [
        f"srun --kill-on-bad-exit=0 --wait=60 gtddp train digits train.epochs=9 run.dir={RUN}",
        f"gtddp train digits train.epochs=9 run.dir={RUN}",
        f"gtddp requeue {RUN} --exit-code 75",
    ]
    assert code == 0

    # The same job again, and it is not put back.
    ends = "case $1 in requeue) exit 1 ;; *) exit 137 ;; esac"
    code, calls = sbatch(["digits", "train.epochs=9"], ends, tmp_path, SLURM_JOB_ID="17")
    assert calls.splitlines()[1:] == [f"gtddp train --resume {RUN}", f"gtddp requeue {RUN} --exit-code 137"]
    assert code == 1


def test_the_job_script_without_a_run_directory_is_not_put_back(tmp_path: Path) -> None:
    code, calls = sbatch(["digits", "train.epochs=9"], "exit 2", tmp_path, SLURM_JOB_ID="17")
    assert code == 2 and "requeue" not in calls


def test_the_job_script_without_slurm(tmp_path: Path) -> None:
    code, calls = sbatch(["my/own.yaml", "run.dir=here"], "exit 75", tmp_path)
    assert (code, calls) == (75, "gtddp train my/own.yaml run.dir=here run.dir=here\n")
    code, calls = sbatch(["my/own.yaml"], "exit 2", tmp_path)
    assert code == 2
    assert re.fullmatch(r"gtddp train my/own\.yaml run\.dir=runs/own-\d{8}T\d{6}Z-\d+\n", calls)
    assert sbatch([], "exit 0", tmp_path) == (2, "")


def test_the_job_script_trains(tmp_path: Path) -> None:
    venv = Path(shutil.which("gtddp") or ROOT / ".venv" / "bin" / "gtddp").parent
    words = ["digits", "train.steps=5", "model.width=4", "log.tensorboard=false", "run.dir=here"]
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), *words],
        env={**os.environ, "PATH": f"{venv}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("here/summary.json").read_text())["steps"] == 5


def test_numbers_too_small_for_float32_count_as_zero_in_a_run() -> None:
    """Computing with them is many times slower, and gradients of samples that are fitted well lie there."""
    torch.set_flush_denormal(False)
    assert float(torch.tensor(1e-20) * torch.tensor(1e-20)) > 0
    build(load_config("digits", ["train.steps=1"]))
    assert float(torch.tensor(1e-20) * torch.tensor(1e-20)) == 0

"""The command `gtddp`: exit codes, messages, and that torch is loaded only for work that needs it."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from gtddp_dist import __version__, cli, errors
from gtddp_dist.config import Config, load_config, shipped_configs, to_yaml

# Runs the command in a process and says on the last line of stdout whether torch was imported.
PROBE = (
    "import sys; from gtddp_dist.cli import main\n"
    "try: code = main(sys.argv[1:])\n"
    "except SystemExit as stop: code = stop.code or 0\n"
    "print('torch' in sys.modules); sys.exit(code)"
)


def run(*arguments: str, probe: bool = False) -> subprocess.CompletedProcess[str]:
    start = ["-c", PROBE] if probe else ["-m", "gtddp_dist"]
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], errors.OK),
        (["train", "--help"], errors.OK),
        (["train", "digits", "optimizer.lr=1e-3", "--check"], errors.OK),
        (["train", "digits", "optimizer.lrr=1e-3"], errors.BAD_INPUT),
    ],
)
def test_answers_at_once_without_torch(arguments: list[str], code: int) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run(*arguments, probe=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1] == "False", "torch was imported"
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


def test_bad_configuration_in_a_process() -> None:
    done = run("train", "digits", "optimizer.lrr=1e-3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gtddp: error: optimizer.lrr (command line): unknown key; nearest: optimizer.lr")
    assert "Traceback" not in done.stderr


def test_check_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits", "train.steps=4", "--check"]) == errors.OK
    assert capsys.readouterr().out == "ok: gtddp-adam trains small-resnet on digits for 4 steps\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "needs a config"),
        (["train", "train.steps=4"], "needs a config"),
        (["train", "digit"], "no config named 'digit'"),
        (["train", "digits", "more"], "'more' (command line): expected key=value"),
        (["train", "digits", "--resume", "somewhere"], "leave out 'digits'"),
        (["train", "--resume", "somewhere", "train.steps=4"], "leave out 'train.steps=4'"),
        (["train", "--resume", "somewhere", "--check"], "leave out '--check'"),
    ],
)
def test_bad_input(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == errors.BAD_INPUT
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("gtddp: error: ")
    assert part in output.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "COMMAND"),
        (["trian", "digits"], "invalid choice: 'trian'"),
        (["train", "digits", "--chek"], "unrecognized arguments: --chek"),
        (["train", "digits", "--res", "x"], "unrecognized arguments: --res"),
        (["eval"], "RUN"),
        (["eval", "one", "two"], "unrecognized arguments: two"),
    ],
)
def test_bad_arguments(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == errors.BAD_INPUT
    assert part in capsys.readouterr().err


def test_help_lists_configs_keys_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == errors.OK
    text = capsys.readouterr().out
    for part in [*shipped_configs(), "optimizer.gauss_newton_weight = null", "75 stopped", "train.batch_size = 32"]:
        assert part in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == errors.OK
    assert capsys.readouterr().out == f"gtddp {__version__}\n"


class Trainer:
    """Stands in for `gtddp_dist.train`: keeps what it was asked to do, and answers as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.answer: int | Exception = errors.OK
        module = types.ModuleType("gtddp_dist.train")
        for name in ("run_training", "resume_training", "evaluate_run"):
            setattr(module, name, lambda *arguments, name=name: self._called(name, *arguments))
        monkeypatch.setitem(sys.modules, "gtddp_dist.train", module)

    def _called(self, *call: object) -> int:
        self.calls.append(call)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(monkeypatch)


@pytest.mark.parametrize(
    "arguments", [["digits", "train.steps=4", "log.every=2"], ["digits", "train.steps=4", "--", "log.every=2"]]
)
def test_train(arguments: list[str], trainer: Trainer) -> None:
    assert cli.main(["train", *arguments]) == errors.OK
    [(name, config, config_name)] = trainer.calls
    assert (name, config_name) == ("run_training", "digits")
    assert isinstance(config, Config) and config.train.steps == 4 and config.log.every == 2


def test_train_a_file_of_ones_own(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 4}\n")
    assert cli.main(["train", str(path)]) == errors.OK
    assert trainer.calls[0][2] == "mine"


def test_flags_may_stand_anywhere() -> None:
    for arguments in (
        ["--check", "digits", "train.steps=4"],
        ["digits", "--check", "train.steps=4"],
        ["digits", "train.steps=4", "--check"],
    ):
        assert cli.main(["train", *arguments]) == errors.OK


def test_resume_and_eval(trainer: Trainer) -> None:
    assert cli.main(["train", "--resume", "runs/one"]) == errors.OK
    assert cli.main(["eval", "runs/one"]) == errors.OK
    assert trainer.calls == [("resume_training", Path("runs/one"), None), ("evaluate_run", Path("runs/one"))]


def test_resume_takes_another_grid_and_nothing_else(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []

    def start(command: list[str], wanted: int) -> int:
        started.append(wanted)
        return errors.OK

    monkeypatch.setattr(cli.local, "start", start)
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("digits", ["parallel.pipe=2"])))
    assert cli.main(["train", "--resume", str(tmp_path)]) == errors.OK
    assert cli.main(["train", "--resume", str(tmp_path), "parallel.data=4"]) == errors.OK
    assert started == [2, 8] and trainer.calls == []
    assert cli.main(["train", "--resume", str(tmp_path), "parallel.pipe=1"]) == errors.OK
    ((_, _, config),) = trainer.calls
    assert isinstance(config, Config) and config.parallel.pipe == 1
    assert cli.main(["train", "--resume", str(tmp_path), "optimizer.lr=1"]) == errors.BAD_INPUT
    assert "optimizer.lr=1" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errors.OK, errors.FAILED, errors.REQUEUE])
def test_exit_code_of_the_work_is_passed_on(code: int, trainer: Trainer) -> None:
    trainer.answer = code
    assert cli.main(["train", "digits"]) == code


def test_bad_input_found_during_the_work(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.answer = errors.UserError("no such run")
    assert cli.main(["eval", "nowhere"]) == errors.BAD_INPUT
    assert capsys.readouterr().err == "gtddp: error: no such run\n"


def test_other_errors_keep_their_traceback(trainer: Trainer) -> None:
    trainer.answer = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "digits"])


def test_public_names_are_lazy() -> None:
    code = (
        "import sys, gtddp_dist; assert 'torch' not in sys.modules\n"
        "assert set(gtddp_dist.__all__) <= set(dir(gtddp_dist))\n"
        "from gtddp_dist import GTDDP, Trajectory, curvature\n"
        "assert GTDDP.__module__ == 'gtddp_dist.optimizer' and curvature.__name__ == 'gtddp_dist.curvature'\n"
        "try: gtddp_dist.GTDPP\n"
        "except AttributeError as error: assert 'GTDPP' in str(error)\n"
        "else: raise SystemExit('no error for an unknown name')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

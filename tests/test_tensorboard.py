"""`gtddp tensorboard` on real files of a run that was continued, by TensorBoard's data endpoint and in a browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from matplotlib.image import imread

from gtddp_dist import cli
from gtddp_dist.errors import BAD_INPUT, OK, UserError
from gtddp_dist.run_directory import MetricsLog, RunDirectory
from gtddp_dist.run_folder import CONFIG
from gtddp_dist.tensorboard import folders, served

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
WITHIN_S = 60.0


def make_run(path: Path) -> Path:
    """A run that logged up to step 60, died, and went on from its checkpoint of step 40 to 100."""
    path.mkdir(parents=True)
    (path / CONFIG).write_text("{}\n")
    run = RunDirectory(path)
    with MetricsLog(run, tensorboard=True) as log:
        for step in range(10, 70, 10):
            log.write(step, {"train/loss": 100 / step})
    with MetricsLog(run, tensorboard=True, from_step=40) as log:
        for step in range(50, 110, 10):
            log.write(step, {"train/loss": 1 + 100 / step})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "continued")


def get(address: str, part: str) -> object:
    """What TensorBoard answers, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address + part, timeout=WITHIN_S) as answer:
        found: object = json.loads(answer.read())
    return found


def wait_for_runs(address: str, count: int) -> list[str]:
    """Names of the runs, once TensorBoard has read so many."""
    end = time.monotonic() + WITHIN_S
    while True:
        found = get(address, "data/runs")
        assert isinstance(found, list)
        if len(found) >= count:
            return sorted(found)
        assert time.monotonic() < end, f"TensorBoard has {found} after {WITHIN_S} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """TensorBoard, started by the command, with one run; it is ended as by Ctrl-C."""
    command = [sys.executable, "-u", "-m", "gtddp_dist", "tensorboard", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield line.split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=WITHIN_S)
    assert line.startswith("TensorBoard: http://127.0.0.1:"), line + err
    assert process.returncode == OK, out + err
    assert "Traceback" not in err


def test_one_run_is_one_curve(address: str) -> None:
    assert wait_for_runs(address, 1) == ["continued"]
    points = get(address, f"data/plugin/scalars/scalars?run=continued&tag={quote('train/loss', safe='')}")
    assert isinstance(points, list)
    assert [step for _, step, _ in points] == list(range(10, 110, 10))
    assert [value for _, _, value in points] == pytest.approx(
        [100 / step for step in range(10, 50, 10)] + [1 + 100 / step for step in range(50, 110, 10)]
    )


def test_its_page_in_a_browser(address: str) -> None:
    """The curve is drawn; the picture stays in artifacts/."""
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "no chromium on the PATH: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    wait_for_runs(address, 1)
    ARTIFACTS.mkdir(exist_ok=True)
    picture = ARTIFACTS / "tensorboard.png"
    picture.unlink(missing_ok=True)
    flags = (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,700"),
        # Not --disable-gpu: axes come without curves then.
        *("--disable-3d-apis", "--virtual-time-budget=10000", f"--screenshot={picture}"),
    )
    page = f"{address}?darkMode=false#scalars&_smoothingWeight=0"
    subprocess.run([chromium, *flags, page], capture_output=True, timeout=120, check=True)
    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[:2] == (700, 1100)
    # The curve's colour is that of the run's check box; below the bar at the top, right of the list of runs.
    right = (pixels[80:, 290:] * 255).round().astype(int).reshape(-1, 3)
    colours = Counter(map(tuple, right))
    curve = sum(count for (red, green, blue), count in colours.items() if red > 230 and 90 < green < 140 and blue < 110)
    assert curve > 200, colours.most_common(12)


def test_runs_trials_and_baselines_have_their_names(tmp_path: Path) -> None:
    (tmp_path / "one" / "baseline").mkdir(parents=True)
    (tmp_path / "one" / CONFIG).touch()
    for trial in ("000-a", "001-b"):
        (tmp_path / "sweep" / "trials" / trial).mkdir(parents=True)
        (tmp_path / "sweep" / "trials" / trial / CONFIG).touch()
    found = folders([tmp_path / "one", tmp_path / "sweep"])
    assert {name: str(path.relative_to(tmp_path.resolve())) for name, path in found.items()} == {
        "one": "one/tb",
        "one-baseline": "one/baseline/tb",
        "sweep/000-a": "sweep/trials/000-a/tb",
        "sweep/001-b": "sweep/trials/001-b/tb",
        "sweep/hparams": "sweep/hparams",
    }
    with pytest.raises(UserError, match="is neither a run directory"):
        folders([tmp_path])
    (tmp_path / "other" / "one").mkdir(parents=True)
    (tmp_path / "other" / "one" / CONFIG).touch()
    with pytest.raises(UserError, match="would both be called one: rename"):
        folders([tmp_path / "one", tmp_path / "other" / "one"])


def test_a_run_that_has_not_written_yet_appears_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtddp_dist.tensorboard.RELOAD_S", 1)
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / CONFIG).touch()
    with served([tmp_path / "early"], port=0) as address:
        assert get(address, "data/runs") == []
        shutil.copytree(make_run(tmp_path / "late") / "tb", tmp_path / "early" / "tb")
        assert wait_for_runs(address, 1) == ["early"]


def test_a_port_that_is_taken(address: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    assert cli.main(["tensorboard", str(run), "--port", port]) == BAD_INPUT
    assert f"port {port}" in capsys.readouterr().err


def test_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tensorboard"]) == BAD_INPUT
    assert "needs run directories or sweeps" in capsys.readouterr().err

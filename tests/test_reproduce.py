"""`gtddp reproduce`: every experiment in its quick form, and that pages say what their CSV files do."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gtddp_dist.checkpoint import JSON
from gtddp_dist.errors import BAD_INPUT, OK, REQUEUE, UserError
from gtddp_dist.experiments.page import Table
from gtddp_dist.experiments.plan import Plan
from gtddp_dist.experiments.pool import RESULTS, Pool
from gtddp_dist.experiments.statistics import Spread, p_of_pairs, p_of_spreads
from gtddp_dist.experiments.training import Trained, training
from gtddp_dist.experiments.unit import Unit
from gtddp_dist.registry import EXPERIMENTS


def gtddp(*arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gtddp_dist", "reproduce", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experiments in their quick form."""
    out = tmp_path_factory.mktemp("results")
    done = gtddp("all", "--quick", "data.name=digits", "--out", str(out))
    assert done.returncode == OK, done.stderr
    return out


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, in which a bar within a cell is escaped."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables_of(page: str) -> list[tuple[list[list[str]], str]]:
    """The tables of a page as rows of cells, each with the CSV file that is named below it."""
    found = re.findall(r"((?:^\|.*\|\n)+)\n\(\[(.*?\.csv)\]", page, flags=re.M)
    return [([cells_of(line) for line in text.strip().split("\n")], file) for text, file in found]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_page_has_its_parts(pages: Path, name: str) -> None:
    page = (pages / f"{name}.md").read_text()
    assert page.startswith(f"# {EXPERIMENTS[name].title}\n")
    assert f"gtddp reproduce {name} --quick data.name=digits seeds=2" in page
    for part in ("## What was run", "* date: ", "* hardware: ", "* versions: ", "* revision: "):
        assert part in page
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", page)
    assert pictures
    for picture in pictures:
        assert (pages / picture).read_bytes().startswith(b"\x89PNG")
    assert f"]({name}.md)" in (pages / "README.md").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_numbers_of_a_page_are_those_of_its_csv(pages: Path, name: str) -> None:
    tables = tables_of((pages / f"{name}.md").read_text())
    assert tables
    numbers = 0
    for rows, file in tables:
        with open(pages / file, newline="", encoding="utf-8") as source:
            expected = list(csv.reader(source))
        assert rows[0] == expected[0]
        assert len(rows) - 2 == len(expected) - 1
        for shown, written in zip(rows[2:], expected[1:], strict=True):
            for cell, value in zip(shown, written, strict=True):
                numbers += agree(cell, value)
    assert numbers > 0


def agree(cell: str, value: str) -> bool:
    """Asserts that a cell of a page shows a CSV's value, to half of its last digit; whether it is a number."""
    if value in ("", "True", "False"):
        assert cell in {"": ("-", ""), "True": ("yes",), "False": ("no",)}[value]
        return False
    try:
        exact = float(value)
    except ValueError:
        assert cell == value
        return False
    shown = float(cell.replace(",", ""))
    mantissa, _, exponent = cell.lower().replace(",", "").partition("e")
    decimals = len(mantissa.partition(".")[2])
    # Formats like .3g drop trailing zeros: half a unit of the third digit is enough for those.
    half = max(0.5 * 10.0 ** (int(exponent or 0) - decimals), 0.0005 * abs(exact)) if "." in cell or exponent else 0.5
    assert math.isclose(shown, exact, rel_tol=0.0, abs_tol=half * 1.0001) or math.isclose(shown, exact, rel_tol=0.05), (
        cell,
        value,
    )
    return True


def test_table2_follows_from_its_runs(pages: Path) -> None:
    """Means and deviations anew, from the CSV of the runs alone."""
    with open(pages / "table2-runs.csv", newline="", encoding="utf-8") as source:
        runs = list(csv.DictReader(source))
    with open(pages / "table2.csv", newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    cells: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        cells.setdefault((run["base"], run["optimizer"]), []).append(float(run["train loss"]))
    assert len(cells) == len(rows) == 12
    for row, losses in zip(rows, cells.values(), strict=True):
        assert float(row["train loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert float(row["deviation of loss"]) == pytest.approx(statistics.stdev(losses), rel=1e-9)


def test_what_was_done_is_not_done_again(pages: Path) -> None:
    before = (pages / RESULTS).read_bytes()
    done = gtddp("table2", "--quick", "--out", str(pages))
    assert done.returncode == OK
    assert (pages / RESULTS).read_bytes() == before


def test_trainings_are_those_of_gtddp_train(pages: Path, tmp_path: Path) -> None:
    """The result of a unit, and of the command with the same settings."""
    from gtddp_dist.config import load_config
    from gtddp_dist.run_directory import RunDirectory
    from gtddp_dist.train import run_training

    line = next(
        entry
        for entry in map(json.loads, (pages / RESULTS).read_text().splitlines())
        if entry["arguments"].get("optimizer.name") == "gtddp-sgd"
    )
    given = [f"{key}={json.dumps(value)}" for key, value in line["arguments"].items()]
    unset = ["optimizer.gauss_newton_weight=null"] * ("optimizer.gauss_newton_weight" not in line["arguments"])
    words = [*unset, "schedule.name=constant", *given, f"run.dir={tmp_path / 'run'}", "log.progress=false"]
    assert run_training(load_config("digits", words), "digits") == OK
    summary = RunDirectory(tmp_path / "run").read_summary()
    assert summary is not None
    assert line["result"]["train_loss"] == summary["train/loss"]
    assert line["result"]["val_accuracy"] == summary["val/accuracy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tabel2"], "table2"),
        (["table2", "seeds=0"], "seeds=0"),
        (["table2", "data.name=digit"], "digits"),
        (["table2", "optimizer.lr=1"], "table2 sets it"),
        (["table2", "train.epoch=1"], "train.epochs"),
        (["table2", "train.epochs=x"], "train.epochs"),
        (["table2", "--jobs=0"], "--jobs=0"),
        ([], "table2"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gtddp_dist.cli import main

    assert main(["reproduce", *words, "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / RESULTS).exists()


def is_there(group: int) -> bool:
    """Whether a process of the group is left. Python's own tracker of resources ends a moment after the command."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_keeps_what_is_done_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "gtddp_dist",
        "reproduce",
        "table2",
        "seeds=3",
        "train.steps=20",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / RESULTS).exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == REQUEUE, told
            assert "goes on where it was" in told
        until = time.monotonic() + 20
        while is_there(process.pid):
            assert time.monotonic() < until, "processes of the command are left"
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for line in (tmp_path / RESULTS).read_text().splitlines():
        json.loads(line)


def test_a_torn_last_line_is_cut_off_and_another_is_refused(tmp_path: Path) -> None:
    unit = Unit.of("math:sqrt", {"x": 4})
    origin = {"date": "", "revision": "", "cpu": "", "versions": ""}
    line = json.dumps({"key": unit.key, "result": {"y": 2.0}, "origin": origin})
    (tmp_path / RESULTS).write_text(line + "\n" + line[:20])
    with Pool(tmp_path, 1) as pool:
        assert pool.results.of(unit) == {"y": 2.0}
        with pytest.raises(UserError, match="another gtddp reproduce"), Pool(tmp_path, 1):
            pass
    assert (tmp_path / RESULTS).read_text() == line + "\n"
    (tmp_path / RESULTS).write_text("{}\n" + line + "\n")
    with pytest.raises(UserError, match="line 1"), Pool(tmp_path, 1):
        pass


def test_spread_counts_what_diverged() -> None:
    spread = Spread.of([1.0, 3.0, None, math.inf, 2.0])
    assert (spread.mean, spread.deviation, spread.diverged, spread.median) == (2.0, 1.0, 2, 3.0)
    assert Spread.of([None]).mean is None


def test_tests_on_pairs() -> None:
    """Against values worked out by hand and by the definitions."""
    assert p_of_pairs([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx(2 / 2**5)  # all signs alike: both tails
    assert p_of_pairs([1.0, 2.0], [1.0, 2.0]) is None
    # A run that diverged ranks behind: five of five worse, as above.
    assert p_of_pairs([2, 4, 6, 8, math.inf], [1, 2, 3, 4, 5]) == pytest.approx(2 / 2**5)
    a, b = [1.0, 2.0, 3.0, 4.5, 0.5], [1.0, 1.1, 0.9, 1.05, 0.97]
    p = p_of_spreads(a, b)
    assert p is not None and p < 0.01
    assert p_of_spreads([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) is None


def test_a_run_trains_below_half_of_guessing() -> None:
    unit = training(Plan(), {"train.seed": 1, "optimizer.name": "sgd", "optimizer.lr": 0.1})

    def trained(loss: float | None) -> Trained:
        result: dict[str, JSON] = {
            "diverged": loss is None, "train_loss": loss, "val_accuracy": 0.5, "seconds_per_step": 0.1, "steps": 3,
            "curves": {"val/accuracy": [[1, 0.3], [2, 0.95], [3, 0.5]]},
        }  # fmt: skip
        return Trained(unit, result)

    assert trained(1.15).trains and not trained(1.16).trains and not trained(None).trains
    assert trained(1.0).steps_to(95) == 2
    assert trained(1.0).steps_to(96) is None


def test_a_table_shows_what_its_file_has() -> None:
    table = Table("x", "X", {"name": "", "value": ".2f"}, [["a", 1.234], ["b", None]])
    assert table.csv() == "name,value\na,1.234\nb,\n"
    assert [line.split("|")[2].strip() for line in table.markdown().splitlines()[2:]] == ["1.23", "-"]

"""The campaign's own bookkeeping: what a case leaves in the CSV and on the page. Its faults run in CI by themselves."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import __main__ as program
from campaign.part import Case, Part, Row
from campaign.processes import Program, started

OUTCOMES = {"good": "", "bad": "it is not so", "late": "", "raises": ""}
RAN: list[str] = []


def one(name: str) -> Row:
    RAN.append(name)
    if name == "raises":
        raise ValueError("no such thing")
    if name == "late":
        time.sleep(5)
    return Row(OUTCOMES[name], {"kind": name[0], "holds": "no" if name == "bad" else "yes", "seconds": "1.5"})


def cases(seed: int, quick: bool) -> list[Case]:
    return [Case(name, lambda folder, name=name: one(name), within_s=1.0, known={"kind": "k"}) for name in OUTCOMES]  # type: ignore[misc]


PART = Part("some", "Some", "What has to hold.", {"kind": "group", "holds": "holds", "seconds": "number"}, cases)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(program, "PARTS", [PART])
    RAN.clear()
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("parts")
def test_each_case_is_run_once_and_the_page_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path)]
    assert program.main(out) == 1
    assert list(OUTCOMES) == RAN
    page = (tmp_path / "README.md").read_text()
    assert "**1 of 4 run are as they should be; 4 of 4 cases were run**" in page
    for problem in ("bad: it is not so", "late: TimeoutError", "raises: ValueError"):
        assert f"* {problem}" in page
    assert program.main(out) == 0 and len(RAN) == 4

    monkeypatch.setitem(OUTCOMES, "bad", "")
    assert program.main([*out, "--failed"]) == 1  # two fail again
    assert RAN[4:] == ["bad", "late", "raises"]
    page = (tmp_path / "README.md").read_text()
    assert "**2 of 4 run are as they should be; 4 of 4 cases were run**" in page
    assert "Failed in an earlier run, and not in the last one: bad." in page


@pytest.mark.usefixtures("parts")
def test_a_part_ends_in_time_and_goes_on_later(tmp_path: Path) -> None:
    assert program.main(["--out", str(tmp_path), "--minutes", "0"]) == 75
    assert "Not run: `make campaign PARTS=some`" in (tmp_path / "README.md").read_text()
    assert RAN == []


LEAVES = """
import os, subprocess, sys, time
if sys.argv[1:] == ["child"]:
    time.sleep(60)
open(os.path.join(os.environ["TMPDIR"], "left"), "w")
open("/dev/shm/gtddp-campaign-test", "w+b").close()
shared = open("/dev/shm/gtddp-campaign-test", "r+b")
subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
time.sleep(1.5)
"""


def test_what_a_program_leaves_is_found_and_its_processes_are_ended(tmp_path: Path) -> None:
    """Also those in sessions of their own, and memory that it had open alone."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    try:
        with started(tmp_path, "it", [sys.executable, str(script)]) as found:
            found.waits_for((found.tmp / "left").exists, 60.0)
            with pytest.raises(TimeoutError):
                found.ends(4.0)
            left = found.leftovers()
            processes = list(found.processes())
        assert left == [f"process {processes[0]}", "/dev/shm/gtddp-campaign-test", "$TMPDIR/left"]
        assert isinstance(found, Program) and not found.processes()
    finally:
        Path("/dev/shm/gtddp-campaign-test").unlink(missing_ok=True)


def test_a_program_whose_environment_is_not_there_yet_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel shows one whose exec has not come to its end."""
    began = time.monotonic()
    with started(tmp_path, "it", [sys.executable, "-c", "import time; time.sleep(1.5)"]) as found:
        monkeypatch.setattr(found, "processes", dict[int, bytes])
        assert found.ends(60.0) >= began + 1.5

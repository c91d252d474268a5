"""Random command lines and random networks: taken, or refused with a message, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fuzz
import fuzz_nets
import pytest
from hypothesis import HealthCheck, given, settings

from gtddp_dist import errors
from gtddp_dist.trials.spec import read_sweep

ANY = settings(
    max_examples=fuzz.EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@given(fuzz.commands)
@ANY
def test_a_command_line_is_taken_or_refused(command: fuzz.CommandLine) -> None:
    with tempfile.TemporaryDirectory(prefix="gtddp-fuzz-") as folder:
        answer = fuzz.in_process(command, Path(folder))
        assert not fuzz.problem(command, answer, Path(folder)), command


@pytest.mark.parametrize("text", [*fuzz.REFUSED_TEXT, *fuzz.REFUSED_BYTES], ids=lambda text: repr(text[:24]))
def test_a_text_that_is_no_configuration_is_refused(text: str | bytes, tmp_path: Path) -> None:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    command = fuzz.CommandLine((fuzz.CONFIG,), data, valid=False)
    assert not fuzz.problem(command, fuzz.in_process(command, tmp_path), tmp_path)


@pytest.mark.parametrize("key", fuzz.WRONG)
def test_a_wrong_value_is_refused(key: str, tmp_path: Path) -> None:
    for value in fuzz.WRONG[key]:
        for command in (
            fuzz.CommandLine(("digits", f"{key}={fuzz.yaml_text(value)}"), valid=False),
            fuzz.CommandLine((fuzz.CONFIG,), fuzz.file_of({key: value}), valid=False),
        ):
            found = fuzz.problem(command, fuzz.in_process(command, tmp_path), tmp_path)
            assert not found, (command, found)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/random", "loop.yaml", "folder.yaml"])
def test_a_file_that_cannot_be_a_configuration_is_refused(name: str, tmp_path: Path) -> None:
    """Devices without end, among others: the memory they would fill is the whole machine's."""
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    answer = fuzz.in_process(fuzz.CommandLine((name,)), tmp_path)
    assert answer.code == errors.BAD_INPUT
    assert f"cannot read the config {name}: " in answer.err


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "x" * 5000 + ".yaml", "a\0b", "a\0b.yaml", "\udcff"])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    command = fuzz.CommandLine((name,), valid=False)
    assert not fuzz.problem(command, fuzz.in_process(command, tmp_path), tmp_path)


def test_a_path_that_cannot_be_one_is_refused_of_a_sweep() -> None:
    for name in ("a\0b.yaml", "/dev/zero", "x" * 5000):
        with pytest.raises(errors.ConfigError, match=r"cannot read the sweep|no sweep named"):
            read_sweep(name)


def test_a_command_line_as_a_process(tmp_path: Path) -> None:
    for command in (
        fuzz.CommandLine((fuzz.CONFIG,), b"\xff\xfe", valid=False),
        fuzz.CommandLine((fuzz.CONFIG,), fuzz.file_of({}), valid=True),
    ):
        assert fuzz.can_be_a_process(command)
        assert not fuzz.problem(command, fuzz.as_process(command, tmp_path), tmp_path)


@pytest.mark.parametrize("seed", range(fuzz_nets.NETWORKS))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_random_network_steps_as_the_dense_reference_does(seed: int) -> None:
    fuzz_nets.check_network(seed)


@pytest.mark.parametrize("what", fuzz_nets.REFUSED)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_random_network_with_something_wrong_is_refused(seed: int, what: str) -> None:
    fuzz_nets.check_refused(seed, what)

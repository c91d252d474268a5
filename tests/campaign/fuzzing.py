"""The fuzz tests with large numbers: command lines in this process and as processes, and networks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import tempfile
from pathlib import Path

import torch

from .part import Case, Kind, Part, Row

IN_PROCESS, BLOCK, QUICK_BLOCK = 980, 98, 20
AS_PROCESSES = 20
NETWORKS, NETWORKS_BLOCK, QUICK_NETWORKS = 200, 10, 3
"""The quick form has little of this: tests/test_fuzz.py is run wherever that is."""

COLUMNS: dict[str, Kind] = {"what": "group", "examples": "number", "with a problem": "number"}
THERE = importlib.util.find_spec("fuzz") is not None
"""Whether tests/fuzz.py is."""


def command_lines(seed: int, count: int, processes: bool, folder: Path) -> Row:
    """Draws command lines with hypothesis, and looks for one that is not taken or refused as it should be."""
    fuzz = importlib.import_module("fuzz")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    tried = 0

    def check(command: object) -> None:
        nonlocal tried
        if processes and not fuzz.can_be_a_process(command):
            return
        tried += 1
        with tempfile.TemporaryDirectory(dir=folder) as here:
            answer = (fuzz.as_process if processes else fuzz.in_process)(command, Path(here))
            found = fuzz.problem(command, answer, Path(here))
            assert not found, f"{command}: {found}"

    torch.set_flush_denormal(False)  # runs of other parts, in this process, have set it; hypothesis draws such numbers
    draw = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    problem = ""
    try:
        seeded(seed)(draw(given(fuzz.commands)(check)))()
    except AssertionError as error:
        problem = str(error)
    values = {
        "what": "command lines, as processes" if processes else "command lines, in one process",
        "examples": str(tried),
        "with a problem": "1" if problem else "0",
    }
    return Row(problem, values)


def networks(first: int, count: int, folder: Path) -> Row:
    """Networks of these seeds, beside the dense reference."""
    fuzz_nets = importlib.import_module("fuzz_nets")

    problems = []
    for seed in range(first, first + count):
        try:
            fuzz_nets.check_network(seed)
        except Exception as error:  # whatever it is, the networks after it are looked at too
            problems.append(f"network {seed}: {type(error).__name__}: {error}")
    values = {"what": "networks", "examples": str(count), "with a problem": str(len(problems))}
    return Row("; ".join(problems), values)


def cases(seed: int, quick: bool) -> list[Case]:
    """In blocks, so that a part that was ended goes on at the next one."""
    if not THERE:
        print("fuzz: tests/fuzz.py is not there", flush=True)
        return []
    chance = random.Random(f"{seed} fuzz")
    if quick:
        run = functools.partial(command_lines, chance.randrange(2**32), QUICK_BLOCK, False)
        return [
            Case("commands-quick", run, 600.0),
            Case("networks-quick", functools.partial(networks, 0, QUICK_NETWORKS), 600.0),
        ]
    found = [
        Case(f"commands-{i}", functools.partial(command_lines, chance.randrange(2**32), BLOCK, False), 600.0)
        for i in range(IN_PROCESS // BLOCK)
    ]
    run = functools.partial(command_lines, chance.randrange(2**32), AS_PROCESSES, True)
    found.append(Case("commands-as-processes", run, 1800.0))
    found += [
        Case(f"networks-{first}", functools.partial(networks, first, NETWORKS_BLOCK), 600.0)
        for first in range(0, NETWORKS, NETWORKS_BLOCK)
    ]
    return found


PART = Part(
    "fuzz",
    "Random command lines and networks",
    f"{IN_PROCESS} random command lines and configurations given to `gtddp train --check` in one process and "
    f"{AS_PROCESSES} as processes of their own: taken where valid, else refused with a message, never a traceback, "
    f"nothing written. {NETWORKS} random networks: equal to the dense reference, or refused with the module named.",
    COLUMNS,
    cases,
)

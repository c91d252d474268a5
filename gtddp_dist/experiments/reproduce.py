"""`gtddp reproduce`: one experiment or all of them, each to a page."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..errors import OK, REQUEUE, ConfigError, UserError
from ..registry import DATA_SETS, EXPERIMENTS, load_object, nearest_first
from .experiment import Experiment
from .page import write_index, write_page
from .plan import DEFAULT_SEEDS, QUICK_SEEDS, Plan
from .pool import Pool, Stopped


@dataclass(frozen=True)
class Request:
    """What the command line says."""

    name: str
    words: tuple[str, ...]
    quick: bool
    out: Path
    jobs: int


def run_reproduce(request: Request) -> int:
    """Does an experiment, or all; what was done before in the same folder is not done again.

    Returns an exit code of `gtddp_dist.errors`. Raises UserError for bad input, before anything is written.
    """
    plan = _plan(request)
    names = list(EXPERIMENTS) if request.name == "all" else [request.name]
    experiments = {name: cast(Experiment, load_object(EXPERIMENTS[name].experiment)) for name in names}
    _refuse_varied(plan, experiments)
    with Pool(request.out, request.jobs) as pool:
        try:
            for number, (name, experiment) in enumerate(experiments.items(), start=1):
                while missing := [u for u in experiment.units(plan, pool.results) if u.key not in pool.results]:
                    pool.do(missing, f"{name} ({number} of {len(names)})")
                units = experiment.units(plan, pool.results)
                origins = [pool.origins[unit.key] for unit in units]
                found = experiment.findings(plan, pool.results)
                title = EXPERIMENTS[name].title
                print(write_page(request.out, name, title, experiment.question, plan, found, origins), flush=True)
                write_index(request.out, {name: entry.title for name, entry in EXPERIMENTS.items()}, list(DATA_SETS))
        except Stopped:
            print(f"stopped; the same command goes on where it was ({pool.file})", file=sys.stderr)
            return REQUEUE
    return OK


def _plan(request: Request) -> Plan:
    """Raises UserError for an experiment that there is not, and for words that say nothing here."""
    if request.name != "all" and request.name not in EXPERIMENTS:
        listed = ", ".join(nearest_first(request.name, EXPERIMENTS))
        raise UserError(f"reproduce {request.name}: no such experiment; all, or one of (nearest first): {listed}")
    if request.jobs < 1:
        raise UserError(f"--jobs={request.jobs}: expected a number of units at a time >= 1")
    data, seeds, words = "digits", QUICK_SEEDS if request.quick else DEFAULT_SEEDS, list[str]()
    for word in request.words:
        key, _, value = word.partition("=")
        if key == "data.name":
            if value not in DATA_SETS:
                raise ConfigError(f"data.name={value}: expected one of {', '.join(nearest_first(value, DATA_SETS))}")
            data = value
        elif key == "seeds":
            if not re.fullmatch(r"[1-9][0-9]{0,3}", value):
                raise ConfigError(f"seeds={value}: expected a number of seeds, from 1 on")
            seeds = int(value)
        else:
            words.append(word)
    plan = Plan(data, seeds, request.quick, tuple(words))
    plan.given()
    return plan


def _refuse_varied(plan: Plan, experiments: dict[str, Experiment]) -> None:
    for key in plan.given():
        setters = [
            name
            for name, experiment in experiments.items()
            if any(key == varied or (varied.endswith(".") and key.startswith(varied)) for varied in experiment.varies)
        ]
        if setters:
            raise ConfigError(f"{key}: {_join(setters)} set{'s' * (len(setters) == 1)} it: leave it out")


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

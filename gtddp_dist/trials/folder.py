"""The directory of a sweep.

sweep.yaml        the sweep, with the command line in it
trials.json       its trials; written last, when all of their directories are there
trials/           a run directory for each
jobs/             scripts and logs of the jobs
table.csv, table.md, curves.png, hparams/        the result (gtddp_dist.trials.report)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError
from ..files import write_text_atomically
from ..jobs.status import JOBS, TRIALS
from ..jobs.submit import prepare_run
from ..run_folder import DEFAULT_PARENT
from .space import Configured, Trial
from .spec import SweepFile, SweepSpec, dump_sweep, parse_sweep

SPEC = "sweep.yaml"
LISTING = "trials.json"
LOCK = ".lock"


class SweepFolder:
    """Paths inside a sweep's directory, and what is read from there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.jobs = path / JOBS
        self.table_csv = path / "table.csv"
        self.table_md = path / "table.md"
        self.picture = path / "curves.png"
        self.hparams = path / "hparams"

    def run(self, trial: Trial) -> Path:
        """The run directory of a trial."""
        return self.path / TRIALS / trial.name

    def read(self) -> tuple[SweepSpec, list[Trial]]:
        """The sweep and its trials. Raises UserError where there is none, or where it was not made to its end."""
        if not (self.path / SPEC).is_file():
            raise UserError(f"{self.path} is not a sweep: it has no {SPEC}")
        spec, _ = parse_sweep((self.path / SPEC).read_text(encoding="utf-8"), str(self.path / SPEC))
        try:
            listing = json.loads((self.path / LISTING).read_text(encoding="utf-8"))
            trials = [Trial(**values) for values in listing]
            for trial in trials:
                # A name with a path in it would lead out of the sweep.
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", trial.name):
                    raise ValueError(f"{trial.name!r} is not the name of a trial")
            return spec, trials
        except FileNotFoundError:
            raise UserError(
                f"{self.path} was not made to its end, and nothing of it was submitted: remove it, and start again"
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path / LISTING}: does not list the trials of a sweep: {error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second `gtddp sweep` out, which would submit the same trials. Raises UserError where there is one."""
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"another gtddp sweep is at work in {self.path}: wait for it (gtddp status {self.path})"
            ) from None
        try:
            yield
        finally:
            lock.release()


def make_folder(sweep: SweepFile, trials: Sequence[Configured], path: Path | None) -> SweepFolder:
    """A directory with everything of the sweep, and no run started. Raises UserError where `path` is in use.

    Args:
        sweep: to be written.
        trials: its trials; a run directory is made for each.
        path: of the directory; None: runs/<name>-<time>, in UTC.
    """
    folder = SweepFolder(_new_path(sweep.name) if path is None else path)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        used = [item.name for item in folder.path.iterdir()]
    except OSError as error:
        raise UserError(f"--dir {folder.path} cannot be made: {error}") from error
    if used:
        raise UserError(f"--dir {folder.path} is not empty and holds no sweep: choose another")
    write_text_atomically(folder.path / SPEC, dump_sweep(sweep.spec))
    (folder.path / TRIALS).mkdir()
    for item in trials:
        run = dataclasses.replace(item.config.run, dir=str(folder.run(item.trial)))
        prepare_run(dataclasses.replace(item.config, run=run), item.trial.name)
    listing = [dataclasses.asdict(item.trial) for item in trials]
    write_text_atomically(folder.path / LISTING, json.dumps(listing, indent=1) + "\n")
    return folder


def _new_path(name: str) -> Path:
    stem = DEFAULT_PARENT / f"{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    paths = (stem if number == 1 else stem.with_name(f"{stem.name}-{number}") for number in range(1, 1000))
    return next(path for path in paths if not path.exists())

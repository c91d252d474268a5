"""Making and locking the directory of a run, before anything is computed. No torch: `gtddp submit` does it too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from .config import to_yaml
from .config_schema import Config
from .errors import UserError
from .files import write_text_atomically
from .source import source_patch

DEFAULT_PARENT = Path("runs")
LOCK = ".lock"
CONFIG = "config.yaml"
PATCH = "source.patch"
JOB = "job"
"""Folder of the job's script, and of a log for each rank."""


def fill(path: Path, config: Config) -> None:
    """Writes what a run directory has before its first start: the configuration, and what differs in the code."""
    patch = source_patch()
    if patch is not None:
        write_text_atomically(path / PATCH, patch)
    write_text_atomically(path / CONFIG, to_yaml(config))


def new_path(config: Config, config_name: str) -> Path:
    """An empty directory for a run: `run.dir`, or `runs/<config>-<time>` with the time in UTC. Raises UserError where
    it cannot be made."""
    if config.run.dir is not None:
        path = Path(config.run.dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir = {path} cannot be made: {error}") from error
        return path
    name = f"{Path(config_name).stem}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    for attempt in range(1, 1000):
        path = DEFAULT_PARENT / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue  # another run of this config started in the same second
        except OSError as error:
            raise UserError(f"the run directory {path} cannot be made: {error}; set run.dir") from error
        return path
    raise UserError(f"{DEFAULT_PARENT} already has 999 runs called {name}: set run.dir")


def refuse_used(path: Path) -> None:
    """Raises UserError where the directory holds anything but a lock."""
    if any(item.name != LOCK for item in path.iterdir()):
        raise UserError(
            f"run.dir = {path} is not empty: choose another, or continue the run there with --resume {path}"
        )


@contextlib.contextmanager
def locked(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keeps a second process out: two that write the same metrics and checkpoints would ruin both runs.

    The lock belongs to the process, so that it ends with it, however it ends. Raises UserError where another process
    still has it after `wait_s` seconds.
    """
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=wait_s, poll_interval=0.5)
    except Timeout:
        raise UserError(
            f"another process is training in {path}: wait until it ends, or choose another run.dir"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be locked, so nothing can be written there: {error}") from error
    try:
        yield
    finally:
        lock.release()

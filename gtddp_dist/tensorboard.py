"""`gtddp tensorboard`: TensorBoard on the folders of runs and sweeps. No torch."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .errors import OK, UserError
from .jobs.status import TRIALS
from .run_folder import CONFIG

RELOAD_S = 5
"""Seconds between two looks for new points."""


def run_tensorboard(paths: Sequence[Path], host: str, port: int | None) -> int:
    """Serves the curves of runs and sweeps until Ctrl-C or SIGTERM; the exit code.

    Args:
        paths: run directories and sweeps.
        host: address to listen on.
        port: None: 6006, or the next free one; 0: any free one.

    Raises UserError for a path that is neither, and where the port is in use.
    """
    if not paths:
        raise UserError("tensorboard needs run directories or sweeps: gtddp tensorboard RUN or SWEEP ...")
    with served(paths, host, port) as address:
        stop = threading.Event()

        def end(number: int, frame: FrameType | None) -> None:
            stop.set()

        former = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        print(f"TensorBoard: {address} (Ctrl-C ends it)", flush=True)
        try:
            stop.wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
    return OK


@contextmanager
def served(paths: Sequence[Path], host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """TensorBoard's address while the block runs; see `run_tensorboard`."""
    links = folders(paths)
    # Imported here: it takes a second.
    from tensorboard import program

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="gtddp-tensorboard-") as temporary:
        # Links in a folder of its own: TensorBoard names a curve by the path below its folder.
        for name, target in links.items():
            link = Path(temporary) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
        board = program.TensorBoard()
        arguments = ["gtddp", "--logdir", temporary, "--host", host, f"--reload_interval={RELOAD_S}"]
        board.configure([*arguments, *([] if port is None else [f"--port={port}"])])
        try:
            address = board.launch()
        except program.TensorBoardServerException as error:
            raise UserError(
                f"TensorBoard cannot listen on {host}, port {port or 6006}: {error.msg}; give another --port"
            ) from error
        yield address


def folders(paths: Sequence[Path]) -> dict[str, Path]:
    """Name in the browser -> folder of TensorBoard's files, of every run and of every trial.

    Raises UserError for a path that is neither a run directory nor a sweep, and where two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        name = path.resolve().name
        if (path / CONFIG).is_file():
            new = {name: path / "tb"}
            if (path / "baseline").is_dir():
                new[f"{name}-baseline"] = path / "baseline" / "tb"
        elif (path / TRIALS).is_dir():
            trials = sorted(item.name for item in (path / TRIALS).iterdir() if (item / CONFIG).is_file())
            new = {f"{name}/{trial}": path / TRIALS / trial / "tb" for trial in trials}
            new |= {f"{name}/hparams": path / "hparams"}
        else:
            raise UserError(f"{path} is neither a run directory (it has no {CONFIG}) nor a sweep (no {TRIALS}/)")
        for key, target in new.items():
            if key in found:
                raise UserError(f"{found[key]} and {target} would both be called {key}: rename one of their folders")
            found[key] = target.resolve()
    return found

"""What one process of a job does: it trains, or goes on with, the run directories that the job was submitted for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import BAD_INPUT, FAILED, OK, REQUEUE
from ..launch.stop import StopRequest, release_stop_signals
from .history import read
from .requeue import is_settled


def run_task(*runs: str) -> None:
    """What submitit calls in every process of a job; ends the process with the exit code of its training.

    Args:
        runs: run directories; several are trained at the same time, each by processes of its own on this host.
    """
    release_stop_signals()  # who submitted may have held them
    code = train(Path(runs[0])) if len(runs) == 1 else pack([Path(run) for run in runs])
    if code != OK:
        raise SystemExit(code)


def train(run: Path) -> int:
    """Trains a run in this process, as one of its ranks; its exit code."""
    from ..cli import main

    return main(["train", "--resume", str(run)])


def pack(runs: Sequence[Path]) -> int:
    """Trains runs at the same time, each in a log of its own (`<run>/train.log`); one exit code for all.

    GPUs that CUDA_VISIBLE_DEVICES lists are shared out, where there are as many as runs: else all would take the first.
    REQUEUE where one was stopped with a checkpoint; else FAILED where one failed; else OK. Stop signals are handed on.
    """
    children: list[subprocess.Popen[bytes]] = []
    with StopRequest() as stop:
        devices = shares(os.environ.get("CUDA_VISIBLE_DEVICES", ""), len(runs))
        for run, visible in zip(runs, devices, strict=True):
            if is_settled(read(run)):
                continue  # the job was put back for another run of the pack
            with open(run / "train.log", "ab") as log:
                command = [sys.executable, "-u", "-m", "gtddp_dist", "train", "--resume", str(run)]
                environ = os.environ if visible is None else {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
                children.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environ
                    )
                )
        handed_on = 0
        while any(child.poll() is None for child in children):
            for number in stop.signals[handed_on:]:
                for child in children:
                    if child.poll() is None:
                        child.send_signal(number)
            handed_on = len(stop.signals)
            for child in children:
                if child.poll() is None:
                    try:
                        child.wait(0.2)
                    except subprocess.TimeoutExpired:
                        break
    codes = {child.returncode for child in children}
    if REQUEUE in codes:
        return REQUEUE
    if codes <= {OK}:
        return OK
    return BAD_INPUT if codes <= {OK, BAD_INPUT} else FAILED


def shares(devices: str, count: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of `count` processes, from that of all; None: as it is, where there are too few."""
    each = [name for name in devices.split(",") if name]
    size = len(each) // count
    if not size:
        return [None] * count
    return [",".join(each[first : first + size]) for first in range(0, size * count, size)]

"""The command `gtddp` on a rank, where one of the ranks may meet with an accident in the middle of a step."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from gtddp_dist import checkpoint, cli
from gtddp_dist import train as training
from gtddp_dist.launch import Ranks, StopRequest
from gtddp_dist.parts import Parts
from gtddp_dist.pipeline.instructions import Instruction
from gtddp_dist.pipeline.worker import Worker
from gtddp_dist.run_directory import RunDirectory
from gtddp_dist.training_step import Precision

from .server import Arguments

STRUCK = "struck"
"""File with the time, by time.monotonic(), at which the accident happened."""


def work(ranks: Ranks, arguments: Arguments) -> int:
    """Run `argv`, or `argv of <rank>` where that is given; the exit code.

    `accident`: {"rank", "step", "op", "what"}: that rank gets the signal `what` before its first instruction `op` of
    the step; or {"rank", "steps", "what": "NaN"}: its inputs of these steps have a NaN. `stop_at`: all ranks are asked
    to stop after so many steps. `no_room`: a rank that cannot write its part of any checkpoint after that of step 0.
    `loss_scale`: where the scale of losses begins, with float16.
    """
    patch = pytest.MonkeyPatch()  # of this process, which ends soon
    accident = cast(dict[str, object], arguments.get("accident") or {})
    if accident.get("rank") == ranks.rank:
        (_spoil if accident["what"] == "NaN" else _strike)(patch, accident)
    if "stop_at" in arguments:
        _stop_at(patch, cast(int, arguments["stop_at"]))
    if arguments.get("no_room") == ranks.rank:
        _leave_no_room(patch, "write_index" if ranks.rank == 0 else "write_snapshot")
    if "loss_scale" in arguments:
        scale = cast(float, arguments["loss_scale"])
        patch.setattr(Precision, "new_scaler", lambda self: torch.amp.GradScaler(self.device.type, init_scale=scale))
    argv = cast(list[str], arguments.get(f"argv of {ranks.rank}", arguments.get("argv")))
    return cli.main(argv)


class _Steps:
    """Counts the steps that a worker begins in this process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        start = Worker.start

        def counting(worker: Worker, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
            self.begun += 1
            start(worker, inputs, targets)

        patch.setattr(Worker, "start", counting)


def _strike(patch: pytest.MonkeyPatch, accident: dict[str, object]) -> None:
    steps = _Steps(patch)
    perform = Worker.perform

    def struck(worker: Worker, instruction: Instruction) -> None:
        if steps.begun == accident["step"] and instruction.op.name == accident["op"]:
            Path(STRUCK).write_text(f"{time.monotonic()}\n")
            os.kill(os.getpid(), getattr(signal, cast(str, accident["what"])))
        perform(worker, instruction)

    patch.setattr(Worker, "perform", struck)


def _spoil(patch: pytest.MonkeyPatch, accident: dict[str, object]) -> None:
    steps = _Steps(patch)
    start = Worker.start

    def spoilt(worker: Worker, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        if steps.begun + 1 in cast(list[int], accident["steps"]):
            inputs = [*inputs[:-1], inputs[-1].clone()]
            inputs[-1][0, 0, 0, 0] = math.nan
        start(worker, inputs, targets)

    patch.setattr(Worker, "start", spoilt)


def _leave_no_room(patch: pytest.MonkeyPatch, what: str) -> None:
    write = getattr(checkpoint, what)

    def refused(folder: Path, *args: object, **kwargs: object) -> object:
        if "step-00000000" not in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return write(folder, *args, **kwargs)

    patch.setattr(checkpoint, what, refused)


def _stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    train = training.train

    class Stop(StopRequest):
        def __init__(self, parts: Parts) -> None:
            super().__init__()
            self._parts = parts

        @property
        def requested(self) -> bool:
            return self._parts.state.progress.step >= step

    def stopping(parts: Parts, run: RunDirectory, stop: StopRequest, from_step: int | None = None) -> int:
        return train(parts, run, Stop(parts), from_step)

    patch.setattr(training, "train", stopping)

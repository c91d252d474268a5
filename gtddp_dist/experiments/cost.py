"""The unit "cost of a step": seconds and peak memory of one optimizer, in a process of its own.

`python -m gtddp_dist.experiments.cost` is that process: a request as JSON on its input, the figures on its output.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ..checkpoint import JSON
from ..errors import UserError
from .plan import Settings, config_of
from .unit import Unit

FUNCTION = "gtddp_dist.experiments.cost:measure"
TIMEOUT_S = 900.0


def cost(settings: Settings, reference: Settings, rounds: int) -> Unit:
    """The unit that measures steps of a training, alone on the machine, with steps of a reference in turn."""
    arguments = {"settings": dict(settings), "reference": dict(reference), "rounds": rounds}
    return Unit.of(FUNCTION, cast(Mapping[str, JSON], arguments), alone=True)


def measure(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    """`seconds` and `reference_seconds` of a step (medians), and `bytes` of peak memory above what stood before it.

    Where the optimizer refuses the batch, only `refused`, its reason. Raises UserError where the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "gtddp_dist.experiments.cost"],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"measuring a step failed (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    return cast(dict[str, JSON], json.loads(done.stdout.splitlines()[-1]))


def _measure_here(arguments: Mapping[str, JSON]) -> dict[str, JSON]:
    import torch

    from ..parts import Parts, build

    def step(run: Parts, number: int) -> float:
        images, labels = run.data.batch(run.order.batch_indices(number), run.config.train.seed, number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run.step(images, labels)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    reference_settings = cast(Settings, arguments["reference"])
    step(build(config_of({**reference_settings, "train.batch_size": 2})), 0)  # what libraries take at first use
    run = build(config_of(cast(Settings, arguments["settings"])))
    gc.collect()
    before = _begin_peak()
    try:
        times = [step(run, 0)]
    except UserError as error:
        return {"refused": str(error)}
    peak = _peak()
    reference = build(config_of(reference_settings))
    step(reference, 0)
    rounds = cast(int, arguments["rounds"])
    # Of a step that takes many seconds, the first is enough.
    times, reference_times = (times, []) if times[0] > 5.0 else ([], [])
    for number in range(1, rounds + 1):
        if len(times) < rounds and (not times or times[0] <= 5.0):
            times.append(step(run, number))
        reference_times.append(step(reference, number))
    return {
        "seconds": statistics.median(times),
        "reference_seconds": statistics.median(reference_times),
        "bytes": max(0, peak - before),
    }


def _begin_peak() -> int:
    """Starts to look for the highest memory from here; the memory now, in bytes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    return _status("VmRSS")


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.M)
    assert match is not None
    return 1024 * int(match[1])


if __name__ == "__main__":
    print(json.dumps(_measure_here(json.load(sys.stdin))))

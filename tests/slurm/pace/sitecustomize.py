"""On the path of jobs: steps that last PACE_S seconds longer, so that something can happen to a job between them.

Only in the first start of a job: once it was put back, it goes as fast as ever.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType

PACE_S = float(os.environ.get("PACE_S", "0"))
PACED = "gtddp_dist.train"


class _Paced(importlib.abc.MetaPathFinder):
    """Finds the module of the training loop as ever, and changes it once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PACED:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert found is not None and found.loader is not None
        execute = found.loader.exec_module

        def paced(module: ModuleType) -> None:
            execute(module)
            advance = module.advance

            def slower(scheduler: object) -> None:
                time.sleep(PACE_S)
                advance(scheduler)

            module.advance = slower  # type: ignore[attr-defined]

        found.loader.exec_module = paced  # type: ignore[method-assign]
        return found


if PACE_S and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    sys.meta_path.insert(0, _Paced())

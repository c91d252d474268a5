"""GT-DDP: a game-theoretic second-order optimizer for training residual networks.

`GTDDP` is a `torch.optim.Optimizer`; `curvature` holds the base optimizers it can stand on; `initialize` puts a model
on a grid of ranks. All are imported when first used: the command line must answer `--help` and configuration errors
without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import curvature as curvature
    from .optimizer import GTDDP as GTDDP
    from .pipeline.initialize import Engine as Engine
    from .pipeline.initialize import initialize as initialize
    from .trajectory import Trajectory as Trajectory

__version__ = "0.1.0"

__all__ = ["GTDDP", "Engine", "Trajectory", "__version__", "curvature", "initialize"]

_LAZY = {
    "Engine": ".pipeline.initialize",
    "GTDDP": ".optimizer",
    "Trajectory": ".trajectory",
    "curvature": ".curvature",
    "initialize": ".pipeline.initialize",
}


def __getattr__(name: str) -> object:
    module_name = _LAZY.get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(module_name, __name__)
    value: object = module if name == "curvature" else getattr(module, name)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

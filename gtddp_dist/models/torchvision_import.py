"""The one way this package imports torchvision.

torchvision has one build for CPU and GPU. On a CPU build of torch its compiled part does not load, and its
import ends with "operator torchvision::nms does not exist". Data sets, transforms and networks need nothing
of that part, so declaring the two operators that the import looks for is enough. Detection operators and
image files do not work then.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_MISSING_OPERATORS = "operator torchvision::nms does not exist"
_declared: list[torch.library.Library] = []  # a declaration lasts as long as its Library object


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Imports torchvision, or one of its modules such as `torchvision.models`, and returns it.

    The plain import is tried first; the operators are declared only where it fails for want of them. Any
    other error of the import is the caller's to see.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if _MISSING_OPERATORS not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]  # what the failed import left behind
    if not _declared:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    return importlib.import_module(module)

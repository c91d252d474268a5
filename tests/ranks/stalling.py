"""The command `gtddp` with a network of its own, whose last layer never returns from one of its calls.

STALL_RANK: of the rank in which that is. STALL_STEP: at which of its training steps.
"""

from __future__ import annotations

import os
import sys
import time
from typing import cast

import torch
from torch import Tensor, nn

from gtddp_dist import cli, registry
from gtddp_dist.config_schema import ModelConfig
from gtddp_dist.models import small_resnet

_calls = 0


def never_returns(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook. It sleeps in C, as a collective or a read from a file does."""
    global _calls
    if not (module.training and torch.is_grad_enabled()) or output.is_meta:
        return
    _calls += 1
    if _calls == int(os.environ["STALL_STEP"]) and os.environ.get("RANK", "0") == os.environ["STALL_RANK"]:
        time.sleep(3600)


def build(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> nn.Module:
    """small-resnet, with the hook on its last layer."""
    model = small_resnet.build(config, in_channels, classes, image_size)
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    last.register_forward_hook(never_returns)
    return model


if __name__ == "__main__":
    models = cast(dict[str, registry.ModelEntry], registry.MODELS)
    models["stalling"] = registry.ModelEntry(("width",), "ranks.stalling:build")
    sys.exit(cli.main(sys.argv[1:]))

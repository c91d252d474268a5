"""Settings on the ranks of a grid: how far each rank's segment is from what one process came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from gtddp_dist.launch import Ranks
from gtddp_dist.pipeline.company import Place, company
from gtddp_dist.pipeline.costs import Expected
from gtddp_dist.pipeline.grid import Grid, Shape
from gtddp_dist.pipeline.initialize import Engine
from gtddp_dist.tracing import trace

from .server import Arguments
from .settings import CUTS, TORCH, Finding, Setting


def work(ranks: Ranks, arguments: Arguments) -> None:
    """Take the steps of all settings; findings by the setting's name go to `findings-<rank>.json`."""
    shape = Shape(*cast(list[int], arguments["grid"]))
    place = Place(ranks, shape, tuple(range(1, shape.pipe)), shape.pipe, torch.device("cpu"), "gloo")
    with company(place, {}, lost_after_s=60.0) as grid:
        findings = {}
        for one in cast(list[dict[str, object]], arguments["settings"]):
            setting = Setting(**cast(dict[str, object], one["setting"]))  # type: ignore[arg-type]
            findings[setting.name] = find(setting, grid, load_file(cast(str, one["reference"])))
    Path(f"findings-{ranks.rank}.json").write_text(json.dumps(findings))


def new_engine(setting: Setting, grid: Grid, expected: Expected | None = None) -> Engine:
    """A setting's model and optimizer on the grid."""
    model, plain = setting.new_model()
    return Engine(
        model,
        trace(model, **plain),
        setting.new_optimizer,
        F.cross_entropy,
        grid=grid,
        cuts=CUTS[setting.net][setting.pipe],
        micro_batch=setting.micro_batch,
        n_micro=setting.n_micro,
        clip_norm=setting.clip_norm if setting.base in TORCH else None,
        zero=int(setting.base == "torch-adam-zero"),
        expected=expected,
    )


def own_chunks(setting: Setting, grid: Grid, tensor: Tensor) -> list[Tensor]:
    """This replica's micro-batches of a batch of all replicas."""
    start = grid.replica * setting.n_micro
    return list(tensor.chunk(setting.chunks)[start : start + setting.n_micro])


def find(setting: Setting, grid: Grid, reference: Mapping[str, Tensor]) -> Finding:
    """Take a setting's steps."""
    engine = new_engine(setting, grid)
    losses = []
    for x, y in setting.batches():
        outcome = engine.step(own_chunks(setting, grid, x), own_chunks(setting, grid, y))
        assert not outcome.refused
        losses.append(outcome.loss)
    parameters, buffers = dict(engine.segment.named_parameters()), dict(engine.segment.named_buffers())
    return {
        "names": [*parameters, *buffers],
        "parameters": max((distance(p.detach(), reference[name]) for name, p in parameters.items()), default=0.0),
        "buffers": max((distance(b, reference[name]) for name, b in buffers.items()), default=0.0),
        "losses": losses,
    }


def distance(got: Tensor, expected: Tensor) -> float:
    """As a share of the norm of what is expected; of integers, too."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-12))

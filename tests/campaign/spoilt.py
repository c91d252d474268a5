"""Training in which something is not finite at some steps, in one process or on a rank of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gtddp_dist import cli
from gtddp_dist.launch import Ranks
from gtddp_dist.pipeline.parts import RankStep
from gtddp_dist.step import Step
from gtddp_dist.training_step import StepResult, TrainingStep

STEPS = "steps-{}.json"
"""What a rank writes: for each step whether it was refused, and whether the weights stayed as they were."""


@dataclass(frozen=True)
class Spoil:
    """What is not finite: data, weight, activation, gram or factor.

    Attributes:
        what: one of these.
        value: nan or inf.
        rank: the only rank where that is so.
        steps: from which step on, up to which; the first one is 1.
    """

    what: str
    value: str
    rank: int
    first: int
    last: int


def work(ranks: Ranks, arguments: Mapping[str, object]) -> int:
    """The command on a rank (`ranks.server.Work`)."""
    with spoilt(Spoil(**cast(dict[str, str], arguments["spoil"])), ranks.rank):  # type: ignore[arg-type]
        return cli.main(cast(list[str], arguments["argv"]))


@contextmanager
def spoilt(spoil: Spoil, rank: int = 0) -> Iterator[None]:
    """Training steps in this process are such while the block runs; writes `STEPS` here."""
    told: list[list[bool]] = []
    at = 0
    with pytest.MonkeyPatch.context() as patch:

        def steps_of(kind: type, own: Callable[[object], tuple[nn.Module, Optimizer]]) -> None:
            call = kind.__call__

            def step(self: object, images: Tensor, labels: Tensor) -> StepResult:
                nonlocal at
                at += 1
                model, optimizer = own(self)
                bad = rank == spoil.rank and spoil.first <= at <= spoil.last
                with _bad(spoil, model, optimizer) if bad else _nothing():
                    if bad and spoil.what == "data":
                        images = images.clone()
                        images[3, 0, 0, 0] = float(spoil.value)
                    before = [p.detach().clone() for p in model.parameters()]
                    refused = True
                    try:
                        result = cast(StepResult, call(self, images, labels))
                        refused = result.refused
                    finally:
                        same = all(_equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
                        told.append([refused, same])
                        Path(STEPS.format(rank)).write_text(json.dumps(told))
                return result

            patch.setattr(kind, "__call__", step)

        steps_of(TrainingStep, lambda self: (self._model, self._optimizer))  # type: ignore[attr-defined]
        steps_of(RankStep, lambda self: (self._engine.segment, self._engine.optimizer))  # type: ignore[attr-defined]
        yield


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(1e30), other.nan_to_num(1e30))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _bad(spoil: Spoil, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Weights, activations, Gram matrices and factors are bad while the block runs."""
    value = float(spoil.value)
    if spoil.what == "activation":
        module = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))

        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            output.view(-1)[0] = value
            return output

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
    elif spoil.what == "gram":
        gains = Step._gains

        def bad_gains(self: Step, *arguments: object) -> object:
            found = gains(self, *arguments)  # type: ignore[arg-type]
            return replace(found, gram=torch.full_like(found.gram, value))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "_gains", bad_gains)
            yield
    elif spoil.what in ("weight", "factor"):
        tensor = _held(spoil.what, model, optimizer)
        kept = float(tensor.detach().view(-1)[0])
        with torch.no_grad():
            tensor.view(-1)[0] = value
        try:
            yield
        finally:
            if spoil.first == spoil.last:  # once, and it is mended
                with torch.no_grad():
                    tensor.view(-1)[0] = kept
    else:
        yield


def _held(what: str, model: nn.Module, optimizer: Optimizer) -> Tensor:
    if what == "weight":
        return next(model.parameters())
    states = (optimizer.state[p] for p in model.parameters() if p in optimizer.state)
    return next(cast(Tensor, state["factor_a"]) for state in states if "factor_a" in state)

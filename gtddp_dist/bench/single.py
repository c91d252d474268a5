"""What takes training steps in one process: this package's optimizers and torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config_schema import Config
from ..environment import select_device
from ..errors import UserError
from ..groups import StepSamples
from ..optimizer import GTDDP
from ..parts import new_optimizer_of
from ..phases import Recorder, phase, recording
from ..registry import OPTIMIZERS
from ..training_step import Precision
from .names import CONTENDERS
from .subject import images_and_labels, new_model, with_optimizer

KindName = Literal["plain", "factors", "bases"]


@dataclass(frozen=True)
class Kind:
    """Steps of one price.

    Attributes:
        name: plain; with new Kronecker factors; with new factors and bases.
        share: of all steps.
        number: of a step of that kind; None where all are.
    """

    name: KindName
    share: float
    number: int | None = None


class Contender:
    """An optimizer and a network of its own.

    Args:
        config: network, batch, and the options that count for all contenders.
        name: which (`names.CONTENDERS`).

    Raises:
        UserError: a configuration that one process cannot measure.
    """

    def __init__(self, config: Config, name: str) -> None:
        entry = CONTENDERS[name]
        options = dict(entry.options)
        scope = options.get("scope", config.optimizer.scope)
        if "scope" in OPTIMIZERS[entry.optimizer].options and isinstance(scope, int):
            options["scope"] = min(scope, config.train.batch_size)
        self.name = name
        self.config = with_optimizer(config, entry.optimizer, **options)
        self.device = select_device(config.train.device)
        self.precision = Precision(config.train.dtype, self.device)
        self.model = new_model(self.config).to(self.device).train()
        self.optimizer = new_optimizer_of(self.config)(self.model, self.config)
        self.kinds: Sequence[Kind] = _kinds(self.config)

    def step(self, images: Tensor, labels: Tensor, kind: Kind | None = None) -> None:
        """One step, of that kind where it is given.

        Raises:
            UserError: the loss or the gradient is not finite, and the step not what is to be measured.
        """
        loss = self.take(images, labels, kind)
        refused = isinstance(self.optimizer, GTDDP) and self.optimizer.skipped_steps
        if refused or not math.isfinite(float(loss.detach())):
            raise UserError(
                f"{self.name}: the step was not finite, so that its time means nothing; lower "
                f"optimizer.lr={self.config.optimizer.lr}"
            )

    def take(self, images: Tensor, labels: Tensor, kind: Kind | None) -> Tensor:
        """The step itself; its loss. Of other libraries it is something else."""
        if kind is not None and kind.number is not None:
            for state in self.optimizer.state.values():
                if "step" in state:
                    state["step"] = torch.tensor(float(kind.number))
        self.optimizer.zero_grad(set_to_none=True)
        with phase("forward"), self.precision.autocast():
            loss = F.cross_entropy(self.model(images), labels)
        weighted = isinstance(self.optimizer, GTDDP) and self.optimizer.options.capture == "weighted"
        with phase("input-gradient" if weighted else "backward"):
            loss.backward()
        with phase("other" if isinstance(self.optimizer, GTDDP) else "update"):
            self.optimizer.step()
        return loss

    def samples(self, images: Tensor, labels: Tensor) -> StepSamples:
        """What every layer's per-sample gradients are made of, of one forward and backward pass of a GTDDP."""
        assert isinstance(self.optimizer, GTDDP)
        former, self.optimizer.forms_early = self.optimizer.forms_early, "none"
        with self.precision.autocast():
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.forms_early = former
        return StepSamples(self.optimizer.capture.take(), float(len(images)), self.optimizer.capture)

    def recorded(self, images: Tensor, labels: Tensor, kind: Kind, read: Callable[[], tuple[float, ...]]) -> Recorder:
        """A step whose phases are charged, player by player where there are players."""
        with recording(Recorder(read)) as recorder, self._marked(recorder):
            self.step(images, labels, kind)
        return recorder

    @contextmanager
    def _marked(self, recorder: Recorder) -> Iterator[None]:
        """Tells the recorder which player's stage the forward and the backward pass are in."""
        if not isinstance(self.optimizer, GTDDP):
            yield
            return

        def arrives(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                recorder.switch(index)
                if index and args[0].requires_grad:  # all of this stage's derivatives are known when this one is
                    args[0].register_hook(lambda grad: recorder.switch(index - 1))

            return hook

        players = self.optimizer.trajectory.players
        handles = [
            next(iter(player.modules.values())).register_forward_pre_hook(arrives(player.index)) for player in players
        ]
        handles.append(self.model.register_forward_hook(lambda *_: recorder.switch(len(players) - 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def batch(config: Config, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Random images and labels of a step."""
    (images,), (labels,) = images_and_labels(config, 1, device, seed)
    return images, labels


def check(config: Config) -> None:
    """Refuse a configuration that one process does not measure.

    Raises:
        UserError: names the key.
    """
    for key, value in (
        ("train.micro_batches", config.train.micro_batches),
        ("train.replica_groups", config.train.replica_groups),
        ("parallel.pipe", config.parallel.pipe),
        ("parallel.data", config.parallel.data),
    ):
        if value != 1:
            raise UserError(f"{key}={value}: bench step measures one process and one micro-batch; take {key}=1")
    if config.train.dtype == "float16":
        raise UserError(
            "train.dtype=float16 needs loss scaling, which bench step does not measure; take float32 or bfloat16"
        )
    optimizer = config.optimizer
    for name, given in (("basis_spread", optimizer.basis_spread), ("basis_lag", optimizer.basis_lag)):
        if given:
            raise UserError(
                f"optimizer.{name}={given}: bench step times steps with new bases of all layers apart, and there are "
                "none; leave it out"
            )


def _kinds(config: Config) -> Sequence[Kind]:
    optimizer = config.optimizer
    if optimizer.factor_every is None or optimizer.basis_every is None:
        return (Kind("plain", 1.0),)
    factors, bases = optimizer.factor_every, optimizer.basis_every
    assert all(longer % shorter == 0 and longer > shorter for shorter, longer in pairwise((1, factors, bases)))
    return (
        Kind("plain", 1 - 1 / factors, 1),
        Kind("factors", 1 / factors - 1 / bases, factors),
        Kind("bases", 1 / bases, bases),
    )

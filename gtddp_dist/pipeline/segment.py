"""The part of a model that one rank owns, under its names in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from ..errors import ModelError
from ..trajectory import LiveValue, ModuleStage, Stage, Traced, Trajectory


class Segment(Traced):
    """A run of stages as a module: live values before -> live values after, or the model's output at the end.

    Its parameters and buffers have the names that they have in the whole model, so that a checkpoint has the same keys
    on every grid. The rest of the model is let go: only this segment's tensors stay materialised.

    Args:
        model: the whole model, traced as ``trajectory``. It cannot be used by itself afterwards.
        trajectory: all of its stages.
        cuts: the first stage of every segment but the first.
        index: which segment.

    Attributes:
        trajectory: the segment's own, with its players counted from 0.
        first_stage: number of its first stage in the whole.
    """

    def __init__(self, model: nn.Module, trajectory: Trajectory, cuts: Sequence[int], index: int) -> None:
        super().__init__()
        bounds = [0, *cuts, len(trajectory.stages)]
        owners = _owners(model, trajectory, bounds)
        self.first_stage = bounds[index]
        stages = tuple(
            replace(stage, player=replace(stage.player, index=local))
            for local, stage in enumerate(trajectory.stages[bounds[index] : bounds[index + 1]])
        )
        first, last = index == 0, index == len(bounds) - 2
        self.trajectory = Trajectory(
            stages,
            tuple(name for name in trajectory.plain_parameters if owners.get(name) == index),
            trajectory.bind if first else _as_they_are,
            trajectory.assemble if last else _together,
            first,
            last,
        )
        for name in _used(model, stages):
            self._adopt(model, name)
        own = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        _let_go(model, own)

    def forward(self, *live: LiveValue) -> object:
        """Live values at the segment's first cut -> those at its last, as a tuple; of the last segment the output."""
        values = self.trajectory.bind(*live)
        for stage in self.trajectory.stages:
            values = stage.run(values)
        return self.trajectory.assemble(values)

    def train(self, mode: bool = True) -> Segment:
        """As nn.Module's; also of modules that were given as stages and are none of the model's."""
        super().train(mode)
        for stage in self.trajectory.stages:
            if isinstance(stage.run, ModuleStage):
                stage.run.module.train(mode)
        return self

    def _adopt(self, model: nn.Module, name: str) -> None:
        """Hold a module, parameter or buffer of the model under its own name."""
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        home: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = cast(nn.Module, home._modules[part])
        if leaf in home._modules or leaf in home._parameters or leaf in home._buffers:
            return  # read twice, or part of a module that is held
        if leaf in owner._modules:
            home.add_module(leaf, owner._modules[leaf])
        elif leaf in owner._parameters:
            home.register_parameter(leaf, owner._parameters[leaf])
        elif leaf in owner._buffers:
            home.register_buffer(leaf, owner._buffers[leaf], leaf not in owner._non_persistent_buffers_set)


def check_segments(model: nn.Module, trajectory: Trajectory, cuts: Sequence[int]) -> None:
    """Refuses a model whose segments would be wrong.

    Args:
        model: traced as ``trajectory``.
        trajectory: all of its stages.
        cuts: the first stage of every segment but the first.

    Raises:
        ModelError: the stages would be wrong in evaluation mode, and a segment runs them in both: names the place. Two
            segments read the same parameter or buffer.
    """
    if trajectory.only_training:
        raise ModelError(
            f"the forward pass depends on training mode at {trajectory.only_training}: ranks run what was traced in "
            "training mode, and would evaluate wrongly. Use a module that knows its mode by itself (nn.Dropout in "
            "place of F.dropout(x, training=self.training)), or take the module around it as it is (plain_modules)"
        )
    _owners(model, trajectory, [0, *cuts, len(trajectory.stages)])


def _as_they_are(*live: LiveValue) -> tuple[LiveValue, ...]:
    return live


def _together(live: tuple[LiveValue, ...]) -> object:
    return live


def _used(model: nn.Module, stages: Sequence[Stage]) -> list[str]:
    """Names that stages read, in the model's order: the same in every process, and a module before what is inside."""
    read = {name for stage in stages for name in stage.reads}
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    return [name for name in (*names, *(n for n, _ in model.named_buffers())) if name and name in read]


def _owners(model: nn.Module, trajectory: Trajectory, bounds: Sequence[int]) -> dict[str, int]:
    """Segment of every parameter and buffer.

    Raises:
        ModelError: two segments read the same one.
    """
    owners: dict[str, int] = {}
    for segment, (start, stop) in enumerate(pairwise(bounds)):
        for stage in trajectory.stages[start:stop]:
            for name in stage.reads:
                for tensor in _tensors_under(model, name):
                    if owners.setdefault(tensor, segment) != segment:
                        raise ModelError(
                            f"'{tensor}' is read in segment {owners[tensor]} and in segment {segment}: a parameter "
                            "or buffer can live on one rank only. Choose parallel.cuts so that one segment holds all "
                            "stages that read it"
                        )
    return owners


def _tensors_under(model: nn.Module, name: str) -> list[str]:
    """Names of the parameters and buffers of a module, or the name of one itself."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf not in owner._modules:
        return [name] if leaf in owner._parameters or leaf in owner._buffers else []
    module = model.get_submodule(name)
    return [f"{name}.{inner}" for inner, _ in (*module.named_parameters(), *module.named_buffers())]


def _let_go(model: nn.Module, own: set[int]) -> None:
    """Free the memory of every parameter and buffer that is not this segment's."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in own:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) not in own:
                module._buffers[name] = torch.empty_like(buffer, device="meta")

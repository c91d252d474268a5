"""Everything a run needs to continue exactly: as tensors and values of a checkpoint, and back.

Everything is keyed by names in the whole model, so that ranks that hold parts of it write one checkpoint together, and
ranks of another grid can read it. Keys of tensors: `model/<parameter or buffer>`, `optimizer/<parameter>/<state>`,
`random/<rank>/<generator>`. Values: `optimizer`, `schedule`, `scaler`, `random`, `progress`.
"""

from __future__ import annotations

import functools
import math
import random
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checkpoint import JSON, Checkpoint, CheckpointError
from .team import SOLO, Team
from .training_step import StepResult


@dataclass
class Progress:
    """Where a run stands: plain numbers, each part of a checkpoint."""

    step: int = 0
    """Training steps done; also the position in the data."""
    seconds: float = 0.0
    """Spent in training steps, over all starts of the run."""
    skipped: int = 0
    """Refused steps of the whole run: those with a non-finite loss or gradient."""
    skipped_in_a_row: int = 0

    # Since the last line of the log that has a training loss:
    window_start: int = 0
    """The value of `step` then."""
    window_seconds: float = 0.0
    window_taken: int = 0
    """Steps that were not refused; the next two are over these."""
    window_loss: float = 0.0
    """Sum of the losses of the steps."""
    window_correct: int = 0
    """Training samples classified right."""

    def count(self, result: StepResult, seconds: float) -> None:
        """Counts a training step that took that long."""
        self.step += 1
        self.seconds += seconds
        self.window_seconds += seconds
        if result.refused:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.window_taken += 1
            self.window_loss += result.loss
            self.window_correct += result.correct

    def close_window(self, batch_size: int) -> dict[str, float]:
        """Means since the last call, for the log; NaN where every step was refused. Starts a new window."""
        samples = batch_size * self.window_taken
        measured = {
            "train/loss": self.window_loss / self.window_taken if samples else math.nan,
            "train/accuracy": self.window_correct / samples if samples else math.nan,
            "throughput": batch_size * (self.step - self.window_start) / self.window_seconds,
        }
        self.window_start, self.window_taken, self.window_correct = self.step, 0, 0
        self.window_seconds, self.window_loss = 0.0, 0.0
        return measured


@runtime_checkable
class HasExtraState(Protocol):
    """An optimizer with state that belongs to no single parameter."""

    def extra_state(self) -> dict[str, JSON]:
        """That state, as plain data."""
        ...

    def load_extra_state(self, state: dict[str, JSON]) -> None:
        """Takes back what `extra_state` gave."""
        ...


@dataclass(frozen=True)
class TrainingState:
    """The live objects of a run whose state a checkpoint holds; of a rank of several, those of its segment."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler | None
    progress: Progress
    team: Team = SOLO

    def collect(self) -> tuple[dict[str, Tensor], dict[str, JSON], dict[str, JSON]]:
        """The state of the run: the tensors, the values that rank 0 gives for all, and those of this rank.

        Raises CheckpointError for state that the format cannot hold, naming it.
        """
        rank = str(self.team.rank)
        tensors, random_values = _collect_random(f"random/{rank}")
        optimizer_tensors, members, optimizer_values = _collect_optimizer(self.model, self.optimizer)
        rank_values: dict[str, JSON] = {"random": {rank: random_values}}
        if self.team.writes_state:
            tensors |= {f"model/{name}": tensor for name, tensor in _model_tensors(self.model).items()}
            rank_values["optimizer"] = {"members": members, "values": optimizer_values}
        if self.team.writes_state or _keeper(self.optimizer) is not self.optimizer:
            tensors |= optimizer_tensors  # all of them, or with ZeRO the replica's own share
        if self.team.rank != 0:
            return tensors, {}, rank_values
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in self.optimizer.param_groups
        ]
        shared: dict[str, JSON] = {"groups": encode(groups, "optimizer/param_groups")}
        if isinstance(self.optimizer, HasExtraState):
            shared["extra"] = encode(self.optimizer.extra_state(), "optimizer/extra")
        values: dict[str, JSON] = {"optimizer": shared}
        if self.scheduler is not None:
            values["schedule"] = encode(self.scheduler.state_dict(), "schedule")
        if self.scaler is not None:
            values["scaler"] = encode(self.scaler.state_dict(), "scaler")
        values["progress"] = encode(asdict(self.progress), "progress")
        return tensors, values, rank_values

    def wanted(self, key: str) -> bool:
        """Whether `restore` needs the tensor of that name."""
        kind, _, name = key.partition("/")
        if kind == "model":
            return name in self._own
        if kind == "optimizer":
            return name.rpartition("/")[0] in self._own
        return key.startswith(f"random/{self.team.rank}/")

    @functools.cached_property
    def _own(self) -> frozenset[str]:
        return frozenset(self.model.state_dict())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts the run where it was when `collect` gave the content of `checkpoint`, random numbers included.

        A rank that the grid of the checkpoint did not have keeps the random numbers that it has. Raises
        CheckpointError that names the key where the checkpoint is of another model or optimizer. The state of the run
        is undefined then.
        """
        values = {key: decode(value) for key, value in checkpoint.values.items()}
        needed = ["optimizer", "random", "progress"]
        needed += ["schedule"] if self.scheduler is not None else []
        needed += ["scaler"] if self.scaler is not None else []
        for key in needed:
            _object(values.get(key), key, checkpoint)
        _restore_model(self.model, checkpoint)
        _restore_optimizer(
            self.model, self.optimizer, checkpoint, _object(values["optimizer"], "optimizer", checkpoint)
        )
        if self.scheduler is not None:
            self.scheduler.load_state_dict(_object(values["schedule"], "schedule", checkpoint))
        if self.scaler is not None:
            self.scaler.load_state_dict(_object(values["scaler"], "scaler", checkpoint))
        progress = _object(values["progress"], "progress", checkpoint)
        for item in fields(Progress):
            if item.name not in progress:
                raise CheckpointError(f"{checkpoint.folder}: progress lacks {item.name!r}")
            setattr(self.progress, item.name, progress[item.name])
        generators = _object(values["random"], "random", checkpoint)
        rank = str(self.team.rank)
        if rank in generators:
            _restore_random(checkpoint, _object(generators[rank], f"random/{rank}", checkpoint), f"random/{rank}")


def attempt_name(team: Team) -> str:
    """A name for one writing of a checkpoint that all ranks share and no other writing has."""
    return team.gather_text(secrets.token_hex(8))[0]


def encode(value: object, where: str) -> JSON:
    """A tree of plain values as JSON that `decode` turns back exactly, tuples and non-finite floats included.

    Raises CheckpointError for anything else (a tensor, a function, a key that is no text), naming `where` it
    is.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"__float__": repr(value)}
    if isinstance(value, tuple):
        return {"__tuple__": [encode(item, where) for item in value]}
    if isinstance(value, list):
        return [encode(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("__") for key in value):
        return {key: encode(item, f"{where}/{key}") for key, item in value.items()}
    raise CheckpointError(f"{where}: a checkpoint cannot hold a {type(value).__name__} there")


def decode(value: JSON) -> object:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        match value:
            case {"__float__": str(text)}:
                return float(text)
            case {"__tuple__": list(items)}:
                return tuple(decode(item) for item in items)
        return {key: decode(item) for key, item in value.items()}
    return value


def model_tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's parameters and buffers in a checkpoint, by their names in the model."""
    prefix = "model/"
    return {k.removeprefix(prefix): tensor for k, tensor in checkpoint.tensors.items() if k.startswith(prefix)}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = model.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"model/{name}: a checkpoint cannot hold a {type(value).__name__} there")
    return tensors


def _restore_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    load_model_tensors(model, model_tensors_of(checkpoint), str(checkpoint.folder))


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies parameters and buffers into the model; names, shapes and types have to be those of the model.

    Raises CheckpointError that names `source` and the first key that does not fit.
    """
    own = _model_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"{source}: has no tensor {name!r} of the model: was the configuration changed?")
        if name not in own:
            raise CheckpointError(f"{source}: the model has no tensor {name!r}: was the configuration changed?")
        got, wanted = tensors[name], own[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise CheckpointError(
                f"{source}: {name!r} is {got.dtype} {list(got.shape)}, in the model it is {wanted.dtype} "
                f"{list(wanted.shape)}: was the configuration changed?"
            )
    model.load_state_dict(dict(tensors))


def _collect_optimizer(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, JSON], dict[str, JSON]]:
    """State tensors by key; the number of every parameter's group; state that is no tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    members: dict[str, JSON] = {}
    values: dict[str, JSON] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError("optimizer: it holds a parameter that is not in the model")
            name = names[id(parameter)]
            members[name] = number
            for key, value in _keeper(optimizer).state.get(parameter, {}).items():
                if not isinstance(key, str) or "/" in key:
                    raise CheckpointError(f"optimizer/{name}: a checkpoint cannot hold state called {key!r}")
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
                else:
                    values[f"{name}/{key}"] = encode(value, f"optimizer/{name}/{key}")
    return tensors, members, values


def _restore_optimizer(
    model: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint, saved: dict[str, object]
) -> None:
    """Writes groups and state directly: `load_state_dict` would convert state to the parameter's type."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = cast(list[dict[str, object]], saved["groups"])
    members = _object(saved.get("members"), "optimizer/members", checkpoint)
    own = {names[id(p)]: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    if len(groups) != len(optimizer.param_groups) or any(members.get(name) != i for name, i in own.items()):
        raise CheckpointError(
            f"{checkpoint.folder}: the optimizer's parameter groups are not those of this configuration"
        )
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    # Torch's optimizers count steps in a tensor on the CPU, unless told that the GPU needs to see the count.
    stays = {
        id(parameter): not (group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    keeper = _keeper(optimizer)
    state, share = keeper.state, {id(p) for group in keeper.param_groups for p in group["params"]}
    state.clear()
    for key, tensor in checkpoint.tensors.items():
        if not key.startswith("optimizer/"):
            continue
        name, _, state_key = key.removeprefix("optimizer/").rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{checkpoint.folder}: {key!r}: the model has no parameter {name!r}")
        parameter = parameters[name]
        if id(parameter) not in share:
            continue
        on_cpu = state_key == "step" and stays.get(id(parameter), True)
        restored = tensor.clone() if on_cpu else tensor.to(parameter.device, copy=True)
        if restored.shape == parameter.shape and restored.ndim:
            # As the optimizer makes it: in the memory format of the parameter.
            restored = torch.empty_like(parameter, dtype=restored.dtype).copy_(restored)
        state[parameter][state_key] = restored
    for key, value in _object(saved.get("values"), "optimizer/values", checkpoint).items():
        name, _, state_key = key.rpartition("/")
        if name in parameters and id(parameters[name]) in share:
            state[parameters[name]][state_key] = value
    if isinstance(optimizer, HasExtraState):
        optimizer.load_extra_state(cast(dict[str, JSON], saved["extra"]))


def _keeper(optimizer: Optimizer) -> Optimizer:
    """Who keeps the state: the optimizer, or inside torch's ZeroRedundancyOptimizer that of this replica's share."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def _collect_random(prefix: str) -> tuple[dict[str, Tensor], JSON]:
    """The state of every generator that code under training could draw from without one of its own."""
    tensors = {f"{prefix}/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"{prefix}/cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors[f"{prefix}/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, next_gauss = random.getstate()
    tensors[f"{prefix}/python"] = torch.tensor(words, dtype=torch.int64)
    values = {"numpy": [kind, position, has_gauss, cached], "python": [version, next_gauss]}
    return tensors, encode(values, prefix)


def _restore_random(checkpoint: Checkpoint, values: dict[str, object], prefix: str) -> None:
    tensors = checkpoint.tensors
    for key in (f"{prefix}/torch", f"{prefix}/numpy", f"{prefix}/python"):
        if key not in tensors:
            raise CheckpointError(f"{checkpoint.folder}: has no tensor {key!r}")
    torch.set_rng_state(tensors[f"{prefix}/torch"])
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            # Absent where the run comes from a machine with fewer GPUs; that one then keeps the seed it was
            # given.
            if f"{prefix}/cuda-{device}" in tensors:
                torch.cuda.set_rng_state(tensors[f"{prefix}/cuda-{device}"], device)
    kind, position, has_gauss, cached = cast(tuple[str, int, int, float], values["numpy"])
    keys = tensors[f"{prefix}/numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    version, next_gauss = cast(tuple[int, float | None], values["python"])
    random.setstate((version, tuple(tensors[f"{prefix}/python"].tolist()), next_gauss))


def _object(value: object, key: str, checkpoint: Checkpoint) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{checkpoint.folder}: has no state of: {key}")
    return value

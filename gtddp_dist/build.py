"""Optimizers from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import cast

import torch
from torch import nn

from . import curvature
from .config import Config, OptimizerConfig
from .curvature import Curvature
from .errors import UserError
from .literal import LiteralDDPNOpt
from .msa import EMSA
from .optimizer import GTDDP
from .options import PAPER, Options
from .players import SUPPORTED
from .registry import MODELS, OPTIMIZERS, load_object
from .trajectory import PlainParts, Traced, refuse_shortcuts

_TORCH = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_CURVATURES: dict[str, type[Curvature]] = {
    "sgd": curvature.SGD,
    "rmsprop": curvature.RMSprop,
    "adam": curvature.Adam,
    "adamw": curvature.AdamW,
    "kfac": curvature.KFAC,
    "ekfac": curvature.EKFAC,
}
_GTDDP_OPTIONS = {*(field.name for field in fields(Options)), "projection"}
"""What GTDDP takes itself; an optimizer's other options are its curvature's."""


def base_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """torch.optim's own optimizer of that name, with the configuration's options and torch's defaults for the rest."""
    name = config.optimizer.name
    options = _given(config.optimizer, OPTIMIZERS[name].options)
    return _TORCH[name](parameter_groups(model, config.optimizer.no_decay), **options)


def gtddp_optimizer(model: nn.Module, config: Config) -> GTDDP:
    """GT-DDP on the curvature of its base; a preset fills what the configuration leaves open.

    KFAC and EKFAC by themselves, and the cooperative GT-KFAC and GT-EKFAC, are the same without feedback. DDPNOpt
    (arXiv 2002.08809) is the paper's preset on a network without shortcuts.

    Raises:
        ModelError: ddpnopt-*: the network has a shortcut.
        UserError: an optimizer of another kind, which `gtddp plan` and `gtddp bench` do not know.
    """
    name = config.optimizer.name
    entry = OPTIMIZERS[name]
    if entry.whole_batch:
        raise UserError(
            f"optimizer.name={name} works in one process: there is nothing to plan or to measure stage-wise"
        )
    kind = _CURVATURES[entry.base or name]
    own = {field.name for field in fields(kind)} - _GTDDP_OPTIONS
    base = kind(**{n: v for n, v in _given(config.optimizer, entry.options).items() if n in own})
    options = _given(config.optimizer, tuple(n for n in _GTDDP_OPTIONS if n in entry.options))
    family = name.partition("-")[0]
    if family not in ("gtddp", "ddpnopt"):
        options["gauss_newton_weight"] = 0.0
        if entry.base is None:
            options["cooperation"] = "none"
    if isinstance(model, Traced):  # a rank's segment: how to trace was asked before
        options.pop("projection", None)
    if config.optimizer.preset == "paper":
        options = {**PAPER, "cooperation": base.of_paper, **options}
    if family == "ddpnopt":
        options = {**PAPER, "cooperation": "none", **options}
    optimizer = GTDDP(
        model,
        base,
        param_groups=parameter_groups(model, config.optimizer.no_decay),
        **plain_parts(model, config),
        replica_groups=config.train.replica_groups,
        clip_norm=config.train.clip_norm,
        seed=config.train.seed,
        **options,  # type: ignore[arg-type]
    )
    if family == "ddpnopt":
        refuse_shortcuts(optimizer.trajectory, name)
    return optimizer


def literal_optimizer(model: nn.Module, config: Config) -> LiteralDDPNOpt:
    """DDPNOpt with explicit matrices, on the base that `optimizer.base` names."""
    base = config.optimizer.base or "sgd"
    options = _given(config.optimizer, OPTIMIZERS[base].options)
    weight = config.optimizer.gauss_newton_weight
    return LiteralDDPNOpt(
        model,
        _CURVATURES[base](**options),
        param_groups=parameter_groups(model, config.optimizer.no_decay),
        gauss_newton_weight="1/B" if weight is None else weight,
    )


def msa_optimizer(model: nn.Module, config: Config) -> EMSA:
    """MSA, or E-MSA with the weight `optimizer.emsa_weight`."""
    given = _given(config.optimizer, OPTIMIZERS[config.optimizer.name].options)
    options = {name.removeprefix("emsa_"): value for name, value in given.items()}
    if config.optimizer.name == "msa":
        options["weight"] = 0.0
    return EMSA(model, **options)  # type: ignore[arg-type]


def plain_parts(model: nn.Module, config: Config) -> PlainParts:
    """What of the network `model.name` can be no player: the registry knows, for the networks that it builds.

    Nothing for a rank's segment, which is traced already.
    """
    location = MODELS[config.model.name].plain
    if location is None or isinstance(model, Traced):
        return {"plain_modules": [], "plain_parameters": []}
    return cast(Callable[[nn.Module], PlainParts], load_object(location))(model)


def parameter_groups(model: nn.Module, no_decay: bool) -> list[dict[str, object]]:
    """One group of all trainable parameters; or two, biases and normalisation parameters without weight decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not no_decay:
        return [{"params": trainable}]
    plain = {
        p
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias" or (type(module) in SUPPORTED and not SUPPORTED[type(module)].affine)
    }
    decayed = [p for p in trainable if p not in plain]
    return [{"params": decayed}, {"params": [p for p in trainable if p in plain], "weight_decay": 0.0}]


def _given(config: OptimizerConfig, names: tuple[str, ...]) -> dict[str, object]:
    """The options that the configuration sets."""
    values = {n: getattr(config, n) for n in names if n not in ("no_decay", "preset")}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if v is not None}

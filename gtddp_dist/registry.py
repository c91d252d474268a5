"""Names of optimizers, models and data sets: the options each takes, and where the code that builds it lives.

This module imports no torch, so that a configuration is checked before anything heavy is loaded. Code is
named as `"module:attribute"` and imported by `load_object` when it is needed. To add an entry, write one file
and add one line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer that a configuration can name."""

    options: tuple[str, ...]
    """Fields of the configuration group `optimizer` that it takes."""
    builder: str
    """`"module:function"`: `build(model: nn.Module, config: Config) -> torch.optim.Optimizer`."""
    base: str | None = None
    """The base optimizer that a GT-DDP or DDPNOpt optimizer equals at gauss_newton_weight = 0; a base has None."""
    whole_batch: bool = False
    """Whether it takes a step from one forward pass of one process over the whole batch, and from no other."""


@dataclass(frozen=True)
class ModelEntry:
    """A network that a configuration can name."""

    options: tuple[str, ...]
    """Fields of the configuration group `model` that it takes."""
    builder: str
    """`"module:function"`: `build(config: ModelConfig, in_channels: int, classes: int, image_size: int) -> nn.Module`,
    `image_size` in pixels; images are square."""
    plain: str | None = None
    """`"module:function"`: `plain_parts(model: nn.Module) -> PlainParts`, what of the network can be no player and gets
    the base update without feedback; None where that is nothing."""


@dataclass(frozen=True)
class DataEntry:
    """A data set that a configuration can name."""

    options: tuple[str, ...]
    """Fields of the configuration group `data` that it takes."""
    loader: str
    """`"module:function"`: `load(config: DataConfig) -> DataSet`."""
    classes: int = 10


@dataclass(frozen=True)
class ExperimentEntry:
    """A table or figure of the papers that `gtddp reproduce` can name."""

    title: str
    """Of its page."""
    experiment: str
    """`"module:object"`: a `gtddp_dist.experiments.experiment.Experiment`."""


_SGD = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "no_decay")
_RMSPROP = ("lr", "alpha", "eps", "momentum", "centered", "weight_decay", "no_decay")
_ADAM = ("lr", "betas", "eps", "amsgrad", "weight_decay", "no_decay")
_KRONECKER = (
    "lr",
    "momentum",
    "weight_decay",
    "damping",
    "factor_decay",
    "factor_every",
    "basis_every",
    "basis_method",
    "basis_spread",
    "basis_lag",
    "factors",
    "fisher",
    "max_factor_dim",
    "max_basis_failures",
)
_GTDDP = (
    "preset",
    "gauss_newton_weight",
    "control_hessian",
    "value_hessian",
    "terminal",
    "rollout",
    "statistics",
    "metric",
    "scope",
    "momentum_of",
    "cooperation",
    "projection",
    "replace_guard",
    "capture",
    "recompute",
    "gram_memory",
)
_LITERAL = tuple(dict.fromkeys(("base", "gauss_newton_weight", *_SGD, *_RMSPROP, *_ADAM, *_KRONECKER)))
_DDPNOPT = ("gauss_newton_weight", "value_hessian", "scope", "replace_guard")

_MSA = ("lr", "weight_decay", "emsa_iterations")

_BASE_BUILDER = "gtddp_dist.build:base_optimizer"
_GTDDP_BUILDER = "gtddp_dist.build:gtddp_optimizer"
_MSA_BUILDER = "gtddp_dist.build:msa_optimizer"

OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    "sgd": OptimizerEntry(_SGD, _BASE_BUILDER),
    "rmsprop": OptimizerEntry(_RMSPROP, _BASE_BUILDER),
    "adam": OptimizerEntry(_ADAM, _BASE_BUILDER),
    "adamw": OptimizerEntry(_ADAM, _BASE_BUILDER),
    "kfac": OptimizerEntry(_KRONECKER, _GTDDP_BUILDER),
    "ekfac": OptimizerEntry(_KRONECKER, _GTDDP_BUILDER),
    "gt-kfac": OptimizerEntry((*_KRONECKER, "cooperation", "projection"), _GTDDP_BUILDER, base="kfac"),
    "gt-ekfac": OptimizerEntry((*_KRONECKER, "cooperation", "projection"), _GTDDP_BUILDER, base="ekfac"),
    "gtddp-sgd": OptimizerEntry(_SGD + _GTDDP, _GTDDP_BUILDER, base="sgd"),
    "gtddp-rmsprop": OptimizerEntry(_RMSPROP + _GTDDP, _GTDDP_BUILDER, base="rmsprop"),
    "gtddp-adam": OptimizerEntry(_ADAM + _GTDDP, _GTDDP_BUILDER, base="adam"),
    "gtddp-adamw": OptimizerEntry(_ADAM + _GTDDP, _GTDDP_BUILDER, base="adamw"),
    "gtddp-kfac": OptimizerEntry(_KRONECKER + _GTDDP, _GTDDP_BUILDER, base="kfac"),
    "gtddp-ekfac": OptimizerEntry(_KRONECKER + _GTDDP, _GTDDP_BUILDER, base="ekfac"),
    "ddpnopt-sgd": OptimizerEntry(_SGD + _DDPNOPT, _GTDDP_BUILDER, base="sgd"),
    "ddpnopt-rmsprop": OptimizerEntry(_RMSPROP + _DDPNOPT, _GTDDP_BUILDER, base="rmsprop"),
    "ddpnopt-adam": OptimizerEntry(_ADAM + _DDPNOPT, _GTDDP_BUILDER, base="adam"),
    "ddpnopt-ekfac": OptimizerEntry(_KRONECKER + _DDPNOPT, _GTDDP_BUILDER, base="ekfac"),
    "msa": OptimizerEntry(_MSA, _MSA_BUILDER, whole_batch=True),
    "emsa": OptimizerEntry((*_MSA, "emsa_weight"), _MSA_BUILDER, whole_batch=True),
    "ddpnopt-literal": OptimizerEntry(_LITERAL, "gtddp_dist.build:literal_optimizer", whole_batch=True),
}

MODELS: Mapping[str, ModelEntry] = {
    "small-resnet": ModelEntry(
        ("blocks", "width", "channels", "batch_norm", "activation", "init_scale"),
        "gtddp_dist.models.small_resnet:build",
    ),
    "plain-net": ModelEntry(
        ("blocks", "width", "channels", "batch_norm", "activation", "init_scale"), "gtddp_dist.models.plain_net:build"
    ),
    "nested-resnet": ModelEntry(
        ("blocks", "width", "batch_norm", "activation", "init_scale"), "gtddp_dist.models.nested_resnet:build"
    ),
    "coop-net": ModelEntry(("width", "activation"), "gtddp_dist.models.coop_net:build"),
    "resnet18": ModelEntry(("stem",), "gtddp_dist.models.resnet:build_resnet18"),
    "resnet34": ModelEntry(("stem",), "gtddp_dist.models.resnet:build_resnet34"),
    "resnet50": ModelEntry(("stem",), "gtddp_dist.models.resnet:build_resnet50"),
    "vit": ModelEntry(
        ("width", "patch_size", "depth", "heads", "mlp_ratio"),
        "gtddp_dist.models.vit:build",
        plain="gtddp_dist.models.vit:plain_parts",
    ),
}

DATA_SETS: Mapping[str, DataEntry] = {
    "digits": DataEntry((), "gtddp_dist.data.digits:load"),
    "mnist": DataEntry(("dir", "download"), "gtddp_dist.data.mnist:load"),
    "svhn": DataEntry(("dir", "download", "augment"), "gtddp_dist.data.svhn:load"),
    "cifar10": DataEntry(("dir", "download", "augment"), "gtddp_dist.data.cifar:load_cifar10"),
    "cifar100": DataEntry(("dir", "download", "augment"), "gtddp_dist.data.cifar:load_cifar100", 100),
}

EXPERIMENTS: Mapping[str, ExperimentEntry] = {
    "table2": ExperimentEntry("GT-DDP against its base at shared settings", "gtddp_dist.experiments.table2:EXPERIMENT"),
    "fig1": ExperimentEntry("Time and memory of a step", "gtddp_dist.experiments.fig1:EXPERIMENT"),
    "fig4": ExperimentEntry(
        "The value Hessian of a batch, and what couples samples", "gtddp_dist.experiments.fig4:EXPERIMENT"
    ),
    "fig6": ExperimentEntry("Feedback and variance during training", "gtddp_dist.experiments.fig6:EXPERIMENT"),
    "fig7": ExperimentEntry("Layers that cooperate", "gtddp_dist.experiments.fig7:EXPERIMENT"),
    "fig8": ExperimentEntry(
        "What the feedback of convolutions responds to, as images", "gtddp_dist.experiments.fig8:EXPERIMENT"
    ),
    "control": ExperimentEntry(
        "Methods of optimal control, by iteration and by second", "gtddp_dist.experiments.control:EXPERIMENT"
    ),
    "vanishing": ExperimentEntry(
        "Vanishing gradients in deep nets of sigmoids and tanhs", "gtddp_dist.experiments.vanishing:EXPERIMENT"
    ),
    "robustness": ExperimentEntry("Which learning rates train", "gtddp_dist.experiments.robustness:EXPERIMENT"),
    "terminal": ExperimentEntry("Which terminal curvature pays", "gtddp_dist.experiments.terminal:EXPERIMENT"),
    "target": ExperimentEntry("Steps and seconds to a target", "gtddp_dist.experiments.target:EXPERIMENT"),
}


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Keys most like the dotted `word`, best first, at most `count`.

    The last parts are compared, and what stands before them decides between equals: compared as a whole, any two
    keys of one group would look alike.
    """
    group, _, leaf = word.rpartition(".")
    scores: dict[str, float] = {}
    for candidate in candidates:
        candidate_group, _, candidate_leaf = candidate.rpartition(".")
        likeness = difflib.SequenceMatcher(None, leaf, candidate_leaf).ratio()
        if likeness >= 0.6:
            same_place = difflib.SequenceMatcher(None, group, candidate_group).ratio()
            scores[candidate] = likeness + 0.3 * same_place
    return sorted(scores, key=lambda candidate: -scores[candidate])[:count]


def nearest_first(word: str, candidates: Iterable[str]) -> list[str]:
    """All candidates, those most like `word` first, the rest in their own order."""
    known = list(candidates)
    return list(dict.fromkeys(difflib.get_close_matches(word, known, n=len(known) or 1, cutoff=0.5) + known))


def load_object(location: str) -> object:
    """The object that `"package.module:attribute"` names; imports its module.

    Raises ValueError where `location` has another form, ImportError or AttributeError where it names nothing.
    """
    module, separator, name = location.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"expected 'package.module:attribute', got {location!r}")
    attribute: object = getattr(importlib.import_module(module), name)
    return attribute

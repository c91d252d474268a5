"""DDPNOpt (arXiv 2002.08809): the presets, and the explicit recursion, against the dense reference."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import oracle
import oracle_kronecker
import pytest
import torch
import torch.nn.functional as F
from nets import CHAIN, PLAIN_NETS, Net
from safetensors.torch import load_file
from torch import nn

from gtddp_dist import GTDDP, parts
from gtddp_dist.config import Config, load_config
from gtddp_dist.errors import OK, ConfigError, ModelError, StepError
from gtddp_dist.train import resume_training, run_training

SAMPLES = 4
STEPS = 3
TOLERANCE = 1e-10


# name of the base -> options, and the reference's rule
BASES: dict[str, tuple[dict[str, Any], oracle.OptimizerRule]] = {
    "sgd": (
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        oracle.SGD(lr=0.1, mu=0.9, weight_decay=0.01),
    ),
    "rmsprop": ({"lr": 0.01, "alpha": 0.9, "eps": 1e-3}, oracle.RMSprop(lr=0.01, alpha=0.9, eps=1e-3)),
    "adam": ({"lr": 0.02, "eps": 1e-4}, oracle.Adam(lr=0.02, eps=1e-4)),
    # With a basis at every step: with fewer samples than inputs the null space of an old one is anybody's choice.
    "ekfac": (
        {"lr": 0.05, "damping": 0.1, "basis_every": 1},
        oracle_kronecker.EKFAC(lr=0.05, damping=0.1, basis_every=1),
    ),
}


def config_of(name: str, options: dict[str, Any], *more: str) -> Config:
    given = [f"optimizer.{key}={value}" for key, value in options.items()]
    blank = ["optimizer.lr=null", "optimizer.gauss_newton_weight=null"]
    return load_config("digits", [f"optimizer.name={name}", *blank, "model.name=plain-net", *given, *more])


def errors_against_the_reference(
    net: Net, name: str, rule: str, rho: float | str, value_hessian: str = "block_diagonal", **options: Any
) -> list[float]:
    """The distance of the weights after every step, relative to the step's own length."""
    given, theirs = BASES[rule]
    more = {"gauss_newton_weight": rho, **options}
    if name != "ddpnopt-literal":
        more["value_hessian"] = value_hessian
    model = net.model()
    optimizer = parts.new_optimizer_of(config_of(name, {**given, **more}))(model, config_of(name, {**given, **more}))
    reference = oracle.Options(
        theirs,
        gauss_newton_weight=rho,  # type: ignore[arg-type]
        control_hessian="replace",
        value_hessian=value_hessian,  # type: ignore[arg-type]
        rollout="nonlinear",
        statistics="value",
        momentum_of="gradient",
        replace_guard=False,
    )
    parameters, state, errors = net.parameters(model), oracle.State(), []
    for step in range(STEPS):
        x, y = net.batch(SAMPLES, step)
        result = oracle.oracle_step(net.stages, parameters, state, x, y, reference)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved = torch.cat([(p.detach() - parameters[n]).flatten() for n, p in model.named_parameters()])
        expected = torch.cat([(result.parameters[n] - parameters[n]).flatten() for n in parameters])
        errors.append(float((moved - expected).norm() / expected.norm()))
        parameters, state = result.parameters, result.state
    return errors


@pytest.mark.parametrize("net", PLAIN_NETS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rho", ["1/B", 2.0])
def test_the_presets_are_the_dense_recursion(net: str, base: str, rho: float | str) -> None:
    errors = errors_against_the_reference(PLAIN_NETS[net], f"ddpnopt-{base}", base, rho)
    assert max(errors) < TOLERANCE, errors


def test_a_full_value_hessian_is_the_dense_recursion_too() -> None:
    errors = errors_against_the_reference(CHAIN, "ddpnopt-sgd", "sgd", 1.0, "batch")
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("net", PLAIN_NETS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rho", ["1/B", 2.0])
def test_the_explicit_recursion_is_the_dense_one(net: str, base: str, rho: float | str) -> None:
    errors = errors_against_the_reference(PLAIN_NETS[net], "ddpnopt-literal", base, rho, base=base)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("base", BASES)
def test_the_explicit_recursion_is_the_one_in_sample_space(base: str) -> None:
    """On a network that the package ships, several steps of each by itself."""
    weights = []
    for name, more in ((f"ddpnopt-{base}", {}), ("ddpnopt-literal", {"base": base})):
        config = config_of(
            name,
            {**BASES[base][0], **more, "lr": 0.002, "gauss_newton_weight": 0.5},
            *("model.width=2", "model.activation=tanh", "train.dtype=float64", "train.batch_size=4"),
        )
        built = parts.build(config)
        start = nn.utils.parameters_to_vector(built.model.parameters()).detach()
        for step in range(STEPS):
            samples = slice(4 * step, 4 * step + 4)
            images, labels = built.data.train_images[samples], built.data.train_labels[samples]
            assert not built.step(images, labels).refused
        weights.append(nn.utils.parameters_to_vector(built.model.parameters()).detach() - start)
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < TOLERANCE


def test_negative_curvature_is_left_out_as_in_sample_space() -> None:
    """At a rate where M would turn negative."""
    given = {"lr": 3.0, "gauss_newton_weight": 40.0}
    moves = []
    for name in ("ddpnopt-sgd", "ddpnopt-literal"):
        model = CHAIN.model()
        config = config_of(name, given)
        optimizer = parts.new_optimizer_of(config)(model, config)
        x, y = CHAIN.batch(SAMPLES)
        F.cross_entropy(model(x), y).backward()
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.step()
        moves.append(nn.utils.parameters_to_vector(model.parameters()).detach() - start)
        if isinstance(optimizer, GTDDP):
            assert optimizer.diagnostics()["clamped"] > 0
    assert float((moves[0] - moves[1]).norm() / moves[0].norm()) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "module"),
    [
        ("small-resnet", "blocks.0.second.conv"),
        ("nested-resnet", "blocks.0.inner.first.conv"),
        ("resnet18", "layer1.0.conv2"),
    ],
)
def test_a_network_with_shortcuts_is_refused(model: str, module: str) -> None:
    with pytest.raises(ModelError, match=rf"ddpnopt-adam takes .* before module '{module}' 2 tensors are live"):
        parts.build(config_of("ddpnopt-adam", {"lr": 0.01}, f"model.name={model}"))


@pytest.mark.parametrize("base", BASES)
def test_a_configuration_trains_with_it(base: str) -> None:
    built = parts.build(config_of(f"ddpnopt-{base}", {**BASES[base][0], "lr": 0.002}, "train.batch_size=8"))
    images, labels = built.data.train_images[:8], built.data.train_labels[:8]
    results = [built.step(images, labels) for _ in range(4)]
    assert not any(result.refused for result in results)
    assert results[-1].loss < results[0].loss


def test_options_that_the_algorithm_fixes_are_refused() -> None:
    with pytest.raises(ConfigError, match="ddpnopt-sgd takes no option control_hessian"):
        config_of("ddpnopt-sgd", {"control_hessian": "proximal"})


# --- the explicit recursion in a run


def literal(*more: str) -> Config:
    return config_of("ddpnopt-literal", {"lr": 0.05}, "model.width=2", "train.batch_size=4", *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("parallel.pipe=2", "parallel.pipe"),
        ("parallel.data=2", "parallel.data"),
        ("train.micro_batches=2", "train.micro_batches"),
        ("train.replica_groups=2", "train.replica_groups"),
        ("train.clip_norm=1.0", "train.clip_norm"),
        ("train.dtype=bfloat16", "train.dtype"),
        ("optimizer.alpha=0.9", "sgd takes no option alpha"),
    ],
)
def test_what_it_cannot_do_is_refused(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        literal(more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.name=small-resnet", "before module 'blocks.0.second.conv' 2 tensors are live"),
        ("model.batch_norm=true", r"module 'stem.norm' \(BatchNorm2d\) couples samples"),
    ],
)
def test_networks_that_it_cannot_take_are_refused(more: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parts.build(literal(more))


def test_a_network_too_large_for_it_is_refused_before_anything_changes() -> None:
    built = parts.build(literal("model.width=32", "train.batch_size=32"))
    start = nn.utils.parameters_to_vector(built.model.parameters()).detach()
    with pytest.raises(StepError, match=r"would take \d+\.\d GiB, more than 8: take a smaller"):
        built.step(built.data.train_images[:32], built.data.train_labels[:32])
    assert torch.equal(start, nn.utils.parameters_to_vector(built.model.parameters()))


def test_a_step_that_is_not_finite_is_refused() -> None:
    built = parts.build(literal())
    images, labels = built.data.train_images[:4].clone(), built.data.train_labels[:4]
    images[0, 0, 0, 0] = float("nan")
    start = nn.utils.parameters_to_vector(built.model.parameters()).detach()
    assert built.step(images, labels).refused
    assert torch.equal(start, nn.utils.parameters_to_vector(built.model.parameters()))
    assert built.optimizer.skipped_steps == 1  # type: ignore[attr-defined]
    assert not built.step(built.data.train_images[:4], labels).refused


def test_a_value_function_that_is_not_finite_is_refused() -> None:
    built = parts.build(literal("optimizer.gauss_newton_weight=1e38"))
    start = nn.utils.parameters_to_vector(built.model.parameters()).detach()
    assert built.step(built.data.train_images[:4], built.data.train_labels[:4]).refused
    assert torch.equal(start, nn.utils.parameters_to_vector(built.model.parameters()))


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_run_resumes_to_the_same_weights(base: str, tmp_path: Path) -> None:
    words = [f"optimizer.base={base}", "train.steps=4", "checkpoint.every=2", "checkpoint.keep=9"]
    words += ["optimizer.momentum=0.9"] if base == "sgd" else ["optimizer.lr=0.002"]

    run = tmp_path / "run"
    assert run_training(literal(*words, "log.progress=false", f"run.dir={run}"), "digits") == OK
    whole = load_file(run / "model.safetensors")
    for left in [*run.glob("checkpoints/step-*4"), run / "model.safetensors", run / "summary.json", run / "curves.png"]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert resume_training(run) == OK
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name

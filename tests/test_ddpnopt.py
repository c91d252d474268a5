"""DDPNOpt (arXiv 2002.08809): the presets, and the explicit recursion, against the dense reference."""

from __future__ import annotations

from typing import Any

import oracle
import oracle_kronecker
import pytest
import torch
import torch.nn.functional as F
from nets import CHAIN, PLAIN_NETS, Net

from gtddp_dist import parts
from gtddp_dist.config import Config, load_config
from gtddp_dist.errors import ConfigError, ModelError

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
    net: Net, name: str, base: str, rho: float | str, value_hessian: str = "block_diagonal", **options: Any
) -> list[float]:
    """The distance of the weights after every step, relative to the step's own length."""
    given, rule = BASES[base]
    more = {"gauss_newton_weight": rho, "value_hessian": value_hessian, **options}
    model = net.model()
    optimizer = parts.new_optimizer_of(config_of(name, {**given, **more}))(model, config_of(name, {**given, **more}))
    reference = oracle.Options(
        rule,
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

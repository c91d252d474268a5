"""KFAC and EKFAC, cooperation of projection shortcuts and the exact terminal against the dense reference.

Eigenvectors of a multiple eigenvalue are not unique, and EKFAC's running second moments depend on them where factors
have a null space that the per-sample gradients do not share. So EKFAC is compared with factors of full rank (SAMPLES
of them, where the recursion is one group and the layers are small), else with bases renewed in every step, when
nothing depends on the choice; with "reduced" factors, whose null space is no gradient's, on small layers alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import oracle_kronecker
import pytest
from nets import ALL_NETS, NETS
from test_against_oracle import BASES, LAYOUTS, check_steps, check_with

from gtddp_dist import curvature

STEPS = 5  # past a basis refresh
SAMPLES = 12

CURVATURES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1, "damping": 0.05, "basis_every": 3},
    "momentum": {"lr": 0.05, "damping": 0.05, "basis_every": 2, "momentum": 0.9, "weight_decay": 0.01},
    "reduced": {"lr": 0.1, "damping": 0.03, "basis_every": 2, "factors": "reduced", "factor_decay": 0.8},
    "by channel": {"lr": 0.1, "damping": 0.05, "basis_every": 2, "factors": "spatially_uncorrelated", "momentum": 0.5},
    "rarely": {"lr": 0.1, "damping": 0.05, "factor_every": 2, "basis_every": 4},
    "sampled": {"lr": 0.1, "damping": 0.05, "basis_every": 3, "fisher": "sampled"},
}
SMALL_LAYERS = ("mlp", "input_shortcut", "twin_linear")
COOPERATIVE = ("small_resnet", "normed_projection", "twin_linear", "twin_conv")
MODES = [
    {
        "control_hessian": control,
        "value_hessian": value,
        "terminal": terminal,
        "rollout": rollout,
        "statistics": statistics,
        "metric": metric,
        "momentum_of": momentum_of,
        "capture": capture,
    }
    for (statistics, metric), control, value, terminal, rollout, momentum_of, capture in itertools.product(
        (("gradient", "current"), ("value", "current"), ("gradient", "previous")),
        ("proximal", "replace"),
        ("batch", "block_diagonal"),
        ("loss_gradient", "sampled", "exact"),
        ("linear", "nonlinear"),
        ("step", "gradient"),
        ("gradient", "weighted"),
    )
]


def both(kind: str, name: str, **changes: Any) -> tuple[curvature.Curvature, oracle.OptimizerRule]:
    options = {**CURVATURES[name], **changes}
    theirs = {"mu" if n == "momentum" else n: v for n, v in options.items()}
    return getattr(curvature, kind)(**options), getattr(oracle_kronecker, kind)(**theirs)


def check_kronecker(
    net: str, kind: str, name: str, layout: int, mode: dict[str, Any], rho: float = 0.5, **more: Any
) -> None:
    changes: dict[str, Any] = {}
    one_group = LAYOUTS[layout].groups is None and LAYOUTS[layout].micro_batches == 1
    if kind == "EKFAC" and CURVATURES[name].get("factors") == "reduced" and not (one_group and net in SMALL_LAYERS):
        name = "plain"
    if kind == "EKFAC" and one_group and net != "small_resnet":
        more = {"samples": SAMPLES, **more}
    elif kind == "EKFAC":
        changes = {"basis_every": 1, "factor_every": 1}
    ours, theirs = both(kind, name, **changes)
    if CURVATURES[name].get("fisher") == "sampled" and mode["statistics"] == "value":
        mode = {**mode, "statistics": "gradient"}
    mode = {"cooperation": "none", **mode}
    more = {"steps": STEPS, "tolerance": 1e-9, **more}
    check_with(ALL_NETS[net], ours, theirs, LAYOUTS[layout], mode, rho, **more)


def _rotated() -> list[Any]:
    nets, names = list(NETS), list(CURVATURES)
    cases = []
    for index, mode in enumerate(MODES):
        if index % 2:
            continue
        turn = index * 5
        kind = ("KFAC", "EKFAC")[(index // 2) % 2]
        case = (
            nets[turn % len(nets)],
            kind,
            names[(turn + index // 7) % len(names)],
            (turn + index // 5) % len(LAYOUTS),
        )
        cases.append(pytest.param(*case, mode, id=f"{index}-{'-'.join(map(str, case))}"))
    return cases


@pytest.mark.parametrize(("net", "kind", "name", "layout", "mode"), _rotated())
def test_steps_equal_the_dense_recursion(net: str, kind: str, name: str, layout: int, mode: dict[str, Any]) -> None:
    check_kronecker(net, kind, name, layout, mode)


SIMPLE = {"terminal": "loss_gradient", "rollout": "nonlinear", "statistics": "value", "metric": "current"}


@pytest.mark.parametrize("net", ALL_NETS)
@pytest.mark.parametrize(
    ("kind", "name"), [*(("KFAC", name) for name in CURVATURES), ("EKFAC", "momentum"), ("EKFAC", "by channel")]
)
def test_every_network_with_every_curvature(net: str, kind: str, name: str) -> None:
    mode: dict[str, Any] = dict(SIMPLE)
    if net.endswith("separate"):
        mode["projection"] = "separate"
    check_kronecker(net, kind, name, 0, mode)


@pytest.mark.parametrize("net", COOPERATIVE)
@pytest.mark.parametrize(("kind", "cooperation"), [("KFAC", "exact"), ("KFAC", "theorem3"), ("EKFAC", "exact")])
@pytest.mark.parametrize("name", ["plain", "momentum", "reduced", "rarely"])
def test_cooperation(net: str, kind: str, cooperation: str, name: str) -> None:
    if net.startswith("twin") and name == "plain":
        mode = {**SIMPLE, "rollout": "linear", "control_hessian": "replace", "value_hessian": "block_diagonal"}
    else:
        mode = dict(SIMPLE)
    check_kronecker(net, kind, name, 0, {**mode, "cooperation": cooperation})


@pytest.mark.parametrize("net", ["twin_linear", "twin_conv"])
@pytest.mark.parametrize("kind", ["KFAC", "EKFAC"])
@pytest.mark.parametrize("name", ["plain", "momentum", "reduced"])
def test_corollary_7(net: str, kind: str, name: str) -> None:
    check_kronecker(net, kind, name, 0, {**SIMPLE, "cooperation": "corollary7"})


@pytest.mark.parametrize("net", ["small_resnet", "twin_conv"])
@pytest.mark.parametrize("cooperation", ["none", "exact"])
@pytest.mark.parametrize("kind", ["KFAC", "EKFAC"])
def test_without_feedback_it_is_the_base(net: str, cooperation: str, kind: str) -> None:
    """rho = 0: KFAC and EKFAC; with cooperation GT-KFAC and GT-EKFAC."""
    mode = {**SIMPLE, "cooperation": cooperation, "statistics": "gradient"}
    check_kronecker(net, kind, "momentum", 0, mode, rho=0.0)
    check_kronecker(net, kind, "plain", 1, mode, rho=0.0)


@pytest.mark.parametrize("kind", ["KFAC", "EKFAC"])
@pytest.mark.parametrize("terminal", ["loss_gradient", "exact"])
def test_values_and_policies_in_explicit_form(kind: str, terminal: str) -> None:
    mode = {**SIMPLE, "terminal": terminal}
    check_kronecker("small_resnet", kind, "plain", 1, {**mode, "cooperation": "exact"}, inspect=True)
    check_kronecker("tokens", kind, "plain", 0, mode, inspect=True)


EXACT_MODES = [
    {
        "control_hessian": control,
        "value_hessian": value,
        "terminal": "exact",
        "rollout": rollout,
        "statistics": statistics,
    }
    for control, value, rollout, statistics in itertools.product(
        ("proximal", "replace"), ("batch", "block_diagonal"), ("linear", "nonlinear"), ("gradient", "value")
    )
]


@pytest.mark.parametrize("mode", EXACT_MODES, ids=str)
@pytest.mark.parametrize("guard", [True, False])
def test_exact_terminal_with_the_other_bases(mode: dict[str, Any], guard: bool) -> None:
    """As many rows a sample as classes, blocks of them where the value Hessian is block-diagonal."""
    nets, bases = list(NETS), list(BASES)
    for index in range(3):
        turn = EXACT_MODES.index(mode) * 3 + index
        check_steps(NETS[nets[turn % len(nets)]], bases[turn % len(bases)], LAYOUTS[turn % 4], mode, 0.5, guard=guard)

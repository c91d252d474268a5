"""Experiments that look inside: the dense recursion against the reference, and a quick unit of each."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import cast

import oracle
import pytest
import torch
import torch.nn.functional as F
from nets import IDENTITY, MLP, PROJECTION, Net
from torch import nn

from gtddp_dist import GTDDP, curvature, parts
from gtddp_dist.checkpoint import JSON
from gtddp_dist.config import load_config
from gtddp_dist.experiments import control, dense, fig8, vanishing
from gtddp_dist.experiments.bases import BASES
from gtddp_dist.experiments.experiment import Experiment
from gtddp_dist.experiments.plan import Plan, config_of
from gtddp_dist.experiments.unit import Result, Results
from gtddp_dist.registry import DATA_SETS, EXPERIMENTS, load_object

SAMPLES = 3
QUICK = Plan(seeds=1, quick=True, words=("train.threads=1",))


def experiment(name: str) -> Experiment:
    return cast(Experiment, load_object(EXPERIMENTS[name].experiment))


# --- the dense recursion


@pytest.mark.parametrize("net", [MLP, IDENTITY, PROJECTION], ids=lambda net: net.name)
@pytest.mark.parametrize("control_hessian", ["replace", "proximal"])
def test_the_dense_recursion_is_the_reference(net: Net, control_hessian: str) -> None:
    rate, rho = 0.05, 0.2
    model = net.model()
    x, y = net.batch(SAMPLES)
    options = oracle.Options(
        oracle.SGD(lr=rate),
        gauss_newton_weight=rho,
        control_hessian=control_hessian,  # type: ignore[arg-type]
        value_hessian="batch",
        terminal="exact",
        replace_guard=False,
    )
    result = oracle.oracle_step(net.stages, net.parameters(model), oracle.State(), x, y, options)
    stages, logits = dense.batch_jacobians(model, x)
    terminal = dense.softmax_hessian(logits, rho)
    values = dense.value_hessians(stages, terminal, rate, proximal=control_hessian == "proximal")
    assert list(values) == list(range(len(net.stages), 0, -1))
    coupled = 0.0
    for cut, V in values.items():
        expected = result.sweeps[0].V_zz[cut]
        torch.testing.assert_close(V, expected, rtol=1e-9, atol=1e-12)
        assert dense.block_norms(V, SAMPLES).shape == (SAMPLES, SAMPLES)
        coupled = max(coupled, dense.off_diagonal_share(V, SAMPLES))
    assert coupled > 1e-3  # the shared controls couple samples


def test_the_dense_recursion_sees_batch_norm() -> None:
    """With controls that hardly move, V_zz is the Gauss-Newton Hessian of the layers behind, on the whole batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model, x = model.double(), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        h = model[1](model[0](x)).flatten()
    stages, logits = dense.batch_jacobians(model, x)
    terminal = dense.softmax_hessian(logits, 1.0)
    V = dense.value_hessians(stages, terminal, 1e-12, proximal=False)[1]
    J = torch.autograd.functional.jacobian(lambda h: model[2:](h.view(4, 4)).flatten(), h)
    torch.testing.assert_close(V, J.T @ terminal @ J, rtol=1e-8, atol=1e-12)
    assert dense.off_diagonal_share(V, 4) > 0.05


def test_the_softmax_hessian_is_that_of_the_loss() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 3])
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, labels), logits)
    torch.testing.assert_close(dense.softmax_hessian(logits, 1.0), hessian.reshape(12, 12))


# --- units


def done(name: str, plan: Plan) -> tuple[Experiment, Results]:
    """All units of the quick form, in this process."""
    results, subject = Results(), experiment(name)
    while missing := [unit for unit in subject.units(plan, results) if unit.key not in results]:
        for unit in missing:
            results[unit.key] = unit.do()
    return subject, results


def checked_page(name: str, plan: Plan) -> tuple[Results, dict[str, list[dict[str, object]]]]:
    """The results, and the tables' rows by table and column; every table has rows, every picture is drawn."""
    subject, results = done(name, plan)
    found = subject.findings(plan, results)
    assert found.conclusion and found.setting
    assert set(found.captions) == set(found.figures)
    for table in found.tables:
        assert table.rows, table.name
        table.markdown()
    for figure in found.figures.values():
        figure.canvas.draw() if hasattr(figure.canvas, "draw") else figure.draw_without_rendering()
    return results, {
        table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in found.tables
    }


def of(result: Result, *keys: str) -> JSON:
    value: JSON = cast(dict[str, JSON], result)
    for key in keys:
        value = cast(Mapping[str, JSON], value)[key]
    return value


def test_fig4() -> None:
    results, tables = checked_page("fig4", QUICK)
    errors = {False: 0.0, True: 0.0}
    for row in tables[""]:
        norm = bool(row["BatchNorm"])
        errors[norm] = max(errors[norm], cast(float, row["gtddp's error, Q_uu = R"]))
    assert errors[False] < 1e-10 and errors[True] > 0.01
    pictured = [result for result in results.values() if "picture" in result]
    assert len(pictured) == 2
    assert max(max(row) for row in cast(list[list[float]], of(pictured[0], "picture", "V"))) == 1.0


def test_the_probe_has_the_gradient_and_q_u() -> None:
    """Against the reference: Q_u is -R k there, with R = I / rate."""
    model = MLP.model()
    x, y = MLP.batch(SAMPLES)
    found = vanishing.probe(model, x, y)
    options = oracle.Options(
        oracle.SGD(lr=BASES["sgd"]),
        gauss_newton_weight="1/B",
        control_hessian="replace",
        value_hessian="block_diagonal",
        replace_guard=False,
    )
    k = oracle.oracle_step(MLP.stages, MLP.parameters(model), oracle.State(), x, y, options).sweeps[0].k
    norms = [float(gain.norm()) / BASES["sgd"] for gain in k]
    torch.testing.assert_close(cast(list[float], found["paper"]), norms, rtol=1e-9, atol=0.0)
    F.cross_entropy(model(x), y).backward()
    first = torch.cat([p.grad.flatten() for p in list(model.parameters())[:2] if p.grad is not None])
    assert cast(list[float], found["g"])[0] == pytest.approx(float(first.norm()))
    assert found["g"] != found["paper"]


def test_vanishing() -> None:
    _, tables = checked_page("vanishing", QUICK)
    g = "first over last: |g|"
    by_activation = {row["activation"]: row[g] for row in tables["ratios"] if not row["trained with"]}
    assert cast(float, by_activation["sigmoid"]) < 0.1 * cast(float, by_activation["tanh"])
    assert {row["optimizer"] for row in tables[""]} == {"base", "DDPNOpt"}


# --- methods of optimal control


def test_the_scale_of_initial_weights() -> None:
    def weights(name: str, scale: float) -> dict[str, torch.Tensor]:
        words = [f"model.name={name}", f"model.init_scale={scale}", "model.batch_norm=true"]
        return dict(parts.build(load_config("digits", words)).model.named_parameters())

    for name in ("plain-net", "small-resnet", "nested-resnet"):
        usual, scaled = weights(name, 1.0), weights(name, 0.25)
        for parameter, value in usual.items():
            factor = 1.0 if ".norm." in parameter else 0.25
            torch.testing.assert_close(scaled[parameter], factor * value, msg=parameter)


def test_control() -> None:
    """A trial of a method, and what is made of made-up losses: the lowest counts, and seconds are those taken alone."""
    plan = Plan(seeds=1, quick=True, words=("train.threads=1",))
    subject = control.EXPERIMENT
    trial = subject.trials(plan, "near the saddle", "emsa")[0]
    results, real = Results(), trial.do()
    assert not real["diverged"]
    while missing := [unit for unit in subject.units(plan, results) if unit.key not in results]:
        for unit in missing:
            name = str(json.loads(unit.arguments)["optimizer.name"])
            loss = 0.5 if name == "emsa" else 2.0
            curve: JSON = [[1, 2.3], [2, loss], [3, loss]]
            made = {**real, "train_loss": loss, "seconds_per_step": 4.0 if unit.alone else 100.0}
            results[unit.key] = {**made, "curves": {**cast(dict[str, JSON], real["curves"]), "train/loss": curve}}
    best = subject.trials(plan, "ordinary", "sgd")[1]
    results[best.key] = {**results[best.key], "train_loss": 0.1}
    assert subject.best(plan, results, "ordinary", "sgd") == control.TRIALS["sgd"][2]
    missing = [unit for unit in subject.units(plan, results) if unit.key not in results]
    assert len(missing) == 2  # the new best setting of SGD, trained and timed
    for unit in missing:
        results[unit.key] = {**real, "train_loss": 2.0, "seconds_per_step": 4.0}
    assert all(len(unit.arguments) > 0 for unit in subject.units(plan, results))
    found = subject.findings(plan, results)
    rows = {(row[0], row[1]): dict(zip(found.tables[0].columns, row, strict=True)) for row in found.tables[0].rows}
    assert rows["ordinary", "E-MSA"]["steps to the mark"] == 2
    assert rows["ordinary", "E-MSA"]["seconds to the mark"] == 8.0
    assert rows["ordinary", "SGD"]["steps to the mark"] is None
    assert "E-MSA gains more per iteration than SGD holds" in found.conclusion
    assert "DDP is the more stable does not hold" in found.conclusion
    assert set(found.captions) == set(found.figures)
    for figure in found.figures.values():
        figure.draw_without_rendering()


# --- feedback as images


@pytest.mark.parametrize("norm", [False, True])
def test_the_leading_image_is_what_the_feedback_responds_to_most(norm: bool) -> None:
    """Against Jacobians by autograd and the gains as the paper has them: K_b = -rate M_b g_u^b g_z^b."""
    words = ["model.width=2", f"model.batch_norm={str(norm).lower()}", "train.dtype=float64", "train.threads=1"]
    built = parts.build(load_config("digits", [*words, "optimizer.name=sgd", "optimizer.gauss_newton_weight=null"]))
    images, labels = built.data.batch(torch.arange(6), 0, 0)
    images = images.double()
    weights = nn.utils.parameters_to_vector(built.model.parameters()).detach()
    image = fig8.leading_image(built.model, images, labels)
    assert torch.equal(weights, nn.utils.parameters_to_vector(built.model.parameters()))

    model = built.model.train()
    model.requires_grad_(True)

    def state(x: torch.Tensor) -> torch.Tensor:
        return model.stem_activation(model.stem(x)).flatten(1)  # type: ignore[operator]

    opt = GTDDP.paper(copy.deepcopy(model), curvature.SGD(lr=BASES["sgd"]), inspect=True, rollout="linear")
    F.cross_entropy(opt._model(images), labels).backward()
    opt.step()
    K = opt.policy(1).feedback_gain
    J = torch.autograd.functional.jacobian(state, images)  # (B, n, B, C, H, W)
    response = torch.einsum("ubn,bncxyz->uxyz", K, J).flatten(1)
    largest = float(torch.linalg.matrix_norm(response, 2))
    assert image.shape == images.shape[1:]
    assert float(image.norm()) == pytest.approx(1.0)
    assert float((response @ image.flatten()).norm()) == pytest.approx(largest, rel=1e-9)
    assert largest > 0


def test_ranks_of_pairs() -> None:
    means = torch.eye(4).view(4, 1, 2, 2)
    assert fig8.rank_of_pair(means[1] - means[2], means, 1, 2) == 1
    assert fig8.rank_of_pair(means[1] - means[2], means, 0, 3) == 6
    assert fig8.likeness(-2 * means[1], means[1]) == pytest.approx(1.0)


def test_fig8() -> None:
    _, tables = checked_page("fig8", QUICK)
    assert len(tables[""]) == 3 * len(fig8.KINDS)
    assert all(0 <= cast(float, row["|cosine|"]) <= 1 for row in tables[""])
    assert {row["image"] for row in tables["images"]} >= {"difference", "trained"}


@pytest.mark.parametrize("data", DATA_SETS)
def test_units_of_every_data_set_are_configurations(data: str) -> None:
    plan = Plan(data, seeds=1, quick=True, words=() if data == "digits" else ("data.dir=nowhere",))
    for name in ("fig4", "fig8", "control", "vanishing"):
        assert experiment(name).units(plan, Results())
        for unit in experiment(name).units(plan, Results()):
            settings = json.loads(unit.arguments)
            assert config_of(settings.get("settings", settings)).data.name == data

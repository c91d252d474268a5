"""`gtddp bench`: what it writes is complete, and says what happened."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_dist import curvature
from gtddp_dist.bench.gram import gram_ways
from gtddp_dist.bench.memory import step_cost
from gtddp_dist.bench.scaling import grids
from gtddp_dist.bench.scaling_report import Row, read_grids, scaled
from gtddp_dist.bench.single import Contender, batch
from gtddp_dist.bench.stages import run_stages
from gtddp_dist.bench.subject import described, new_model
from gtddp_dist.cli import main
from gtddp_dist.config import load_config
from gtddp_dist.errors import BAD_INPUT, OK, UserError
from gtddp_dist.optimizer import GTDDP
from gtddp_dist.pipeline.costs import Counting, StageCosts, count_stages, read_costs
from gtddp_dist.pipeline.grid import Shape
from gtddp_dist.pipeline.measured import Protocol, measure_stages
from gtddp_dist.pipeline.plan import run_plan
from gtddp_dist.players import is_affine, is_supported
from gtddp_dist.trajectory import from_stages

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("model.name=small-resnet", "bench.image=[1,8,8]", "bench.steps=2", "bench.warmup=1", "train.device=cpu")


def gtddp(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own; it has to succeed."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gtddp_dist", *words],
        env=environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == OK, done.stderr
    return done


# ----------------------------------------------------------------------------------------------------------
# pipeline


def test_pipeline_times_all_contenders_from_the_same_weights(tmp_path: Path) -> None:
    """First losses are equal; what was measured is kept with what it was measured on."""
    done = gtddp("bench", "pipeline", *SMALL, "--json", "--out", str(tmp_path))
    rows = {row["optimizer"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == ["deepspeed sgd", "sgd", "gtddp-sgd"]
    for row in rows.values():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["time_ratio_to_deepspeed"] > 0
        assert row["first_loss"] == pytest.approx(rows["sgd"]["first_loss"], rel=1e-6)
    assert rows["deepspeed sgd"]["time_ratio_to_deepspeed"] == 1
    # The recursion's messages are a few numbers a sample.
    assert 1 < rows["gtddp-sgd"]["sent_mb"] / rows["sgd"]["sent_mb"] < 1.02
    kept = json.loads((tmp_path / "pipeline.json").read_text())
    assert kept["rows"] == list(rows.values())
    assert kept["grid"] == "pipe=2,data=1" and len(kept["cuts"]) == 1
    for name in ("sgd", "gtddp-sgd"):
        seconds = kept["seconds_by_instruction"][name]
        assert ("gram" in seconds) is (name == "gtddp-sgd")
        assert all(len(ranks) == 2 for ranks in seconds.values())
        assert all(sum(of_rank) < 1.1 * rows[name]["slowest"] for of_rank in zip(*seconds.values(), strict=True))
    assert kept["environment"]["packages"]["torch"] == torch.__version__


# ----------------------------------------------------------------------------------------------------------
# stages


class Sleep(torch.autograd.Function):
    """Takes its time in both directions."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: float, backward: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.backward_s = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        time.sleep(ctx.backward_s)
        return grad, None, None


class SleepyStage(nn.Module):
    def __init__(self, layer: nn.Module, forward: float, backward: float) -> None:
        super().__init__()
        self.layer, self.forward_s, self.backward_s = layer, forward, backward

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Sleep.apply(self.layer(x), self.forward_s, self.backward_s)
        return found


SLEEPS = ((0.0, 0.12), (0.08, 0.0), (0.0, 0.08), (0.1, 0.06))
LITTLE = 0.04
"""Seconds that all else takes less than, also where processes wait for a core."""


def measured_sleeps(protocol: Protocol) -> tuple[StageCosts, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(*(SleepyStage(nn.Linear(6, 6), *sleep) for sleep in SLEEPS))
    trajectory = from_stages(model, list(model))

    def batches(step: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        n = protocol.micro_batches
        return [torch.randn(5, 6) for _ in range(n)], [torch.randint(6, (5,)) for _ in range(n)]

    def optimizer(segment: nn.Module) -> GTDDP:
        scope = "batch" if protocol.by == "step" else "micro_batch"
        return GTDDP(segment, curvature.SGD(lr=0.01), capture="weighted", scope=scope)

    return measure_stages(model, trajectory, optimizer, Counting(), batches, F.cross_entropy, protocol, nullcontext)


@pytest.mark.parametrize("protocol", [Protocol(warmup=1, steps=3), Protocol(by="step", n_micro=3, warmup=1, steps=2)])
def test_time_goes_to_the_stage_that_takes_it(protocol: Protocol) -> None:
    for stage, (forward, backward) in zip(measured_sleeps(protocol), SLEEPS, strict=True):
        assert forward <= stage.forward < forward + LITTLE
        assert backward <= stage.backward < backward + LITTLE
        for name in ("gram", "sweep", "feedback", "weight"):
            assert 0 < getattr(stage, name) < LITTLE


def test_weight_gradients_have_to_be_apart() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(UserError, match="capture='weighted'"):
        measure_stages(
            model,
            from_stages(model, list(model)),
            lambda segment: GTDDP(segment, curvature.SGD(lr=0.01)),
            Counting(),
            lambda step: ([torch.randn(5, 6)], [torch.randint(6, (5,))]),
            F.cross_entropy,
            Protocol(),
            nullcontext,
        )


def test_measured_costs_are_taken_by_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("bench", SMALL)
    assert run_stages(config, as_json=False, out=tmp_path) == OK
    assert "by measured work: parallel.cuts=[" in capsys.readouterr().out
    file = read_costs(tmp_path / "costs.json")
    assert file.unit == "seconds" and len(file.stages) == 5
    assert file.stages[0].samples == 8 and file.stages[1].live_bytes == 4 * 8 * 16 * 64  # bytes, samples, channels
    assert all(0 < stage.work < 1 for stage in file.stages)
    kept = json.loads((tmp_path / "stages.json").read_text())
    assert kept["micro_batch"] == 8 and kept["torch_threads"] == torch.get_num_threads()
    planned = load_config("bench", [*SMALL, f"plan.costs={tmp_path / 'costs.json'}"])
    assert run_plan(planned, "bench", tmp_path / "plan.png") == OK
    assert f"work: measured, {tmp_path / 'costs.json'}" in capsys.readouterr().out


def test_processes_that_measure_at_once(tmp_path: Path) -> None:
    done = gtddp("bench", "stages", *SMALL, "--ranks", "2", "--json", "--out", str(tmp_path))
    told = json.loads(done.stdout)  # of the first one alone
    assert tuple(StageCosts(**stage) for stage in told["stages"]) == read_costs(tmp_path / "costs.json").stages
    assert json.loads((tmp_path / "stages.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("optimizer.name=sgd", "optimizer.scope=null", "optimizer.capture=null"), ("gram", "sweep", "feedback")),
        (("optimizer.capture=gradient", "optimizer.scope=batch"), ()),
        (("optimizer.name=gtddp-adam", "optimizer.metric=previous"), ()),
        (("optimizer.name=gtddp-ekfac", "optimizer.scope=4"), ()),
    ],
)
def test_every_kind_of_optimizer_can_be_measured(
    words: Sequence[str], without: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("bench", [*SMALL, *words])
    assert run_stages(config, as_json=True, out=None) == OK
    absent = {*without} if "ekfac" in words[0] else {*without, "statistics"}
    for stage in json.loads(capsys.readouterr().out)["stages"]:
        for name in ("forward", "backward", "gram", "sweep", "feedback", "weight", "statistics"):
            assert stage[name] == 0 if name in absent else stage[name] > 0, name


# ----------------------------------------------------------------------------------------------------------
# scaling


def row(pipe: int, data: int, seconds: float, mode: str = "strong", batch_size: int = 32) -> Row:
    return Row(
        pipe=pipe,
        data=data,
        mode="weak" if mode == "weak" else "strong",
        batch_size=batch_size,
        seconds=seconds,
        fastest=seconds,
        slowest=seconds,
        sent_mb=0.0,
        busy=1.0,
        least_busy=1.0,
    )


def test_grids_of_powers_of_two_within_ranks_and_stages() -> None:
    assert list(map(str, grids(5, 2))) == [
        "pipe=1,data=1",
        "pipe=1,data=2",
        "pipe=2,data=1",
        "pipe=1,data=4",
        "pipe=2,data=2",
    ]
    assert grids(1, 9) == [Shape(1, 1)]


def test_efficiency_by_hand() -> None:
    """Strong: 32 samples in 2 s on one rank; on two in 1.25 s. Weak: twice the samples in 2.5 s."""
    rows = [row(2, 1, 1.25), row(1, 1, 2.0), row(1, 1, 2.0, "weak"), row(1, 2, 2.5, "weak", 64)]
    found = [(s.row.mode, s.row.ranks, s.efficiency) for s in scaled(rows)]
    assert found == [("strong", 1, 1.0), ("strong", 2, 0.8), ("weak", 1, 1.0), ("weak", 2, 0.8)]


def test_scaling_measures_every_grid_of_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "figures"
    done = gtddp("bench", "scaling", *SMALL, "--ranks", "2", "--json", "--out", str(out))
    rows = json.loads(done.stdout)["rows"]
    assert [(r["mode"], r["pipe"], r["data"], r["batch_size"]) for r in rows] == [
        ("strong", 1, 1, 32),
        ("strong", 1, 2, 32),
        ("strong", 2, 1, 32),
        ("weak", 1, 1, 32),
        ("weak", 1, 2, 64),
        ("weak", 2, 1, 32),
    ]
    alone, replicas, segments, _, weak, again = rows
    for r in rows:
        assert 0 < r["fastest"] <= r["seconds"] <= r["slowest"]
        assert 0 < r["least_busy"] <= r["busy"] <= 1
        assert r["samples_per_second"] == pytest.approx(r["batch_size"] / r["seconds"])
        assert r["efficiency"] == pytest.approx(alone["seconds"] * r["batch_size"] / 32 / r["seconds"] / r["ranks"])
    parameters_mb = sum(stage.parameter_bytes for stage in stages_of_small()) / 1e6
    assert alone["sent_mb"] == 0
    # Replicas sum the gradient once a step, whatever their batch; segments send activations or their gradients.
    assert replicas["sent_mb"] == weak["sent_mb"] == pytest.approx(parameters_mb, rel=0.02)
    assert segments["sent_mb"] == again["sent_mb"] > 0
    with open(out / "scaling.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["seconds"]) for line in lines] == [r["seconds"] for r in rows]
    assert (out / "scaling.md").read_text().count("\n| ") == 7
    assert (out / "scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # The same folder is not written to twice; figures of another configuration do not go together with these.
    assert main(["bench", "scaling", *SMALL, "--ranks", "2", "--out", str(out)]) == BAD_INPUT
    other = json.loads((out / "grid-pipe-2-data-1.json").read_text())
    (out / "grid-pipe-2-data-1.json").write_text(json.dumps({**other, "configuration": "another"}))
    with pytest.raises(UserError, match=r"grid-pipe-2-data-1\.json: configuration is 'another'.*different config"):
        read_grids(out)


def stages_of_small() -> tuple[StageCosts, ...]:
    subject = described(load_config("bench", SMALL))
    return count_stages(subject.trajectory, torch.zeros(8, 1, 8, 8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scaling", "--grid", "2x4", "--out", "here"), "--grid='2x4': expected a grid such as pipe=2,data=4"),
        (("scaling", "--grid", "pipe=2,data=1"), "say where its figures go with --out DIR"),
        (("scaling", "--ranks", "0"), "--ranks=0: expected a number of ranks >= 1"),
        (("scaling", "parallel.cuts=[3]"), "parallel.cuts: every grid has cuts of its own"),
        (("scaling", "--join", "nowhere"), "nowhere: no figures of a grid there"),
        (("pipeline", "--join", "nowhere"), "--join joins the figures of bench scaling, and takes no config"),
        (("pipeline", "parallel.pipe=1", "train.dtype=bfloat16"), "compare with train.dtype=float32"),
        (("pipeline", "--ranks", "2"), "--ranks: bench pipeline has parallel.pipe times parallel.data ranks"),
        (("pipeline", "--list"), "--list: only bench scaling takes it"),
        (("stages", "parallel.pipe=99", "parallel.cuts=null"), "parallel.pipe=99: more ranks than stages"),
        (("stages", "train.replica_groups=2"), "take parallel.data=2"),
    ],
)
def test_bad_requests_are_refused(words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    what, *rest = words
    assert main(["bench", what, *(rest if "--join" in rest else [*SMALL, *rest])]) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_figures_that_are_damaged_are_named(tmp_path: Path) -> None:
    file = tmp_path / "grid-pipe-1-data-1.json"
    good = {
        "format": "gtddp-scaling",
        "version": 1,
        "configuration": "a",
        "model": "m",
        "optimizer": "o",
        "batch_size": 32,
        "micro_batches": 4,
        "rows": [dataclasses.asdict(row(1, 1, 2.0))],
    }
    file.write_text(json.dumps(good))
    heading, rows = read_grids(tmp_path)
    assert rows == [row(1, 1, 2.0)] and heading.startswith("o on m")
    for broken, message in (
        ({**good, "version": 2}, "no figures of bench scaling of version 1"),
        ({**good, "rows": []}, "missing rows"),
        ({**good, "rows": [{**dataclasses.asdict(row(1, 1, 2.0)), "seconds": -1.0}]}, "seconds is -1.0"),
        ({**good, "rows": [{"pipe": 1}]}, "expected objects with the keys pipe, data"),
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message) as caught:
            read_grids(tmp_path)
        assert str(file) in str(caught.value)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_grids(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# slurm/scaling.sbatch, with stand-ins for srun and gtddp


def sbatch(tmp_path: Path, words: Sequence[str], **variables: str) -> tuple[int, list[str], str]:
    """Runs the job script: its exit code, what was called, and its error output."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.write_text("")
    lists = 'case "$*" in *--list*) printf "pipe=1,data=1\\npipe=2,data=4\\n" ;; *pipe=2*) exit ${FAIL:-0} ;; esac'
    for name, body in (("gtddp", lists), ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')):
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{body}\n')
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GPUS"))}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "scaling.sbatch"), *words],
        env={**kept, "PATH": f"{programs}:{os.environ['PATH']}", "VIRTUAL_ENV": "set", **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines(), done.stderr


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3"}


def test_the_job_script_measures_every_grid_and_joins(tmp_path: Path) -> None:
    code, calls, _ = sbatch(tmp_path, ["train.micro_batches=8"], **JOB)
    words, out = "bench scaling bench train.micro_batches=8 train.device=cpu", "benchmarks/scaling-7"
    common = "--cpus-per-task=3 --kill-on-bad-exit=1 gtddp"
    assert code == 0
    assert calls == [
        f"gtddp {words} --ranks 8 --list",
        f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 {common} {words} --grid pipe=1,data=1 --out {out}",
        f"gtddp {words} --grid pipe=1,data=1 --out {out}",
        f"srun --nodes=2 --ntasks=8 --ntasks-per-node=4 {common} {words} --grid pipe=2,data=4 --out {out}",
        f"gtddp {words} --grid pipe=2,data=4 --out {out}",
        f"gtddp bench scaling --join {out}",
    ]
    assert (tmp_path / out).is_dir()


def test_the_job_script_on_gpus_and_with_a_grid_that_fails(tmp_path: Path) -> None:
    code, calls, errors = sbatch(tmp_path, ["my.yaml", "train.steps=9"], **JOB, GPUS="4", FAIL="3")
    assert code == 3 and "grid pipe=2,data=4 ended with exit code 3" in errors
    assert all("--gpus-per-node=4" in call for call in calls if call.startswith("srun"))
    assert calls[0] == "gtddp bench scaling my.yaml train.steps=9 train.device=cuda --ranks 8 --list"
    assert calls[-1] == "gtddp bench scaling --join benchmarks/scaling-7"


def test_the_job_script_needs_slurm(tmp_path: Path) -> None:
    code, calls, errors = sbatch(tmp_path, [])
    assert code == 2 and not calls and "start it with sbatch" in errors


# ----------------------------------------------------------------------------------------------------------
# step, gram, memory


@pytest.mark.parametrize("name", ["sgd", "gtddp-sgd", "gtddp-adam", "gtddp-ekfac"])
def test_contenders_run_under_autocast(name: str) -> None:
    """With train.dtype=bfloat16 convolutions run in it, weights stay in float32, and the step is nearly the same."""
    moves = []
    for dtype in ("float32", "bfloat16"):
        words = (*SMALL, "train.batch_size=8", "optimizer.scope=4", "optimizer.lr=0.1", f"train.dtype={dtype}")
        contender = Contender(load_config("bench-step", words), name)
        before = nn.utils.parameters_to_vector(contender.model.parameters()).detach().clone()
        outputs: set[torch.dtype] = set()
        for module in contender.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, args, output, to=outputs: to.add(output.dtype))
        contender.step(*batch(contender.config, contender.device, seed=0))
        assert outputs == {getattr(torch, dtype)}
        moves.append(nn.utils.parameters_to_vector(contender.model.parameters()).detach() - before)
    assert all(move.dtype == torch.float32 for move in moves)
    assert 0 < float((moves[0] - moves[1]).norm() / moves[0].norm()) < 0.2


ALONE = (*SMALL, "train.batch_size=8", "optimizer.scope=4", "bench.optimizers=[gtddp-sgd,gtddp-ekfac]")
ONE_SIZE = ("bench.batch_sizes=[8]", "bench.depths=[1]", "bench.widths=[16]")


def test_all_contenders_beside_sgd(tmp_path: Path) -> None:
    done = gtddp("bench", "all", *ALONE, *ONE_SIZE, "--json", "--out", str(tmp_path))
    told = json.loads(done.stdout)
    rows = {row["optimizer"]: row for row in told["rows"]}
    assert list(rows) == ["sgd", "gtddp-sgd", "gtddp-ekfac"]
    assert rows["sgd"]["time_ratio_to_sgd"] == rows["sgd"]["memory_ratio_to_sgd"] == 1
    assert rows["sgd"]["flops_over_limit"] == 1 < rows["gtddp-sgd"]["flops_over_limit"]
    assert rows["sgd"]["flops_ratio_to_sgd"] == 1 < rows["gtddp-sgd"]["flops_ratio_to_sgd"]
    for row in rows.values():
        assert 0 < row["fastest_ratio"] <= row["time_ratio_to_sgd"] <= row["slowest_ratio"]
        assert row["tensor_bytes"] > 0 and row["peak_bytes"] > 0
    # Steps with new factors and bases count as often as they come.
    by_kind = rows["gtddp-ekfac"]["seconds_by_kind"]
    amortised = 0.9 * by_kind["plain"] + 0.09 * by_kind["factors"] + 0.01 * by_kind["bases"]
    assert rows["gtddp-ekfac"]["seconds"] == pytest.approx(amortised)
    # Every counted operation belongs to a phase.
    for name, row in rows.items():
        assert sum(p["flops"] for p in told["profile"] if p["optimizer"] == name) == pytest.approx(row["flops"])
    of = {(p["optimizer"], p["phase"]) for p in told["profile"] if p["seconds"] > 0}
    common = {"forward", "input-gradient", "gram", "sweep", "weight-gradient", "update"}
    assert {phase for name, phase in of if name == "gtddp-sgd"} >= common
    assert {phase for name, phase in of if name == "gtddp-ekfac"} >= common | {"curvature"}
    assert {phase for name, phase in of if name == "sgd"} == {"forward", "backward", "update"}
    for layer in {way["layer"] for way in told["gram"]}:
        ways = [way for way in told["gram"] if way["layer"] == layer]
        assert [way["cost"] for way in ways if way["chosen"]] and sum(way["chosen"] for way in ways) == 1
        assert all(way["seconds"] > 0 and way["flops"] > 0 for way in ways if way["chosen"])
    assert [(m["optimizer"], m["batch_size"]) for m in told["memory"]] == [(name, 8) for name in rows]
    assert [(p["axis"], p["optimizer"]) for p in told["growth"]] == [
        (axis, name) for axis in ("batch", "depth", "width") for name in rows
    ]
    assert {path.name for path in tmp_path.iterdir()} >= {"growth.md", "growth.png", "growth.csv"}
    kept = json.loads((tmp_path / "all.json").read_text())
    assert kept["rows"] == told["rows"] and len(kept["load_before"]) == 3


def test_gram_goes_through_every_layer() -> None:
    """Those whose per-sample gradients a step would form in its backward pass, too."""
    config = load_config("bench-step", (*ALONE, "bench.steps=1"))
    layers = {name for name, module in new_model(config).named_modules() if is_supported(module) and is_affine(module)}
    assert {way.layer for way in gram_ways(config)} == layers


def test_cost_of_one_optimizer_grows_with_the_batch() -> None:
    config = load_config("bench-step", ALONE)
    small, large = (step_cost(config, "gtddp-sgd", size) for size in (4, 16))
    assert (small.batch_size, large.batch_size) == (4, 16)
    assert 0 < small.fastest <= small.seconds <= small.slowest
    # Activations and what is made of them, over parameters that both have; 4 times as many samples.
    assert 1.5 * small.tensor_bytes < large.tensor_bytes < 4.5 * small.tensor_bytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("step", "parallel.pipe=2"), "parallel.pipe=2: bench step measures one process"),
        (("step", "train.dtype=float16", "optimizer.capture=gradient"), "take float32 or bfloat16"),
        (("step", "optimizer.name=gtddp-ekfac", "optimizer.basis_lag=2"), "optimizer.basis_lag=2: bench step times"),
        (("memory", "bench.optimizers=[sdg]"), "one of the contenders (nearest first): sgd"),
        (("gram", "--ranks", "2"), "--ranks: bench gram measures one process"),
    ],
)
def test_bad_requests_in_one_process(words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    what, *rest = words
    assert main(["bench", what, *ALONE, *rest]) == BAD_INPUT
    assert message in capsys.readouterr().err

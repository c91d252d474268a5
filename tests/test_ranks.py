"""Training on a grid of ranks gives what one process gives, however the ranks were started and whatever they send."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
import torch
from ranks.server import Ended, Job, Server, environment, shared, told
from ranks.settings import (
    CUTS,
    GRIDS,
    LEVELS,
    RESNET_CUT,
    RESNET_SAMPLES,
    Finding,
    Net,
    Reference,
    Setting,
    all_pairs,
    full_product,
    run_reference,
    singled_out,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from gtddp_dist.config import ModelConfig
from gtddp_dist.models import resnet
from gtddp_dist.tracing import trace
from gtddp_dist.trajectory import LiveValue

BIN = Path(sys.executable).parent
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SETTINGS = list(dict.fromkeys([*all_pairs(LEVELS), *singled_out()]))


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Server:
    return shared(request.config)


# ----------------------------------------------------------------------------------------------------------
# Ranks take the steps of one process


class Comparison:
    """References and findings, each made once."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._references: dict[Setting, Reference] = {}
        self._grids = itertools.count()

    def reference(self, setting: Setting) -> Reference:
        wanted = setting.reference
        if wanted not in self._references:
            self._references[wanted] = run_reference(wanted, self._folder)
        return self._references[wanted]

    def run(self, grid: tuple[int, int], settings: Sequence[Setting]) -> list[dict[str, Finding]]:
        """What every rank of a grid found, by the settings' names; one launch for all of them."""
        folder = self._folder / f"grid-{next(self._grids)}"
        arguments = {
            "grid": grid,
            "settings": [{"setting": asdict(s), "reference": str(self.reference(s).file)} for s in settings],
        }
        world = grid[0] * grid[1]
        (ended,) = self._server.run(Job("ranks.parity:work", world, folder, arguments, within_s=60 + 6 * len(settings)))
        assert [rank.code for rank in ended] == [0] * world, told(ended)
        return [json.loads((folder / f"findings-{rank}.json").read_text()) for rank in range(world)]

    def check(self, setting: Setting, ranks: Sequence[Finding]) -> None:
        """Assert that all ranks came to the reference, and that there was something to come to."""
        reference, tolerance = self.reference(setting), TOLERANCE[setting.dtype]
        assert reference.moved > 1e-3  # of every parameter
        whole = load_file(reference.file)
        for replica in range(setting.data):
            own = [name for segment in range(setting.pipe) for name in ranks[segment * setting.data + replica]["names"]]
            assert sorted(own) == sorted(whole)  # each in one segment
        for rank in ranks:
            assert rank["parameters"] <= tolerance
            assert rank["buffers"] <= tolerance
            assert rank["losses"] == pytest.approx(reference.losses, rel=tolerance)
            assert rank["losses"] == ranks[0]["losses"]


@pytest.fixture(scope="module")
def comparison(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    torch.set_num_threads(1)
    return Comparison(server, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def findings(comparison: Comparison, request: pytest.FixtureRequest) -> dict[Setting, list[Finding]]:
    """Of all settings whose tests run in this session: one launch for each grid."""
    found: dict[Setting, list[Finding]] = {}
    chosen = [
        cast(Setting, item.callspec.params["setting"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_ranks_equal_one_process.__name__
    ]
    for grid in GRIDS:
        own = [setting for setting in chosen if (setting.pipe, setting.data) == grid]
        if own:
            ranks = comparison.run(grid, own)
            found |= {setting: [rank[setting.name] for rank in ranks] for setting in own}
    return found


@pytest.mark.timeout(600)  # the first of them launches for all
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_ranks_equal_one_process(
    setting: Setting, findings: dict[Setting, list[Finding]], comparison: Comparison
) -> None:
    comparison.check(setting, findings[setting])


PRODUCT = full_product()


@pytest.mark.full_product
@pytest.mark.skipif(
    "GTDDP_TEST_ALL" not in os.environ, reason="every combination of options takes hours: make test-all"
)
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("base", LEVELS["base"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_ranks_equal_one_process_in_every_combination(grid: tuple[int, int], base: str, comparison: Comparison) -> None:
    own = [setting for setting in PRODUCT if (setting.pipe, setting.data) == grid and setting.base == base]
    different = []
    for start in range(0, len(own), 40):
        some = own[start : start + 40]
        ranks = comparison.run(grid, some)
        for setting in some:
            try:
                comparison.check(setting, [rank[setting.name] for rank in ranks])
            except AssertionError as error:
                different.append(f"{setting.name}: {error}")
    assert different == []


def test_the_chosen_settings_have_every_two_values_together() -> None:
    """But those that the optimizer does not take."""
    pairs = [((a, x), (b, y)) for a, b in itertools.combinations(LEVELS, 2) for x in LEVELS[a] for y in LEVELS[b]]
    chosen = [{"grid": (s.pipe, s.data), **asdict(s)} for s in all_pairs(LEVELS)]
    missing = [(one, two) for one, two in pairs if not any(s[one[0]] == one[1] and s[two[0]] == two[1] for s in chosen)]
    assert missing == [
        (("base", "kfac-sampled"), ("metric", "value")),
        (("base", "adam"), ("momentum", 0.9)),
    ]


def live_at(model: nn.Module, cut: int, images: Tensor) -> list[Tensor]:
    """The live tensors at a cut."""
    trajectory = trace(model)
    live: tuple[LiveValue, ...] = trajectory.bind(images)
    for stage in trajectory.stages[:cut]:
        live = stage.run(live)
    return [value for value in live if isinstance(value, Tensor)]


@pytest.mark.parametrize(("net", "cut"), [("digits", 2), ("blocks", 2), ("blocks", 4)])
def test_nets_are_cut_inside_residual_blocks(net: Net, cut: int) -> None:
    """Both the main path and the shortcut's input cross, or the settings above would test less than they say."""
    assert any(cut in cuts for cuts in CUTS[net].values())
    model, _ = Setting(net=net).new_model()
    main, shortcut = live_at(model, cut, torch.zeros(2, 1, 8, 8, dtype=torch.float64))
    assert main is not shortcut and main.shape == shortcut.shape


# ----------------------------------------------------------------------------------------------------------
# What goes over a boundary, and who takes part in a sum


def found_by(ended: list[Ended], folder: Path) -> list[dict[str, object]]:
    """What ranks of a probe have written."""
    assert [rank.code for rank in ended] == [0] * len(ended), told(ended)
    return [json.loads((folder / f"found-{rank.rank}.json").read_text()) for rank in ended]


def test_bytes_over_a_boundary(server: Server, tmp_path: Path) -> None:
    sampled = Setting(2, 1, 4, scope="micro_batch", terminal="sampled")
    batch = Setting(2, 1, 4)
    base = Setting(2, 1, 4, "digits", "torch-sgd")
    arguments = {"settings": [asdict(setting) for setting in (sampled, batch, base)]}
    (ended,) = server.run(Job("ranks.probes:traffic", 2, tmp_path, arguments, within_s=120))
    upstream, downstream = (cast(dict[str, dict[str, int]], found) for found in found_by(ended, tmp_path))

    # Linear rollout, block-diagonal M, cotangent of the loss: next to nothing besides activations and gradients.
    model = resnet.build_resnet18(ModelConfig(name="resnet18"), 3, 10, 32)
    live = live_at(model, RESNET_CUT, torch.zeros(RESNET_SAMPLES, 3, 32, 32))
    assert len(live) == 2  # inside a block
    plain = 2 * sum(tensor.nbytes for tensor in live)  # of 2 micro-batches
    for step in ("resnet18-0", "resnet18-1"):
        sent = [upstream[step], downstream[step]]
        total = sum(bytes_of for kinds in sent for bytes_of in kinds.values())
        assert 2 * plain < total <= 1.01 * 2 * plain
    numbers = 8 * 2 * RESNET_SAMPLES  # one of float64 a sample
    nothing = dict.fromkeys(upstream["resnet18-1"], 0)
    assert upstream["resnet18-1"] == {**nothing, "activation": plain, "feedback": numbers}
    assert downstream["resnet18-1"] == {**nothing, "gradient": plain, "value": 2 * numbers}

    # Another cotangent is a second stream backward; all of M is the square of the samples.
    gradient = downstream[base.name]["gradient"]
    assert {k: v for k, v in downstream[base.name].items() if v} == {"gradient": gradient}
    assert downstream[sampled.name]["cotangent"] == gradient == downstream[sampled.name]["gradient"]
    assert downstream[sampled.name]["value"] == 4 * 8 * (4 + 4**2)
    assert downstream[batch.name]["value"] == 8 * (16 + 16**2)
    assert upstream[batch.name] == {**nothing, "activation": gradient, "feedback": 8 * 16}


def test_sums_are_over_the_right_ranks(server: Server, tmp_path: Path) -> None:
    """On a 2 x 2 grid both axes have groups of two: that of the other axis would do as well, and give other sums."""
    (ended,) = server.run(Job("ranks.probes:groups", 4, tmp_path))
    for rank, found in enumerate(found_by(ended, tmp_path)):
        segment, replica = divmod(rank, 2)
        replicas = [2 * segment, 2 * segment + 1]
        assert found["place"] == [segment, replica]
        total = sum(10.0**r for r in replicas)
        assert found["replicas"] == [total, sum(replicas), total, 2 * total]
        assert found["types"] == ["torch.float64", "torch.int64", "torch.float32", "torch.float64"]
        assert found["segments"] == 10.0**replica + 10.0 ** (replica + 2)
        assert found["unchanged"] == 10.0**rank
        for source in (0, 1):
            assert found[f"from {source}"] == [10.0 ** replicas[source], replicas[source]]
        assert found["any"] == [True, False, True, True]
        assert found["gather"] == [[r, 0.1 * r] for r in range(4)]
        assert found["text"] == ["", "eins", "zwölf", "日本"]
        assert found["nothing"] == [""] * 4
        assert found["any waits"] is True


def test_weights_do_not_depend_on_the_order_to_the_bit(server: Server, tmp_path: Path) -> None:
    settings = [
        Setting(2, 1, 8, "blocks", scope="micro_batch", momentum=0.9, steps=4),
        Setting(2, 1, 8, "blocks", "ekfac", scope="micro_batch", metric="previous", capture="weighted", steps=4),
        Setting(2, 1, 8, "digits", "adam", scope="micro_batch", metric="previous", terminal="sampled", steps=4),
    ]
    arguments = {"settings": [asdict(setting) for setting in settings]}
    (ended,) = server.run(Job("ranks.probes:orders", 2, tmp_path, arguments, within_s=100))
    found = found_by(ended, tmp_path)
    for setting in settings:
        ranks = [{name: one for name, one in rank.items() if name.startswith(f"{setting.name} ")} for rank in found]
        several = [[cast(list[object], one)[0] for one in rank.values()] for rank in ranks]
        assert len(set(zip(*several, strict=True))) == 3  # on one rank or the other
        assert [cast(list[object], one)[1] for rank in ranks for one in rank.values()] == [True] * 6


def test_captured_data_are_let_go_as_soon_as_the_schedule_says(server: Server, tmp_path: Path) -> None:
    """Though autograd's graphs, unsent messages or the optimizer might hold on to them."""
    settings = [
        Setting(2, 1, 8, "blocks", scope="micro_batch"),
        Setting(2, 1, 8, "digits", "adam", scope="micro_batch", metric="previous", capture="weighted"),
        Setting(2, 1, 8, "digits", "sgd", scope="micro_batch", capture="weighted", terminal="sampled"),
        Setting(2, 1, 8, "digits", "adam", rho=0.0, capture="weighted"),
    ]
    arguments = {"settings": [asdict(setting) for setting in settings]}
    (ended,) = server.run(Job("ranks.probes:held", 2, tmp_path, arguments, within_s=60))
    for rank, found in enumerate(found_by(ended, tmp_path)):
        for setting in settings:
            most, by_order = cast(list[int], found[setting.name])
            assert most == by_order < 8, (rank, setting.name)


def test_replicas_decompose_side_by_side(server: Server, tmp_path: Path) -> None:
    """Each has its part of the layers, and none waits for another's before its own are done."""
    setting = Setting(1, 2, 2, "digits", "ekfac", scope="micro_batch", metric="previous")
    (ended,) = server.run(Job("ranks.probes:decompositions", 2, tmp_path, {"setting": asdict(setting)}))
    both = [cast(list[str], found) for found in found_by(ended, tmp_path)]
    # Five players; the one with the projection has canonical bases, which the first replica makes.
    for done in both:
        assert done == ["a"] * 4 + ["exchange"] * 5


@pytest.mark.parametrize("synchronised", [True, False])
def test_batch_norm_over_replicas(synchronised: bool, server: Server, tmp_path: Path) -> None:
    """With `sync_batch_norm` weights and running statistics are those of one process with all samples; else not."""
    (ended,) = server.run(Job("ranks.probes:batch_norm", 2, tmp_path, {"synchronised": synchronised}, within_s=120))
    for found in found_by(ended, tmp_path):
        for name in ("sgd", "adam", "ekfac"):
            assert cast(float, found[f"{name} moved"]) > 1e-3
            assert (cast(float, found[name]) < 1e-10) is synchronised, (name, found)


# ----------------------------------------------------------------------------------------------------------
# Ways of starting ranks

RUN = [
    "train",
    "digits",
    "model.width=4",
    "model.batch_norm=true",
    "optimizer.name=gtddp-adam",
    "optimizer.scope=micro_batch",
    "train.steps=4",
    "train.micro_batches=2",
    "schedule.name=constant",
    "log.tensorboard=false",
    "log.progress=false",
    "parallel.pipe=2",
    "parallel.data=2",
    "parallel.cuts=[2]",
]


@contextlib.contextmanager
def started(*commands: Sequence[str], cwd: Path, env: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes, which are ended with what they have started in their session."""
    processes = [
        subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def test_every_way_of_starting_gives_the_same_weights(tmp_path: Path) -> None:
    """To the bit, from the command line."""
    gtddp = [sys.executable, "-m", "gtddp_dist"]
    ways = {
        "gtddp": gtddp,
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=4", "-m", "gtddp_dist"],
        "mpirun": [str(BIN / "mpirun"), "-n", "4", *gtddp],
    }
    missing = [name for name, command in ways.items() if not Path(command[0]).exists()]
    weights, logged = {}, {}
    for name in ways.keys() - set(missing):
        with started([*ways[name], *RUN, f"run.dir={name}"], cwd=tmp_path, env=environment()) as (process,):
            said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        logged[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert json.loads((tmp_path / name / "layout.json").read_text()) == {"pipe=2,data=2": [2]}
    first = weights.pop("gtddp")
    assert len(first) > 10
    for lines in logged.values():  # gathered from all ranks: by MPI under mpirun
        assert lines[-1]["train/loss"] == logged["gtddp"][-1]["train/loss"]
        assert all(lines[-1][f"rank-{rank}/sent_mb"] > 0 for rank in range(4))
    for name, found in weights.items():
        assert found.keys() == first.keys()
        assert [key for key in first if not torch.equal(first[key], found[key])] == [], name
    if missing:
        pytest.skip(f"not tried: {', '.join(missing)} not installed beside this Python; the others agree")


def test_what_ranks_log(server: Server, tmp_path: Path) -> None:
    """By one of them: the loss of the last segment, what each rank did, ages of factors; in both logs."""
    words = ["optimizer.name=gtddp-ekfac", "optimizer.metric=previous", "log.every=2", "log.tensorboard=true"]
    job = Job("ranks.command:work", 4, tmp_path, {"argv": [*RUN, *words, "run.dir=run"]}, within_s=100)
    (ended,) = server.run(job)
    assert [rank.code for rank in ended] == [0] * 4, told(ended)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    by_rank = [f"rank-{rank}/{name}" for rank in range(4) for name in ("busy_s", "idle_s", "sent_mb", "memory_mb")]
    for line in lines:
        assert {"train/loss", "throughput", "lr", *by_rank} <= line.keys()
        assert {"gtddp/factor_age", "gtddp/basis_age", "gtddp/actual_decrease"} <= line.keys()
        positive = [f"rank-{rank}/{name}" for rank in range(4) for name in ("busy_s", "sent_mb", "memory_mb")]
        assert [(name, line[name]) for name in positive if not line[name] > 0] == []
        assert 1.5 < line["train/loss"] < 4
    assert lines[-1]["gtddp/basis_age"] == 3  # made in the first of four steps
    (events,) = (tmp_path / "run" / "tb").iterdir()
    found = EventAccumulator(str(events)).Reload()
    for name in ("train/loss", *by_rank, "gtddp/factor_age", "val/loss"):
        assert [point.step for point in found.Scalars(name)] == ([4] if name == "val/loss" else [2, 4])


def make_namespaces(names: Sequence[str]) -> str:
    """Two network namespaces joined by a cable, 10.213.7.1 and .2; why they cannot be made, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "network namespaces need iproute2 (ip) and unshare"
    ends = [f"{name}-veth" for name in names]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {ends[0]} type veth peer name {ends[1]}"]
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        commands += [
            f"ip link set {end} netns {name}",
            f"ip -n {name} address add 10.213.7.{number}/24 dev {end}",
            f"ip -n {name} link set {end} up",
            f"ip -n {name} link set lo up",
        ]
    commands += ["unshare --uts true"]
    for command in commands:
        made = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
        if made.returncode:
            return f"this machine allows no network namespaces: {command}: {made.stderr.strip()}"
    return ""


def test_two_hosts(server: Server, tmp_path: Path) -> None:
    """Two network namespaces stand for hosts: each has its own address, its own loopback, and its own name."""
    names = [f"gtddp{os.getpid() % 10000}{letter}" for letter in "ab"]
    run = [word for word in RUN if not word.startswith("parallel.data")]
    problem = make_namespaces(names)
    try:
        if problem:
            pytest.skip(problem)
        port = free_port()
        commands = []
        for rank, name in enumerate(names):
            variables = f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=10.213.7.1 MASTER_PORT={port}"
            variables += f" GLOO_SOCKET_IFNAME={name}-veth"  # else by the host's name, which nobody knows here
            inner = f"hostname {name}; exec env {variables} {sys.executable} -m gtddp_dist {' '.join(run)} run.dir=two"
            commands.append(["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inner])
        with started(*commands, cwd=tmp_path, env=environment()) as processes:
            said = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)
    one = Job("ranks.command:work", 2, tmp_path, {"argv": [*run, "run.dir=one"]})
    (ended,) = server.run(one)
    assert [rank.code for rank in ended] == [0, 0], told(ended)
    on_two, on_one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert on_two.keys() == on_one.keys() and all(torch.equal(on_two[key], on_one[key]) for key in on_one)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])

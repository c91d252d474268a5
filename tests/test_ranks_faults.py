"""What becomes of a run on several ranks when a rank is lost, told to stop, or meets what it cannot work with."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from ranks.command import STRUCK
from ranks.server import Ended, Job, Server, environment, shared, told
from ranks.settings import BAD_STEP, Setting
from safetensors.torch import load_file
from torch import Tensor

from gtddp_dist import checkpoint
from gtddp_dist.errors import BAD_INPUT, FAILED, OK, REQUEUE
from gtddp_dist.jobs import history

STEPS = 12
LOST_WITHIN_S = 60.0

COMMON = [
    "train",
    "digits",
    "run.dir=run",
    "model.width=4",
    f"train.steps={STEPS}",
    "train.micro_batches=2",
    "schedule.name=constant",
    "checkpoint.every=4",
    "checkpoint.keep=3",
    "log.every=1",
    "log.progress=false",
    "log.tensorboard=false",
    "parallel.lost_after_s=5",
]
GRIDS = {
    "2x2": [*COMMON, "model.batch_norm=true", "optimizer.scope=micro_batch", "parallel.pipe=2", "parallel.data=2"],
    "4x1": [*COMMON, "optimizer.metric=previous", "parallel.pipe=4", "parallel.cuts=[1,2,3]"],
}
"""A run by micro-batch, and one by step."""
PIPE = {"2x2": 2, "4x1": 4}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Server:
    return shared(request.config)


def command(folder: Path, world: int, argv: Sequence[str], **arguments: object) -> Job:
    return Job("ranks.command:work", world, folder, {"argv": list(argv), **arguments}, within_s=100)


def codes(ranks: Sequence[Ended]) -> list[int]:
    return [rank.code for rank in ranks]


def assert_ended(ranks: Sequence[Ended], code: int = OK) -> None:
    """All ended so, by themselves."""
    assert codes(ranks) == [code] * len(ranks), told(list(ranks))


def errors_in(ranks: Sequence[Ended]) -> list[str]:
    """The lines on stderr, of all ranks."""
    return [line for rank in ranks for line in rank.err.splitlines() if line.startswith("gtddp: error")]


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "throughput" and not k.startswith("rank-")} for line in lines]


def assert_equal_runs(got: Path, expected: Path) -> None:
    """Weights, everything in the last checkpoint, and the log, to the bit."""
    weights = [load_file(run / "model.safetensors") for run in (got, expected)]
    assert_same(weights[0], weights[1])
    last = [checkpoint.newest_valid(run / "checkpoints")[0] for run in (got, expected)]
    assert [found.step if found else None for found in last] == [STEPS, STEPS]
    assert_same(*(state_of(found) for found in last))
    assert metrics(got) == metrics(expected)
    assert [line["step"] for line in metrics(got)] == list(range(1, STEPS + 1))


def state_of(found: checkpoint.Checkpoint | None) -> dict[str, Tensor]:
    """All tensors but those of Python's and NumPy's generators, which a run does not seed."""
    assert found is not None
    return {name: tensor for name, tensor in found.tensors.items() if not name.endswith(("/python", "/numpy"))}


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.fixture(scope="module")
def unbroken(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on each grid that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    for ranks in server.run(*(command(folder / grid, 4, GRIDS[grid]) for grid in GRIDS)):
        assert_ended(ranks)
    return {grid: folder / grid / "run" for grid in GRIDS}


# ----------------------------------------------------------------------------------------------------------
# Lost ranks

ACCIDENTS = [
    ("2x2", 0, "REDUCE"),
    ("2x2", 1, "FORWARD"),
    ("2x2", 2, "SWEEP"),
    ("2x2", 3, "UPDATE"),
    ("4x1", 0, "AGREE"),
    ("4x1", 2, "BACKWARD"),
]
"""Grid, rank, and the instruction that the rank is killed at, in step 7."""


@dataclass(frozen=True)
class Lost:
    """A run that lost a rank: where it ran, and how its ranks ended."""

    folder: Path
    ended: list[Ended]


@pytest.fixture(scope="module")
def accidents(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Lost]:
    """All of them, three at a time: what takes long is waiting for signs of life."""
    folder = tmp_path_factory.mktemp("lost")
    found: dict[tuple[str, int], Lost] = {}
    for start in range(0, len(ACCIDENTS), 3):
        jobs = {
            (grid, rank): command(
                folder / f"{grid}-{rank}",
                4,
                GRIDS[grid],
                accident={"rank": rank, "step": 7, "op": op, "what": "SIGKILL"},
            )
            for grid, rank, op in ACCIDENTS[start : start + 3]
        }
        ended = server.run(*jobs.values())
        found |= {key: Lost(job.folder, ranks) for (key, job), ranks in zip(jobs.items(), ended, strict=True)}
    return found


@pytest.mark.parametrize(("grid", "rank"), [(grid, rank) for grid, rank, _ in ACCIDENTS])
def test_a_killed_rank_is_named_by_all_others_and_they_end(
    grid: str, rank: int, accidents: dict[tuple[str, int], Lost]
) -> None:
    lost = accidents[grid, rank]
    struck = float((lost.folder / STRUCK).read_text())
    said = told(lost.ended)
    assert codes(lost.ended) == [-signal.SIGKILL if r.rank == rank else FAILED for r in lost.ended], said
    segment = rank // (4 // PIPE[grid])
    for other in lost.ended:
        assert 0 <= other.at - struck < LOST_WITHIN_S
        assert not other.killed_here
        assert not is_running(other.process)
        if other.rank == rank:
            continue
        lines = [line for line in other.err.splitlines() if line.startswith("gtddp: lost")]
        assert len(lines) == 1, said
        assert lines[0].startswith(f"gtddp: lost rank {rank} (segment {segment + 1} of {PIPE[grid]}: stage"), said
        assert lines[0].count("rank ") == 1, said
        where = "run" if other.rank == 0 else lost.folder / "run"
        assert lines[0].endswith(f". continue it with: gtddp train --resume {where}"), said
    ends = [
        event
        for event in history.read(lost.folder / "run")
        if isinstance(event, history.Ended) and event.code == FAILED
    ]
    assert ends[-1].reason.startswith(f"lost rank {rank} (segment {segment + 1} of {PIPE[grid]}: stage")


def test_runs_with_a_killed_rank_go_on_to_the_bit(
    server: Server, accidents: dict[tuple[str, int], Lost], unbroken: dict[str, Path]
) -> None:
    lost = list(accidents.items())
    for start in range(0, len(lost), 2):
        some = lost[start : start + 2]
        resumed = server.run(*(command(one.folder, 4, ["train", "--resume", "run"]) for _, one in some))
        for ((grid, _), one), ranks in zip(some, resumed, strict=True):
            assert_ended(ranks)
            assert_equal_runs(one.folder / "run", unbroken[grid])


@contextmanager
def launched(*argv: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`gtddp` itself, with the ranks that it starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gtddp_dist", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()  # its ranks end with it
        process.communicate()


def ranks_of(process: int) -> list[int]:
    """Process numbers of the ranks that `gtddp` has started, rank 0 first."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == process:
                variables = (entry / "environ").read_bytes().decode().split("\0")
                found[int(next(v for v in variables if v.startswith("RANK="))[5:])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_that_is_stopped_is_lost_and_nothing_is_left_running(tmp_path: Path) -> None:
    """Under `gtddp train`: a stopped process holds its connections open, so that only signs of life tell."""
    run = [*GRIDS["2x2"][:-1], "train.steps=100000", "eval.every=100000", "checkpoint.every=100000"]
    with launched(*run, cwd=tmp_path) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3, process)
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGSTOP)
        started = time.monotonic()
        try:
            _, said = process.communicate(timeout=LOST_WITHIN_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(ranks[1], signal.SIGCONT)
        assert time.monotonic() - started < LOST_WITHIN_S
        assert process.returncode == FAILED, said
        assert "gtddp: lost rank 1 (segment 2 of 2: stage" in said
        assert "gave no sign of life for" in said
        assert "continue it with: gtddp train --resume run\n" in said
        assert not any(is_running(rank) for rank in ranks)


# ----------------------------------------------------------------------------------------------------------
# Stopping, and going on


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    server: Server, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    accident = {"rank": 1, "step": 7, "op": "GRAM", "what": "SIGTERM"}
    (ended,) = server.run(command(tmp_path, 4, GRIDS["2x2"], accident=accident))
    assert_ended(ended, REQUEUE)
    assert "stopped by a signal to another rank at step 7, with a checkpoint" in ended[0].err
    assert "".join(rank.err for rank in ended).count("stopped by") == 1
    found, refused = checkpoint.newest_valid(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == 7 and refused == []
    (ended,) = server.run(command(tmp_path, 4, ["train", "--resume", "run"]))
    assert_ended(ended)
    assert "continues run at step 7 of 12" in ended[0].out
    assert_equal_runs(tmp_path / "run", unbroken["2x2"])


def test_a_last_checkpoint_that_one_rank_cannot_write(server: Server, tmp_path: Path) -> None:
    """Nobody waits for it: all end together, and rank 0 says why, whichever rank it was."""
    words = [*COMMON, "parallel.pipe=2", "checkpoint.every=100"]
    jobs = [
        command(tmp_path / f"{stop}-{rank}", 2, words, no_room=rank, **({"stop_at": 3} if stop else {}))
        for stop in (True, False)
        for rank in (0, 1)
    ]
    for job, ended in zip(jobs, server.run(*jobs), strict=True):
        assert_ended(ended, FAILED)
        said = errors_in(ended)
        assert len(said) == 1 and said[0] in ended[0].err, told(ended)
        assert "No space left on device" in said[0] and "gtddp: lost" not in told(ended)
        found, _ = checkpoint.newest_valid(job.folder / "run" / "checkpoints")
        assert found is not None and found.step == 0


def truncate(newest: Path) -> str:
    shard = newest / "shard-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def leave_half_written(newest: Path) -> str:
    shard = newest / "shard-00000-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    (newest / "shard-00001-of-00002.safetensors").unlink()
    (newest / checkpoint.INDEX).unlink()
    return checkpoint.INDEX


def cut_the_index(newest: Path) -> str:
    index = newest / checkpoint.INDEX
    index.write_text(index.read_text()[:200])
    return checkpoint.INDEX


EKFAC = [
    *COMMON,
    "train.dtype=float64",
    "optimizer.name=gtddp-ekfac",
    "optimizer.lr=0.03",
    "optimizer.gauss_newton_weight=0.1",
    "optimizer.basis_every=7",  # at steps 0 and 7: what is used from a checkpoint on is what the checkpoint has
    "optimizer.momentum=0.9",
    "optimizer.scope=8",
    "parallel.pipe=2",
    "parallel.cuts=[2]",
]
SPOILT = (truncate, leave_half_written, cut_the_index)


@pytest.fixture(scope="module")
def ekfac(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unbroken run ("unbroken/run"), and one that was stopped at step 9 ("stopped/run")."""
    folder = tmp_path_factory.mktemp("ekfac")
    jobs = [command(folder / "unbroken", 2, EKFAC), command(folder / "stopped", 2, EKFAC, stop_at=9)]
    whole, stopped = server.run(*jobs)
    assert_ended(whole)
    assert_ended(stopped, REQUEUE)
    return folder


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_it_used(
    server: Server, ekfac: Path, tmp_path: Path
) -> None:
    what = {}
    for spoil in SPOILT:
        folder = tmp_path / spoil.__name__
        shutil.copytree(ekfac / "stopped", folder)
        what[folder] = spoil(checkpoint.folder_of(folder / "run" / "checkpoints", 9))
    resumed = server.run(*(command(folder, 2, ["train", "--resume", "run"]) for folder in what))
    for (folder, name), ranks in zip(what.items(), resumed, strict=True):
        assert_ended(ranks)
        said = "".join(rank.err for rank in ranks)
        assert said.count("warning: checkpoint not used") == 1  # not by each rank
        assert "step-00000009" in said and name in said
        assert "continues run at step 8 of 12" in ranks[0].out
        assert not (folder / "run" / "checkpoints" / "step-00000009").exists()
        assert_equal_runs(folder / "run", ekfac / "unbroken" / "run")


def test_a_run_goes_on_on_other_grids(server: Server, ekfac: Path, tmp_path: Path) -> None:
    """From two segments to one process to two replicas, with the factors and bases of EKFAC, and its momentum."""
    shutil.copytree(ekfac / "stopped", tmp_path / "moved")
    (tmp_path / "moved/run/checkpoints/step-00000009").rename(tmp_path / "not-used")
    shutil.rmtree(tmp_path / "moved/run/checkpoints/step-00000008")
    resume = ["train", "--resume", "run", "parallel.pipe=1", "parallel.cuts=null"]
    (alone,) = server.run(command(tmp_path / "moved", 1, resume, stop_at=10))
    assert_ended(alone, REQUEUE)
    assert "continues run at step 4 of 12" in alone[0].out
    (replicas,) = server.run(command(tmp_path / "moved", 2, [*resume, "parallel.data=2"]))
    assert_ended(replicas)
    assert "continues run at step 10 of 12" in replicas[0].out

    at = [
        checkpoint.newest_valid(folder / "run" / "checkpoints")[0]
        for folder in (tmp_path / "moved", ekfac / "unbroken")
    ]
    assert at[0] is not None and at[1] is not None and at[0].step == at[1].step == STEPS
    kept = [{k: t for k, t in found.tensors.items() if not k.startswith("random/")} for found in at if found]
    assert kept[0].keys() == kept[1].keys()
    names = {name.rpartition("/")[2] for name in kept[0] if name.startswith("optimizer/")}
    assert {"factor_a", "factor_b", "basis_a", "basis_b", "momentum_buffer"} <= names
    for name, tensor in kept[1].items():
        distance = float((kept[0][name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12))
        assert distance < 1e-6, (name, distance)


# ----------------------------------------------------------------------------------------------------------
# What is not finite

PROBED = [
    Setting(2, 2, 2, "blocks", "sgd", scope="micro_batch", momentum=0.9, steps=4),
    Setting(2, 2, 2, "blocks", "adam", rollout="nonlinear", steps=4),
    Setting(2, 2, 2, "blocks", "ekfac", metric="value", clip_norm=0.5, steps=4),
    Setting(2, 2, 2, "blocks", "torch-adam", clip_norm=0.5, steps=4),
]
SPOILT_BY = ("input", "gradient of the first rank", "gradient of the last rank")


def test_no_rank_takes_a_step_that_is_not_finite_on_one(server: Server, tmp_path: Path) -> None:
    """Nothing changes anywhere, running statistics included, and training goes on as if there had been no such step.

    Where there is one replica, nobody but the rank itself sees that its gradient is not finite.
    """
    settings = {data: [replace(setting, data=data) for setting in PROBED] for data in (1, 2)}
    jobs = [
        Job("ranks.probes:nonfinite", 2 * data, tmp_path / f"{data}", {"settings": [asdict(one) for one in some]})
        for data, some in settings.items()
    ]
    for (data, some), ended in zip(settings.items(), server.run(*jobs), strict=True):
        assert_ended(ended)
        for rank in range(2 * data):
            found = json.loads((tmp_path / f"{data}" / f"found-{rank}.json").read_text())
            assert found.keys() == {f"{spoil}-{setting.name}" for spoil in SPOILT_BY for setting in some}
            for name, one in found.items():
                assert one["refused"] == [step == BAD_STEP for step in range(4)], (rank, name)
                assert one["unchanged"], (rank, name)
                assert one["as if it had not been"], (rank, name)


def test_a_run_goes_on_after_a_step_that_is_not_finite_and_gives_up_after_several(
    server: Server, tmp_path: Path
) -> None:
    words = [*GRIDS["2x2"], "checkpoint.every=2", "train.max_nonfinite=2"]
    once, often = server.run(
        command(tmp_path / "once", 4, words, accident={"rank": 1, "steps": [3], "what": "NaN"}),
        command(tmp_path / "often", 4, words, accident={"rank": 1, "steps": [3, 4, 5], "what": "NaN"}),
    )
    assert_ended(once)
    lines = metrics(tmp_path / "once/run")
    assert [line["step"] for line in lines if "train/skipped" in line] == [3]
    assert ["train/loss" in line for line in lines] == [step != 3 for step in range(1, STEPS + 1)]
    assert all(math.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)

    assert_ended(often, FAILED)
    said = errors_in(often)
    assert len(said) == 1 and "the last 2 steps (train.max_nonfinite) was not finite" in said[0]
    checkpoints = tmp_path / "often/run/checkpoints"
    before, after = (checkpoint.load(checkpoint.folder_of(checkpoints, step)) for step in (2, 4))
    state = [
        {name: tensor for name, tensor in found.tensors.items() if not name.startswith("random/")}
        for found in (before, after)
    ]
    assert_same(state[1], state[0])


FLOAT16 = [*COMMON, "train.dtype=float16", "train.max_nonfinite=20", "train.steps=20", "checkpoint.every=20"]
FLOAT16_BY = {
    "gtddp-sgd": ["optimizer.name=gtddp-sgd", "optimizer.lr=0.05", "optimizer.scope=micro_batch"],
    "gtddp-adam": ["optimizer.name=gtddp-adam", "optimizer.eps=1e-3", "train.clip_norm=1.0"],
    "adam": ["optimizer.name=adam", "optimizer.gauss_newton_weight=null"],
}


def test_float16_on_ranks_is_that_of_one_process(server: Server, tmp_path: Path) -> None:
    """Losses are scaled up until gradients overflow: the steps that are refused for it, the scale, and the weights."""
    scaled = {"loss_scale": 2.0**24}
    jobs = []
    for name, words in FLOAT16_BY.items():
        argv = [*FLOAT16, *words]
        jobs.append(command(tmp_path / name / "one", 1, [*argv, "train.replica_groups=2"], **scaled))
        jobs.append(command(tmp_path / name / "ranks", 4, [*argv, "parallel.pipe=2", "parallel.data=2"], **scaled))
    for start in range(0, len(jobs), 2):
        for ended in server.run(*jobs[start : start + 2]):
            assert_ended(ended)
    for name in FLOAT16_BY:
        one, ranks = (tmp_path / name / way / "run" for way in ("one", "ranks"))
        skipped = [[line["step"] for line in metrics(run) if "train/skipped" in line] for run in (one, ranks)]
        assert skipped[0] == skipped[1] and 3 < len(skipped[0]) < 15, (name, skipped)
        expected, got = (load_file(run / "model.safetensors") for run in (one, ranks))
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            assert float((got[key] - tensor).norm() / tensor.norm()) < 1e-3, (name, key)
        last = [checkpoint.newest_valid(run / "checkpoints")[0] for run in (one, ranks)]
        scales = [found.values["scaler"] for found in last if found is not None]
        assert scales[0] == scales[1]


# ----------------------------------------------------------------------------------------------------------
# Refused before anything is begun


def refused(server: Server, folder: Path, world: int, argv: Sequence[str], **more: object) -> str:
    """The one message of ranks that all refuse to begin."""
    (ended,) = server.run(command(folder, world, argv, **more))
    return told_once(ended, folder)


def told_once(ended: Sequence[Ended], folder: Path) -> str:
    """What rank 0 says of ranks that all refused to begin; the others say nothing."""
    said = messages(ended, folder)
    assert len(said) == 1 and said[0] in ended[0].err, told(list(ended))
    assert [rank.err for rank in ended[1:]] == [""] * (len(ended) - 1), told(list(ended))
    return said[0]


def messages(ended: Sequence[Ended], folder: Path) -> list[str]:
    """The messages of ranks that all refused to begin, and wrote nothing."""
    assert_ended(ended, BAD_INPUT)
    assert "Traceback" not in "".join(rank.err for rank in ended)
    assert not (folder / "run").exists() and not (folder / "runs").exists()
    return errors_in(ended)


def test_more_ranks_than_stages(server: Server, tmp_path: Path) -> None:
    said = refused(server, tmp_path, 6, [*COMMON, "parallel.pipe=6"])
    assert "6" in said and "5 stages" in said


def test_cuts_that_do_not_exist(server: Server, tmp_path: Path) -> None:
    said = refused(server, tmp_path, 2, [*COMMON, "parallel.pipe=2", "parallel.cuts=[9]"])
    assert "cuts" in said and "9" in said


def test_a_batch_that_is_larger_than_the_data_set(server: Server, tmp_path: Path) -> None:
    said = refused(server, tmp_path, 2, [*COMMON, "parallel.pipe=2", "train.batch_size=2000"])
    assert "2000" in said and "1437" in said


def test_ranks_with_different_configurations(server: Server, tmp_path: Path) -> None:
    words = [*COMMON, "parallel.pipe=2"]
    other = {"argv of 1": [*words, "optimizer.lr=0.5"]}
    said = refused(server, tmp_path, 2, words, **other)
    assert "the ranks are not alike. configuration:" in said and "on rank 1" in said


def test_a_rank_that_was_given_twice(server: Server, tmp_path: Path) -> None:
    job = Job("ranks.command:work", 3, tmp_path, {"argv": [*COMMON, "parallel.pipe=3"]}, {2: {"RANK": "1"}})
    (ended,) = server.run(job)
    assert "rank 1 was given to two processes" in told_once(ended, tmp_path)


def test_a_port_that_is_in_use(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # As torchrun's variables, so that gtddp's own listening socket is not used.
        variables = {"GTDDP_STARTED_BY": "", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        job = Job(
            "ranks.command:work", 2, tmp_path, {"argv": [*COMMON, "parallel.pipe=2"]}, {0: variables, 1: variables}
        )
        (ended,) = server.run(job)
    assert [rank.code for rank in ended] == [BAD_INPUT, FAILED], told(ended)
    assert not (tmp_path / "run").exists() and "Traceback" not in told(ended)
    first, second = errors_in(ended)
    assert f"port {port} of" in first and "is in use by another process" in first
    assert f"found a process at 127.0.0.1:{port} that is not rank 0" in second and "the error of rank 0" in second


def test_what_each_rank_finds_before_it_meets_the_others(server: Server, tmp_path: Path) -> None:
    """A grid of another size than there are ranks, a batch that cannot be shared out, and what one of them finds."""
    grid, batch, one = server.run(
        command(tmp_path / "grid", 2, [*COMMON, "parallel.pipe=2", "parallel.data=2"]),
        command(tmp_path / "batch", 3, [*COMMON, "parallel.data=3"]),
        command(tmp_path / "one", 2, [*COMMON, "parallel.pipe=2"], **{"argv of 1": [*COMMON, "no.such=key"]}),
    )
    said = told_once(grid, tmp_path / "grid")
    assert "the grid (parallel.pipe times parallel.data) has 4 ranks, but gtddp started 2 processes" in said
    said = told_once(batch, tmp_path / "batch")
    assert "train.batch_size must be a multiple of micro_batches * data = 6" in said
    said = told_once(one, tmp_path / "one")
    assert said.startswith("gtddp: error: rank 1: ") and "no.such" in said


def test_gtddp_tells_of_a_mistake_once_and_writes_nothing(tmp_path: Path) -> None:
    """What the ranks find, and what is found before there are any."""
    for words, message in (
        (["parallel.pipe=2", "parallel.cuts=[9]"], "cuts"),
        (["parallel.data=3"], "train.batch_size must be a multiple"),
    ):
        with launched(*COMMON, *words, cwd=tmp_path) as process:
            out, said = process.communicate(timeout=90)
        assert process.returncode == BAD_INPUT, said
        assert said.count("gtddp: error:") == 1 and message in said
        assert out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", [("torchrun", "--standalone", "--nproc-per-node=3"), ("mpirun", "-n", "3")])
def test_a_mistake_is_told_once_however_ranks_were_started(way: Sequence[str], tmp_path: Path) -> None:
    """One that each of them finds before it knows of the others; who ends first does not keep rank 0 from telling."""
    starter = Path(sys.executable).parent / way[0]
    if not starter.exists():
        pytest.skip(f"{way[0]} is not installed beside this Python")
    program = ["-m"] if way[0] == "torchrun" else [sys.executable, "-m"]
    done = subprocess.run(
        [str(starter), *way[1:], *program, "gtddp_dist", *COMMON, "parallel.data=3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        timeout=90,
    )
    assert done.returncode != OK
    assert done.stderr.count("gtddp: error:") == 1 and "train.batch_size must be a multiple" in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []

"""Checkpoints that several ranks write and read: every way in which one of them may be late, dead or out of date."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gtddp_dist import checkpoint
from gtddp_dist.checkpoint import JSON, Checkpoint, CheckpointError, CheckpointWriteError, Refused
from gtddp_dist.checkpoint_writer import Writer

LAYERS = 8
"""Of the network whose state is saved; a rank owns a run of them."""


def state_of(step: int, layers: range = range(LAYERS)) -> dict[str, Tensor]:
    """The state of some layers at a step: other numbers for every step and layer."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        numbers = torch.Generator().manual_seed(1000 * step + layer)
        tensors[f"model/{layer}.weight"] = torch.randn(3, layer + 1, generator=numbers)
        tensors[f"optimizer/{layer}.weight/exp_avg"] = torch.randn(3, layer + 1, generator=numbers).double()
    return tensors


def own(rank: int, world: int) -> range:
    size = LAYERS // world
    return range(rank * size, (rank + 1) * size)


def wants(rank: int, world: int) -> Callable[[str], bool]:
    return lambda key: int(key.split("/")[1].split(".")[0]) in own(rank, world)


def values_of(step: int) -> dict[str, JSON]:
    return {"progress": {"step": step}, "optimizer": {"rate": 1 / 3, "values": {}}}


def rank_values_of(step: int, rank: int) -> dict[str, JSON]:
    return {"optimizer": {"values": {f"{rank}.weight/age": step + rank}}}


def save(writer: Writer, rank: int, world: int, step: int, attempt: str = "once") -> None:
    tensors, values = state_of(step, own(rank, world)), values_of(step) if rank == 0 else {}
    writer.save(step, tensors, values, rank_values=rank_values_of(step, rank), attempt=f"{attempt}.{step}")


def run(world: int, work: Callable[[int], object]) -> list[object]:
    """What `work` returns on each of `world` threads."""
    with ThreadPoolExecutor(world) as pool:
        return [future.result(60) for future in [pool.submit(work, rank) for rank in range(world)]]


def write(directory: Path, world: int, step: int, keep: int = 9, attempt: str = "once") -> Path:
    """A checkpoint of `world` ranks."""

    def work(rank: int) -> None:
        with Writer(directory, rank, world, keep, timeout_s=30) as writer:
            save(writer, rank, world, step, attempt)

    run(world, work)
    return checkpoint.folder_of(directory, step)


class Exchange:
    """An allgather among threads: nobody gets an answer before all have spoken."""

    def __init__(self, world: int) -> None:
        self.texts = [""] * world
        self.barrier = threading.Barrier(world, timeout=30)

    def of(self, rank: int) -> checkpoint.AllGather:
        def allgather(text: str) -> list[str]:
            self.texts[rank] = text
            self.barrier.wait()
            answer = list(self.texts)
            self.barrier.wait()
            return answer

        return allgather


def agree(directory: Path, world: int) -> list[tuple[Checkpoint | None, list[Refused]]]:
    exchange = Exchange(world)

    def work(rank: int) -> tuple[Checkpoint | None, list[Refused]]:
        return checkpoint.newest_agreed(directory, wants(rank, world), exchange.of(rank))

    with ThreadPoolExecutor(world) as pool:
        return [future.result(60) for future in [pool.submit(work, rank) for rank in range(world)]]


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def shard(folder: Path, rank: int, world: int) -> Path:
    return folder / f"shard-{rank:05d}-of-{world:05d}.safetensors"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Writing -----------------------------------------------------------------------------------------------------


def test_four_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, 4, step=5)
    assert names(tmp_path) == ["step-00000005"]
    assert names(folder) == ["index.json", *(shard(folder, rank, 4).name for rank in range(4))]
    read = checkpoint.load(folder)
    same(read.tensors, state_of(5))
    ages = {f"{rank}.weight/age": 5 + rank for rank in range(4)}
    assert read.values == {"progress": {"step": 5}, "optimizer": {"rate": 1 / 3, "values": ages}}


def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path) -> None:
    for step, (writers, readers) in enumerate([(4, 1), (4, 2), (1, 4), (2, 4), (2, 2), (1, 1)]):
        write(tmp_path, writers, step)
        read = agree(tmp_path, readers)
        for rank, (found, refused) in enumerate(read):
            assert found is not None and found.step == step and refused == []
            same(found.tensors, state_of(step, own(rank, readers)))
            assert found.values == checkpoint.load(found.folder).values


def test_state_that_goes_from_4_to_1_to_2_ranks_stays_bitwise(tmp_path: Path) -> None:
    write(tmp_path, 4, step=1)
    (found, _) = agree(tmp_path, 1)[0]
    assert found is not None
    with Writer(tmp_path, 0, 1, keep=9) as writer:
        writer.save(2, found.tensors, found.values)
    for rank, (found, _) in enumerate(agree(tmp_path, 2)):
        assert found is not None and found.step == 2
        same(found.tensors, state_of(1, own(rank, 2)))
        assert found.values == checkpoint.load(tmp_path / "step-00000001").values


def test_ranks_may_be_fast_and_slow_and_only_complete_ones_are_ever_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint.write_snapshot
    chance = random.Random(0)

    def slow(*args: object, **options: object) -> object:
        time.sleep(chance.random() * 0.05)
        return written(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_snapshot", slow)
    ended = threading.Event()
    seen: set[int] = set()

    def look() -> None:
        while not ended.is_set():
            for folder in tmp_path.glob("step-*"):
                try:
                    found = checkpoint.load(folder)
                except CheckpointError as error:
                    assert not folder.exists(), error  # it was removed meanwhile: only 2 are kept
                    continue
                same(found.tensors, state_of(found.step))
                seen.add(found.step)

    def work(rank: int) -> None:
        with Writer(tmp_path, rank, 4, keep=2, timeout_s=30) as writer:
            for step in range(12):
                save(writer, rank, 4, step)
                if rank == 0:
                    time.sleep(0.02)  # the others run ahead, by many steps

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            run(4, work)
        finally:
            ended.set()
        looking.result(30)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert len(seen) > 3


def test_the_caller_goes_on_while_the_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, go_on = checkpoint.write_snapshot, threading.Event()

    def wait_first(*args: object, **options: object) -> object:
        assert go_on.wait(30)
        return written(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_snapshot", wait_first)
    weight, progress = torch.ones(3), {"step": 1}
    with Writer(tmp_path, 0, 1, keep=1) as writer:
        writer.save(1, {"model/weight": weight}, {"progress": progress})  # type: ignore[dict-item]
        weight.zero_()  # the next training step
        progress["step"] = 2
        assert not (tmp_path / "step-00000001").exists()
        go_on.set()
        writer.wait()
        read = checkpoint.load(tmp_path / "step-00000001")
    assert read.tensors["model/weight"].tolist() == [1, 1, 1] and read.values == {"progress": {"step": 1}}


def test_a_rank_without_tensors_writes_no_shard(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with Writer(tmp_path, rank, 3, keep=1, timeout_s=30) as writer:
            tensors = {} if rank == 1 else {f"model/{rank}.weight": torch.full((2,), rank)}
            writer.save(1, tensors, {}, rank_values={"seen": {str(rank): True}}, attempt="a")

    run(3, work)
    folder = tmp_path / "step-00000001"
    assert names(folder) == ["index.json", shard(folder, 0, 3).name, shard(folder, 2, 3).name]
    read = checkpoint.load(folder)
    assert sorted(read.tensors) == ["model/0.weight", "model/2.weight"]
    assert read.values == {"seen": {"0": True, "1": True, "2": True}}


# Failing -----------------------------------------------------------------------------------------------------


def test_a_dead_rank_is_named_and_the_former_checkpoint_stays(tmp_path: Path) -> None:
    write(tmp_path, 3, step=1)

    def work(rank: int) -> str:
        if rank == 2:
            return "dead"
        writer = Writer(tmp_path, rank, 3, keep=1, timeout_s=0.3)
        save(writer, rank, 3, step=2)
        try:
            writer.wait()
        except CheckpointWriteError as error:
            assert error.exit_code == 1
            return str(error)
        return "written"

    told = run(3, work)
    assert told[1:] == ["written", "dead"]
    assert "nothing was written by rank 2 of 3 after 0 s" in str(told[0])
    assert str(tmp_path / "unfinished-step-00000002-once.2") in str(told[0])
    for found, refused in agree(tmp_path, 3):
        assert found is not None and found.step == 1
        assert [(item.folder.name, item.complete) for item in refused] == [("unfinished-step-00000002-once.2", False)]
    checkpoint.set_aside(refused)
    assert names(tmp_path) == ["step-00000001"]


def interrupted(directory: Path, step: int, world: int) -> None:
    """A write with other numbers that a kill interrupted when all was there but the index."""
    folder = checkpoint.begin(directory, step, "before")
    for rank in range(world):
        entry = checkpoint.write_shard(folder, state_of(99, own(rank, world)), rank=rank, world=world)
        note = {"attempt": "before", "rank": rank, "world": world, "shard": entry, "values": {}, "problem": ""}
        (folder / f"note-{rank:05d}.json").write_text(json.dumps(note))


@pytest.mark.parametrize("world", [2, 4])
def test_what_an_interrupted_write_of_the_step_left_is_not_mixed_in(tmp_path: Path, world: int) -> None:
    interrupted(tmp_path, 3, 4)
    interrupted(tmp_path, 7, 4)  # of a step that the resumed run has not come to
    folder = write(tmp_path, world, step=3, attempt="again")
    same(checkpoint.load(folder).tensors, state_of(3))
    assert names(tmp_path) == ["step-00000003", "unfinished-step-00000007-before"]


def test_a_note_of_another_attempt_is_no_note(tmp_path: Path) -> None:
    interrupted(tmp_path, 3, 2)
    folder = checkpoint.begin(tmp_path, 3, "now")
    shutil.copytree(tmp_path / "unfinished-step-00000003-before", folder, dirs_exist_ok=True)  # by an unlucky hand
    writer = Writer(tmp_path, 0, 2, keep=1, timeout_s=0.3)
    writer.save(3, state_of(3, own(0, 2)), {}, attempt="now")
    with pytest.raises(CheckpointWriteError, match="nothing was written by rank 1 of 2"):
        writer.wait()
    assert checkpoint.newest_valid(tmp_path)[0] is None


def test_a_run_that_comes_to_the_step_again_replaces_what_it_left_there(tmp_path: Path) -> None:
    write(tmp_path, 4, step=3)
    folder = write(tmp_path, 2, step=3, attempt="again")
    assert len(names(folder)) == 3
    same(checkpoint.load(folder).tensors, state_of(3))


def test_a_failed_save_does_not_keep_the_next_from_being_written(tmp_path: Path) -> None:
    writers = [Writer(tmp_path, rank, 2, keep=1, timeout_s=0.2) for rank in range(2)]
    save(writers[0], 0, 2, step=1)  # rank 1 is too late
    assert writers[0]._thread is not None
    writers[0]._thread.join(30)
    save(writers[1], 1, 2, step=1)
    writers[1].wait()
    with pytest.raises(CheckpointWriteError, match="rank 1 of 2"):
        save(writers[0], 0, 2, step=2)  # says it, and begins nothing
    for rank in range(2):
        save(writers[rank], rank, 2, step=3)
    for writer in writers:
        writer.wait()
    assert names(tmp_path) == ["step-00000003"]


def test_what_goes_wrong_on_another_rank_is_passed_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoint.write_snapshot

    def no_room(folder: Path, tensors: dict[str, Tensor], *, rank: int, world: int) -> checkpoint.ShardEntry:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(folder, tensors, rank=rank, world=world)

    monkeypatch.setattr(checkpoint, "write_snapshot", no_room)
    started = time.monotonic()

    def work(rank: int) -> str:
        writer = Writer(tmp_path, rank, 2, keep=1, timeout_s=60)
        save(writer, rank, 2, step=1)
        with pytest.raises(CheckpointWriteError, match="No space left on device") as error:
            writer.wait()
        return str(error.value)

    told = run(2, work)
    assert "not completed: rank 1: " in str(told[0])
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"values": {"w": 2}}}, r"'optimizer' / 'values' / 'w' is given by rank 1, and already there"),
        ({"optimizer": 3}, r"'optimizer' is given by rank 1, and already there"),
    ],
)
def test_a_value_that_is_given_twice_is_an_error(tmp_path: Path, values: dict[str, JSON], message: str) -> None:
    first, second = (Writer(tmp_path, rank, 2, keep=1, timeout_s=30) for rank in range(2))
    second.save(1, {}, {}, rank_values=values, attempt="a")
    first.save(1, {"model/w": torch.ones(1)}, {"optimizer": {"values": {"w": 1}}}, attempt="a")
    second.wait()
    with pytest.raises(ValueError, match=message):
        first.wait()
    assert checkpoint.newest_valid(tmp_path)[0] is None


def test_a_tensor_that_two_ranks_give_is_an_error(tmp_path: Path) -> None:
    first, second = (Writer(tmp_path, rank, 2, keep=1, timeout_s=30) for rank in range(2))
    for writer in (first, second):
        writer.save(1, {"model/w": torch.ones(1)}, {}, attempt="a")
    with pytest.raises(ValueError, match="two shards hold the tensor 'model/w'"):
        first.wait()


def test_arguments_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        Writer(tmp_path, 2, 2, keep=1)
    with pytest.raises(ValueError, match="keep is 0"):
        Writer(tmp_path, 0, 2, keep=0)
    with Writer(tmp_path, 1, 2, keep=1) as writer:
        with pytest.raises(ValueError, match="attempt is missing"):
            writer.save(1, {}, {})
        with pytest.raises(ValueError, match=r"attempt is '\.\./x'"):
            writer.save(1, {}, {}, attempt="../x")
        with pytest.raises(ValueError, match="rank 1 gives values"):
            writer.save(1, {}, {"a": 1}, attempt="a")
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.save(1, {}, {}, rank_values={"a": float("nan")}, attempt="a")
    assert names(tmp_path) == []


def test_an_exception_of_the_run_is_not_hidden_and_does_not_wait_for_the_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with (
        pytest.raises(ZeroDivisionError),
        Writer(tmp_path, 0, 2, keep=1, timeout_s=600, grace_s=0.2) as writer,
    ):
        save(writer, 0, 2, step=1)
        raise ZeroDivisionError
    assert time.monotonic() - started < 20
    assert "nothing was written by rank 1 of 2 when the run ended" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True, timeout=30)


def test_a_full_disk_is_said_with_the_file_and_leaves_the_former_checkpoint(tiny_disk: Path) -> None:
    writers = [Writer(tiny_disk, rank, 2, keep=2, timeout_s=30) for rank in range(2)]

    def save_sizes(step: int, *kilobytes: int) -> list[str]:
        def work(rank: int) -> str:
            tensors = {f"model/{rank}.weight": torch.ones(kilobytes[rank] * 250)}
            writers[rank].save(step, tensors, {}, attempt=f"a{step}")
            try:
                writers[rank].wait()
            except CheckpointWriteError as error:
                return str(error)
            return ""

        return [str(text) for text in run(2, work)]

    assert save_sizes(1, 1, 1) == ["", ""]
    told = save_sizes(2, 300, 4000)
    file = shard(tiny_disk / "unfinished-step-00000002-a2", 1, 2)
    assert f"{file}: cannot be written" in told[1] and "No space left on device" in told[1]
    assert "rank 1: " in told[0]
    assert checkpoint.find_valid(tiny_disk)[0] == [1]
    # There is room for this one once what the failed one left is gone.
    assert save_sizes(3, 300, 1) == ["", ""]
    assert names(tiny_disk) == ["step-00000001", "step-00000003"]


def _write_with_small_files(directory: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    writer = Writer(directory, 0, 1, keep=1)
    writer.save(2, {"model/weight": torch.ones(100_000)}, {})
    try:
        writer.wait()
    except CheckpointWriteError as error:
        os._exit(7 if "File too large" in str(error) and ".safetensors: cannot be written" in str(error) else 8)
    os._exit(9)


def test_a_file_that_must_not_grow_is_said_too(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"model/weight": torch.ones(1)}, {}, keep=1)
    assert _in_process(_write_with_small_files, tmp_path) == 7
    newest, refused = checkpoint.newest_valid(tmp_path)
    assert newest is not None and newest.step == 1 and not refused[0].complete


def _in_process(work: Callable[[Path], None], directory: Path) -> int | None:
    """The exit code of `work` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(directory,))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        process.join(10)
    return process.exitcode


def _killed_while_writing(directory: Path) -> None:
    """Rank 1 of 2, which dies when half of its shard is written."""

    def dies(tensors: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = dies  # type: ignore[assignment]
    writer = Writer(directory, 1, 2, keep=1)
    save(writer, 1, 2, step=2)
    writer.wait()


def test_a_rank_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    write(tmp_path, 2, step=1)
    writer = Writer(tmp_path, 0, 2, keep=1, timeout_s=1.0)
    save(writer, 0, 2, step=2)
    assert _in_process(_killed_while_writing, tmp_path) == -signal.SIGKILL
    with pytest.raises(CheckpointWriteError, match="nothing was written by rank 1 of 2"):
        writer.wait()
    assert any(name.endswith(".partial.safetensors") for name in names(tmp_path / "unfinished-step-00000002-once.2"))
    found, refused = agree(tmp_path, 2)[0]
    assert found is not None and found.step == 1
    checkpoint.set_aside(refused)
    same(checkpoint.load(write(tmp_path, 2, step=2)).tensors, state_of(2))


# Reading -----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"has \d+ bytes, its index says \d+"),
        (flip, r"does not match its checksum"),
        (Path.unlink, r"is missing"),
    ],
)
def test_a_shard_that_one_rank_needs_is_refused_by_all(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    write(tmp_path, 4, step=1)
    bad = write(tmp_path, 4, step=2)
    damage(shard(bad, 3, 4))
    answers = agree(tmp_path, 4)
    for rank, (found, refused) in enumerate(answers):
        assert found is not None and found.step == 1
        same(found.tensors, state_of(1, own(rank, 4)))
        assert [item.folder for item in refused] == [bad] and refused[0].complete
        assert refused[0].reason.startswith(f"rank 3: {shard(bad, 3, 4)}: ")
        assert re.search(message, refused[0].reason)
    checkpoint.set_aside(answers[0][1])  # rank 0 does
    assert names(tmp_path) == ["refused-step-00000002", "step-00000001"]


def test_only_shards_with_what_is_wanted_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 4, step=1)
    for rank in (0, 2, 3):
        shard(folder, rank, 4).unlink()
    same(checkpoint.load(folder, wants(1, 4)).tensors, state_of(1, own(1, 4)))
    one = "model/2.weight"
    same(checkpoint.load(folder, lambda key: key == one).tensors, {one: state_of(1)[one]})
    assert checkpoint.load(folder, lambda key: False).tensors == {}
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(folder, wants(0, 2))
    assert checkpoint.find_valid(tmp_path, wants(1, 4)) == ([1], [])
    steps, refused = checkpoint.find_valid(tmp_path)
    assert steps == [] and "is missing" in refused[0].reason


def test_damages_of_several_shards_are_all_told(tmp_path: Path) -> None:
    bad = write(tmp_path, 4, step=2)
    flip(shard(bad, 1, 4))
    truncate(shard(bad, 2, 4))
    for found, refused in agree(tmp_path, 4):
        assert found is None
        assert "rank 1: " in refused[0].reason and "; rank 2: " in refused[0].reason
    flip(bad / checkpoint.INDEX)
    (_, refused) = agree(tmp_path, 4)[0]
    assert refused[0].reason.count("index.json") == 1 and "rank" not in refused[0].reason  # the same for all


def test_older_checkpoints_are_not_read_where_the_newest_will_do(tmp_path: Path) -> None:
    old = write(tmp_path, 2, step=1)
    write(tmp_path, 2, step=2)
    shutil.rmtree(old)
    old.write_text("not even a folder")
    for found, refused in agree(tmp_path, 2):
        assert found is not None and found.step == 2 and refused == []


def test_a_checkpoint_that_only_some_ranks_see_is_refused(tmp_path: Path) -> None:
    # Two folders stand for a file system that shows an old state to one rank.
    for place in ("a", "b"):
        write(tmp_path / place, 2, step=1)
    write(tmp_path / "a", 2, step=2)
    exchange = Exchange(2)

    def work(rank: int) -> tuple[Checkpoint | None, list[Refused]]:
        return checkpoint.newest_agreed(tmp_path / "ab"[rank], wants(rank, 2), exchange.of(rank))

    with ThreadPoolExecutor(2) as pool:
        answers = [future.result(60) for future in [pool.submit(work, rank) for rank in range(2)]]
    for found, refused in answers:
        assert found is not None and found.step == 1
        assert refused[0].reason.startswith("rank 1: ") and refused[0].complete


def test_ranks_that_see_other_checkpoints_under_one_name_do_not_agree(tmp_path: Path) -> None:
    for place, world in (("a", 1), ("b", 2)):
        write(tmp_path / place, world, step=1)
    exchange = Exchange(2)

    def work(rank: int) -> tuple[Checkpoint | None, list[Refused]]:
        return checkpoint.newest_agreed(tmp_path / "ab"[rank], wants(rank, 2), exchange.of(rank))

    with ThreadPoolExecutor(2) as pool:
        answers = [future.result(60) for future in [pool.submit(work, rank) for rank in range(2)]]
    for found, refused in answers:
        assert found is None and "is not the same file for all ranks" in refused[0].reason


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert agree(tmp_path / "nowhere", 2) == [(None, [])] * 2


def test_a_folder_that_one_rank_cannot_list_is_said_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange(2)
    folders = checkpoint._folders

    def denied(directory: Path) -> list[Path]:
        if directory.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(directory))
        return folders(directory)

    monkeypatch.setattr(checkpoint, "_folders", denied)

    def work(rank: int) -> str:
        with pytest.raises(CheckpointError) as error:
            checkpoint.newest_agreed(tmp_path / "ab"[rank], None, exchange.of(rank))
        return str(error.value)

    told = run(2, work)
    assert told[0] == told[1] and str(told[0]).startswith("rank 1: ") and "cannot be listed" in str(told[0])


# Processes ---------------------------------------------------------------------------------------------------


def gather_by_files(folder: Path, rank: int, world: int) -> checkpoint.AllGather:
    """An allgather among processes."""
    calls = iter(range(1000))

    def allgather(text: str) -> list[str]:
        call = next(calls)
        temporary = folder / f".{call}-{rank}"
        temporary.write_text(text)
        temporary.rename(folder / f"{call}-{rank}")
        paths = [folder / f"{call}-{other}" for other in range(world)]
        deadline = time.monotonic() + 30
        while not all(path.exists() for path in paths):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return [path.read_text() for path in paths]

    return allgather


def _write_and_read(rank: int, world: int, directory: Path, meeting: Path) -> None:
    with Writer(directory, rank, world, keep=2, timeout_s=30) as writer:
        for step in range(4):
            save(writer, rank, world, step)
    if rank == 0:
        flip(shard(directory / "step-00000003", 2, world))
    allgather = gather_by_files(meeting, rank, world)
    allgather("the last one is damaged now")
    found, refused = checkpoint.newest_agreed(directory, wants(rank, world), allgather)
    assert found is not None and found.step == 2
    same(found.tensors, state_of(2, own(rank, world)))
    assert [item.reason.partition(": ")[0] for item in refused] == [f"rank {2 * world // 4}"]


def test_processes_write_and_agree(tmp_path: Path) -> None:
    world = 4
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_write_and_read, args=(rank, world, tmp_path / "checkpoints", meeting))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(10)
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000003"]

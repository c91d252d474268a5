"""Starting ranks: real processes of small programs, under gtddp itself, torchrun and mpirun; Slurm by its variables."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from gtddp_dist import errors
from gtddp_dist.launch import (
    RankMissing,
    Ranks,
    Rendezvous,
    StopRequest,
    discover,
    local,
    mpi,
    patience,
    rendezvous,
    slurm,
)
from gtddp_dist.launch.patience import StoppedWaiting
from gtddp_dist.launch.stop import STOP_SIGNALS

BIN = Path(sys.executable).parent
SECONDS = 40  # no process here takes longer

# A program that starts itself as ranks: {setup} comes first in every process, {body} is the work of a rank.
PROGRAM = """
import os, signal, subprocess, sys, time
from gtddp_dist import errors
from gtddp_dist.launch import Rendezvous, StopRequest, discover, launch, local

wanted = int(sys.argv[1])
{setup}

def work(stop, ranks):
    rank = ranks.rank
    def say(*words):
        os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
    def wait_for_stop():
        while not stop.requested:
            time.sleep(0.02)
        say("stopped by", stop.reason)
        return errors.REQUEUE
{body}
    return 0

if "RANK" not in os.environ and "PMI_RANK" not in os.environ:
    code = local.start([sys.executable, *sys.argv], wanted)
    assert "torch" not in sys.modules
    sys.exit(code)
try:
    sys.exit(launch(work, wanted))
except errors.UserError as error:
    os.write(2, f"gtddp: error: {{error}}{{chr(10)}}".encode())
    sys.exit(error.exit_code)
"""


class Program:
    """Processes of a program, all ended at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "SLURM"))}

    def start(self, wanted: int, body: str, setup: str = "", by: tuple[str, ...] = (sys.executable,)) -> None:
        script = self.folder / "program.py"
        script.write_text(
            PROGRAM.format(setup=textwrap.dedent(setup), body=textwrap.indent(textwrap.dedent(body), "    "))
        )
        self.process = subprocess.Popen(
            [*by, str(script), str(wanted)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=self.environ,
        )

    def end(self) -> tuple[int, str, str]:
        assert self.process is not None
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err

    def run(
        self, wanted: int, body: str, setup: str = "", by: tuple[str, ...] = (sys.executable,)
    ) -> tuple[int, str, str]:
        self.start(wanted, body, setup, by)
        return self.end()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def wait_for(self, *names: str) -> list[int]:
        """Waits until the ranks have written these files, and returns the process numbers in them."""
        files = [self.folder / name for name in names]
        deadline = time.monotonic() + SECONDS
        while not all(file.exists() and file.read_text().endswith("\n") for file in files):
            assert time.monotonic() < deadline, "a rank did not come so far"
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def here(self, name: str = "rank") -> str:
        """Code by which a rank writes its process number to "pid<rank>"; `name` is the code of <rank>."""
        return f'open({str(self.folder)!r} + "/pid" + str({name}), "w").write(str(os.getpid()) + chr(10))'


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    it = Program(tmp_path)
    yield it
    if it.process is not None:
        it.process.kill()
        it.process.communicate(timeout=SECONDS)
    for file in tmp_path.glob("pid*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def state_of(pid: int) -> str:
    """The letter of a process's state in /proc, "gone" for one that has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if state == "Z" else state


def wait_until_state(pids: list[int], state: str, within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while any(state_of(pid) not in state for pid in pids):
        assert time.monotonic() < deadline, [state_of(pid) for pid in pids]
        time.sleep(0.02)


# gtddp starts the ranks itself.


@pytest.mark.parametrize(
    ("codes", "run"),
    [
        ([0, 0], errors.OK),
        ([0, 75], errors.REQUEUE),
        ([75, 75], errors.REQUEUE),
        ([2, 0], errors.BAD_INPUT),
        ([2, 75, None], errors.BAD_INPUT),
        ([2, 1], errors.FAILED),
        ([2, -9], errors.FAILED),
        ([0, 3], errors.FAILED),
        ([0, None], errors.FAILED),
    ],
)
def test_codes_combine(codes: list[int | None], run: int) -> None:
    assert local.combined(codes) == run


def test_ranks_know_themselves(program: Program) -> None:
    body = """
    assert os.environ["RANK"] == str(rank) and os.environ["WORLD_SIZE"] == "3"
    assert not any(name.startswith("GTDDP_") for name in os.environ) and discover({}) is None
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1
    assert "torch" not in sys.modules
    say(rank, ranks.world, ranks.local_rank, ranks.local_world, ranks.started_by, ranks.address, ranks.port > 0)
    """
    del program.environ["OMP_NUM_THREADS"]
    code, out, err = program.run(3, body)
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == sorted(
        f"{prefix}{rank} 3 {rank} 3 gtddp 127.0.0.1 True" for rank, prefix in enumerate(("", "[rank 1] ", "[rank 2] "))
    )


def test_lines_are_whole(program: Program) -> None:
    """Ranks write lines in pieces, at the same time; the last has no end."""
    body = """
    for count in range(100):
        for piece in ("one ", "two ", "x" * 5000, chr(10)):
            os.write(2, piece.encode())
    os.write(2, b"the end")
    """
    code, _, err = program.run(3, f"if rank > 0:{textwrap.indent(body, '    ')}")
    assert code == 0
    lines = err.splitlines()
    assert set(lines) == {f"[rank {rank}] {line}" for rank in (1, 2) for line in (f"one two {'x' * 5000}", "the end")}
    assert len(lines) == 202


def test_a_killed_rank_is_named_and_the_others_end(program: Program) -> None:
    """One ends by itself, one after SIGTERM, and one must be killed; what a rank had started is ended too."""
    body = f"""
    {program.here()}
    if rank == 3:
        helper = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        open({str(program.folder)!r} + "/pid-helper", "w").write(f"{{helper.pid}}\\n")
    if rank == 1:
        while len(os.listdir({str(program.folder)!r})) < 6:  # the program, four ranks, the helper
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        return wait_for_stop()
    if rank == 3:
        time.sleep(0.5)
        return 1
    while True:  # StopRequest only sets a flag
        time.sleep(0.02)
    """
    setup = "local.END_WITHIN_S, local.TERM_WITHIN_S = 1.5, 1.0"
    code, out, err = program.run(4, body, setup)
    assert code == errors.FAILED
    assert err.splitlines() == [
        f"gtddp: rank 1 on {socket.gethostname()} was killed by SIGKILL",
        f"gtddp: ranks 0, 2 on {socket.gethostname()} did not end after the end of rank 1: ended by gtddp",
    ]
    assert out == "stopped by SIGTERM\n"
    wait_until_state(program.wait_for("pid0", "pid1", "pid2", "pid3", "pid-helper"), "gone", 2)


def test_a_rank_that_stands_still_is_not_waited_for(program: Program) -> None:
    body = """
    if rank == 1:
        return 1
    os.kill(os.getpid(), signal.SIGSTOP)
    """
    started = time.monotonic()
    code, _, err = program.run(2, body, "local.IDLE_WITHIN_S, local.TERM_WITHIN_S = 1.0, 0.5")
    assert time.monotonic() - started < local.END_WITHIN_S / 2
    assert code == errors.FAILED
    assert f"gtddp: rank 1 on {socket.gethostname()} ended with exit code 1\n" in err
    assert f"rank 0 on {socket.gethostname()} did not end" in err


def test_bad_input_of_one_rank(program: Program) -> None:
    body = """
    if rank == 1:
        raise errors.UserError("no such thing")
    while True:
        time.sleep(0.02)
    """
    code, _, err = program.run(2, body, "local.END_WITHIN_S, local.TERM_WITHIN_S = 0.5, 0.5")
    assert code == errors.BAD_INPUT
    told = f"gtddp: rank 0 on {socket.gethostname()} did not end after the end of rank 1"
    assert err.startswith(f"[rank 1] gtddp: error: no such thing\n{told}")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signals_reach_all_ranks(program: Program, number: signal.Signals) -> None:
    program.start(2, f"{program.here()}\nreturn wait_for_stop()")
    program.wait_for("pid0", "pid1")
    program.send(number)
    code, out, err = program.end()
    assert (code, err) == (errors.REQUEUE, "")
    assert sorted(out.splitlines()) == [f"[rank 1] stopped by {number.name}", f"stopped by {number.name}"]


def test_ctrl_c_comes_once(program: Program) -> None:
    """A terminal sends SIGINT to the whole process group; twice would be KeyboardInterrupt in the ranks."""
    body = f"""
    {program.here()}
    wait_for_stop()
    time.sleep(0.5)
    return errors.REQUEUE
    """
    program.start(2, body)
    program.wait_for("pid0", "pid1")
    assert program.process is not None
    os.killpg(program.process.pid, signal.SIGINT)
    code, out, err = program.end()
    assert (code, err, out.count("stopped by SIGINT")) == (errors.REQUEUE, "", 2)


def test_second_ctrl_c_ends_the_run(program: Program) -> None:
    program.start(2, f"wait_for_stop()\n{program.here()}\ntime.sleep(60)")
    time.sleep(0.5)
    program.send(signal.SIGINT)
    program.wait_for("pid0", "pid1")
    program.send(signal.SIGINT)
    code, _, err = program.end()
    assert code == errors.FAILED
    assert "KeyboardInterrupt" in err


def test_stop_signal_while_ranks_start(program: Program) -> None:
    """It comes before a rank can handle it, and is heard all the same."""
    setup = f"""
    if "RANK" in os.environ:
        {program.here("os.environ['RANK']")}
        time.sleep(0.7)
    """
    program.start(2, "return wait_for_stop()", setup)
    program.wait_for("pid0", "pid1")
    program.send(signal.SIGUSR2)
    code, out, _ = program.end()
    assert (code, out.count("stopped by SIGUSR2")) == (errors.REQUEUE, 2)


def test_ctrl_z_stops_all_and_they_go_on(program: Program) -> None:
    program.start(2, f"{program.here()}\nreturn wait_for_stop()")
    pids = program.wait_for("pid0", "pid1")
    program.send(signal.SIGTSTP)
    assert program.process is not None
    wait_until_state([*pids, program.process.pid], "T")
    program.send(signal.SIGCONT)
    wait_until_state(pids, "SR")
    program.send(signal.SIGTERM)
    assert program.end()[0] == errors.REQUEUE


@pytest.mark.parametrize("early", [False, True])
def test_no_rank_outlives_a_killed_parent(program: Program, early: bool) -> None:
    """`early`: the parent dies before its ranks watch it."""
    write = program.here("os.environ['RANK']")
    setup = f"if 'RANK' in os.environ:\n    {write}\n    time.sleep(0.7)" if early else ""
    program.start(2, "time.sleep(60)" if early else f"{write}\ntime.sleep(60)", setup)
    pids = program.wait_for("pid0", "pid1")
    program.send(signal.SIGKILL)
    wait_until_state(pids, "gone")


def test_launch_starts_the_command(tmp_path: Path) -> None:
    """`launch` as the command calls it: outside of any rank it starts `python -m gtddp_dist` as many times."""
    code = "import sys; from gtddp_dist.launch import launch; sys.exit(launch(lambda stop, ranks: 3, 2, ['--version']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    versions = [line.removeprefix("[rank 1] ") for line in done.stdout.splitlines()]
    assert len(versions) == 2 and set(versions) == {versions[0]} and versions[0].startswith("gtddp ")


# The ranks meet.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def ranks_of(world: int, port: int) -> list[Ranks]:
    return [Ranks(rank, world, rank, world, f"node{rank}", "127.0.0.1", port, "torchrun") for rank in range(world)]


def in_threads(work: Callable[[Ranks], object], ranks: list[Ranks]) -> list[object]:
    """What `work` returns or raises for each rank."""
    results: list[object] = [None] * len(ranks)

    def one(each: Ranks) -> None:
        try:
            results[each.rank] = work(each)
        except Exception as error:
            results[each.rank] = error

    threads = [threading.Thread(target=one, args=(each,), daemon=True) for each in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    return results


def test_texts_of_all_ranks_in_their_order() -> None:
    def work(ranks: Ranks) -> object:
        meeting = Rendezvous(ranks, 20)
        meeting.barrier()
        told = [meeting.allgather("loss", f"{ranks.rank}: {count}") for count in range(3)]
        meeting.agree({"config": "abc"})
        return told

    expected = [[f"{rank}: {count}" for rank in range(3)] for count in range(3)]
    assert in_threads(work, ranks_of(3, free_port())) == [expected] * 3


def test_one_rank_needs_nobody() -> None:
    (ranks,) = ranks_of(1, 1)
    meeting = Rendezvous(ranks)
    assert meeting.allgather("loss", "1") == ["1"]
    meeting.agree({"config": "abc"})
    meeting.store.set("key", "value")
    assert meeting.store.get("key") == b"value"


def test_ranks_that_are_not_alike() -> None:
    def work(ranks: Ranks) -> object:
        facts = {"torch": "2.13", "config": "def" if ranks.rank == 1 else "abc", "grid": "pipe=3,data=1"}
        Rendezvous(ranks, 20).agree(facts)
        return None

    error, *others = in_threads(work, ranks_of(3, free_port()))
    assert isinstance(error, errors.UserError)
    assert "config: abc on ranks 0, 2 (node0, node2); def on rank 1 (node1)" in str(error)
    assert "torch" not in str(error) and "grid" not in str(error)
    assert [type(other) for other in others] == [errors.ToldElsewhere] * 2


def test_what_any_rank_finds_rank_0_tells() -> None:
    def work(ranks: Ranks) -> object:
        Rendezvous(ranks, 20).prepared("no such thing" if ranks.rank == 1 else "")
        return None

    error, *others = in_threads(work, ranks_of(3, free_port()))
    assert (type(error), str(error)) == (errors.UserError, "rank 1: no such thing")
    assert [type(other) for other in others] == [errors.ToldElsewhere] * 2


@pytest.mark.parametrize(
    ("local_world", "hosts", "where"),
    [
        (1, (), "those ranks,"),  # nobody knows
        (1, ("node0", "node1", "node1", "node2"), r"those ranks \(on node1, node2\),"),
        (4, (), r"those ranks \(on node0\),"),
    ],
)
def test_where_missing_ranks_are(local_world: int, hosts: tuple[str, ...], where: str) -> None:
    ranks = replace(ranks_of(4, free_port())[0], local_world=local_world, hosts=hosts)
    with pytest.raises(RankMissing, match=f"ranks 1, 2, 3 of 4 not there .* look for errors of {where}"):
        Rendezvous(ranks, 0.5).allgather("start", "")


def test_rank_0_that_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has made the store, and does no more."""
    monkeypatch.setattr(rendezvous, "ANSWER_WITHIN_S", 0.5)
    port = free_port()

    def work(ranks: Ranks) -> object:
        meeting = Rendezvous(ranks, 20)
        return meeting if ranks.rank == 0 else meeting.allgather("start", "", 1)

    _, error = in_threads(work, [replace(ranks, host="node0") for ranks in ranks_of(2, port)])
    assert isinstance(error, RankMissing)
    assert str(error).startswith("rank 0 (on node0, at 127.0.0.1) gave no answer to rank 1 within 2 s (start)")


def test_a_rank_that_is_missing() -> None:
    def work(ranks: Ranks) -> object:
        return Rendezvous(ranks, 1.5).allgather("start", "")

    for error in in_threads(work, ranks_of(4, free_port())[:2]):
        assert isinstance(error, RankMissing)
        assert str(error).startswith("ranks 2, 3 of 4 not there after 2 s (start)")


def test_rank_0_is_missing() -> None:
    port = free_port()
    with pytest.raises(RankMissing, match=f"rank 1 on node1 did not reach rank 0 at 127.0.0.1:{port} within 1 s"):
        Rendezvous(ranks_of(2, port)[1], 1)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_is_told_to_stop_names_whom_it_waits_for(program: Program, missing: int) -> None:
    """Rank 0 has the port from the start: it is listened at also where rank 0 does not come."""
    setup = "from gtddp_dist.launch import patience\npatience.STOPPED_WITHIN_S = 0.5"
    body = f"""
    if rank == {missing}:
        {program.here()}
        code = wait_for_stop()
        time.sleep(4)
        return code
    threading = __import__("threading")
    def tell():
        {program.here()}
    threading.Timer(1.5, tell).start()  # it waits by then
    Rendezvous(ranks, 60, stop, lambda rank: "segment %d of 2" % (rank + 1)).barrier()
    """
    program.start(2, body, setup)
    program.wait_for("pid0", "pid1")
    program.send(signal.SIGTERM)
    code, _, err = program.end()
    assert code == errors.REQUEUE
    there, host = 1 - missing, socket.gethostname()
    whom = f"rank {missing} (segment {missing + 1} of 2, on {host})"
    assert f"gtddp: rank {there} on {host} is told to stop (SIGTERM) while it waits for {whom}: ends in" in err
    assert f"gtddp: error: told to stop (SIGTERM) before the ranks had met: {whom} did not come" in err


def test_ranks_that_come_soon_after_the_signal_stop_together(program: Program) -> None:
    body = f"""
    {program.here()}
    if rank == 1:
        wait_for_stop()
        time.sleep(1)
    Rendezvous(ranks, 60, stop).barrier()
    return wait_for_stop()
    """
    program.start(2, body)
    program.wait_for("pid0", "pid1")
    program.send(signal.SIGUSR2)
    code, _, err = program.end()
    assert code == errors.REQUEUE
    assert "error" not in err


def test_a_rank_that_is_told_to_stop_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node whose neighbour is lost."""
    monkeypatch.setattr(patience, "STOPPED_WITHIN_S", 0.3)
    stop = StopRequest()
    stop.request()
    ranks = replace(ranks_of(2, free_port())[1], local_world=1, hosts=("node0", "node1"))
    with pytest.raises(StoppedWaiting, match=r"rank 0 \(on node0\) did not come, for whom rank 1 on node1 has") as told:
        Rendezvous(ranks, 60, stop)
    assert told.value.exit_code == errors.REQUEUE


def test_ranks_tell_each_other_who_is_missing_after_a_stop_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone is told to stop."""
    monkeypatch.setattr(patience, "STOPPED_WITHIN_S", 4.0)

    def work(ranks: Ranks) -> object:
        stop = StopRequest()
        if ranks.rank == 0:
            stop.request()
        return Rendezvous(ranks, 20, stop).allgather("start", "")

    for rank, error in enumerate(in_threads(work, ranks_of(4, free_port())[:3])):
        assert isinstance(error, StoppedWaiting)
        assert f"rank 3 (on node{rank}) did not come" in str(error)


def test_port_in_use_by_a_process_that_says_nothing() -> None:
    """Rank 0 cannot have it; the others, who get through to that process, do not wait for its answer for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        first, *others = in_threads(lambda ranks: Rendezvous(ranks, 2), ranks_of(3, port))
    assert type(first) is errors.UserError and f"port {port} of node0" in str(first)
    for rank, other in enumerate(others, 1):
        assert isinstance(other, RankMissing)
        assert f"rank {rank} on node{rank} found a process at 127.0.0.1:{port} that is not rank 0" in str(other)


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(errors.UserError, match=rf"port {port} of node0, .*, is in use .*torchrun --master-port"):
            Rendezvous(ranks_of(2, port)[0], 5)


def test_two_processes_of_one_rank() -> None:
    """Rank 0 tells of it, both others end without a word."""
    first, second, _ = ranks_of(3, free_port())  # of the third nothing comes, so that they do not meet without the twin
    twins: list[object] = []

    def work(ranks: Ranks) -> object:
        if ranks.rank == 1:
            twins.extend(in_threads(lambda _: Rendezvous(second, 20).allgather("start", ""), [first, second]))
            return None
        return Rendezvous(ranks, 20).allgather("start", "")

    told, _ = in_threads(work, [first, second])
    assert type(told) is errors.UserError
    assert re.match(r"rank 1 was given to two processes: process .* on .*, and process", str(told))
    assert [type(each) for each in twins] == [errors.ToldElsewhere] * 2


def test_a_process_of_a_rank_that_the_others_have_met_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "TOLD_WITHIN_S", 0.3)
    first, second = ranks_of(2, free_port())
    held: list[Rendezvous] = []

    def work(ranks: Ranks) -> object:
        held.append(Rendezvous(ranks, 20))
        return held[-1].allgather("start", str(ranks.rank))

    assert in_threads(work, [first, second]) == [["0", "1"]] * 2
    with pytest.raises(errors.UserError, match="rank 1 was given to two processes") as stray:
        Rendezvous(second, 10)
    assert not isinstance(stray.value, errors.ToldElsewhere)
    assert in_threads(lambda ranks: _of(held, ranks).allgather("start", "on"), [first, second]) == [["on", "on"]] * 2


def _of(meetings: list[Rendezvous], ranks: Ranks) -> Rendezvous:
    return next(meeting for meeting in meetings if meeting.ranks == ranks)


# torchrun.

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_torchrun(program: Program) -> None:
    body = """
    meeting = Rendezvous(ranks, 30)
    say(ranks.started_by, ranks.local_world, meeting.allgather("ranks", str(rank)))
    meeting.agree({"config": "abc"})
    """
    by = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2")
    code, out, err = program.run(2, body, by=by)
    assert code == 0, err
    assert out.splitlines() == ["torchrun 2 ['0', '1']"] * 2


def test_as_many_ranks_as_the_grid_has(program: Program) -> None:
    program.environ |= TORCHRUN
    code, _, err = program.run(8, "say('worked')")
    assert code == errors.BAD_INPUT
    assert "the grid (parallel.pipe times parallel.data) has 8 ranks, but torchrun started 4 processes" in err
    assert "torchrun --nproc-per-node=8" in err
    assert program.run(4, "say('worked')")[:2] == (0, "worked\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"MASTER_PORT": "0"}, "port 0"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    ],
)
def test_torchrun_variables_that_make_no_sense(change: Mapping[str, str | None], message: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(errors.UserError, match=message):
        discover(environ)


def test_variables_of_torch_without_torchrun() -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ranks = discover({name: TORCHRUN[name] for name in names})
    assert ranks is not None and (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world) == (1, 4, 0, 1)
    assert ranks.variables() | {name: TORCHRUN[name] for name in names} == ranks.variables()
    assert discover({"RANK": "1", "WORLD_SIZE": "4"}) is None


# mpirun.


@pytest.fixture
def mpirun() -> tuple[str, ...]:
    pytest.importorskip("mpi4py")
    if not (BIN / "mpirun").exists():
        pytest.skip("there is no mpirun beside this Python")
    return (str(BIN / "mpirun"), "-n", "3", sys.executable)


def test_mpirun(program: Program, mpirun: tuple[str, ...]) -> None:
    body = """
    meeting = Rendezvous(ranks, 20)
    told = [meeting.allgather("ranks", f"{rank}: {count}") for count in range(2)]
    assert told == [[f"{rank}: {count}" for rank in range(3)] for count in range(2)]
    assert "torch" not in sys.modules
    meeting.agree({"config": "abc"})
    if rank == 0:
        meeting.store.set("key", "value")
    assert meeting.store.get("key") == b"value"
    from gtddp_dist.launch import mpi
    time.sleep(0.1 * rank)
    every = [mpi.gather_numbers([rank, rank + 0.5 * k]) for k in range(3)]
    assert every == [[[other, other + 0.5 * k] for other in range(3)] for k in range(3)], every
    meeting.barrier()
    say(ranks.started_by, rank, ranks.world, ranks.local_rank, ranks.local_world, ranks.address)
    return errors.REQUEUE
    """
    code, out, err = program.run(3, body, by=mpirun)
    assert code == errors.REQUEUE, err
    assert sorted(out.splitlines()) == [f"mpirun {rank} 3 {rank} 3 127.0.0.1" for rank in range(3)]


def test_mpirun_with_ranks_that_are_not_alike(program: Program, mpirun: tuple[str, ...]) -> None:
    body = "Rendezvous(ranks, 20).agree({'config': 'def' if rank == 1 else 'abc'})"
    code, _, err = program.run(3, body, by=mpirun)
    host = socket.gethostname()
    assert code == errors.BAD_INPUT
    assert err.count(f"config: abc on ranks 0, 2 ({host}); def on rank 1 ({host})") == 1


def test_mpirun_with_a_rank_that_is_missing(program: Program, mpirun: tuple[str, ...]) -> None:
    """It does not come, though MPI has started it: a collective of MPI would wait for ever."""
    started = time.monotonic()
    body = "time.sleep(30) if rank == 1 else Rendezvous(ranks, 1).barrier()"
    code, _, err = program.run(3, body, by=mpirun)
    assert code != 0 and err.count("gtddp: error: rank 1 of 3 not there after 1 s (barrier)") == 2
    assert time.monotonic() - started < 20


def test_mpirun_with_a_rank_that_fails_alone(program: Program, mpirun: tuple[str, ...]) -> None:
    """The others do not wait for it for ever, nor it for them."""
    body = """
    meeting = Rendezvous(ranks, 60)
    if rank == 1:
        raise errors.UserError("no such thing")
    meeting.barrier()
    """
    started = time.monotonic()
    code, _, err = program.run(3, body, by=mpirun)
    assert code != 0 and "gtddp: error: no such thing" in err
    assert time.monotonic() - started < 20


def test_mpirun_with_a_rank_that_is_killed_leaves_no_shared_memory(program: Program, mpirun: tuple[str, ...]) -> None:
    body = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)
    """
    before = set(os.listdir("/dev/shm"))
    code, _, err = program.run(3, body, by=mpirun)
    assert code != 0, err
    assert [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("mpich")] == []


def test_mpirun_without_mpi4py(program: Program) -> None:
    program.environ |= {"PMI_RANK": "1", "PMI_SIZE": "2"}
    code, _, err = program.run(2, "", setup="sys.modules['mpi4py'] = None")
    assert code == errors.BAD_INPUT
    assert "rank 1 of 2, but mpi4py is not installed: pip install 'gtddp-dist[cluster]'" in err


def test_mpirun_of_another_mpi(program: Program, mpirun: tuple[str, ...]) -> None:
    """mpi4py then knows of one process only."""
    program.environ |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    code, _, err = program.run(2, "", setup="os.environ['RANK'] = '1'")
    assert code == errors.BAD_INPUT
    assert re.search("mpirun started 2 processes, but mpi4py sees 1: mpi4py is of another MPI than mpirun", err)


def test_one_process_of_mpirun_needs_no_mpi4py() -> None:
    ranks = discover({"PMI_RANK": "0", "PMI_SIZE": "1"})
    assert ranks is not None and (ranks.world, ranks.started_by) == (1, "mpirun")


# Slurm.

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[1-3]",
    "SLURM_JOB_NODELIST": "node[0-9]",
    "SLURMD_NODENAME": "node3",
}


@pytest.fixture
def scontrol(tmp_path: Path) -> str:
    """A folder with a stand-in for scontrol that knows one list of hosts."""
    script = tmp_path / "scontrol"
    script.write_text(
        "#!/bin/sh\n[ \"$*\" = 'show hostnames node[1-3]' ] && printf 'node1\\nnode2\\nnode3\\n' && exit\n"
        'echo "Invalid hostlist: $3" >&2; exit 1\n'
    )
    script.chmod(0o755)
    return str(tmp_path)


def test_srun(scontrol: str) -> None:
    ranks = discover(STEP | {"PATH": scontrol + ":/usr/bin:/bin"})
    assert ranks == Ranks(
        rank=4,
        world=5,
        local_rank=0,
        local_world=1,
        host="node3",
        address="node1",
        port=slurm.port_of(77, 3),
        started_by="srun",
        hosts=("node1", "node1", "node2", "node2", "node3"),
    )
    assert len({slurm.port_of(job, step) for job in (77, 78) for step in range(3)}) == 6
    again = discover(STEP | {"PATH": scontrol + ":/usr/bin:/bin", "SLURM_RESTART_COUNT": "1"})
    assert again is not None and again.port not in {slurm.port_of(77, step) for step in range(9)}


@pytest.mark.parametrize(
    ("layout", "hosts"),
    [
        ("block:cyclic,NoPack", ("node1", "node1", "node2", "node2", "node3")),
        ("cyclic", ("node1", "node2", "node3", "node1", "node2")),
        ("cyclic:block", ("node1", "node2", "node3", "node1", "node2")),
        ("plane", ()),
        ("arbitrary", ()),
    ],
)
def test_hosts_of_tasks_as_srun_lays_them_out(scontrol: str, layout: str, hosts: tuple[str, ...]) -> None:
    ranks = discover(STEP | {"PATH": scontrol + ":/usr/bin:/bin", "SLURM_DISTRIBUTION": layout})
    assert ranks is not None and ranks.hosts == hosts


def test_srun_with_an_address_of_the_user() -> None:
    ranks = discover(STEP | {"MASTER_ADDR": "node9", "MASTER_PORT": "1234", "PATH": "/nowhere"})
    assert ranks is not None and (ranks.address, ranks.port, ranks.started_by) == ("node9", 1234, "srun")


def test_srun_on_one_node_needs_no_scontrol() -> None:
    change = {"SLURM_STEP_NODELIST": "node1", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    ranks = discover(STEP | change | {"SLURM_LOCALID": "4", "PATH": "/nowhere"})
    assert ranks is not None and (ranks.address, ranks.local_world) == ("node1", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PATH": "/nowhere"}, "scontrol is not on the PATH"),
        ({"SLURM_STEP_NODELIST": "node[1-"}, r"show hostnames node\[1- failed \(1\): Invalid hostlist"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "given as 'two'"),
        ({"SLURM_NODEID": "7"}, "numbers this node 7"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is ''"),
    ],
)
def test_srun_variables_that_make_no_sense(scontrol: str, change: Mapping[str, str], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        discover({**STEP, "PATH": scontrol + ":/usr/bin:/bin", **change})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash in a job of 8 tasks
        STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell of salloc
        {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_PROCID": "0"},  # a batch script
    ],
)
def test_processes_that_are_no_ranks(environ: Mapping[str, str]) -> None:
    assert discover(environ) is None


def test_the_innermost_counts(scontrol: str) -> None:
    step = STEP | {"PATH": scontrol + ":/usr/bin:/bin"}
    in_step = discover(step | TORCHRUN)  # torchrun on each node, started by srun
    assert in_step is not None and in_step.started_by == "torchrun"
    with_pmi = discover(step | {"PMI_RANK": "4", "PMI_SIZE": "5"})  # srun --mpi=pmi2
    assert with_pmi is not None and with_pmi.started_by == "srun"
    alone = discover(step | {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"})  # mpirun inside a step
    assert alone is not None and alone.started_by == "mpirun"
    assert not mpi.by_slurm(step | {"PMI_RANK": "4", "PMI_SIZE": "5", "MPI_LOCALNRANKS": "5"})
    assert not mpi.by_slurm(step | {"OMPI_COMM_WORLD_RANK": "4", "PMI_RANK": "4"})
    ours = discover(step | TORCHRUN | {"GTDDP_STARTED_BY": "gtddp"})
    assert ours is not None and ours.started_by == "gtddp"

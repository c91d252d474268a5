"""Which rank was lost: real ranks over gloo, one of which is killed or stopped, and what all others say and do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from gtddp_dist import errors
from gtddp_dist.liveness import DIED

LOST_AFTER_S = 5.0

# Imports torch once and forks the ranks of all scenarios, since importing it in thirty processes takes a minute.
ZOO = """
import datetime, json, os, socket, sys, threading, time
import torch, torch.distributed as dist
from gtddp_dist import liveness
from gtddp_dist.liveness import Heartbeats
from gtddp_dist.errors import UserError

folder, scenarios = sys.argv[1], json.loads(sys.argv[2])

def work(name, rank, world, server, mode, lost_after_s):
    minute = datetime.timedelta(seconds=60)
    port = server.getsockname()[1]
    listening = {"master_listen_fd": server.detach()} if rank == 0 else {}
    server.close()
    store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timeout=minute, wait_for_workers=False, **listening)
    dist.init_process_group("gloo", store=dist.PrefixStore("pg", store), rank=rank, world_size=world, timeout=minute)
    alive = dist.PrefixStore("alive", store)
    beats = Heartbeats(alive, rank, world, f"the {rank}th", advice="go on with --resume", lost_after_s=lost_after_s)
    if mode == "unreachable":
        def fail(*args):
            raise OSError("blocked")
        liveness.Followed = fail
        mode = "reduce"
    with beats:
        dist.barrier()
        open(f"{folder}/{name}.{rank}.ready", "w").close()
        while mode == "reduce":
            dist.all_reduce(torch.ones(1))
            time.sleep(0.1)
        if mode == "chain":  # every rank waits for the one before it
            dist.recv(torch.ones(1), src=(rank - 1) % world)
        if mode == "explained":
            try:
                while True:
                    dist.all_reduce(torch.ones(1))
                    time.sleep(0.1)
            except RuntimeError as error:
                print("lost:", beats.explain(error, 30), flush=True)
        if mode == "own error":
            if rank == 1:
                raise RuntimeError("something of rank 1")
            dist.recv(torch.ones(1), src=1)
        if mode == "bad input":
            if rank == 0:
                raise UserError("something of rank 0")
            dist.recv(torch.ones(1), src=0)
        if mode == "no loss":  # torch's own message, but everybody is there
            try:
                raise RuntimeError("Connection closed by peer")
            except RuntimeError as error:
                started = time.monotonic()
                print("lost:", beats.explain(error, 60), time.monotonic() - started < 20, flush=True)
        if mode in ("well", "no loss"):
            time.sleep(2 * rank)  # rank 0, which has the store, is done first
            sys.exit(75 if mode == "well" else 0)
        if mode.startswith("stalled"):  # as a watchdog does it, while the main thread waits
            beats.once_stalled(lambda: os.write(1, b"stacks\\n"))
            if str(rank) in mode:
                def end():
                    time.sleep(1)
                    beats.give_up("no step has ended for 3 s")
                    os._exit(1)
                threading.Thread(target=end).start()
            dist.recv(torch.ones(1), src=(rank - 1) % world)
        if mode == "pause":
            ends = time.monotonic() + 16
            while time.monotonic() < ends:
                time.sleep(0.1)
            dist.barrier()
    dist.destroy_process_group()

pids = {}
for name, (world, mode, lost_after_s) in scenarios.items():
    server = socket.create_server(("127.0.0.1", 0))
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            for number, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{folder}/{name}.{rank}.{end}", os.O_WRONLY | os.O_CREAT), number)
            try:
                work(name, rank, world, server, mode, lost_after_s)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except UserError as error:
                print("gtddp: error:", error, file=sys.stderr)
                code = error.exit_code
            except BaseException as error:
                print("uncaught:", error, file=sys.stderr)
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids[f"{name}.{rank}"] = pid
    server.close()
open(f"{folder}/pids.partial", "w").write(json.dumps(pids))
os.rename(f"{folder}/pids.partial", f"{folder}/pids")
names = {pid: name for name, pid in pids.items()}
while names:
    pid, status = os.wait()
    name = names.pop(pid)
    open(f"{folder}/{name}.partial", "w").write(json.dumps([os.waitstatus_to_exitcode(status), time.time()]))
    os.rename(f"{folder}/{name}.partial", f"{folder}/{name}.ended")
"""

SCENARIOS = {  # name: ranks, what they do, which is hit by which signal
    "kill-0": (3, "reduce", 0, signal.SIGKILL),
    "kill-1": (3, "explained", 1, signal.SIGKILL),
    "kill-2": (3, "reduce", 2, signal.SIGKILL),
    "chain-kill-0": (4, "chain", 0, signal.SIGKILL),
    "chain-kill-1": (4, "chain", 1, signal.SIGKILL),
    "chain-kill-3": (4, "chain", 3, signal.SIGKILL),
    "unreachable": (3, "unreachable", 2, signal.SIGKILL),
    "stop-0": (3, "chain", 0, signal.SIGSTOP),
    "stop-2": (3, "reduce", 2, signal.SIGSTOP),
    "stalled-0": (3, "stalled 0", None, None),
    "stalled-1": (3, "stalled 1", None, None),
    "stalled-0-2": (3, "stalled 0 2", None, None),
    "own-error": (3, "own error", None, None),
    "bad-input": (3, "bad input", None, None),
    "no-loss": (3, "no loss", None, None),
    "well": (3, "well", None, None),
    "pause": (2, "pause", None, None),
}


@dataclass(frozen=True)
class Ended:
    code: int
    seconds: float
    """From when its scenario's signal was sent."""
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Ended]]:
    """How each rank of each scenario ended, by "name.rank"; all scenarios run side by side."""
    folder = tmp_path_factory.mktemp("ranks")
    spec = {name: (world, mode, LOST_AFTER_S) for name, (world, mode, _, _) in SCENARIOS.items()}
    zoo = subprocess.Popen([sys.executable, "-c", ZOO, str(folder), json.dumps(spec)])
    pids: dict[str, int] = {}
    try:
        ranks = [f"{name}.{rank}" for name, (world, _, _, _) in SCENARIOS.items() for rank in range(world)]
        wait_for([folder / "pids"], 60)
        pids = json.loads((folder / "pids").read_text())
        wait_for([folder / f"{rank}.ready" for rank in ranks], 60)
        time.sleep(1.5)  # until each knows that all have begun
        hit_at = time.time()
        for name, (_, _, victim, number) in SCENARIOS.items():
            if victim is not None and number is not None:
                os.kill(pids[f"{name}.{victim}"], number)
        # All ranks of one scenario stand still for longer than lost_after_s, as with Ctrl-Z.
        for number, pause_s in ((signal.SIGSTOP, LOST_AFTER_S + 4), (signal.SIGCONT, 0)):
            for rank in ("pause.0", "pause.1"):
                os.kill(pids[rank], number)
            time.sleep(pause_s)
        stopped = [f"{name}.{victim}" for name, (_, _, victim, number) in SCENARIOS.items() if number == signal.SIGSTOP]
        wait_for([folder / f"{rank}.ended" for rank in ranks if rank not in stopped], 60)
        for rank in stopped:
            assert not (folder / f"{rank}.ended").exists()
            os.kill(pids[rank], signal.SIGCONT)
        zoo.wait(30)
        yield {rank: read_ended(folder, rank, hit_at) for rank in ranks}
    finally:
        for rank, pid in pids.items():
            if not (folder / f"{rank}.ended").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        zoo.kill()
        zoo.wait(20)


def wait_for(files: list[Path], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while missing := [file.name for file in files if not file.exists()]:
        assert time.monotonic() < deadline, f"not there after {within_s} s: {missing}"
        time.sleep(0.05)


def read_ended(folder: Path, rank: str, hit_at: float) -> Ended:
    code, ended_at = json.loads((folder / f"{rank}.ended").read_text())
    out, err = ((folder / f"{rank}.{end}").read_text() for end in ("out", "err"))
    return Ended(code, ended_at - hit_at, out, err)


def gtddp_lines(end: Ended) -> list[str]:
    """What gtddp has said; torch may say things too."""
    return [line for line in end.err.splitlines() if line.startswith("gtddp:")]


@pytest.mark.parametrize(
    "name",
    [name for name, (_, _, victim, _) in SCENARIOS.items() if victim is not None and name != "unreachable"],
)
def test_the_lost_rank_is_named_and_nobody_else(name: str, ended: Mapping[str, Ended]) -> None:
    world, _, victim, _ = SCENARIOS[name]
    for rank in range(world):
        if rank == victim:
            continue
        end = ended[f"{name}.{rank}"]
        assert end.code == errors.FAILED, end
        (line,) = gtddp_lines(end)
        assert re.match(rf"gtddp: lost rank {victim} \(the {victim}th\): .*\. go on with --resume$", line), end
        assert set(re.findall(r"rank (\d)", line)) == {str(victim)}
        assert end.seconds < LOST_AFTER_S + 15
        if SCENARIOS[name][3] == signal.SIGKILL:
            # Of rank 0 also the store, which it held, is gone: whichever is seen first.
            assert DIED in line or (victim == 0 and "its store cannot be reached" in line), end


def test_without_connections_signs_of_life_tell_of_a_death(ended: Mapping[str, Ended]) -> None:
    """And each rank says that it has none."""
    first = gtddp_lines(ended["unreachable.1"])[0]
    assert first.startswith("gtddp: rank 1 (the 1th) does not reach rank 0 at 127.0.0.1:")
    assert first.endswith(f"(blocked): should either die, the other knows it after {LOST_AFTER_S:g} s only")
    for rank in (0, 1):
        end = ended[f"unreachable.{rank}"]
        assert end.code == errors.FAILED and end.seconds >= LOST_AFTER_S - 1.5, end
        assert "lost rank 2 (the 2th): gave no sign of life for" in gtddp_lines(end)[-1]


@pytest.mark.parametrize("rank", [rank for rank in SCENARIOS if SCENARIOS[rank][3] == signal.SIGSTOP])
def test_a_rank_that_was_stopped_knows_it_when_it_goes_on(rank: str, ended: Mapping[str, Ended]) -> None:
    victim = SCENARIOS[rank][2]
    end = ended[f"{rank}.{victim}"]
    assert end.code == errors.FAILED
    if victim == 0:  # it has the store, and finds the others gone
        assert re.search(r"gtddp: lost rank 1 \(the 1th\): .*; rank 2 \(the 2th\)|uncaught", end.err), end
    else:
        assert re.search(
            rf"gtddp: lost rank {victim} \(the {victim}th\): did not run for \d+ s, and the others", end.err
        )


def test_main_thread_is_told(ended: Mapping[str, Ended]) -> None:
    assert [ended[f"kill-1.{rank}"].out for rank in (0, 2)] == ["lost: [1]\n"] * 2


def test_error_of_a_rank_is_its_own(ended: Mapping[str, Ended]) -> None:
    """Found out without waiting for lost_after_s, and told to the others."""
    assert "uncaught: something of rank 1" in ended["own-error.1"].err
    assert "gtddp:" not in ended["own-error.1"].err
    for rank in (0, 2):
        end = ended[f"own-error.{rank}"]
        assert end.code == errors.FAILED
        assert "gtddp: lost rank 1 (the 1th): failed: RuntimeError: something of rank 1. go on" in end.err


@pytest.mark.parametrize("name", ["stalled-0", "stalled-1", "stalled-0-2"])
def test_others_write_their_stacks_where_a_watchdog_ends_a_rank(name: str, ended: Mapping[str, Ended]) -> None:
    gave_up = [int(rank) for rank in name.split("-")[1:]]
    for rank in range(3):
        end = ended[f"{name}.{rank}"]
        assert end.code == errors.FAILED, end
        # Whoever has given up has written its own, and has said so itself.
        assert end.out == ("" if rank in gave_up else "stacks\n"), end
        named = {int(number) for line in gtddp_lines(end) for number in re.findall(r"lost rank (\d)", line)}
        assert named == set() if rank in gave_up else named <= set(gave_up) and named, end
        assert end.seconds < LOST_AFTER_S + 10


def test_error_of_the_first_rank_which_holds_the_store(ended: Mapping[str, Ended]) -> None:
    assert ended["bad-input.0"].code == errors.BAD_INPUT
    assert gtddp_lines(ended["bad-input.0"]) == ["gtddp: error: something of rank 0"]
    for rank in (1, 2):
        assert ended[f"bad-input.{rank}"].code == errors.FAILED
        assert "lost rank 0 (the 0th): failed: UserError: something of rank 0. go on" in ended[f"bad-input.{rank}"].err


def test_nobody_lost(ended: Mapping[str, Ended]) -> None:
    for rank in range(3):
        end = ended[f"no-loss.{rank}"]
        assert (end.code, end.out) == (errors.OK, "lost: [] True\n")
        assert "gtddp:" not in end.err


@pytest.mark.parametrize(("name", "code"), [("well", errors.REQUEUE), ("pause", errors.OK)])
def test_ranks_that_end_well(name: str, code: int, ended: Mapping[str, Ended]) -> None:
    """Rank 0 stays with its store until all are done; standing still together is no loss."""
    for rank in range(SCENARIOS[name][0]):
        end = ended[f"{name}.{rank}"]
        assert end.code == code, end
        assert "gtddp:" not in end.err

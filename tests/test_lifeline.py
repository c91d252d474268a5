"""Connections of ranks to rank 0: real processes that are killed, that say goodbye, and a stranger."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import pytest

from gtddp_dist.lifeline import Followed, Held

RANK = """
import os, sys
from gtddp_dist.lifeline import Followed
told = lambda dead: print("dead", dict(dead), flush=True)
line = Followed(sys.argv[1], int(sys.argv[2]), f"the {sys.argv[2]}th", told)
print("here", flush=True)
if sys.stdin.readline() == "goodbye\\n":
    line.close()
os._exit(0)
"""
FIRST = """
import sys
from gtddp_dist.lifeline import Held
held = Held("127.0.0.1", 2, lambda dead: None)
print(held.where, flush=True)
if sys.stdin.readline() == "goodbye\\n":
    held.close()
"""


class Deaths(queue.Queue[Mapping[int, str]]):
    """What `OnDeath` was called with."""


def process(code: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


@pytest.fixture
def held(deaths: Deaths) -> Iterator[Held]:
    held = Held("127.0.0.1", 4, deaths.put)
    yield held
    held.close()


@pytest.fixture
def ranks(held: Held) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Ranks 1, 2 and 3, connected."""
    found = {rank: process(RANK, held.where, str(rank)) for rank in (1, 2, 3)}
    try:
        for one in found.values():
            assert one.stdout is not None and one.stdout.readline() == "here\n"
        yield found
    finally:
        for one in found.values():
            one.kill()
            one.communicate(timeout=20)


def test_one_that_is_killed_is_known_at_once(ranks: dict[int, subprocess.Popen[str]], deaths: Deaths) -> None:
    killed_at = time.monotonic()
    ranks[2].kill()
    assert deaths.get(timeout=5) == {2: "the 2th"}
    assert time.monotonic() - killed_at < 1.0
    assert deaths.empty()


def test_those_killed_together_are_told_of_together(ranks: dict[int, subprocess.Popen[str]], deaths: Deaths) -> None:
    for rank in (1, 3):
        ranks[rank].send_signal(signal.SIGKILL)
    assert deaths.get(timeout=5) == {1: "the 1th", 3: "the 3th"}


def test_one_that_says_goodbye_has_not_died(ranks: dict[int, subprocess.Popen[str]], deaths: Deaths) -> None:
    assert ranks[1].communicate("goodbye\n", timeout=20)[0] == ""
    ranks[2].kill()
    assert deaths.get(timeout=5) == {2: "the 2th"}  # and so not 1, which ended before


def test_one_that_is_stopped_has_not_died(ranks: dict[int, subprocess.Popen[str]], deaths: Deaths) -> None:
    ranks[1].send_signal(signal.SIGSTOP)
    with pytest.raises(queue.Empty):
        deaths.get(timeout=0.5)
    ranks[1].send_signal(signal.SIGCONT)


def test_rank_0s_death_and_goodbye_are_told_apart(ranks: dict[int, subprocess.Popen[str]], held: Held) -> None:
    held.close()
    for one in ranks.values():
        assert one.communicate("goodbye\n", timeout=20)[0] == ""


def test_rank_0s_death(deaths: Deaths) -> None:
    first = process(FIRST)
    assert first.stdout is not None
    line = Followed(first.stdout.readline(), 1, "the 1th", deaths.put)
    first.kill()
    assert deaths.get(timeout=5) == {0: ""}
    first.communicate(timeout=20)
    line.close()


def test_strangers_are_no_ranks(held: Held, ranks: dict[int, subprocess.Popen[str]], deaths: Deaths) -> None:
    where = json.loads(held.where)
    hello = {"word": where["word"], "rank": 1, "who": "somebody"}
    for words in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        json.dumps({**hello, "word": "guessed"}).encode() + b"\n",
        json.dumps([1]).encode() + b"\n",
        b"\xff" * 10_000,
        json.dumps(hello).encode(),  # cut short
    ):
        with socket.create_connection((where["address"], where["port"])) as connection:
            connection.sendall(words)
    with pytest.raises(queue.Empty):
        deaths.get(timeout=0.3)
    ranks[3].kill()
    assert deaths.get(timeout=5) == {3: "the 3th"}


def test_a_loopback_address_is_listened_at_alone(held: Held) -> None:
    assert held._server.getsockname()[0] == "127.0.0.1"


def test_other_hosts_reach_one_that_is_not(deaths: Deaths) -> None:
    held = Held(socket.gethostname(), 2, deaths.put)
    port = json.loads(held.where)["port"]
    for address in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
        where = json.dumps({**json.loads(held.where), "address": address, "port": port})
        line = Followed(where, 1, "the 1th", lambda dead: None)
        line._over = True
        line._connection.shutdown(socket.SHUT_RDWR)  # as if it died
        assert deaths.get(timeout=5) == {1: "the 1th"}
        line.close()
    held.close()

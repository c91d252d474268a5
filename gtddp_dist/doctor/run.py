"""The order of things: facts, folder, links, sums; each phase with all ranks, so that all come to the same result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore

from ..errors import FAILED, OK, UserError
from ..launch import RankMissing, Ranks, Rendezvous
from ..launch.pause import Pause
from ..launch.ranks import alone
from ..launch.rendezvous import START_WITHIN_S
from . import network
from .checks import Check, check_clocks, check_facts, guarded, told_by
from .facts import RankFacts, collect_facts
from .folder import check_folder
from .network import Link
from .report import render


def run_doctor(
    directory: Path,
    ranks: Ranks | None = None,
    *,
    as_json: bool = False,
    start_within_s: float = START_WITHIN_S,
    timeout_s: float = 30.0,
) -> int:
    """Checks whether these ranks can train together, and prints what was found, on rank 0.

    Every rank calls it. torch.distributed must not be initialised yet, and is not afterwards.

    Args:
        directory: where runs are to be written; it has to exist, and all ranks should see it.
        ranks: this process among the others (`gtddp_dist.launch.discover`); default: one process alone.
        as_json: prints {"checks": [...], "ranks": [...], "links": [...]} instead of tables.
        start_within_s: how long ranks wait for each other at first.
        timeout_s: how long each exchange and each look at the folder may take.

    Returns OK, or FAILED where there is a problem; warnings are none. The same on all ranks that met.
    """
    ranks = ranks or alone()
    own = collect_facts(ranks, directory)
    facts, checks, links = [own], list[Check](), list[Link]()
    try:
        meeting = Rendezvous(ranks, start_within_s)
        started = time.monotonic()
        facts = [RankFacts.from_json(text) for text in meeting.allgather("doctor", own.to_json())]
        waited = time.monotonic() - started
    except UserError as error:
        checks = [_missing(error), *check_facts(facts)]
        return _end(ranks, checks, facts, links, as_json)
    hosts = len({rank.host for rank in facts})
    where = f"{len(facts)} on {hosts} host{'s' if hosts > 1 else ''}"
    met = f"{where}, started by {ranks.started_by}, met in {waited:.1f} s"
    checks += [Check("ranks", "ok", met if len(facts) > 1 else "one"), *check_facts(facts)]
    try:
        checks.append(check_folder(directory, ranks.rank, meeting, timeout_s))
        _measure(ranks, facts, meeting, timeout_s, checks, links)
        meeting.barrier("doctor done", timeout_s)
    except RankMissing as error:
        checks.append(_missing(error))
        timeout_s = 1.0  # to wait for it once more is of no use
    except Exception as error:  # what was found so far is said all the same
        checks.append(Check("doctor", "problem", f"{type(error).__name__}: {error}", "report this"))
    code = _end(ranks, checks, facts, links, as_json)
    if dist.is_initialized():
        dist.destroy_process_group()
    _leave(meeting, ranks, timeout_s)
    return code


def _missing(error: UserError) -> Check:
    return Check("ranks", "problem", str(error), "the checks that need all ranks were left out, or not ended")


def _measure(
    ranks: Ranks,
    facts: Sequence[RankFacts],
    meeting: Rendezvous,
    timeout_s: float,
    checks: list[Check],
    links: list[Link],
) -> None:
    """Appends to `checks` and `links`."""
    plane, problem = None, ""
    try:
        ranks.keep_to_host()
        plane = network.start(facts, ranks.rank, PrefixStore("doctor", meeting.store), timeout_s)
        clock = network.read_clock()
    except (RuntimeError, ValueError) as error:
        problem = str(error).strip().partition("\n")[0]
    problems = meeting.allgather("group", problem, 3 * timeout_s)
    if plane is None or any(problems):
        told = told_by({rank: text for rank, text in enumerate(problems) if text})
        checks.append(
            Check(
                "process group",
                "problem",
                told,
                "ranks meet, but cannot open connections to each other: look for a firewall, or name the network to "
                "use (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
            )
        )
        return
    clocks = [json.loads(text) for text in meeting.allgather("clock", json.dumps(clock), timeout_s)]
    checks.append(guarded("clocks", lambda: check_clocks(clocks, facts)))
    network.measure_links(plane, facts, ranks.rank, meeting, timeout_s, links)
    wanted = len(network.pairs([rank.host for rank in facts]))
    checks.append(guarded("links", lambda: network.check_links(links, wanted)))
    checks.append(network.measure_sum(plane, ranks.world, ranks.rank, meeting, timeout_s))


def _end(ranks: Ranks, checks: list[Check], facts: list[RankFacts], links: list[Link], as_json: bool) -> int:
    failed = any(check.status == "problem" for check in checks)
    if ranks.rank == 0:
        if as_json:
            content = {
                "checks": [asdict(check) for check in checks],
                "ranks": [asdict(rank) for rank in facts],
                "links": [network.as_json(link) for link in links],
            }
            print(json.dumps(content, indent=1))
        else:
            print(render(checks, facts, links))
        sys.stdout.flush()
    elif ranks.world > len(facts):
        # Rank 0 may not be there to say it.
        print(f"gtddp doctor (rank {ranks.rank}): {checks[0].text}", file=sys.stderr, flush=True)
    return FAILED if failed else OK


def _leave(meeting: Rendezvous, ranks: Ranks, timeout_s: float) -> None:
    """Rank 0, which may hold the store, ends last: others might still ask it for the last answer."""
    if ranks.world == 1:
        return
    store = PrefixStore("doctor-end", meeting.store)
    try:
        store.set(str(ranks.rank), "ended")
        deadline, pause = time.monotonic() + timeout_s, Pause(1e-3, 0.1)
        others = [str(rank) for rank in range(1, ranks.world)]
        while ranks.rank == 0 and time.monotonic() < deadline and not store.check(others):
            pause()
    except RuntimeError as error:  # a rank was lost, rank 0 perhaps: that has been said already
        print(f"gtddp doctor: rank {ranks.rank}: {error}".partition("\n")[0], file=sys.stderr)

"""How fast ranks talk to each other: each link by itself, then all together; over gloo, or NCCL where GPUs allow it."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import Check, duration, size, told_by
from .facts import RankFacts
from .folder import Meeting

MOST_LINKS = 64
"""More are not measured: at a tenth of a second or so each, one would wait too long for them."""

LINK_BYTES = 8 << 20
SUM_BYTES = 16 << 20
PINGS = 50
REPEATS = 3

SLOW = 4.0
"""A link is named where it has less than this part of the bandwidth that is usual between such ranks."""

GIVE_UP_AFTER = 3
"""Links that failed, each after the time-out."""

MARGIN_S = 30.0
"""How much longer than a time-out the others wait for a rank to say that it had one."""

Kind = Literal["same host", "other host"]


@dataclass(frozen=True)
class Link:
    """Two ranks, and how fast they talk; None where that failed."""

    first: int
    second: int
    kind: Kind
    latency_s: float | None
    """One way, of 8 bytes: half of a round trip."""
    bytes_per_s: float | None
    """One way, of messages of 8 MiB."""
    problem: str = ""


@dataclass(frozen=True)
class Plane:
    """What data goes over."""

    backend: Literal["gloo", "nccl"]
    device: torch.device
    group: dist.ProcessGroup | None
    """None for the default group."""
    why: str

    def wait(self) -> None:
        """For what was given to the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_backend(facts: Sequence[RankFacts]) -> tuple[Literal["gloo", "nccl"], str]:
    """What the data of these ranks can go over, and why."""
    ids = [rank.device_id for rank in facts]
    if None in ids:
        return "gloo", "there is no GPU" if not any(ids) else "not every rank has a GPU"
    if len(set(ids)) < len(ids):
        return "gloo", "NCCL refuses several ranks on one GPU"
    if any(rank.no_kernels for rank in facts):
        return "gloo", "torch cannot compute on the GPU"
    if any(rank.nccl is None for rank in facts):
        return "gloo", "this build of torch is without NCCL"
    return "nccl", "every rank has a GPU of its own"


def start(facts: Sequence[RankFacts], rank: int, store: dist.Store, timeout_s: float) -> Plane:
    """Makes the groups. Raises RuntimeError, or what torch.distributed raises of that kind."""
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(facts), timeout=timeout)
    backend, why = choose_backend(facts)
    if backend == "gloo":
        return Plane("gloo", torch.device("cpu"), None, why)
    # Else a time-out would end the process instead of being raised.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    group = dist.new_group(list(range(len(facts))), backend="nccl", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return Plane("nccl", torch.device("cuda", torch.cuda.current_device()), group, why)


def pairs(hosts: Sequence[str], most: int = MOST_LINKS) -> list[tuple[int, int]]:
    """Which ranks are measured: neighbours, as in a pipeline, then one pair of ranks for each two hosts."""
    neighbours = [(rank, rank + 1) for rank in range(len(hosts) - 1)]
    first_of = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    across = itertools.combinations(sorted(first_of.values()), 2)
    return list(dict.fromkeys([*neighbours, *across]))[:most]


def measure_links(
    plane: Plane, facts: Sequence[RankFacts], rank: int, meeting: Meeting, timeout_s: float, links: list[Link]
) -> None:
    """Appends the links, the same on all ranks. One is measured after the other: they would disturb each other."""
    hosts = [one.host for one in facts]
    for first, second in pairs(hosts):
        told = ""
        if rank in (first, second):
            try:
                latency, speed = _measure_link(plane, first if rank == second else second, leads=rank == first)
                told = json.dumps([latency, speed, ""])
            except (RuntimeError, ValueError) as error:
                told = json.dumps([None, None, f"rank {rank}: {_line(error)}"])
        answers = meeting.allgather("link", told, timeout_s + MARGIN_S)
        mine, other = (json.loads(answers[end]) for end in (first, second))
        kind: Kind = "same host" if hosts[first] == hosts[second] else "other host"
        problem = "; ".join(text for text in (mine[2], other[2]) if text)
        links.append(Link(first, second, kind, None if problem else mine[0], None if problem else mine[1], problem))
        if sum(bool(link.problem) for link in links) == GIVE_UP_AFTER:
            break


def _measure_link(plane: Plane, peer: int, *, leads: bool) -> tuple[float, float]:
    """Latency in seconds and bytes a second, each one way."""
    latency = _round_trip(plane, torch.zeros(1, dtype=torch.float64, device=plane.device), peer, leads, PINGS) / 2
    large = torch.zeros(LINK_BYTES // 4, device=plane.device)
    return latency, LINK_BYTES / (_round_trip(plane, large, peer, leads, REPEATS) / 2)


def _round_trip(plane: Plane, tensor: Tensor, peer: int, leads: bool, count: int) -> float:
    """Seconds to the peer and back: the median, the first one not counted."""
    sent = tensor + 1
    seconds = []
    for _ in range(count + 1):
        started = time.perf_counter()
        if leads:
            dist.send(sent, peer, group=plane.group)
            dist.recv(tensor, peer, group=plane.group)
        else:
            dist.recv(tensor, peer, group=plane.group)
            dist.send(sent, peer, group=plane.group)
        plane.wait()
        seconds.append(time.perf_counter() - started)
    if not torch.equal(sent, tensor):
        raise ValueError(f"rank {peer} sent other numbers than arrived")
    return statistics.median(seconds[1:])


def check_links(links: Sequence[Link], wanted: int) -> Check:
    """`wanted`: how many links there are to measure."""
    bad = [link for link in links if link.problem]
    if bad:
        told = "; ".join(f"{link.first} - {link.second}: {link.problem}" for link in bad)
        return Check(
            "links",
            "problem",
            told + (f"; {wanted - len(links)} more not tried" if len(links) < wanted else ""),
            "look for a firewall between these hosts, and name the network to use: GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME",
        )
    slow = []
    for link in links:
        usual = statistics.median(other.bytes_per_s or 0.0 for other in links if other.kind == link.kind)
        if (link.bytes_per_s or 0.0) * SLOW < usual:
            slow.append(f"{link.first} - {link.second} ({size(link.bytes_per_s or 0.0)}/s, usual {size(usual)}/s)")
    if slow:
        advice = "look at the network of these hosts, and at their load"
        return Check("links", "warning", f"slow: {', '.join(slow)}", advice)
    return Check("links", "ok", f"{len(links)} measured" if links else "one rank")


def measure_sum(plane: Plane, world: int, rank: int, meeting: Meeting, timeout_s: float) -> Check:
    """An all-reduce over all ranks: that it is right, and how fast. The same on all ranks."""
    told: list[float | str | None]
    try:
        told = [*_sum(plane, world, rank), ""]
    except (RuntimeError, ValueError) as error:
        told = [None, _line(error)]
    answers = [json.loads(text) for text in meeting.allgather("sum", json.dumps(told), timeout_s + MARGIN_S)]
    name = f"all-reduce ({plane.backend})"
    bad = {rank: problem for rank, (_, problem) in enumerate(answers) if problem}
    if bad:
        return Check(name, "problem", told_by(bad), "see the links: which of them is broken?")
    seconds = max(seconds for seconds, _ in answers)
    text = f"{size(SUM_BYTES)} in {duration(seconds)}"
    if world > 1:
        text += f", {size(2 * (world - 1) / world * SUM_BYTES / seconds)}/s on each link of a ring"
    elif plane.backend == "nccl":
        text += "; NCCL between several ranks was not tested: there is one"
    return Check(name, "ok", f"right; {text} ({plane.why})")


def _sum(plane: Plane, world: int, rank: int) -> list[float]:
    """Seconds that it takes: the median."""
    tensor = torch.empty(SUM_BYTES // 4, device=plane.device)
    seconds = []
    for _ in range(REPEATS + 1):
        tensor.fill_(rank + 1)
        plane.wait()
        started = time.perf_counter()
        dist.all_reduce(tensor, group=plane.group)
        plane.wait()
        seconds.append(time.perf_counter() - started)
        if not bool((tensor == world * (world + 1) // 2).all()):
            raise ValueError(f"the sum is wrong: {tensor[0].item()} instead of {world * (world + 1) // 2}")
    return [statistics.median(seconds[1:])]


def read_clock() -> float:
    """What the clock says at the moment when all ranks have met."""
    dist.barrier()
    return time.time()


def as_json(link: Link) -> dict[str, int | float | str | None]:
    return dict(asdict(link))


def _line(error: Exception) -> str:
    """The first line of an error: those of torch go on with a page of addresses."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

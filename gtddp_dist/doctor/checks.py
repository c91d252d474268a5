"""What the facts of all ranks say, together: each check a function of them, without side effects."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..launch.rendezvous import ranks_named
from .facts import RankFacts

Status = Literal["ok", "warning", "problem"]

GIB = 1 << 30

DISK_PROBLEM = GIB // 2
DISK_WARNING = 5 * GIB
"""Free, where runs are written: room for some checkpoints."""

SHARED_MEMORY_WARNING = GIB
"""Free in /dev/shm: containers often have 64 MiB, with which NCCL and loaders of data fail."""

SOCKETS_BY_RANK = 32
"""How many sockets a rank may have open to each other rank: a few for each process group."""

FILES_OF_OWN = 512
"""How many files a rank opens besides: libraries, logs, data."""

CLOCK_WARNING_S = 1.0


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    text: str
    """What was found, with the ranks that it was found on."""
    advice: str = ""
    """What to do about it; empty where all is well."""


def check_facts(facts: Sequence[RankFacts]) -> list[Check]:
    """All checks that need nothing but the facts of every rank."""
    return [guarded(name, lambda check=check: check(facts)) for name, check in _CHECKS.items()]  # type: ignore[misc]


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """What `check` finds; a problem where it fails itself, so that it never hides the others."""
    try:
        return check()
    except Exception as error:
        return Check(name, "problem", f"the check itself failed: {type(error).__name__}: {error}", "report this")


def _versions(facts: Sequence[RankFacts]) -> Check:
    told: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted({name for rank in facts for name in _versions_of(rank)}):
        difference = _differences(facts, lambda rank, name=name: _versions_of(rank).get(name, "none"))  # type: ignore[misc]
        if difference:
            told[name in _MUST_BE_ALIKE].append(f"{name}: {difference}")
    if not told[True] and not told[False]:
        return Check("versions", "ok", "the same on all ranks" if len(facts) > 1 else "one rank")
    return Check(
        "versions",
        "problem" if told[True] else "warning",
        ". ".join(told[True] + told[False]),
        "install the same versions on every host, or start all ranks from one environment on a shared disk",
    )


_MUST_BE_ALIKE = ("Python", "revision of the code", "CUDA", "NCCL", "gtddp-dist", "torch", "deepspeed")
"""With others of these, ranks exchange messages that they understand differently, or compute differently."""


def _versions_of(rank: RankFacts) -> dict[str, str]:
    packages = {name: version or "not installed" for name, version in rank.packages.items()}
    return {
        **packages,
        "Python": ".".join(rank.python.split(".")[:2]),
        "revision of the code": rank.revision or "none",
        "CUDA": rank.cuda or "none",
        "NCCL": rank.nccl or "none",
    }


def _deepspeed(facts: Sequence[RankFacts]) -> Check:
    missing = [rank.rank for rank in facts if not rank.packages.get("deepspeed")]
    if not missing:
        return Check("deepspeed", "ok", "installed")
    return Check(
        "deepspeed",
        "problem" if len(facts) > 1 else "warning",
        f"not installed on {ranks_named(missing)}; training on several ranks needs it",
        "pip install 'gtddp-dist[cluster]'",
    )


def _devices(facts: Sequence[RankFacts]) -> Check:
    without = {rank.rank: rank.no_kernels for rank in facts if rank.no_kernels}
    if without:
        text = told_by(without)
        volta = any(rank.no_kernels and (rank.capability or "").startswith("7.0") for rank in facts)
        advice = "pip install -c constraints/v100.txt" if volta else "install a build of torch for this GPU"
        return Check("devices", "problem", text, advice)
    sharing = {rank.rank: rank.device_id for rank in facts if rank.device_id is not None}
    shared = [ranks_named(who) for who in _holders(sharing).values() if len(who) > 1]
    if shared:
        return Check(
            "devices",
            "problem",
            f"on one GPU: {'; '.join(shared)}. NCCL refuses several ranks on one GPU",
            "start as many ranks on a host as it has GPUs, or train.device=cpu",
        )
    if 0 < len(sharing) < len(facts):
        missing = [rank.rank for rank in facts if rank.device_id is None]
        return Check(
            "devices",
            "problem",
            f"no GPU on {ranks_named(missing)}, but on the other ranks",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES there, and whether that torch is a CUDA build",
        )
    mixed = _differences(facts, lambda rank: rank.device)
    if mixed:
        return Check("devices", "warning", mixed, "the slowest sets the pace: give it fewer layers (gtddp plan)")
    return Check("devices", "ok", facts[0].device + (f" (compute capability {facts[0].capability})" if sharing else ""))


def _names(facts: Sequence[RankFacts]) -> Check:
    several = len({rank.host for rank in facts}) > 1
    bad = [rank for rank in facts if rank.loopback] if several else []
    if not bad:
        return Check("host names", "ok", "lead to addresses that others can reach" if several else "one host")
    hosts = ", ".join(sorted({f"{rank.host} is {rank.loopback}" for rank in bad}))
    return Check(
        "host names",
        "warning",
        f"lead to the host itself: {hosts} ({ranks_named([rank.rank for rank in bad])}), where no other host gets to",
        "give the host its address in /etc/hosts, or name the network: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
    )


def _open_files(facts: Sequence[RankFacts]) -> Check:
    needed = FILES_OF_OWN + SOCKETS_BY_RANK * (len(facts) - 1)
    low = [rank for rank in facts if rank.open_files is not None and rank.open_files < needed]
    if low:
        return Check(
            "open files",
            "warning",
            f"at most {min(rank.open_files or 0 for rank in low)} on {ranks_named([rank.rank for rank in low])}; "
            f"{len(facts)} ranks may need {needed}",
            f"ulimit -n {max(4096, needed)} where ranks are started",
        )
    limits = [rank.open_files for rank in facts if rank.open_files is not None]
    return Check("open files", "ok", f"at least {min(limits)} allowed, {needed} needed" if limits else "no limit")


def _disk(facts: Sequence[RankFacts]) -> Check:
    known = {rank.rank: rank.disk_free for rank in facts if rank.disk_free is not None}
    if not known:
        return Check("free disk", "warning", "unknown on all ranks", "see what is said of the shared folder")
    least = min(known.values())
    if least >= DISK_WARNING:
        return Check("free disk", "ok", f"{size(least)} or more")
    low = [rank for rank, free in known.items() if free < DISK_WARNING]
    return Check(
        "free disk",
        "problem" if least < DISK_PROBLEM else "warning",
        f"{size(least)} on {ranks_named(low)}",
        "make room, choose another folder (run.dir), or keep fewer checkpoints (checkpoint.keep)",
    )


def _shared_memory(facts: Sequence[RankFacts]) -> Check:
    known = {rank.rank: rank.shared_memory_free for rank in facts if rank.shared_memory_free is not None}
    low = [rank for rank, free in known.items() if free < SHARED_MEMORY_WARNING]
    if low:
        return Check(
            "/dev/shm",
            "warning",
            f"{size(min(known.values()))} free on {ranks_named(low)}",
            "start the container with more (docker --shm-size=8g, --ipc=host), or remove what other jobs left there",
        )
    return Check("/dev/shm", "ok", f"{size(min(known.values()))} or more free" if known else "there is none")


def _threads(facts: Sequence[RankFacts]) -> Check:
    crowded = []
    for host in sorted({rank.host for rank in facts}):
        there = [rank for rank in facts if rank.host == host]
        threads, cores = sum(rank.threads for rank in there), max(rank.usable_cores for rank in there)
        if len(there) > 1 and threads > cores:
            crowded.append((f"{host}: {threads} threads of {len(there)} ranks on {cores} cores", cores / len(there)))
    if not crowded:
        return Check("threads", "ok", "no more than there are cores")
    fair = min(fair for _, fair in crowded)
    advice = f"export OMP_NUM_THREADS={int(fair)}" if fair >= 1 else "OMP_NUM_THREADS=1, and fewer ranks there"
    return Check("threads", "warning", "; ".join(text for text, _ in crowded), advice)


def _unknown(facts: Sequence[RankFacts]) -> Check:
    found = [(f"{name}: {why}", rank.rank) for rank in facts for name, why in rank.unknown.items()]
    if not found:
        return Check("facts", "ok", "all could be found out")
    told = [f"{what} ({ranks_named([rank for other, rank in found if other == what])})" for what, _ in found]
    return Check("facts", "warning", "not known: " + "; ".join(dict.fromkeys(told)), "see what is said there")


_CHECKS: dict[str, Callable[[Sequence[RankFacts]], Check]] = {
    "versions": _versions,
    "deepspeed": _deepspeed,
    "devices": _devices,
    "host names": _names,
    "threads": _threads,
    "open files": _open_files,
    "free disk": _disk,
    "/dev/shm": _shared_memory,
    "facts": _unknown,
}


def check_clocks(seconds: Sequence[float], facts: Sequence[RankFacts]) -> Check:
    """`seconds`: what the clock of each rank said at one moment."""
    middle = sorted(seconds)[len(seconds) // 2]
    apart = max(seconds) - min(seconds)
    if apart < CLOCK_WARNING_S:
        # Below what the meeting of ranks itself takes, a figure would say nothing.
        return Check("clocks", "ok", f"less than {max(0.1, apart):.1f} s apart" if len(seconds) > 1 else "one rank")
    wrong = [
        f"rank {rank.rank} ({rank.host}) {second - middle:+.1f} s"
        for rank, second in zip(facts, seconds, strict=True)
        if abs(second - middle) >= CLOCK_WARNING_S / 2
    ]
    return Check(
        "clocks",
        "warning",
        f"{apart:.1f} s apart: {', '.join(wrong)}",
        "set the clocks (chrony, ntpd): times in logs and of files do not compare",
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def duration(seconds: float) -> str:
    """A short time for people."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} us"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _differences(facts: Sequence[RankFacts], get: Callable[[RankFacts], Hashable]) -> str:
    """The values and who holds them, the most common first; empty where all hold the same."""
    holders = _holders({rank.rank: get(rank) for rank in facts})
    if len(holders) < 2:
        return ""
    hosts = {rank.rank: rank.host for rank in facts}
    return "; ".join(
        f"{value} on {ranks_named(who)} ({', '.join(sorted({hosts[rank] for rank in who}))})"
        for value, who in sorted(holders.items(), key=lambda item: (-len(item[1]), item[1]))
    )


def told_by(texts: Mapping[int, str]) -> str:
    """What ranks say, each text once, with those that say it."""
    return "; ".join(f"{ranks_named(who)}: {text}" for text, who in _holders(texts).items())


_Value = TypeVar("_Value", bound=Hashable)


def _holders(values: Mapping[int, _Value]) -> dict[_Value, list[int]]:
    holders: dict[_Value, list[int]] = {}
    for rank, value in values.items():
        holders.setdefault(value, []).append(rank)
    return holders

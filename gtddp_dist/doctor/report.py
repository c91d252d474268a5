"""What was found, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from .checks import Check, duration, size
from .facts import RankFacts
from .network import Link

_WIDTH = 96


def render(checks: Sequence[Check], facts: Sequence[RankFacts], links: Sequence[Link]) -> str:
    """Tables of the ranks, the links and the checks, then what to do."""
    parts = [_ranks(facts)]
    if links:
        parts.append(_links(links))
    parts.append(_checks(checks))
    for check in checks:
        if check.advice:
            parts.append(_wrapped(f"{check.status}: {check.name}: ", f"{check.text}.\nWhat to do: {check.advice}."))
    problems, warnings = (sum(check.status == status for check in checks) for status in ("problem", "warning"))
    parts.append(f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    return "\n\n".join(parts)


def _ranks(facts: Sequence[RankFacts]) -> str:
    rows = [
        (
            rank.rank,
            rank.host,
            rank.device,
            rank.capability or "-",
            rank.python,
            *(rank.packages.get(name) or "-" for name in ("gtddp-dist", "torch", "deepspeed")),
            rank.cuda or "-",
            rank.nccl or "-",
        )
        for rank in facts
    ]
    headers = ("rank", "host", "device", "capability", "Python", "gtddp-dist", "torch", "deepspeed", "CUDA", "NCCL")
    return tabulate(rows, headers, disable_numparse=True)


def _links(links: Sequence[Link]) -> str:
    rows = [
        (
            f"{link.first} - {link.second}",
            link.kind,
            "failed" if link.latency_s is None else duration(link.latency_s),
            "failed" if link.bytes_per_s is None else f"{size(link.bytes_per_s)}/s",
        )
        for link in links
    ]
    return tabulate(rows, ("link", "", "latency", "bandwidth"), disable_numparse=True)


def _checks(checks: Sequence[Check]) -> str:
    rows = [(check.name, check.status, check.text if check.status == "ok" else "see below") for check in checks]
    return tabulate(rows, ("check", "result", ""), disable_numparse=True)


def _wrapped(start: str, text: str) -> str:
    wrapped = []
    for number, line in enumerate((start + text).split("\n")):
        first = "  " if number else ""
        filled = textwrap.fill(line, _WIDTH, initial_indent=first, subsequent_indent="  ", break_on_hyphens=False)
        wrapped.append(filled)
    return "\n".join(wrapped)


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"

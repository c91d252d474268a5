"""The end of a run's `metrics.jsonl`, read without the rest of it. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

METRICS = "metrics.jsonl"
_TAIL = 1 << 13
_LONGEST_TAIL = 1 << 19  # an evaluation may be thousands of lines back


def last_step(run: Path) -> int:
    """The last step in the metrics of the run in that directory, and 0 where there is none. Raises UserError."""
    return int(newest_values(run / METRICS, ("step",)).get("step", 0))


def newest_values(file: Path, names: Sequence[str]) -> dict[str, float]:
    """The newest value of each name in a run's `metrics.jsonl`, read from its end; names that it lacks are left out.

    A last line without its end is left out too: it is being written. Raises UserError for a line that is not JSON.
    """
    found: dict[str, float] = {}
    try:
        with open(file, "rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            length = 0
            while len(found) < len(names) and length < min(end, _LONGEST_TAIL):
                length = min(max(_TAIL, 8 * length), end, _LONGEST_TAIL)
                stream.seek(end - length)
                tail = stream.read(length)
                tail = tail[: tail.rfind(b"\n") + 1]
                for name in names:
                    at = tail.rfind(f'"{name}":'.encode())
                    first = tail.rfind(b"\n", 0, at) + 1
                    if name not in found and at >= 0 and (first > 0 or length == end):
                        found[name] = _number(tail[first : tail.index(b"\n", at)], name, file)
    except FileNotFoundError:
        pass
    return found


def _number(line: bytes, name: str, file: Path) -> float:
    try:
        return float(json.loads(line)[name])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: a line that has no number {name}: {error}: {line[:80]!r}") from error

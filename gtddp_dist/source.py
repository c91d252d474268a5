"""The code that a run was made with: its git revision, and what differs from it. No torch."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import TypedDict

LARGEST_PATCH = 1 << 20
"""Bytes; of a larger difference only a summary is kept."""

_NO_PROGRAMS = ("--no-ext-diff", "--no-textconv")
"""A user's own programs for differences make what no `git apply` reads."""

_FOLDER = Path(__file__).resolve().parent


class Revision(TypedDict):
    """A revision of the code."""

    revision: str
    changed: bool
    """Whether tracked files differ from it."""


def git_revision(folder: Path = _FOLDER) -> Revision | None:
    """Revision of the package's code in `folder`; None where it is not in a git checkout."""
    # An installed package may lie inside somebody else's checkout; only tracked files have that checkout's revision.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if revision is None or changes is None else {"revision": revision.strip(), "changed": bool(changes)}


@functools.cache  # a process runs one code; a sweep makes a thousand run directories
def source_patch() -> str | None:
    """What tracked files differ in from the revision, as `git diff` shows it; None where there is no difference."""
    revision = git_revision()
    if revision is None or not revision["changed"]:
        return None
    patch = _git(_FOLDER, "diff", *_NO_PROGRAMS, "HEAD") or ""
    if len(patch.encode()) > LARGEST_PATCH:
        summary = _git(_FOLDER, "diff", *_NO_PROGRAMS, "--stat", "HEAD")
        patch = f"The difference is larger than {LARGEST_PATCH} bytes; a summary:\n{summary}"
    return f"# to git revision {revision['revision']}\n{patch}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None  # no git on this machine: the revision is unknown
    return done.stdout if done.returncode == 0 else None

"""Clusters for the tests of this folder. They run one after another, and share one cluster of many small nodes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster

NODES = 32


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder with a short path (a socket's may have 107 letters) that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="gtddp-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def started(cluster: Cluster) -> Cluster:
    """The same, started; skips where Slurm is missing and cannot be installed, except in CI, where that is an error."""
    done = cluster.script("start")
    if done.returncode == 0:
        return cluster
    reason = f"no Slurm: {done.stderr.strip()}"
    in_ci = os.environ.get("CI", "") not in ("", "false", "0")
    if not in_ci and ("missing: " in done.stderr or "needs " in done.stderr):
        pytest.skip(reason)
    pytest.fail(reason)


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster on the loopback interface."""
    running = Cluster(folder / "slurm", {"SLURM_LOCAL_NODES": str(NODES)})
    try:
        yield started(running)
    finally:
        assert running.script("stop").returncode == 0


@pytest.fixture(scope="session")
def linked_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster whose nodes are joined by links."""
    running = Cluster(folder / "linked", {"SLURM_LOCAL_NODES": "3", "SLURM_LOCAL_NETWORK": "veth"})
    try:
        yield started(running)
    finally:
        assert running.script("stop").returncode == 0

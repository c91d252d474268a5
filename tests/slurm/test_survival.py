"""What a training run survives on a real Slurm, and how it ends.

A story is one job and what befalls it, on nodes of its own. All stories of the session run at the same time, a few at
once: most of each is waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from . import script_stories, stories
from .cluster import ROOT, Cluster
from .conftest import NODES
from .runs import Place, Run
from .stories import LATE_S

AT_ONCE = 4


@dataclass(frozen=True)
class Cast:
    """A story, and how many nodes it needs."""

    story: Callable[[Place, Callable[[], Run]], Run | None]
    nodes: int
    linked: bool = False
    """On nodes that are joined by links."""


# Those that take longest come first.
STORIES = {
    item.story.__name__: item
    for item in (
        Cast(stories.unbroken, 2),
        Cast(stories.time_limit, 1),
        Cast(stories.lost_link, 3, linked=True),
        Cast(stories.lost_node, 3),
        Cast(stories.lost_slurmd, 3),
        Cast(stories.orphaned, 2),
        Cast(stories.preemption, 1),
        Cast(script_stories.scaling_sbatch, 1),
        Cast(stories.killed_rank, 2),
        Cast(stories.asked, 1),
        Cast(script_stories.array_sbatch, 2),
        Cast(stories.killed_slurmd, 2),
        Cast(stories.requeued, 1),
        Cast(stories.cancelled, 1),
        Cast(script_stories.train_nodes_sbatch, 2),
        Cast(script_stories.node_without_the_code, 2),
        Cast(script_stories.directory_not_shared, 2),
    )
}


@pytest.fixture(scope="module")
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Run | None]]]:
    """All stories that this session has tests of, begun in their order."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = {item.callspec.params["name"] for item in items if item.originalname == "test_story"}
    first = 0
    futures: dict[str, Future[Run | None]] = {}
    clusters: list[Cluster] = []

    def unbroken() -> Run:
        run = futures["unbroken"].result(LATE_S)
        assert run is not None
        return run

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, item in STORIES.items():
            if name not in wanted and name != "unbroken":
                continue
            cluster: Cluster = request.getfixturevalue("linked_cluster" if item.linked else "cluster")
            clusters.append(cluster)
            nodes = [f"node{i}" for i in range(item.nodes)] if item.linked else []
            if not item.linked:
                nodes = [f"node{i}" for i in range(first, first + item.nodes)]
                first += item.nodes
            assert first <= NODES, "more nodes are needed: NODES in conftest.py"
            cluster.name_nodes(nodes, name)
            place = Place(cluster, nodes, name, tmp_path_factory.mktemp(name))
            futures[name] = pool.submit(item.story, place, unbroken)
        yield futures
        for future in futures.values():
            future.cancel()
    for cluster in clusters:  # what a story has left that failed
        cluster.run("scancel", "--user=root")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STORIES)
def test_story(name: str, told: dict[str, Future[Run | None]]) -> None:
    told[name].result()


def test_every_script_is_submitted() -> None:
    told = {name.replace("_", "-").replace("-sbatch", ".sbatch") for name in STORIES} | {"train.sbatch"}  # asked
    assert {file.name for file in (ROOT / "slurm").glob("*.sbatch")} <= told

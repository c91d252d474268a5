"""slurm/local_cluster.sh itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SCRIPT, Cluster, wait_until
from .conftest import started

HELLO = "#!/bin/bash\nsrun bash -c 'echo $(hostname) $SLURM_PROCID'\nsleep 60\n"


def links() -> set[str]:
    """Names of all network links of this machine."""
    done = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True, timeout=20)
    return {link["ifname"] for link in json.loads(done.stdout)}


def mounts(under: Path) -> list[str]:
    """Mounts below a folder, or of something in it, that this process sees."""
    return [line for line in Path("/proc/mounts").read_text().splitlines() if str(under) in line]


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked about since (a zombie) has."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def carrying(root: Path) -> list[str]:
    """Processes that have a cluster's folder in their environment or their words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(process / name).read_bytes() for name in ("environ", "cmdline")]
        except OSError:
            continue
        if process.name != str(os.getpid()) and any(str(root).encode() in text for text in texts):
            found.append(texts[1].decode(errors="replace").replace("\0", " "))
    return found


@pytest.fixture
def own(folder: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of a test's own, with the network that the test asks for; it is not started yet."""
    network = getattr(request, "param", "loopback")
    cluster = Cluster(folder / f"own-{network}", {"SLURM_LOCAL_NETWORK": network})
    yield cluster
    cluster.script("stop")


@pytest.mark.parametrize("own", ["loopback", "veth"], indirect=True)
def test_nothing_is_left_after_stop(own: Cluster, tmp_path: Path) -> None:
    before = links() if own.knobs["SLURM_LOCAL_NETWORK"] == "veth" else set()
    started(own)
    assert own.script("status").returncode == 0
    (tmp_path / "hello").write_text(HELLO)
    job = own.sbatch(tmp_path, "--nodes=2", "--ntasks-per-node=2", "--output=out", "hello")
    out = tmp_path / "out"
    wait_until(lambda: out.exists() and out.read_text().count("\n") == 4, 20, lambda: f"output of {own.job(job)}")
    assert sorted(out.read_text().splitlines()) == ["node0 0", "node0 1", "node1 2", "node1 3"]
    if before:
        assert links() > before
    spaces = own.processes()
    assert len(spaces) > 10  # the job's script and its sleep too
    assert own.script("stop").returncode == 0
    assert [pid for pid in spaces if runs(pid)] == []
    assert carrying(own.root) == []
    assert mounts(own.root) == []
    assert not before or links() == before
    assert own.script("status").returncode == 1
    assert own.script("stop").returncode == 0  # again


def test_start_brings_back_what_has_died(own: Cluster) -> None:
    started(own)
    first = own.box("node0")
    own.kill_slurmd("node1")
    own.kill_node("node0")
    assert "node1 slurmd: does not run" in own.script("status").stdout
    started(own)
    assert own.box("node0") != first
    assert own.script("status").returncode == 0
    second = own.box("node0")
    started(own)  # again: nothing is started twice
    assert own.box("node0") == second
    assert own.script("start", SLURM_LOCAL_NODES="3").returncode == 1
    own.kill_node("head")
    started(own)
    assert own.box("node0") != second  # nodes do not outlive their controller


def test_a_start_that_fails_leaves_nothing(own: Cluster, tmp_path: Path) -> None:
    started(own)  # so that Slurm is there
    own.script("stop")
    (tmp_path / "slurmd").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "slurmd").chmod(0o755)
    done = own.script("start", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1 and "did not start" in done.stderr
    assert carrying(own.root) == [] and mounts(own.root) == []


def test_what_is_missing_is_said(folder: Path) -> None:
    programs = folder / "programs"  # of somebody who is not root and has no Slurm
    programs.mkdir()
    for name in ("cksum", "id", "paste", "realpath", "dirname", "mkdir", "sed"):
        (programs / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    script = shutil.copy(SCRIPT, folder / "start.sh")
    done = subprocess.run(
        ["/bin/bash", script, "start"],
        env={"PATH": str(programs), "SLURM_LOCAL_ROOT": str(folder / "none")},
        user=65534,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "missing: " in done.stderr and "apt-get install" in done.stderr

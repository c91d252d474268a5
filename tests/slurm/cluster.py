"""A cluster of `slurm/local_cluster.sh`: starting it, asking it, and what befalls it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "local_cluster.sh"
PACE = Path(__file__).resolve().parent / "pace"
COMMAND_S = 60.0
"""For any one command of Slurm."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def wait_until(true: Callable[[], bool], within_s: float, what: str | Callable[[], str]) -> None:
    """Returns once it is true; fails with `what` was waited for after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.2)


@dataclass
class Cluster:
    """A cluster in the folder `root`, with the knobs of `slurm/local_cluster.sh`."""

    root: Path
    knobs: Mapping[str, str] = field(default_factory=dict)

    def script(self, word: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs `slurm/local_cluster.sh` with a word."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return subprocess.run(
            ["bash", str(SCRIPT), word],
            env={**kept, "SLURM_LOCAL_ROOT": str(self.root), **self.knobs, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def environment(self, **variables: str) -> dict[str, str]:
        """Of a shell that uses the cluster, with the command gtddp of this checkout on its path."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            **kept,
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": path,
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": f"{ROOT}:{PACE}",
            **variables,
        }

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of Slurm, or gtddp."""
        return subprocess.run(
            words,
            cwd=cwd,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints; it has to succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"
        return done.stdout

    def sbatch(self, cwd: Path, *words: str, **variables: str) -> str:
        """Submits a script; the number of the job."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells of a job."""
        told = self.ask("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", told))

    def state(self, number: str) -> str:
        """Such as RUNNING."""
        return self.job(number)["JobState"]

    def ends(self, number: str, within_s: float) -> dict[str, str]:
        """Waits until a job has ended for good; what is told of it then."""
        wait_until(
            lambda: self.state(number) in ENDED, within_s, lambda: f"end of job {number}, which is {self.job(number)}"
        )
        return self.job(number)

    def hosts(self, number: str) -> list[str]:
        """Nodes of a job that runs, the first one first."""
        return self.ask("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def name_nodes(self, nodes: Sequence[str], feature: str) -> None:
        """Gives nodes a feature, by which one test keeps them to itself."""
        for node in nodes:
            features = f"local,v100,{feature}"
            self.ask(
                "scontrol",
                "update",
                f"NodeName={node}",
                f"AvailableFeatures={features}",
                f"ActiveFeatures={features}",
            )

    # What befalls it

    def box(self, name: str) -> int:
        """The first process of a node, by its number on this machine."""
        return int((self.root / name / "box.pid").read_text())

    def in_node(self, name: str, *words: str) -> None:
        """Runs a command on a node."""
        subprocess.run(
            ["nsenter", "--target", str(self.box(name)), "--all", "--", *words], check=True, timeout=COMMAND_S
        )

    def kill_slurmd(self, node: str) -> None:
        """Kills a node's slurmd, and leaves what it has started."""
        self.in_node(node, "kill", "-KILL", (self.root / node / "slurmd.pid").read_text().strip())

    def start_slurmd(self, node: str) -> None:
        """Starts the slurmd of a node that is there."""
        self.in_node(node, "env", f"SLURM_CONF={self.root}/slurm.conf", "slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills all of a node."""
        subprocess.run(["kill", "-KILL", str(self.box(node))], check=True, timeout=COMMAND_S)

    def link(self, node: str, state: str) -> None:
        """Takes the link of a node up or down."""
        name = (self.root / node / "link").read_text().strip()
        subprocess.run(["ip", "link", "set", name, state], check=True, timeout=COMMAND_S)

    def processes(self) -> list[int]:
        """All of the cluster, by their namespaces."""
        boxes = {os.readlink(f"/proc/{self.box(file.parent.name)}/ns/mnt") for file in self.root.glob("*/box.pid")}
        return [pid for pid, space in _mount_spaces() if space in boxes]

    def ranks(self, run: str, node: str) -> dict[int, list[int]]:
        """Rank -> its processes on a node, of which there is one once it is there, by their numbers on this machine."""
        space = os.readlink(f"/proc/{self.box(node)}/ns/mnt")
        found: dict[int, list[int]] = {}
        for pid, other in _mount_spaces():
            if other != space:
                continue
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().decode()
            except OSError:
                continue
            number = re.search(r"(?:^|\0)SLURM_PROCID=(\d+)", variables)
            if number and "python" in words[0] and run in " ".join(words):
                found.setdefault(int(number[1]), []).append(pid)
        return found

    def rank(self, run: str, node: str, rank: int) -> int:
        """The process of a rank of a run on a node, by its number on this machine."""
        found = self.ranks(run, node).get(rank, [])
        assert len(found) == 1, f"rank {rank} of {run} on {node}: {found}"
        return found[0]


def _mount_spaces() -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(folder.name), os.readlink(folder / "ns" / "mnt")))
        except OSError:
            continue  # it has ended meanwhile
    return found

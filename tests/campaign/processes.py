"""Programs under watch: all processes that descend from them, and what these leave behind.

A process is known by a word in its environment that everything inherits that a program starts. Ranks are in sessions
and process groups of their own, so that neither of these tells.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ranks.server import environment

WORD = "GTDDP_CAMPAIGN"
RANK = re.compile(rb"(?:RANK|PMI_RANK|SLURM_PROCID)=(\d+)")
SHM = Path("/dev/shm")
SAMPLE_S = 0.25
CACHE = "torchinductor_"
"""Folder that torch makes for all programs of a user, and keeps."""
SETTLE_S = 10.0
"""How long the kernel may take to give back what an ended process had."""


class Watched:
    """All that is started with `variables` in its environment, and all that descends from it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.word = f"{WORD}={secrets.token_hex(8)}".encode()
        self.tmp = folder / f"{name}-tmp"
        self.tmp.mkdir()
        self.variables = {WORD: self.word.decode().partition("=")[2], "TMPDIR": str(self.tmp)}
        self._shm = set(os.listdir(SHM))
        self._ports: set[int] = set()
        self._shared: set[str] = set()
        self._sampled = 0.0

    def processes(self) -> dict[int, bytes]:
        """Those that live, with their environment."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                variables = (folder / "environ").read_bytes()
                if self.word in variables.split(b"\0"):
                    found[int(folder.name)] = variables
        return found

    def sample(self) -> None:
        """Notes from time to time what they have of what could be left behind: others on this machine have such too."""
        if time.monotonic() > self._sampled + SAMPLE_S:
            self._note(self.processes())

    def _note(self, processes: Mapping[int, bytes]) -> None:
        self._ports |= _listening(processes)
        new = set(os.listdir(SHM)) - self._shm
        self._shared |= {name for name in new if any(_has_mapped(process, name) for process in processes)}
        self._sampled = time.monotonic()

    def leftovers(self) -> list[str]:
        """What is left of it, once no process should be: processes, ports, shared memory, temporary files."""
        deadline = time.monotonic() + SETTLE_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self) -> list[str]:
        processes = [f"process {process}" for process in self.processes()]
        listening = {inode: port for inode, port in _listening_inodes().items() if port in self._ports}
        ports = [f"port {port} ({_who_has(f'socket:[{inode}]')})" for inode, port in sorted(listening.items())]
        shm = [f"/dev/shm/{name}" for name in sorted(self._shared & set(os.listdir(SHM)))]
        files = [path.name for path in self.tmp.iterdir() if not path.name.startswith(CACHE)]
        return [*processes, *ports, *shm, *(f"$TMPDIR/{name}" for name in sorted(files))]

    def kill(self) -> None:
        """Ends whoever is left of it, and those that they start meanwhile; returns when they are gone."""
        deadline = time.monotonic() + SETTLE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)


class Program(Watched):
    """A program and all that descends from it. Its folder gets `<name>.out` and `<name>.err`."""

    def __init__(self, folder: Path, name: str, argv: Sequence[str], variables: Mapping[str, str]) -> None:
        super().__init__(folder, name)
        self._files = [folder / f"{name}.{ending}" for ending in ("out", "err")]
        self.started = time.monotonic()
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                start_new_session=True,
                env={**environment(**self.variables), **variables},
            )

    @property
    def text(self) -> str:
        """All that was printed."""
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in self._files)

    def ranks(self) -> dict[int, int]:
        """Rank -> its process. What a rank has started itself is no rank."""
        numbered = {}
        for process, variables in self.processes().items():
            found = [m for word in variables.split(b"\0") if (m := RANK.fullmatch(word))]
            if found and b"python" in program_of(process):
                numbered[process] = int(found[0][1])
        return {rank: process for process, rank in numbered.items() if _parent(process) not in numbered}

    def ends(self, within_s: float) -> float:
        """Waits until no process is left; when that was, by time.monotonic(). Raises TimeoutError."""
        deadline = time.monotonic() + within_s
        while True:
            # A program that has just been started has no environment yet: that none is seen does not tell its end.
            ended = self.process.poll() is not None
            left = self.processes()
            if ended and not left:
                return time.monotonic()
            self._note(left)
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {within_s:.0f} s there are still {len(left)} processes: {self.text[-600:]}")
            time.sleep(0.1)

    def waits_for(self, true: Callable[[], bool], within_s: float) -> bool:
        """Whether it became true before the program ended. Raises TimeoutError."""
        deadline = time.monotonic() + within_s
        while not true():
            if self.process.poll() is not None:
                return False
            self.sample()
            if time.monotonic() > deadline:
                raise TimeoutError(f"not so far within {within_s:.0f} s: {self.text[-600:]}")
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        """Ends whoever is left of it."""
        super().kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SETTLE_S)


@contextmanager
def started(
    folder: Path, name: str, argv: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[Program]:
    """A program, of which nothing runs when the block has ended."""
    program = Program(folder, name, argv, variables or {})
    try:
        yield program
    finally:
        program.kill()


def program_of(process: int) -> bytes:
    """The first word of its command line."""
    return _read(process, "cmdline").split(b"\0")[0]


def _read(process: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{file}").read_bytes()
    except OSError:  # it has ended
        return b""


def _parent(process: int) -> int:
    words = _read(process, "stat").rpartition(b")")[2].split()
    return int(words[1]) if words else 0


def _listening_inodes() -> dict[str, int]:
    """Sockets of this network that listen -> their port."""
    found = {}
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                found[words[9]] = int(words[1].rpartition(":")[2], 16)
    return found


def _listening(processes: Mapping[int, bytes]) -> set[int]:
    """Ports that these processes listen at."""
    inodes = _listening_inodes()
    return {
        inodes[link[8:-1]]
        for process in processes
        for link in _links(process)
        if link.startswith("socket:[") and link[8:-1] in inodes
    }


def _links(process: int) -> list[str]:
    """What the descriptors of a process stand for."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{process}/fd"):
            with suppress(OSError):
                found.append(os.readlink(entry.path))
    return found


def _who_has(link: str) -> str:
    """Which process has something open: one that was not watched may have been given the same port meanwhile."""
    for folder in Path("/proc").glob("[0-9]*"):
        if link in _links(int(folder.name)):
            words = _read(int(folder.name), "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            return f"process {folder.name}: {words[:120]}"
    return "of no process that can be seen"


def _has_mapped(process: int, name: str) -> bool:
    """Whether a process has opened or mapped a file in /dev/shm."""
    path = f"{SHM}/{name}"
    return path in _links(process) or path.encode() in _read(process, "maps")

"""Stand-ins of Slurm's commands: shell scripts in a folder that is all of the PATH."""

from __future__ import annotations

import shutil
from pathlib import Path


class Cluster:
    """What squeue and sacct print, and how often they were called. At first there is an empty squeue, and no sacct."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        # Nothing else of this machine's: a real Slurm may be installed.
        for tool in ("cat", "env", "grep", "sleep"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self._folder = folder
        self.squeue("")

    def squeue(self, prints: str, code: int = 0, error: str = "") -> None:
        """What squeue prints from now on."""
        self._program("squeue", prints, code, error)

    def sacct(self, prints: str, code: int = 0, error: str = "") -> None:
        """What sacct prints from now on."""
        self._program("sacct", prints, code, error)

    def calls(self, program: str) -> list[str]:
        """Arguments of each call."""
        log = self._folder / f"{program}.log"
        return log.read_text().splitlines() if log.exists() else []

    def _program(self, name: str, prints: str, code: int, error: str) -> None:
        (self._folder / f"{name}.out").write_text(prints)
        (self._folder / f"{name}.err").write_text(error)
        script = self.bin / name
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {self._folder}/{name}.log\nenv | grep ^SQUEUE_ >> {self._folder}/env.log\n'
            f"cat {self._folder}/{name}.out\ncat {self._folder}/{name}.err >&2\nexit {code}\n"
        )
        script.chmod(0o755)

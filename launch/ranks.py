"""The ranks of a run: what a process knows of itself and of the others once it was started."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError

StartedBy = Literal["alone", "gtddp", "torchrun", "mpirun", "srun"]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, and where they meet."""

    rank: int
    """Which rank this process is, 0 first."""
    world: int
    """How many ranks there are."""
    local_rank: int
    """Which of the ranks of its host this is, 0 first."""
    local_world: int
    """How many ranks its host has."""
    host: str
    """Name of this host."""
    address: str
    """Name or address of the host where ranks meet."""
    port: int
    """TCP port there; 0 where there is but one rank."""
    started_by: StartedBy
    """Who started the ranks."""
    listen_fd: int | None = None
    """Rank 0: descriptor of a socket that listens on `port` already, so that nobody else can take the port."""
    agent_store: bool = False
    """Whether torchrun's agent holds a store at `address` and `port`; else rank 0 does."""
    attempt: int = 0
    """How often torchrun has started these ranks anew: its agent's store keeps the keys of earlier attempts."""
    hosts: tuple[str, ...] = ()
    """The host of every rank, in their order, where who has started them tells it before they come; else empty."""

    @property
    def on_one_host(self) -> bool:
        """Whether all of them are."""
        return self.local_world == self.world

    @property
    def first_address(self) -> str:
        """Where they reach what rank 0 listens at for them alone: on one host the loopback device, whatever the host's
        name stands for."""
        return "127.0.0.1" if self.on_one_host else self.address

    def host_of(self, rank: int) -> str | None:
        """The host of a rank that has not come; None where it is not known."""
        if self.on_one_host:
            return self.host
        return self.hosts[rank] if self.hosts else None

    def variables(self) -> dict[str, str]:
        """The environment variables by which torch.distributed knows ranks."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Sets `variables` in the environment of this process, and what `keep_to_host` does."""
        environ.update(self.variables())
        self.keep_to_host(environ)

    def keep_to_host(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Ranks of one host need no network: gloo listens on the loopback device alone, where nothing else is named."""
        if self.on_one_host:
            environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def host_name(environ: Mapping[str, str] = os.environ) -> str:
    """What this host is called: by Slurm in one of its jobs, else by itself."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def alone() -> Ranks:
    """One process, which nobody started as a rank."""
    return Ranks(
        rank=0,
        world=1,
        local_rank=0,
        local_world=1,
        host=socket.gethostname(),
        address="127.0.0.1",
        port=0,
        started_by="alone",
    )


def number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The environment variable `name` as a number of 0 or more; `default` where it is not set.

    Raises UserError where it is no such number, or not set and there is no default.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"is {text!r}"
        raise UserError(
            f"environment variable {name} {found}, expected a number: ranks are started by gtddp itself, torchrun, "
            f"mpirun or srun, which set it"
        )
    return int(text)


def checked(ranks: Ranks) -> Ranks:
    """The same ranks; raises UserError where their numbers contradict each other."""
    if not (0 <= ranks.rank < ranks.world and 0 <= ranks.local_rank < ranks.local_world <= ranks.world):
        raise UserError(
            f"{ranks.started_by} started rank {ranks.rank} of {ranks.world}, on this host {ranks.local_rank} of "
            f"{ranks.local_world}: these numbers contradict each other. Look for variables left from another run "
            f"(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE) in the environment"
        )
    if ranks.world > 1 and not 0 < ranks.port < 65536:
        raise UserError(f"the ranks were given port {ranks.port} to meet at (MASTER_PORT), expected 1 to 65535")
    return ranks

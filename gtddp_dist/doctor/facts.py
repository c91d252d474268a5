"""What one rank knows of itself and of its machine, without asking any other."""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch

from ..checkpoint import JSON
from ..environment import describe_environment, select_device
from ..errors import UserError

CLUSTER_PACKAGES = ("deepspeed", "mpi4py")
"""Those of the extra `cluster`."""

SHARED_MEMORY = Path("/dev/shm")


class Identity(Protocol):
    """Which rank this is: what of `gtddp_dist.launch.Ranks` is told to others."""

    @property
    def rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def host(self) -> str: ...


@dataclass(frozen=True)
class RankFacts:
    """A rank and its machine. Sizes in bytes; None where there is no such thing, or it could not be found out."""

    rank: int
    local_rank: int
    host: str
    pid: int
    python: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    """Version of each package; None where it is not installed."""
    revision: str = ""
    """Of the code, where it is a git checkout."""
    cuda: str | None = None
    """The CUDA version that torch was built for."""
    nccl: str | None = None
    device: str = "cpu"
    """Name of the device that this rank computes on."""
    device_id: str | None = None
    """Of its GPU: the same for two ranks only where they share it."""
    capability: str | None = None
    """Compute capability of its GPU, such as 7.0."""
    no_kernels: str = ""
    """Why this build of torch cannot compute on that GPU; empty where it can."""
    threads: int = 1
    """With which torch computes on the CPU."""
    usable_cores: int = 1
    open_files: int | None = None
    """How many files and sockets the process may have open; None without limit."""
    disk_free: int | None = None
    """In the folder for runs."""
    shared_memory_free: int | None = None
    """In /dev/shm."""
    loopback: str | None = None
    """The address of this host's own name, where it is one that no other host can reach."""
    unknown: dict[str, str] = field(default_factory=dict)
    """What could not be found out, and why."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankFacts:
        return cls(**json.loads(text))


_Found = TypeVar("_Found")


def collect_facts(ranks: Identity, directory: Path) -> RankFacts:
    """The facts of this rank; `directory` is where runs are to be written. Never fails: see `RankFacts.unknown`."""
    unknown: dict[str, str] = {}

    def find(name: str, look: Callable[[], _Found], otherwise: _Found) -> _Found:
        try:
            return look()
        except Exception as error:  # a fact that is missing must not hide the others
            unknown[name] = f"{type(error).__name__}: {error}"
            return otherwise

    nothing: dict[str, JSON] = {}
    environment = find("environment", describe_environment, nothing)
    gpu = find("GPU", lambda: _gpu(ranks.local_rank), _Gpu())
    return RankFacts(
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        host=ranks.host,
        pid=os.getpid(),
        python=platform.python_version(),
        packages=find("packages", lambda: _packages(environment), {}),
        revision=find("revision", lambda: _revision(environment), ""),
        cuda=torch.version.cuda,
        nccl=find("NCCL", _nccl, None),
        device=gpu.name,
        device_id=gpu.identity and f"{ranks.host} {gpu.identity}",
        capability=gpu.capability,
        no_kernels=gpu.no_kernels,
        threads=torch.get_num_threads(),
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        open_files=find("open files", _open_files, None),
        disk_free=find("disk", lambda: shutil.disk_usage(directory).free, None),
        shared_memory_free=find("shared memory", lambda: shutil.disk_usage(SHARED_MEMORY).free, None),
        loopback=find("address of the host", lambda: _loopback(ranks.host), None),
        unknown=unknown,
    )


def _packages(environment: dict[str, JSON]) -> dict[str, str | None]:
    packages = dict(cast(dict[str, str | None], environment.get("packages", {})))
    for name in CLUSTER_PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return packages


def _revision(environment: dict[str, JSON]) -> str:
    git = environment.get("git")
    if not isinstance(git, dict):
        return ""
    return str(git["revision"])[:12] + (" with changes" if git["changed"] else "")


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


@dataclass(frozen=True)
class _Gpu:
    name: str = "cpu"
    identity: str | None = None
    capability: str | None = None
    no_kernels: str = ""


def _gpu(local_rank: int) -> _Gpu:
    if not torch.cuda.is_available():
        return _Gpu()
    index = local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    gpu = torch.cuda.get_device_properties(index)
    no_kernels = ""
    try:
        select_device("cuda")
    except UserError as error:
        no_kernels = str(error)
    # Older torch tells no uuid; then two containers on one host may be taken to share a GPU.
    identity = str(getattr(gpu, "uuid", index))
    return _Gpu(gpu.name, identity, f"{gpu.major}.{gpu.minor}", no_kernels)


def _open_files() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _loopback(host: str) -> str | None:
    address = socket.gethostbyname(host)
    return address if ipaddress.ip_address(address).is_loopback else None

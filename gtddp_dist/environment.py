"""Where a run computes, and the record of it: versions, hardware, revision of the code. No environment variables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import cast

import torch

from .checkpoint import JSON
from .errors import UserError
from .source import git_revision

DISTRIBUTION = "gtddp-dist"


def describe_environment() -> dict[str, JSON]:
    """The record that a run directory keeps in `environment.json`."""
    return {
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "git": cast(JSON, git_revision()),
    }


def prepare_cpu(threads: int | None) -> None:
    """Sets how this process computes on a CPU: its number of threads (None: torch's choice), and that numbers too small
    for a normal float32 count as zero.

    Gradients of samples that are fitted well, and products of such, come to lie there; processors compute with them
    many times more slowly (8 times a whole step was seen). Where the processor has no such mode, nothing changes. Call
    it before anything is computed: torch's threads that exist already keep their way.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def select_device(name: str) -> torch.device:
    """The device of `train.device`: "cpu", "cuda", or "auto", the GPU where there is one.

    Raises UserError where a GPU is asked for and there is none, or this build of torch has no kernels for it.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "train.device=cuda, but torch sees no GPU here (torch.cuda.is_available() is false, "
            f"torch {torch.__version__}): use train.device=cpu, or install a CUDA build of torch and its driver"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    _check_kernels(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
    return torch.device("cuda")


def _check_kernels(capability: tuple[int, int], architectures: list[str]) -> None:
    """Raises UserError where a torch built for `architectures` has no kernels that a GPU of that capability
    runs.

    A wrong build would only fail at its first kernel, with "no kernel image is available". A kernel runs on
    its own major architecture from its own minor one on (sm_80 on 8.6); intermediate code (compute_90) on all
    later ones.
    """
    major, minor = capability
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
        if match is None:
            continue
        kind, built = match[1], (int(match[2]), int(match[3]))
        if (kind == "compute" and built <= capability) or (built[0] == major and built[1] <= minor):
            return
    advice = "constraints/v100.txt names the last versions that do" if major == 7 else "install another build of torch"
    raise UserError(
        f"this build of torch ({torch.__version__}) has no kernels for the GPU here, of compute capability "
        f"{major}.{minor} (it has: {', '.join(architectures) or 'none'}): {advice}, or use train.device=cpu"
    )


def _versions() -> dict[str, JSON]:
    """Versions of this package and of those it depends on directly; null for one that is not installed as a package."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout without installation
        requirements = ["torch", "numpy"]
    needed = [requirement for requirement in requirements if "extra ==" not in requirement]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in needed}
    versions: dict[str, JSON] = {}
    for name in sorted({DISTRIBUTION, *names}):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with its build, which the package's metadata may leave out
    return versions


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[JSON]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in properties
    ]

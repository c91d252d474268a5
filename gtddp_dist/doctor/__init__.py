"""`gtddp doctor`: whether a machine, or all ranks of a cluster, can train; the first command to run there."""

from __future__ import annotations

from .run import run_doctor

__all__ = ["run_doctor"]

"""All parts, in the order in which they run."""

from __future__ import annotations

from . import files, fuzzing, kills, kills_slurm, numbers, soak
from .part import Part

PARTS: list[Part] = [*kills.PARTS, kills_slurm.PART, files.PART, numbers.PART, soak.PART, fuzzing.PART]

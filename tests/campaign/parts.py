"""All parts, in the order in which they run."""

from __future__ import annotations

from . import files, kills, numbers
from .part import Part

PARTS: list[Part] = [*kills.PARTS, files.PART, numbers.PART]

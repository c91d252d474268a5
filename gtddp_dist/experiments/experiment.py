"""What an experiment is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .page import Findings
from .plan import Plan
from .unit import Results, Unit


class Experiment(Protocol):
    """A table or figure: the work it needs, and what follows from what that came to."""

    question: str
    """What the papers claim, and what is asked here: the first paragraph of the page."""
    varies: Sequence[str]
    """Configuration keys that it sets itself, so that a user cannot; a key ending in "." stands for its whole group."""

    def units(self, plan: Plan, results: Results) -> Sequence[Unit]:
        """All units needed so far. Asked again with their results until it names no new ones, so that later work can
        depend on earlier results (the rate that did best)."""
        ...

    def findings(self, plan: Plan, results: Results) -> Findings:
        """The page, from the results of all units."""
        ...

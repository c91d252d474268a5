"""The four bases of the papers' tables, their good rates, and the optimizers made of them."""

from __future__ import annotations

from collections.abc import Mapping

from .plan import Settings

BASES: Mapping[str, float] = {"sgd": 0.3, "rmsprop": 0.003, "adam": 0.01, "ekfac": 0.03}
"""Base -> the best constant rate for it alone among those of docs/study-defaults.md (DIGITS, batch 32)."""

NAMES: Mapping[str, str] = {"sgd": "SGD", "rmsprop": "RMSprop", "adam": "Adam", "ekfac": "EKFAC"}


def base(name: str, rate: float) -> Settings:
    """A base by itself."""
    return {"optimizer.name": name, "optimizer.lr": rate}


def gtddp(name: str, rate: float, **options: float | str) -> Settings:
    """GT-DDP on it, with its default options but for those given."""
    given = {f"optimizer.{option}": value for option, value in options.items()}
    return {"optimizer.name": f"gtddp-{name}", "optimizer.lr": rate, **given}

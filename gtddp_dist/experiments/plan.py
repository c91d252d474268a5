"""What `gtddp reproduce` was asked for, and the configurations of trainings that follow from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from .. import strict_yaml
from ..config import Config, ConfigError, Draft, draft
from ..registry import DATA_SETS

T = TypeVar("T")

Settings = Mapping[str, strict_yaml.Value]
"""Values of a configuration by dotted key."""

DEFAULT_SEEDS = 10
QUICK_SEEDS = 2
_OWN_GROUPS = ("data.", "model.", "train.")
"""Groups of a shipped config that experiments take over; optimizer and schedule are theirs."""


@dataclass(frozen=True)
class Plan:
    """What was asked for.

    Attributes:
        data: name of the data set; the network and batch size are those of its shipped config.
        seeds: how many, from 0 on.
        quick: a form of seconds that shows that everything runs, and nothing about the method.
        words: `key=value` that count over the experiment's own settings.
    """

    data: str = "digits"
    seeds: int = DEFAULT_SEEDS
    quick: bool = False
    words: tuple[str, ...] = ()

    def settings(self, *parts: Settings) -> dict[str, strict_yaml.Value]:
        """Data set and network, with the experiment's `parts` over them in order, and the user's words over all."""
        merged = dict(_of_shipped_config(self.data))
        for part in parts:
            merged.update(part)
        merged.update(self.given())
        return merged

    def given(self) -> dict[str, strict_yaml.Value]:
        """What the user's words say, by dotted key. Raises ConfigError for words that no key takes."""
        return dict(_read(self.words))

    def pick(self, usual: T, quick: T) -> T:
        """`quick` in the quick form, else `usual`."""
        return quick if self.quick else usual


# Thousands of trainings of an experiment are made of the same two.


@functools.cache
def _of_shipped_config(data: str) -> Settings:
    return {key: value for key, value in draft(data).values().items() if key.startswith(_OWN_GROUPS)}


@functools.cache
def _read(words: tuple[str, ...]) -> Settings:
    given = Draft().overridden(words)
    if given.unread:
        raise ConfigError("\n  ".join(given.unread))
    return given.values()


def config_of(settings: Settings) -> Config:
    """The configuration that these settings make. Raises ConfigError for what is wrong with them."""
    return Draft().over(settings, dict.fromkeys(settings, "experiment")).build()


def loss_of_guessing(data: str) -> float:
    """The cross-entropy of equal odds on a data set, in nats."""
    return math.log(DATA_SETS[data].classes)

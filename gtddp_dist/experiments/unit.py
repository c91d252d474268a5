"""A unit of work of an experiment: a function by name, and its arguments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from ..checkpoint import JSON
from ..registry import load_object

Result = Mapping[str, JSON]
"""What a unit came to."""


@dataclass(frozen=True)
class Unit:
    """Something that is done once, whichever experiments need it.

    Attributes:
        function: `"module:function"`; it takes the arguments as one mapping, and returns a mapping.
        arguments: as JSON with sorted keys, so that equal arguments are equal text.
        alone: nothing else is to run beside it, since it takes times.
    """

    function: str
    arguments: str
    alone: bool = False

    @classmethod
    def of(cls, function: str, arguments: Mapping[str, JSON], *, alone: bool = False) -> Unit:
        """The unit that calls `function` with `arguments`."""
        return cls(function, json.dumps(arguments, sort_keys=True, allow_nan=False), alone)

    @property
    def key(self) -> str:
        """Equal for equal work: a hash of function and arguments."""
        return hashlib.sha256(f"{self.function}\n{self.arguments}".encode()).hexdigest()

    def do(self) -> Result:
        """Calls the function, in this process."""
        result = load_object(self.function)(json.loads(self.arguments))  # type: ignore[operator]
        return cast(Result, result)


class Results(dict[str, Result]):
    """Results by the keys of their units."""

    def of(self, unit: Unit) -> Result:
        """What `unit` came to."""
        return self[unit.key]

"""What is measured side by side in one process: an optimizer with options. No torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

REFERENCE = "sgd"
"""What ratios are to: torch.optim's SGD."""


@dataclass(frozen=True)
class ContenderEntry:
    """A row of `gtddp bench step`.

    Attributes:
        optimizer: registered name of the optimizer.
        options: fields of the configuration group `optimizer` that make it this row; they count over the configured
            ones, which count for all rows.
        peer: the package whose step it is (`peers`); None: torch's or this one's. Without that package the row is left
            out.
    """

    optimizer: str
    options: Mapping[str, object] = field(default_factory=dict)
    peer: Literal["deepspeed", "curvlinops"] | None = None


_SPREAD = {"factor_every": 10, "basis_every": 100}
_CHANNELS = {**_SPREAD, "factors": "spatially_uncorrelated"}
_UNFOLDED = {**_SPREAD, "factors": "unfolded"}

CONTENDERS: Mapping[str, ContenderEntry] = {
    REFERENCE: ContenderEntry("sgd"),
    "adam": ContenderEntry("adam"),
    "deepspeed-sgd": ContenderEntry("sgd", peer="deepspeed"),
    "curvlinops-kfac": ContenderEntry("sgd", peer="curvlinops"),
    "gtddp-sgd": ContenderEntry("gtddp-sgd"),
    "gtddp-sgd-batch": ContenderEntry("gtddp-sgd", {"scope": "batch"}),
    "gtddp-sgd-nonlinear": ContenderEntry("gtddp-sgd", {"rollout": "nonlinear"}),
    "gtddp-adam": ContenderEntry("gtddp-adam", {"metric": "previous"}),
    "kfac": ContenderEntry("kfac", _CHANNELS),
    "ekfac": ContenderEntry("ekfac", _CHANNELS),
    "gtddp-ekfac": ContenderEntry("gtddp-ekfac", _CHANNELS),
    "ekfac-unfolded": ContenderEntry("ekfac", _UNFOLDED),
    "gtddp-ekfac-unfolded": ContenderEntry("gtddp-ekfac", _UNFOLDED),
}

GROWTH = (REFERENCE, "gtddp-sgd", "adam", "gtddp-adam")
"""Those whose growth is measured unless others are named."""


def chosen(names: tuple[str, ...] | None) -> list[str]:
    """The contenders to measure, the reference first; those whose package is not installed are left out, and named on
    standard error."""
    found = []
    for name in dict.fromkeys((REFERENCE, *(CONTENDERS if names is None else names))):
        peer = CONTENDERS[name].peer
        if peer is None or importlib.util.find_spec(peer) is not None:
            found.append(name)
        else:
            print(f"gtddp: {name} is left out: {peer} is not installed", file=sys.stderr)
    return found

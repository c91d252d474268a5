"""What is measured side by side in one process: an optimizer with options. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

REFERENCE = "sgd"
"""What ratios are to: torch.optim's SGD."""


@dataclass(frozen=True)
class ContenderEntry:
    """A row of `gtddp bench step`.

    Attributes:
        optimizer: registered name of the optimizer.
        options: fields of the configuration group `optimizer` that make it this row; they count over the configured
            ones, which count for all rows.
    """

    optimizer: str
    options: Mapping[str, object] = field(default_factory=dict)


_SPREAD = {"factor_every": 10, "basis_every": 100}
_CHANNELS = {**_SPREAD, "factors": "spatially_uncorrelated"}
_UNFOLDED = {**_SPREAD, "factors": "unfolded"}

CONTENDERS: Mapping[str, ContenderEntry] = {
    REFERENCE: ContenderEntry("sgd"),
    "adam": ContenderEntry("adam"),
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
    """The contenders to measure, the reference first."""
    return list(dict.fromkeys((REFERENCE, *(CONTENDERS if names is None else names))))

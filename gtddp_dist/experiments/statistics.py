"""Means, deviations and tests over seeds.

Runs of two optimizers with the same seed are a pair: they begin with the same weights and see the same batches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

SIGNIFICANT = 0.05
"""A p-value below it."""


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of the values that are finite, the median of all, and how many are not finite."""

    mean: float | None
    deviation: float | None
    median: float | None
    """Of all, those that diverged counted as infinite; None where it is infinite."""
    diverged: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """Of values, where None or infinity stands for a run that diverged; the deviation is the sample's (n - 1)."""
        finite = [value for value in values if value is not None and math.isfinite(value)]
        return cls(
            statistics.fmean(finite) if finite else None,
            statistics.stdev(finite) if len(finite) > 1 else None,
            _median(values),
            len(values) - len(finite),
        )


def p_of_pairs(ours: Sequence[float], base: Sequence[float]) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test on pairs; None where they do not differ, or are fewer than two.

    Values that are not finite rank behind all others.
    """
    worst = 10 * max((abs(value) for value in (*ours, *base) if math.isfinite(value)), default=1.0)
    differences = [_finite(a, worst) - _finite(b, worst) for a, b in zip(ours, base, strict=True)]
    if len(differences) < 2 or not any(differences):
        return None
    return float(stats.wilcoxon(differences).pvalue)


def p_of_spreads(ours: Sequence[float], base: Sequence[float]) -> float | None:
    """Two-sided p-value for equal variances of pairs, by Pitman and Morgan: sums and differences are correlated.

    None where fewer than three pairs are finite, or either does not vary.
    """
    pairs = [(a, b) for a, b in zip(ours, base, strict=True) if math.isfinite(a) and math.isfinite(b)]
    sums, differences = [a + b for a, b in pairs], [a - b for a, b in pairs]
    if len(pairs) < 3 or len(set(sums)) == 1 or len(set(differences)) == 1:
        return None
    return float(stats.pearsonr(sums, differences).pvalue)


def _finite(value: float, worst: float) -> float:
    return value if math.isfinite(value) else worst


def _median(values: Sequence[float | None]) -> float | None:
    median = statistics.median(math.inf if value is None else value for value in values)
    return median if math.isfinite(median) else None

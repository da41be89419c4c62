"""95 % intervals of a score and of the difference of two, by bootstrap over cases (Efron 1979, percentiles).

A score is the mean of its parts' means; cases are drawn again within each part. Two scores of the same cases are
compared case by case: what a hard case costs both does not widen the interval of their difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL, SEED = 2_000, 0.95, 0
CHUNK_VALUES = 2_000_000  # drawn at a time: 16 MB

ByCase = Mapping[str, Mapping[str, float]]  # part -> case -> value


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval, over `num_cases`."""

    value: float
    low: float
    high: float
    num_cases: int


def score_interval(by_case: ByCase) -> Interval:
    """The mean over the parts of the means of their cases; none may be empty."""
    return _bootstrap([list(part.values()) for part in by_case.values()])


def difference(before: ByCase, after: ByCase) -> Interval | None:
    """after - before over the cases that both have, paired; None where they share none."""
    parts = []
    for name, part in before.items():
        common = [case for case in part if case in after.get(name, {})]
        if common:
            parts.append([after[name][case] - part[case] for case in common])
    return _bootstrap(parts) if parts else None


def _bootstrap(parts: Sequence[Sequence[float]]) -> Interval:
    rng = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for part in parts:
        values = np.asarray(part, dtype=np.float64)
        rows = max(CHUNK_VALUES // len(values), 1)
        for start in range(0, RESAMPLES, rows):
            drawn = rng.integers(len(values), size=(min(rows, RESAMPLES - start), len(values)))
            means[start : start + rows] += values[drawn].mean(axis=1) / len(parts)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(np.mean([np.mean(part) for part in parts]))
    return Interval(value, float(low), float(high), sum(map(len, parts)))

"""How far two raters agree on the order of the same answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longalign_ray.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Agreement:
    """Rank correlations over `num_pairs` answers, -1 to 1: Spearman's rho with mean ranks for ties, Kendall's tau-b.

    None where they are not defined: fewer than two answers, or a rater who gave all the same.
    """

    num_pairs: int
    spearman: float | None
    kendall: float | None


def agreement(ratings: Sequence[float], reference: Sequence[float]) -> Agreement:
    """Agreement of two raters; ratings[i] and reference[i] are of the same answer. Needs scipy."""
    try:
        from scipy.stats import kendalltau, spearmanr
    except ImportError as error:
        raise EvaluationError(
            "the agreement of a judge with reference scores needs scipy: pip install 'longalign_ray[eval]'"
        ) from error
    if len(set(ratings)) < 2 or len(set(reference)) < 2:
        return Agreement(len(ratings), None, None)
    rho, tau = spearmanr(ratings, reference), kendalltau(ratings, reference)
    values = [float(getattr(result, "statistic")) for result in (rho, tau)]  # noqa: B009 - scipy's types lack it
    spearman, kendall = (value if math.isfinite(value) else None for value in values)
    return Agreement(len(ratings), spearman, kendall)

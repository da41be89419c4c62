"""A rating read from what a judge wrote, and means where some could not be read: no score is ever made up."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

GROUP = re.compile(r"\[\[([^\[\]]*)\]\]")
NUMBER = r"(?P<number>[+-]?\d+(?:\.\d+)?)(?:\s*/\s*(?P<best>\d+(?:\.\d+)?))?"
ALONE = re.compile(NUMBER)
# A reply that is a rating and nothing else, as after the cue "Rating:".
WHOLE = re.compile(
    rf"(?:(?:rating|score|评分|得分|分数)\s*[:：]?)?\s*\[?\s*{NUMBER}\s*\]?\s*分?\s*[.。]?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class RatedMean:
    """The mean of the ratings that there are, None where there is none, and what it would be if those that are missing
    were all the worst or all the best of the scale."""

    mean: float | None
    if_worst: float
    if_best: float
    num_rated: int
    num_unrated: int


def read_rating(text: str, *, worst: float, best: float) -> float | None:
    """The rating that a reply gives, from `worst` to `best`; None where it gives none, two, or one off the scale.

    It is the only number of the last [[...]], as the paper's judge writes it (LongAlign, arXiv 2401.18058, App. C.1),
    or the only thing that is said. 7/10 is 7 where 10 is the best, and else no rating.
    """
    groups = GROUP.findall(text)
    match = ALONE.fullmatch(groups[-1].strip()) if groups else WHOLE.fullmatch(text.strip())
    if match is None or (match["best"] is not None and float(match["best"]) != best):
        return None
    rating = float(match["number"])
    return rating if worst <= rating <= best else None


def rated_mean(ratings: Sequence[float | None], *, worst: float, best: float) -> RatedMean:
    """Mean and bounds of at least one rating; None is one that is missing."""
    known = [rating for rating in ratings if rating is not None]
    total, missing = math.fsum(known), len(ratings) - len(known)
    return RatedMean(
        mean=total / len(known) if known else None,
        if_worst=(total + missing * worst) / len(ratings),
        if_best=(total + missing * best) / len(ratings),
        num_rated=len(known),
        num_unrated=missing,
    )

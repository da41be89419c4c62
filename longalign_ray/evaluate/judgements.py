"""The ratings of a task that is judged, read from the judge's replies: what became of each, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.rating import rated_mean, read_rating
from longalign_ray.evaluate.task import EvalCase, Prediction, judgement_id


@dataclass(frozen=True, slots=True)
class Judgements:
    """`of_case` has the ratings of each answered case in the order of its judgements, None where one is missing;
    `details` are those of the score file."""

    of_case: Mapping[str, Sequence[float | None]]
    details: Mapping[str, Any]

    def rating(self, case: EvalCase) -> float | None:
        """The mean of the ratings of a case that there are."""
        known = [rating for rating in self.of_case.get(case.case_id, ()) if rating is not None]
        return sum(known) / len(known) if known else None


def read_judgements(
    cases: Sequence[EvalCase], predictions: Mapping[str, Prediction], *, worst: float, best: float
) -> Judgements:
    """The ratings among `predictions`, `judge_calls` of a case's attributes each.

    Details: judgements by what became of them, and what their mean would be were those without a rating all the worst,
    or all the best. Raises EvaluationError where no answer has a rating.
    """
    of_case: dict[str, list[float | None]] = {}
    unreadable = 0
    for case in cases:
        if case.case_id not in predictions:
            continue
        ids = [judgement_id(case.case_id, number) for number in range(int(case.attributes["judge_calls"]))]
        of_case[case.case_id] = [
            read_rating(predictions[one].text, worst=worst, best=best) if one in predictions else None for one in ids
        ]
        unreadable += sum(
            one in predictions and rating is None for one, rating in zip(ids, of_case[case.case_id], strict=True)
        )
    found = [rating for ratings in of_case.values() for rating in ratings]
    whole = rated_mean(found, worst=worst, best=best)
    failed = whole.num_unrated - unreadable
    if whole.mean is None:
        raise EvaluationError(
            f"{cases[0].task}: no answer has a rating: of {len(found)} judgements {unreadable} hold none and {failed} "
            f"failed; see the warnings above and evaluate/predictions/*.judgements.jsonl, put evaluate.judge right and "
            f"run `longalign evaluate` again: the answers are kept"
        )
    return Judgements(
        of_case,
        {
            "if_unrated_worst": whole.if_worst,
            "if_unrated_best": whole.if_best,
            "judgements": {"rated": whole.num_rated, "unreadable": unreadable, "failed": failed},
        },
    )

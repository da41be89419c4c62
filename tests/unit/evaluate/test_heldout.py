from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from longalign_ray.data.store import Example
from longalign_ray.evaluate.heldout import heldout_cases, read_answer, score_heldout
from longalign_ray.evaluate.task import AnswerError


def example(ids: list[int], mask: list[int]) -> Example:
    return Example("a", np.array(ids, np.int32), 100 * np.array(mask, np.uint8))


def answer(logprobs: list[Any]) -> dict[str, Any]:
    return {"choices": [{"text": "", "finish_reason": "length", "logprobs": {"token_logprobs": logprobs}}]}


def test_a_case_asks_for_the_echo_of_its_ids():
    (case,) = heldout_cases([example([5, 6, 7], [0, 0, 1])])
    assert case.path == "/completions"
    assert case.request == {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0.0}
    assert case.reference == {"positions": [2], "weights": [1.0]}


def test_the_first_token_is_no_target_and_examples_without_targets_are_left_out():
    cases = heldout_cases([example([5, 6, 7], [1, 0, 1]), example([5, 6], [1, 0]), example([5, 6], [0, 0])])
    assert [case.reference["positions"] for case in cases] == [[2]]


def test_every_sequence_counts_equally():
    cases = heldout_cases([example([1, 2, 3, 4], [0, 1, 1, 1]), example([1, 2, 3], [0, 0, 1])])
    assert len({case.case_id for case in cases}) == 2, "equal example ids were taken for one"
    answers = [answer([None, -1.0, -2.0, -3.0]), answer([None, -9.0, -6.0])]
    predictions = {case.case_id: read_answer(case, given) for case, given in zip(cases, answers, strict=True)}
    score, details = score_heldout(cases, predictions)
    assert score.value == pytest.approx((2.0 + 6.0) / 2)  # Eq. 2: mean of 2 and 6
    assert details == {"token_loss": pytest.approx((1 + 2 + 3 + 6) / 4), "num_targets": 4}
    assert score.by_group == {"<= 4": pytest.approx(4.0)}


def test_only_answered_sequences_are_scored():
    cases = heldout_cases([example([1, 2], [0, 1]), example([1, 2, 3, 4, 5], [0, 0, 0, 0, 1])])
    prediction = read_answer(cases[1], answer([None, -1, -1, -1, -2.5]))
    score, _ = score_heldout(cases, {prediction.case_id: prediction})
    assert (score.value, score.num_cases, score.by_group) == (2.5, 1, {"<= 8": 2.5})


@pytest.mark.parametrize("logprobs", [[None, -1.0], [None, -1.0, None], [None, -1.0, -math.inf], [None, -1.0, "x"], []])
def test_an_answer_without_its_log_probabilities_is_no_answer(logprobs: list[Any]):
    (case,) = heldout_cases([example([5, 6, 7], [0, 0, 1])])
    with pytest.raises(AnswerError):
        read_answer(case, answer(logprobs))

"""Held-out loss: the training objective of Eq. 2 (LongAlign, arXiv 2401.18058) on examples kept out of training.

The endpoint echoes a prompt of token ids with the log-probability of each, so what is measured is the served model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longalign_ray.data.store import FULL_WEIGHT, Example
from longalign_ray.evaluate.task import AnswerError, EvalCase, Prediction, TaskScore, mean_score

TASK = "heldout"


def heldout_cases(examples: Sequence[Example]) -> list[EvalCase]:
    """A case for each example with a target; the others have no loss.

    `reference` lists the target positions and their weights. The first token is never one: nothing precedes it.
    """
    cases = []
    for number, example in enumerate(examples):
        targets = np.flatnonzero(example.loss_weight[1:]) + 1
        if len(targets) == 0:
            continue
        request = {
            "prompt": example.input_ids.tolist(),
            "echo": True,
            "logprobs": 1,
            "max_tokens": 0,
            "temperature": 0.0,
        }
        cases.append(
            EvalCase(
                case_id=f"{number}:{example.example_id}",  # ids need not be unique in a corpus of several files
                task=TASK,
                path="/completions",
                request=request,
                reference={
                    "positions": targets.tolist(),
                    "weights": (example.loss_weight[targets] / FULL_WEIGHT).tolist(),
                },
                document=f"{number}",
                num_tokens=example.length,
            )
        )
    return cases


def read_answer(case: EvalCase, answer: dict[str, Any]) -> Prediction:
    """`loss_sum` (weighted negative log-probabilities of the targets, in nats), `num_targets` and `sum_weights`.

    Raises AnswerError where the answer does not give a finite log-probability for every target; KeyError, IndexError or
    TypeError where it has another shape.
    """
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    if len(logprobs) != case.num_tokens:
        raise AnswerError("logprobs_missing", f"{len(logprobs)} log-probabilities for {case.num_tokens} prompt tokens")
    positions, weights = case.reference["positions"], case.reference["weights"]
    of_targets = [logprobs[position] for position in positions]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in of_targets):
        raise AnswerError("logprobs_missing", "a target token has no finite log-probability")
    loss_sum = -math.fsum(weight * value for weight, value in zip(weights, of_targets, strict=True))
    values = {"loss_sum": loss_sum, "num_targets": len(of_targets), "sum_weights": math.fsum(weights)}
    return Prediction(case.case_id, "", choice.get("finish_reason") or "", values)


def score_heldout(cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]) -> tuple[TaskScore, dict[str, Any]]:
    """Mean over the answered sequences of their mean loss (Eq. 2), and beside it the mean over all target tokens.

    Groups are lengths in powers of two. At least one sequence must be answered.
    """
    answered = [case for case in cases if case.case_id in predictions]
    sums = [predictions[case.case_id].values["loss_sum"] for case in answered]
    weights = [predictions[case.case_id].values["sum_weights"] for case in answered]
    targets = [predictions[case.case_id].values["num_targets"] for case in answered]
    losses = [loss_sum / weight for loss_sum, weight in zip(sums, weights, strict=True)]
    groups = [f"<= {_power_of_two(case.num_tokens)}" for case in answered]
    details = {"token_loss": math.fsum(sums) / math.fsum(weights), "num_targets": int(sum(targets))}
    return mean_score(TASK, "heldout_loss", losses, groups, cases=answered), details


def _power_of_two(number: int) -> int:
    """Smallest power of two not below `number`."""
    return 1 << (number - 1).bit_length()

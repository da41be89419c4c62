"""What every benchmark is made of: cases to ask, predictions that came back, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longalign_ray.data.store import Example
from longalign_ray.data.template import Tokenizer


@dataclass(frozen=True, slots=True)
class EvalCase:
    """One request of a benchmark.

    `path` and `request` are what is posted below the endpoint's base URL, less the model's name; `reference` is what
    the scorer needs. Cases with the same `document` share a prompt prefix; `num_tokens` is the length of the prompt,
    `shared_tokens` about how much of it another case may have too, where cases share unequal parts.
    """

    case_id: str
    task: str
    path: str
    request: dict[str, Any]
    reference: Any
    document: str
    num_tokens: int
    attributes: dict[str, float] = field(default_factory=dict)
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the endpoint answered to a case; `values` holds numbers read from the answer (a loss, a token count),
    `first_answer` what it answered before, where a task asks twice.

    `request_digest` ties it to the request and model that it answers, so that a later run knows whether it still holds.
    """

    case_id: str
    text: str
    finish_reason: str
    values: dict[str, float] = field(default_factory=dict)
    request_digest: str = ""
    first_answer: str = ""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A metric over the answered cases of a task; `by_group` splits it, for instance by length.

    `by_case` has what it is made of: the value is the mean over the parts of the means of their cases.
    """

    task: str
    metric: str
    value: float
    num_cases: int
    by_group: dict[str, float]
    by_case: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class TaskInputs:
    """What cases are made from, beside the settings."""

    heldout: Sequence[Example]
    haystack: str
    tokenizer: Tokenizer
    seed: int


class AnswerError(ValueError):
    """An answer that came back but holds nothing to score; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read_text(case: EvalCase, answer: dict[str, Any]) -> Prediction:
    """The text of a completion or a chat completion. KeyError, IndexError or TypeError where the answer is neither."""
    choice = answer["choices"][0]
    text = choice["message"]["content"] if case.path == "/chat/completions" else choice["text"]
    return Prediction(case.case_id, text or "", choice["finish_reason"] or "", _usage(answer))


def _usage(answer: dict[str, Any]) -> dict[str, float]:
    """The numbers of tokens, where the endpoint tells them."""
    usage = answer.get("usage")
    known = usage if isinstance(usage, dict) else {}
    names = ("prompt_tokens", "completion_tokens")
    return {name: known[name] for name in names if isinstance(known.get(name), int | float)}


def judgement_id(case_id: str, number: int) -> str:
    """The name of the judge's reply `number` to the answer of a case."""
    return f"{case_id}#{number}"


def mean_score(
    task: str, metric: str, values: Sequence[float], groups: Sequence[str], *, cases: Sequence[EvalCase]
) -> TaskScore:
    """Mean of the values of the cases, whole and within each group; groups keep the order of their first appearance."""
    members: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    by_group = {group: sum(part) / len(part) for group, part in members.items()}
    by_case = {"all": {case.case_id: value for case, value in zip(cases, values, strict=True)}}
    return TaskScore(task, metric, sum(values) / len(values), len(values), by_group, by_case)

"""LongEval (LongChat, lmsys.org 2023-06-29): a number of one of many lines, or the first topic of a long conversation.

Cases are the benchmark's own files, prompts included. Of lines the last number of the answer counts, as in the
benchmark. Topics are judged by people there, or by a model; here the answer is right if it has all content words of the
first topic, and not all of any other one: a list of the topics is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longalign_ray.config import LongEvalConfig
from longalign_ray.data.template import Tokenizer, encode_prompt
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmark_rows import read_rows
from longalign_ray.evaluate.scoring import content_recall, content_words
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore, mean_score

TASK = "longeval"
NUMBER = re.compile(r"\d+")
MAX_LINE_TOKENS, MAX_TOPIC_TOKENS = 100, 50
REMEDY = "give a directory with N_lines.jsonl or N_topics.jsonl of the repository DachengLi1/LongChat"
LINES = {"prompt": str, "expected_number": int, "num_lines": int}
TOPICS = {"prompt": str, "topics": list}


def longeval_cases(config: LongEvalConfig, *, tokenizer: Tokenizer, seed: int) -> list[EvalCase]:
    """A case for each row of the files, or for the first rows of each, shorter files first.

    Raises EvaluationError where there is none.
    """
    paths = [path for path in Path(config.data).glob("*.jsonl") if path.stem.endswith(("_lines", "_topics"))]
    if not paths:
        raise EvaluationError(f"evaluate.longeval.data: {config.data} has no such file; {REMEDY}")
    cases = []
    for path in sorted(paths, key=lambda path: path.stat().st_size):
        is_lines = path.stem.endswith("_lines")
        fields = LINES if is_lines else TOPICS
        rows = read_rows(str(path), setting="evaluate.longeval.data", fields=fields, remedy=REMEDY)
        for number, row in enumerate(rows[: config.rows_per_file]):
            messages = [{"role": "user", "content": row["prompt"]}]
            size = row["num_lines"] if is_lines else len(row["topics"])
            cases.append(
                EvalCase(
                    case_id=f"{path.stem}-{number}",
                    task=TASK,
                    path="/chat/completions",
                    request={
                        "messages": messages,
                        "max_tokens": MAX_LINE_TOKENS if is_lines else MAX_TOPIC_TOKENS,
                        "temperature": 0.0,
                        "seed": seed,
                    },
                    reference={
                        "group": f"{size} {'lines' if is_lines else 'topics'}",
                        "answer": row["expected_number"] if is_lines else row["topics"],
                    },
                    document=f"{path.stem}-{number}",
                    num_tokens=len(encode_prompt(tokenizer, messages)),
                )
            )
    return cases


def score_longeval(
    cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]
) -> tuple[TaskScore, dict[str, Any]]:
    """Accuracy over the answered cases, whole and by number of lines or topics; details: mean prompt tokens of each."""
    answered = [case for case in cases if case.case_id in predictions]
    groups = [case.reference["group"] for case in answered]
    right = [is_right(predictions[case.case_id].text, case.reference["answer"]) for case in answered]
    tokens = mean_score(TASK, "tokens", [case.num_tokens for case in answered], groups, cases=answered).by_group
    score = mean_score(TASK, "longeval_accuracy", [float(one) for one in right], groups, cases=answered)
    return score, {"mean_prompt_tokens": tokens}


def is_right(text: str, wanted: int | Sequence[str]) -> bool:
    """wanted: the number of a line, or the topics in their order."""
    if isinstance(wanted, int):
        numbers = NUMBER.findall(text)
        return bool(numbers) and int(numbers[-1]) == wanted
    first, *others = wanted
    # A topic all of whose words are in the first one's name says nothing.
    telling = [other for other in others if not set(content_words(other)) <= set(content_words(first))]
    named = [content_recall(text, reference=topic) == 1 for topic in (first, *telling)]
    return named[0] and not any(named[1:])

"""LongBench v2 (arXiv 2412.15204): 503 questions with four choices about long contexts, asked directly or with a chain
of thought. Prompts and data are the benchmark's own files.

The whole prompt is cut in its middle and then sent as a user's message. With a chain of thought there are two requests:
the model thinks about the document, then it is shown its thoughts without the document and asked for the choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longalign_ray.config import LongBenchV2Config
from longalign_ray.data.template import Tokenizer
from longalign_ray.evaluate.benchmark_rows import filled, read_prompt, read_rows
from longalign_ray.evaluate.cut_prompt import without_middle
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore, mean_score
from longalign_ray.run_dir import digest

TASK = "longbench_v2"
CHOICES = ("A", "B", "C", "D")
# Field of a row -> its placeholder in the prompts, between dollar signs.
PLACEHOLDERS = {"context": "DOC", "question": "Q"} | {f"choice_{choice}": f"C_{choice}" for choice in CHOICES}
PLACEHOLDER = r"\$(DOC|Q|C_[A-D]|COT)\$"
FIELDS = {"_id": str, "difficulty": str, "length": str, "answer": str} | dict.fromkeys(PLACEHOLDERS, str)
GROUPS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}
# In this order: the parentheses are what the prompt asks for.
ANSWERS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
TEMPERATURE = 0.1
MAX_ANSWER_TOKENS, MAX_THOUGHT_TOKENS = 128, 1_024
DATA_REMEDY = (
    "give the path of data.json of the data set THUDM/LongBench-v2 of the Hugging Face hub, or hf://THUDM/LongBench-v2"
)
PROMPTS_REMEDY = "give the path of the directory prompts/ of the repository THUDM/LongBench"


def longbench_v2_cases(config: LongBenchV2Config, *, tokenizer: Tokenizer, seed: int) -> list[EvalCase]:
    """A case for each question, or for the first `rows`. Raises EvaluationError where a file is missing."""
    names = ("0shot_cot", "0shot_cot_ans") if config.chain_of_thought else ("0shot",)
    first, *second = (
        read_prompt(
            Path(config.prompts) / f"{name}.txt", setting="evaluate.longbench_v2.prompts", remedy=PROMPTS_REMEDY
        )
        for name in names
    )
    rows = read_rows(config.data, setting="evaluate.longbench_v2.data", fields=FIELDS, remedy=DATA_REMEDY)
    cases = []
    for row in rows[: config.rows]:
        values = {placeholder: row[field].strip() for field, placeholder in PLACEHOLDERS.items()}
        prompt = filled(first, values | {"COT": ""}, placeholder=PLACEHOLDER)
        text, num_tokens = without_middle(prompt, max_tokens=config.max_prompt_tokens, tokenizer=tokenizer)
        reference = {name: row[name] for name in ("answer", "difficulty", "length")}
        if second:
            # All but the thoughts, which the first answer will be; the document is left out of this prompt.
            reference["second"] = filled(second[0], values | {"COT": "$COT$"}, placeholder=PLACEHOLDER)
        cases.append(
            EvalCase(
                case_id=row["_id"],
                task=TASK,
                path="/chat/completions",
                request=_request(text, MAX_THOUGHT_TOKENS if second else MAX_ANSWER_TOKENS, seed),
                reference=reference,
                document=digest(row["context"]),
                num_tokens=num_tokens,
            )
        )
    return cases


def second_request(case: EvalCase, thoughts: str) -> dict[str, Any] | None:
    """The request for the choice after a chain of thought; None where the case has none."""
    if "second" not in case.reference:
        return None
    before, _, after = case.reference["second"].rpartition("$COT$")
    return _request(f"{before}{thoughts.strip()}{after}", MAX_ANSWER_TOKENS, case.request["seed"])


def read_choice(text: str) -> str | None:
    """The letter that the answer names in the form that the prompt asks for; None where it names none."""
    plain = text.replace("*", "")
    found = next((match for pattern in ANSWERS if (match := pattern.search(plain))), None)
    return found[1] if found else None


def score_longbench_v2(
    cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]
) -> tuple[TaskScore, dict[str, Any]]:
    """Accuracy over the answered questions, whole, by difficulty and by length; an answer without a choice is wrong.

    `no_choice` in the details counts those. At least one question must be answered.
    """
    answered = [case for case in cases if case.case_id in predictions]
    choices = [read_choice(predictions[case.case_id].text) for case in answered]
    right = [float(choice == case.reference["answer"]) for choice, case in zip(choices, answered, strict=True)]
    by_group: dict[str, float] = {}
    for field, names in GROUPS.items():
        of_field = mean_score(TASK, field, right, [case.reference[field] for case in answered], cases=answered).by_group
        by_group |= {name: of_field[name] for name in names if name in of_field}
    score = mean_score(TASK, "longbench_v2_accuracy", right, ["all"] * len(right), cases=answered)
    return replace(score, by_group=by_group), {"no_choice": choices.count(None)}


def _request(text: str, max_tokens: int, seed: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": TEMPERATURE,
        "seed": seed,
    }

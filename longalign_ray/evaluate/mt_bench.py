"""MT-Bench (arXiv 2306.05685): questions of two turns in eight categories, the answer to each turn rated from 1 to 10
by a judge.

Questions, reference answers and the judge's prompts are the benchmark's own files. The second turn is asked with the
first answer before it. The judge sees the first turn alone, then the whole conversation, and the reference answers
where the category has right and wrong ones. Two differences from the benchmark's script: the judge's last [[rating]]
counts, not its first, and a question's score is the mean of its turns before the mean over questions is taken, which
is the same number where every turn has a rating.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from longalign_ray.config import MTBenchConfig
from longalign_ray.data.template import Tokenizer, encode_prompt
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmark_rows import filled, read_rows
from longalign_ray.evaluate.judgements import read_judgements
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore, mean_score

TASK = "mt_bench"
WORST, BEST = 1, 10
# Sampling temperature by category, as in the benchmark.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("reasoning", "math", "coding")
# Names of the judge's prompts for the first and for the second turn, and what each must have a place for.
PROMPTS = ("single-v1", "single-v1-multi-turn")
PROMPTS_WITH_REFERENCE = ("single-math-v1", "single-math-v1-multi-turn")
PLACEHOLDER = r"\{(question|answer|question_1|question_2|answer_1|answer_2|ref_answer_1|ref_answer_2)\}"
CONVERSATION = {"question_1", "question_2", "answer_1", "answer_2"}
PLACES = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": CONVERSATION,
    "single-math-v1-multi-turn": {*CONVERSATION, "ref_answer_1", "ref_answer_2"},
}
QUESTION_FIELDS = {"question_id": int, "category": str, "turns": list}
ANSWER_FIELDS = {"question_id": int, "choices": list}
PROMPT_FIELDS = {"name": str, "system_prompt": str, "prompt_template": str}
WHERE = "fastchat/llm_judge/data/ of the repository lm-sys/FastChat"
QUESTIONS_REMEDY = f"give the path of mt_bench/question.jsonl of {WHERE}"
ANSWERS_REMEDY = f"give the path of mt_bench/reference_answer/gpt-4.jsonl of {WHERE}"
PROMPTS_REMEDY = f"give the path of judge_prompts.jsonl of {WHERE}"


def mt_bench_cases(config: MTBenchConfig, *, tokenizer: Tokenizer, seed: int) -> list[EvalCase]:
    """A case for each question; `reference` has its turns, and the judge's prompt and reference answer for each turn.

    `judge_tokens` of the attributes counts the judge's prompts with the model's tokenizer, less one answer each. Raises
    EvaluationError where a file is missing or does not have the benchmark's form.
    """
    rows = read_rows(
        config.questions, setting="evaluate.mt_bench.questions", fields=QUESTION_FIELDS, remedy=QUESTIONS_REMEDY
    )
    answers = _reference_answers(config.reference_answers)
    prompts = _judge_prompts(config.judge_prompts)
    cases = []
    for row in rows[: config.rows]:
        number, category, turns = row["question_id"], row["category"], row["turns"]
        if not _two_texts(turns):
            raise EvaluationError(
                f"{config.questions}, question_id {number}: turns is no list of two texts; {QUESTIONS_REMEDY}"
            )
        if category not in TEMPERATURES:
            raise EvaluationError(
                f"{config.questions}, question_id {number}: category {category!r} is none of MT-Bench, which has "
                f"{', '.join(TEMPERATURES)}; {QUESTIONS_REMEDY}"
            )
        if category in WITH_REFERENCE and number not in answers:
            raise EvaluationError(
                f"{config.reference_answers} has no answer to question_id {number}, and {category} needs one; "
                f"{ANSWERS_REMEDY}"
            )
        messages = [{"role": "user", "content": turns[0]}]
        reference = {
            "category": category,
            "turns": turns,
            "answers": answers[number] if category in WITH_REFERENCE else None,
            "prompts": [prompts[name] for name in _prompt_names(category)],
        }
        case = EvalCase(
            case_id=f"{number}",
            task=TASK,
            path="/chat/completions",
            request={
                "messages": messages,
                "max_tokens": config.max_new_tokens,
                "temperature": TEMPERATURES[category],
                "seed": seed,
            },
            reference=reference,
            document=f"{number}",
            num_tokens=len(encode_prompt(tokenizer, messages)),
        )
        shown = "".join(
            message["content"] for asked in judge_messages(case, Prediction("", "", "")) for message in asked
        )
        # The second prompt has both answers.
        judge_tokens = len(tokenizer(shown, verbose=False)["input_ids"]) + config.max_new_tokens
        cases.append(replace(case, attributes={"judge_calls": len(turns), "judge_tokens": judge_tokens}))
    return cases


def second_request(case: EvalCase, first_answer: str) -> dict[str, Any]:
    """The request for the second turn, the first answer before it."""
    conversation = [
        *case.request["messages"],
        {"role": "assistant", "content": first_answer},
        {"role": "user", "content": case.reference["turns"][1]},
    ]
    return case.request | {"messages": conversation}


def judge_messages(case: EvalCase, answer: Prediction) -> list[list[dict[str, str]]]:
    """The messages to the judge, a conversation a turn."""
    of, answers = case.reference, (answer.first_answer.strip(), answer.text.strip())
    values = {"question": of["turns"][0], "answer": answers[0]}
    for number in (1, 2):
        values |= {f"question_{number}": of["turns"][number - 1], f"answer_{number}": answers[number - 1]}
        values |= {f"ref_answer_{number}": of["answers"][number - 1]} if of["answers"] else {}
    return [
        [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": filled(prompt["prompt_template"], values, placeholder=PLACEHOLDER)},
        ]
        for prompt in of["prompts"]
    ]


def score_mt_bench(
    cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]
) -> tuple[TaskScore, dict[str, Any]]:
    """Mean rating, 1 to 10, of the questions with one, each the mean of its turns; groups are categories, then turns.

    `predictions` hold the judgements as well. Raises EvaluationError where no answer has a rating.
    """
    judgements = read_judgements(cases, predictions, worst=WORST, best=BEST)
    ratings = {case.case_id: judgements.rating(case) for case in cases}
    rated = [case for case in cases if ratings[case.case_id] is not None]
    values = [rating for rating in ratings.values() if rating is not None]
    score = mean_score(TASK, TASK, values, [case.reference["category"] for case in rated], cases=rated)
    by_turn = {}
    for number in (1, 2):
        of_turn = [of_case[number - 1] for of_case in judgements.of_case.values()]
        known = [rating for rating in of_turn if rating is not None]
        by_turn |= {f"turn {number}": sum(known) / len(known)} if known else {}
    return replace(score, by_group=score.by_group | by_turn), dict(judgements.details)


def _prompt_names(category: str) -> tuple[str, str]:
    return PROMPTS_WITH_REFERENCE if category in WITH_REFERENCE else PROMPTS


def _reference_answers(path: str) -> dict[int, list[str]]:
    """Two answers, one a turn, by question."""
    rows = read_rows(path, setting="evaluate.mt_bench.reference_answers", fields=ANSWER_FIELDS, remedy=ANSWERS_REMEDY)
    answers = {}
    for row in rows:
        first = row["choices"][0] if row["choices"] else None
        if not isinstance(first, dict) or not _two_texts(first.get("turns")):
            raise EvaluationError(
                f"{path}, question_id {row['question_id']}: choices does not begin with an answer of two turns; "
                f"{ANSWERS_REMEDY}"
            )
        answers[row["question_id"]] = first["turns"]
    return answers


def _judge_prompts(path: str) -> dict[str, dict[str, str]]:
    """The four prompts that rate one answer, by name."""
    rows = read_rows(path, setting="evaluate.mt_bench.judge_prompts", fields=PROMPT_FIELDS, remedy=PROMPTS_REMEDY)
    prompts = {row["name"]: row for row in rows}
    for name, places in PLACES.items():
        if name not in prompts:
            raise EvaluationError(f"evaluate.mt_bench.judge_prompts: {path} has no {name}; {PROMPTS_REMEDY}")
        found = set(re.findall(PLACEHOLDER, prompts[name]["prompt_template"]))
        if found != places:
            raise EvaluationError(
                f"evaluate.mt_bench.judge_prompts: {name} of {path} has places for "
                f"{', '.join(sorted(found)) or 'nothing'}, "
                f"and must have them for {', '.join(sorted(places))}; {PROMPTS_REMEDY}"
            )
    return {name: prompts[name] for name in PLACES}


def _two_texts(turns: Any) -> bool:
    return isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)

"""LongBench-Chat (LongAlign, arXiv 2401.18058, section 3.4 and appendix C.1): real questions about long documents,
answers rated from 1 to 10 by a judge that has seen three rated answers to the same question.

Questions, rated answers and the judge's prompt are the benchmark's own files. The judge sees the question, never the
document. As in the paper each answer is judged twice, the three examples in another order, and the score is the mean.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longalign_ray.config import LongBenchChatConfig
from longalign_ray.data.template import Tokenizer
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmark_rows import read_prompt, read_rows
from longalign_ray.evaluate.cut_prompt import without_middle
from longalign_ray.evaluate.judgements import read_judgements
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore, mean_score
from longalign_ray.run_dir import digest

TASK = "longbench_chat"
WORST, BEST = 1, 10
FIELDS = {"idx": int, "prompt": str, "query": str, "answer": str}
EXAMPLES = 3
SLOT = "{}"  # question, reference, three times answer and rating, the answer to rate
NUM_SLOTS = 2 + 2 * EXAMPLES + 1
JUDGE_ROLE = "You evaluate the quality of texts, strictly and impartially."
CHINESE = re.compile(r"[\u4e00-\u9fff]")
WHERE = "LongBench_Chat/ of the repository THUDM/LongAlign"
DATA_REMEDY = f"give the benchmark's questions, JSON or JSON lines with idx, prompt, query and answer, of {WHERE}"
FEW_SHOTS_REMEDY = f"give the path of few_shots.json of {WHERE}"
PROMPT_REMEDY = f"give the path of a text file with the judge's prompt of {WHERE}, {NUM_SLOTS} times {{}} in it"


def longbench_chat_cases(config: LongBenchChatConfig, *, tokenizer: Tokenizer, seed: int) -> list[EvalCase]:
    """A case for each question; `reference` has the judge's prompts, each as the text before and after the answer.

    `judge_tokens` of the attributes counts them with the model's tokenizer. Raises EvaluationError where a file is
    missing or does not have the benchmark's form.
    """
    rows = read_rows(config.data, setting="evaluate.longbench_chat.data", fields=FIELDS, remedy=DATA_REMEDY)
    few_shots = _few_shots(config.few_shots)
    template = read_prompt(
        Path(config.judge_prompt), setting="evaluate.longbench_chat.judge_prompt", remedy=PROMPT_REMEDY
    ).split(SLOT)
    if len(template) != NUM_SLOTS + 1:
        raise EvaluationError(
            f"evaluate.longbench_chat.judge_prompt: {config.judge_prompt} has {len(template) - 1} times {{}}; "
            f"{PROMPT_REMEDY}"
        )
    cases = []
    for row in rows[: config.rows]:
        if not 1 <= row["idx"] <= len(few_shots):
            raise EvaluationError(
                f"{config.data} has a question idx {row['idx']}, and {config.few_shots} rated answers to "
                f"{len(few_shots)} questions: both belong to the same version of the benchmark"
            )
        text, num_tokens = without_middle(row["prompt"], max_tokens=config.max_prompt_tokens, tokenizer=tokenizer)
        prompts = [
            _judge_prompt(template, row, few_shots[row["idx"] - 1], seed=f"{seed}-{row['idx']}-{number}")
            for number in range(config.judgements)
        ]
        judge_tokens = sum(len(tokenizer("".join(prompt), verbose=False)["input_ids"]) for prompt in prompts)
        cases.append(
            EvalCase(
                case_id=f"{row['idx']}",
                task=TASK,
                path="/chat/completions",
                request={
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": config.max_new_tokens,
                    "temperature": 0.0,
                    "seed": seed,
                },
                reference={
                    "prompts": prompts,
                    "one_line": config.one_line_answers,
                    "language": "zh" if CHINESE.search(row["query"]) else "en",
                },
                document=digest(row["prompt"].replace(row["query"], "")),
                num_tokens=num_tokens,
                attributes={"judge_calls": config.judgements, "judge_tokens": judge_tokens},
            )
        )
    return cases


def judge_messages(case: EvalCase, answer: Prediction) -> list[list[dict[str, str]]]:
    """The messages to the judge, a conversation a judgement."""
    text = answer.text.strip()
    if case.reference["one_line"]:
        text = text.replace("\n", " ")
    return [
        [{"role": "system", "content": JUDGE_ROLE}, {"role": "user", "content": f"{before}{text}{after}"}]
        for before, after in case.reference["prompts"]
    ]


def score_longbench_chat(
    cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]
) -> tuple[TaskScore, dict[str, Any]]:
    """Mean rating of the rated answers, 1 to 10, whole and by language; `predictions` hold the judgements as well.

    A case's rating is the mean of its judgements that could be read. Raises EvaluationError where no answer has one.
    """
    judgements = read_judgements(cases, predictions, worst=WORST, best=BEST)
    ratings = {case.case_id: judgements.rating(case) for case in cases}
    rated = [case for case in cases if ratings[case.case_id] is not None]
    values = [rating for rating in ratings.values() if rating is not None]
    score = mean_score(TASK, TASK, values, [case.reference["language"] for case in rated], cases=rated)
    return score, dict(judgements.details)


def _judge_prompt(
    template: Sequence[str], row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], *, seed: str
) -> tuple[str, str]:
    """Text before and after the answer to rate; the seed gives the order of the examples."""
    shuffled = random.Random(seed).sample(list(examples), len(examples))
    values = [row["query"], row["answer"]]
    for example in shuffled:
        values += [example["answer"], str(example["score"])]
    before = "".join(part + value for part, value in zip(template[:-2], values, strict=True))
    return before + template[-2], template[-1]


def _few_shots(path: str) -> list[list[dict[str, Any]]]:
    text = read_prompt(Path(path), setting="evaluate.longbench_chat.few_shots", remedy=FEW_SHOTS_REMEDY)
    try:
        few_shots = json.loads(text)
        whole = all(
            len(examples) == EXAMPLES and all(isinstance(one["answer"], str) and "score" in one for one in examples)
            for examples in few_shots
        )
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise EvaluationError(
            f"evaluate.longbench_chat.few_shots: {path} is not a JSON list with {EXAMPLES} times answer and score a "
            f"question; {FEW_SHOTS_REMEDY}"
        )
    return few_shots

"""LongBench v1 and LongBench-E as a task: prompts and data are the benchmark's own files, answers are scored by rule.

A prompt is filled, cut in its middle, and only then put into the chat template, as in the benchmark; the sets that are
to be continued as they stand (examples, code) go without a template. Of samsum the benchmark ends an answer at the
first new line that is not at its beginning; here the answer goes on and its first line is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longalign_ray.config import LongBenchConfig
from longalign_ray.data.template import Tokenizer
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmark_rows import HUB, filled, read_prompt, read_rows
from longalign_ray.evaluate.cut_prompt import without_middle
from longalign_ray.evaluate.longbench_metrics import score_row
from longalign_ray.evaluate.longbench_score import summed_up
from longalign_ray.evaluate.longbench_sets import LONGBENCH_SETS, LongBenchSet
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore
from longalign_ray.run_dir import digest, whole_file

TASK = "longbench"
FIELDS = {"input": str, "context": str, "answers": list, "length": int, "all_classes": list | None}
PLACEHOLDER = r"\{(context|input)\}"
DATA_REMEDY = (
    "unpack data.zip of the data set THUDM/LongBench of the Hugging Face hub, and give the directory with its .jsonl "
    "files, or name fewer sets in evaluate.longbench.sets"
)
PROMPTS_REMEDY = "give the path of config/dataset2prompt.json of the repository THUDM/LongBench"


def longbench_cases(config: LongBenchConfig, *, tokenizer: Tokenizer, seed: int) -> list[EvalCase]:
    """A case for each row of each set, or for its first rows. Raises EvaluationError where a file is missing."""
    prompts = _prompts(Path(config.prompts))
    cases = []
    for of in _wanted(config):
        if of.name not in prompts:
            raise EvaluationError(f"evaluate.longbench.prompts: {config.prompts} has no {of.name}; {PROMPTS_REMEDY}")
        source = _source(config, of)
        rows = read_rows(source, setting="evaluate.longbench.data", fields=FIELDS, remedy=DATA_REMEDY)
        for number, row in enumerate(rows[: config.rows_per_set]):
            _check_scorable(of, row, place=f"{source}, row {number + 1}")
            prompt = filled(prompts[of.name], row, placeholder=PLACEHOLDER)
            text, num_tokens = without_middle(prompt, max_tokens=config.max_prompt_tokens, tokenizer=tokenizer)
            request = {"max_tokens": of.max_new_tokens, "temperature": 0.0, "seed": seed}
            cases.append(
                EvalCase(
                    case_id=f"{of.name}-{number}",
                    task=TASK,
                    path="/chat/completions" if of.chat else "/completions",
                    request=({"messages": [{"role": "user", "content": text}]} if of.chat else {"prompt": text})
                    | request,
                    reference={"set": of.name, **{name: row[name] for name in ("answers", "all_classes", "length")}},
                    document=digest(row["context"]),
                    num_tokens=num_tokens,
                )
            )
    return cases


def score_longbench(
    cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]
) -> tuple[TaskScore, dict[str, Any]]:
    """The mean of the sets, each the mean of its answered rows, and all that `longalign score` tells.

    `by_group` has the sets, 0 to 1; the details are in per cent.
    """
    row_scores: dict[str, list[float | None]] = {}
    lengths: dict[str, list[int]] = {}
    by_case: dict[str, dict[str, float]] = {}
    for case in cases:
        name, of_row = case.reference["set"], None
        if case.case_id in predictions:
            of_row = score_row(
                LONGBENCH_SETS[name],
                predictions[case.case_id].text,
                answers=case.reference["answers"],
                all_classes=case.reference["all_classes"],
            )
            by_case.setdefault(name, {})[case.case_id] = of_row
        row_scores.setdefault(name, []).append(of_row)
        lengths.setdefault(name, []).append(case.reference["length"])
    scores = summed_up(row_scores, lengths)
    by_set = {name: score / 100 for name, score in scores.scores.items()}
    score = TaskScore(TASK, "longbench", sum(by_set.values()) / len(by_set), len(predictions), by_set, by_case)
    return score, {
        "scores": scores.scores,
        "category_scores": scores.category_scores,
        "averages": scores.averages,
        "buckets": scores.buckets,
        "rows": scores.rows,
    }


def write_longbench(directory: Path, cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]) -> None:
    """A file `<set>.jsonl` a set with the answered rows, which `longalign score longbench` and the benchmark read."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        if case.case_id in predictions:
            of_row = {"pred": predictions[case.case_id].text, **case.reference}
            rows.setdefault(of_row.pop("set"), []).append(of_row)
    for stale in directory.glob("*.jsonl"):
        stale.unlink()
    for name, of_set in rows.items():
        with whole_file(directory / f"{name}.jsonl") as temporary:
            temporary.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_set), encoding="utf-8"
            )


def _wanted(config: LongBenchConfig) -> list[LongBenchSet]:
    known = {name: of for name, of in LONGBENCH_SETS.items() if of.in_e or not config.extended}
    unknown = [name for name in config.sets or () if name not in known]
    if unknown:
        which = "LongBench-E" if config.extended else "LongBench"
        raise EvaluationError(
            f"evaluate.longbench.sets names {', '.join(unknown)}, and {which} has {', '.join(known)}: correct the name"
        )
    return [of for name, of in known.items() if config.sets is None or name in config.sets]


def _check_scorable(of: LongBenchSet, row: dict[str, Any], *, place: str) -> None:
    """Raises EvaluationError where an answer to the row could not be scored, before any is asked for: where reference
    answers or classes are not what the metric needs, or a package that finds words is not installed."""
    try:
        if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
            raise ValueError(f"the field 'answers' is {str(row['answers'])[:80]!r}, and must be a list of texts")
        score_row(of, "", answers=row["answers"], all_classes=row["all_classes"])
    except ValueError as error:
        raise EvaluationError(f"{place}: {error}; {DATA_REMEDY}") from error


def _source(config: LongBenchConfig, of: LongBenchSet) -> str:
    name = f"{of.name}_e" if config.extended else of.name
    if config.data.startswith(HUB):
        return f"{config.data}{'&' if '?' in config.data else '?'}name={name}&split=test"
    return str(Path(config.data) / f"{name}.jsonl")


def _prompts(path: Path) -> dict[str, str]:
    text = read_prompt(path, setting="evaluate.longbench.prompts", remedy=PROMPTS_REMEDY)
    try:
        prompts = json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"evaluate.longbench.prompts: {path} is not JSON ({error}); {PROMPTS_REMEDY}") from error
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise EvaluationError(f"evaluate.longbench.prompts: {path} is no mapping of sets to prompts; {PROMPTS_REMEDY}")
    return prompts

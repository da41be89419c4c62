"""RULER (arXiv 2404.06654): thirteen synthetic tasks in prompts of exact lengths, and the length up to which a model is
good at them.

A prompt, from left to right, with its answer never longer than the length:

    | chat template | task, solved example | context, as long as fits | question, template | answer prefix | answer |

The benchmark makes contexts longer in coarse steps; here the longest that fits is taken. An answer is right where it
holds the wanted strings, as there. The samples themselves: `needles.py`, `lists.py`, `questions.py`;
what they differ in is told at their heads, and `words.py` has the wording.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longalign_ray.config import RulerConfig
from longalign_ray.data.template import Tokenizer
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.ruler.lists import common_words_sampler, frequent_words_sampler, variable_sampler
from longalign_ray.evaluate.ruler.needles import Essay, NeedleTask, needle_sampler
from longalign_ray.evaluate.ruler.prompts import PATHS, RulerPrompt, longest_prompt
from longalign_ray.evaluate.ruler.questions import QuestionSet, question_sampler, read_hotpotqa, read_squad
from longalign_ray.evaluate.ruler.samples import Sampler
from longalign_ray.evaluate.ruler.words import OWN_WORDS, RulerWords, read_words
from longalign_ray.evaluate.scoring import string_match_all, string_match_part
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskScore

logger = logging.getLogger(__name__)

TASK = "ruler"
# Llama-2-7B-chat's average at 4k: the paper calls a length effective whose average is not below it (section 4).
THRESHOLD = 0.856


@dataclass(frozen=True, slots=True)
class RulerParts:
    """What samplers are made from."""

    words: RulerWords
    essay: Essay
    question_sets: Mapping[str, QuestionSet]


@dataclass(frozen=True, slots=True)
class RulerTask:
    """How the samples of a task for a length are made, and how an answer of at most `max_new_tokens` is scored."""

    max_new_tokens: int
    sampler: Callable[[RulerParts, int], Sampler]
    score: Callable[[str, Sequence[str]], float] = string_match_all


def _needles(task: NeedleTask) -> RulerTask:
    return RulerTask(128, lambda parts, length: needle_sampler(task, parts.words, parts.essay))


def _questions(name: str) -> RulerTask:
    return RulerTask(
        32, lambda parts, length: question_sampler(parts.question_sets[name], parts.words), string_match_part
    )


RULER_TASKS = {
    "niah_single_1": _needles(NeedleTask("noise")),
    "niah_single_2": _needles(NeedleTask("essay")),
    "niah_single_3": _needles(NeedleTask("essay", values="uuids")),
    "niah_multikey_1": _needles(NeedleTask("essay", num_keys=4)),
    "niah_multikey_2": _needles(NeedleTask("needles")),
    "niah_multikey_3": _needles(NeedleTask("needles", keys="uuids", values="uuids")),
    "niah_multivalue": _needles(NeedleTask("essay", num_values=4)),
    "niah_multiquery": _needles(NeedleTask("essay", num_keys=4, num_queries=4)),
    "vt": RulerTask(30, lambda parts, length: variable_sampler(parts.words)),
    "cwe": RulerTask(120, lambda parts, length: common_words_sampler(parts.words, length=length)),
    "fwe": RulerTask(50, lambda parts, length: frequent_words_sampler(parts.words, length=length)),
    "qa_1": _questions("qa_1"),
    "qa_2": _questions("qa_2"),
}
QUESTION_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}


def ruler_cases(config: RulerConfig, *, haystack: str, tokenizer: Tokenizer, seed: int) -> list[EvalCase]:
    """`samples` cases of each task at each length, lengths outermost; the same seed gives the same.

    Samples of a task and length whose contexts begin alike are one document. Raises EvaluationError where a task is not
    known or lacks its file, or a length is too short or too long for one.
    """
    question_sets = _question_sets(config)
    names = _wanted(config, question_sets)
    parts = RulerParts(
        OWN_WORDS if config.prompts is None else read_words(config.prompts), Essay(haystack), question_sets
    )
    cases = []
    for length in config.lengths:
        for name in names:
            task = RULER_TASKS[name]
            sampler = task.sampler(parts, length)
            size = sampler.least + 32
            for number in range(config.samples):
                made = longest_prompt(
                    sampler,
                    limit=length - task.max_new_tokens,
                    number=number,
                    seed=f"{seed}-{name}-{length}-{number}",
                    guess=size,
                    tokenizer=tokenizer,
                    prefix_of=config.answer_prefix,
                )
                if made is None or made.size == sampler.most:
                    raise _no_such_length(length, name, made)
                size = made.size
                case_id = f"{name}-{length}-{number}"
                request = {"max_tokens": task.max_new_tokens, "temperature": 0.0, "seed": seed}
                cases.append(
                    EvalCase(
                        case_id=case_id,
                        task=TASK,
                        path=PATHS[config.answer_prefix],
                        request=made.request | request,
                        reference={"task": name, "answers": list(made.sample.answers)},
                        document=f"{name}-{length}" if made.sample.shared_chars else case_id,
                        num_tokens=made.num_tokens,
                        attributes={"length": length},
                        shared_tokens=made.shared_tokens,
                    )
                )
    return cases


def score_ruler(cases: Sequence[EvalCase], predictions: Mapping[str, Prediction]) -> tuple[TaskScore, dict[str, Any]]:
    """The mean of the means of each task at each length, over the answered cases; groups are lengths, then tasks.

    Details: `grid`, rows are tasks, columns lengths, None where no answer came; `averages`, by length, over the tasks;
    `effective_length`, the largest whose average is not below THRESHOLD, 0 where there is none; `num_tasks`, as an
    average of fewer than thirteen is none of RULER's.
    """
    by_cell: dict[tuple[str, float], dict[str, float]] = {}
    for case in cases:
        of_cell = by_cell.setdefault((case.reference["task"], case.attributes["length"]), {})
        if case.case_id in predictions:
            task = RULER_TASKS[case.reference["task"]]
            of_cell[case.case_id] = task.score(predictions[case.case_id].text, case.reference["answers"])
    mean = {cell: _mean(list(values.values())) for cell, values in by_cell.items()}
    tasks, lengths = list(dict.fromkeys(task for task, _ in mean)), list(dict.fromkeys(length for _, length in mean))
    grid = [[mean[task, length] for length in lengths] for task in tasks]
    averages = [_mean([value for value in column if value is not None]) for column in zip(*grid, strict=True)]
    of_tasks = [_mean([value for value in row if value is not None]) for row in grid]
    good = [
        length
        for length, average in zip(lengths, averages, strict=True)
        if average is not None and average >= THRESHOLD
    ]
    groups = zip([*(f"{length:,} tokens" for length in lengths), *tasks], [*averages, *of_tasks], strict=True)
    known = [value for value in mean.values() if value is not None]
    score = TaskScore(
        task=TASK,
        metric="ruler",
        value=sum(known) / len(known),
        num_cases=sum(map(len, by_cell.values())),
        by_group={group: value for group, value in groups if value is not None},
        by_case={f"{task}-{length}": values for (task, length), values in by_cell.items() if values},
    )
    return score, {
        "lengths": lengths,
        "tasks": tasks,
        "grid": grid,
        "averages": averages,
        "effective_length": max(good, default=0),
        "num_tasks": len(tasks),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _question_sets(config: RulerConfig) -> dict[str, QuestionSet]:
    """Those whose files are given and that are wanted."""
    wanted = QUESTION_FILES if config.tasks is None else config.tasks
    sets: dict[str, QuestionSet] = {}
    if config.squad is not None and "qa_1" in wanted:
        sets["qa_1"] = read_squad(config.squad)
    if config.hotpotqa is not None and "qa_2" in wanted:
        sets["qa_2"] = read_hotpotqa(config.hotpotqa)
    for name, questions in sets.items():
        if len(questions.questions) < config.samples:
            raise EvaluationError(
                f"evaluate.ruler.{QUESTION_FILES[name]} has {len(questions.questions)} questions, and "
                f"evaluate.ruler.samples asks for {config.samples}: lower it, or give the whole published file"
            )
    return sets


def _wanted(config: RulerConfig, question_sets: Mapping[str, QuestionSet]) -> list[str]:
    """Names of the tasks in the benchmark's order; those left out for want of a file are logged."""
    unknown = [name for name in config.tasks or () if name not in RULER_TASKS]
    if unknown:
        raise EvaluationError(
            f"evaluate.ruler.tasks names {', '.join(unknown)}, and RULER has {', '.join(RULER_TASKS)}: correct the name"
        )
    without = [name for name in QUESTION_FILES if name not in question_sets]
    if config.tasks is None:
        if without:
            files = ", ".join(f"evaluate.ruler.{QUESTION_FILES[name]}" for name in without)
            logger.warning("ruler: left out for want of %s: %s", files, ", ".join(without))
        return [name for name in RULER_TASKS if name not in without]
    for name in without:
        if name in config.tasks:
            raise EvaluationError(
                f"evaluate.ruler.tasks names {name}, and evaluate.ruler.{QUESTION_FILES[name]} is not set: set it to "
                f"the published file, or leave {name} out"
            )
    return [name for name in RULER_TASKS if name in config.tasks]


def _no_such_length(length: int, name: str, made: RulerPrompt | None) -> EvaluationError:
    if made is None:
        why = "which is too short for a prompt and its answer: raise it"
    else:
        why = f"and there is no more material than for {made.num_tokens} tokens: lower it"
    return EvaluationError(f"evaluate.ruler.lengths holds {length} for {name}, {why}, or leave out the task")

"""The benchmarks that `longalign evaluate` knows: how the cases of each are made, and its answers read and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign_ray.config import EvaluateConfig
from longalign_ray.evaluate import heldout as heldout_task
from longalign_ray.evaluate import longbench as longbench_task
from longalign_ray.evaluate import longbench_chat as longbench_chat_task
from longalign_ray.evaluate import longbench_v2 as longbench_v2_task
from longalign_ray.evaluate import longeval as longeval_task
from longalign_ray.evaluate import mt_bench as mt_bench_task
from longalign_ray.evaluate import needle as needle_task
from longalign_ray.evaluate.ruler import tasks as ruler_task
from longalign_ray.evaluate.task import EvalCase, Prediction, TaskInputs, TaskScore, read_text

logger = logging.getLogger(__name__)

ReadAnswer = Callable[[EvalCase, dict[str, Any]], Prediction]
SecondRequest = Callable[[EvalCase, str], dict[str, Any] | None]


def no_second_request(case: EvalCase, text: str) -> None:
    """For a task that asks once."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How the cases of a task are made, and their answers read and scored.

    `make_cases` gives None where the settings leave the task out; `score` gives the score and its details, of which
    those in `in_manifest` go into the manifest, each under the name that stands for it there. `write_published` writes
    the predictions into a directory in the benchmark's own format, for other scorers. `second_request` makes the
    request that follows a first answer, whose text it is given; the second answer is then the prediction.
    `judge_messages` makes the conversations with the judge about an answer; its replies are then among the predictions
    that `score` is given, each under its `judgement_id`, and of `judge_max_tokens` unless the settings say otherwise.
    """

    make_cases: Callable[[EvaluateConfig, TaskInputs], list[EvalCase] | None]
    score: Callable[[Sequence[EvalCase], Mapping[str, Prediction]], tuple[TaskScore, dict[str, Any]]]
    read_answer: ReadAnswer = read_text
    in_manifest: Mapping[str, str] = field(default_factory=dict)
    write_published: Callable[[Path, Sequence[EvalCase], Mapping[str, Prediction]], None] | None = None
    second_request: SecondRequest = no_second_request
    judge_messages: Callable[[EvalCase, Prediction], list[list[dict[str, str]]]] | None = None
    judge_max_tokens: int = 256


def _needle(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.needle and needle_task.needle_cases(
        config.needle, haystack=inputs.haystack, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


def _ruler(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.ruler and ruler_task.ruler_cases(
        config.ruler, haystack=inputs.haystack, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


def _heldout(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return heldout_task.heldout_cases(inputs.heldout) if config.heldout_loss else None


def _longbench(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.longbench and longbench_task.longbench_cases(
        config.longbench, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


def _longbench_v2(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.longbench_v2 and longbench_v2_task.longbench_v2_cases(
        config.longbench_v2, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


def _longeval(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.longeval and longeval_task.longeval_cases(
        config.longeval, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


def _longbench_chat(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.longbench_chat and longbench_chat_task.longbench_chat_cases(
        config.longbench_chat, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


def _mt_bench(config: EvaluateConfig, inputs: TaskInputs) -> list[EvalCase] | None:
    return config.mt_bench and mt_bench_task.mt_bench_cases(
        config.mt_bench, tokenizer=inputs.tokenizer, seed=inputs.seed
    )


BENCHMARKS = {
    needle_task.TASK: Benchmark(_needle, needle_task.score_needle, in_manifest={"exact": "needle_exact"}),
    heldout_task.TASK: Benchmark(
        _heldout, heldout_task.score_heldout, heldout_task.read_answer, in_manifest={"token_loss": "heldout_token_loss"}
    ),
    ruler_task.TASK: Benchmark(
        _ruler,
        ruler_task.score_ruler,
        in_manifest={"effective_length": "ruler_effective_length", "num_tasks": "ruler_tasks"},
    ),
    longbench_task.TASK: Benchmark(
        _longbench, longbench_task.score_longbench, write_published=longbench_task.write_longbench
    ),
    longbench_v2_task.TASK: Benchmark(
        _longbench_v2,
        longbench_v2_task.score_longbench_v2,
        in_manifest={"no_choice": "longbench_v2_no_choice"},
        second_request=longbench_v2_task.second_request,
    ),
    longeval_task.TASK: Benchmark(_longeval, longeval_task.score_longeval),
    longbench_chat_task.TASK: Benchmark(
        _longbench_chat, longbench_chat_task.score_longbench_chat, judge_messages=longbench_chat_task.judge_messages
    ),
    mt_bench_task.TASK: Benchmark(
        _mt_bench,
        mt_bench_task.score_mt_bench,
        second_request=mt_bench_task.second_request,
        judge_messages=mt_bench_task.judge_messages,
        judge_max_tokens=2_048,
    ),
}


def task_cases(config: EvaluateConfig, inputs: TaskInputs) -> dict[str, list[EvalCase]]:
    """The cases of each task that the settings ask for. Raises EvaluationError where one cannot be made.

    No endpoint is needed: what is missing is told before a server is started.
    """
    cases: dict[str, list[EvalCase]] = {}
    for task, benchmark in BENCHMARKS.items():
        of_task = benchmark.make_cases(config, inputs)
        if of_task:
            cases[task] = of_task
        elif of_task is not None:
            logger.warning("evaluate: %s has no case and is left out", task)
    return cases

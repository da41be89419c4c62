"""Runs benchmarks against an OpenAI-compatible endpoint: many requests at a time, nothing lost, nothing made up.

For every model: the cases, longest document first -> requests over HTTP -> predictions/<task>-<model>.jsonl, a line as
an answer comes -> of some tasks, a judge's replies to the answers: predictions/<task>-<model>.judgements.jsonl ->
scores/<task>-<model>.json. Failed cases are counted by reason and take no part in a score.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import quote

from longalign_ray.config import EvaluateConfig, JudgeConfig
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmarks import BENCHMARKS, ReadAnswer, SecondRequest, no_second_request
from longalign_ray.evaluate.document_order import by_document, do_by_document
from longalign_ray.evaluate.endpoint import Endpoint, RequestFailed
from longalign_ray.evaluate.judge import RecordedJudge, judge_case, judge_cost, judge_digest, open_judge
from longalign_ray.evaluate.predictions import PredictionFile, file_stem
from longalign_ray.evaluate.task import AnswerError, EvalCase, Prediction, read_text
from longalign_ray.logs import progress
from longalign_ray.run_dir import RunDir, digest, write_json

logger = logging.getLogger(__name__)

# Names the document: a router, such as Ray Serve's ConsistentHashRouter, can keep it on the replica that has cached it.
SESSION_HEADER = "x-session-id"


@dataclass(frozen=True, slots=True)
class _Sheet:
    """The cases of one task for one model, what was answered and what failed; `read_answer` and `second_request` are
    those of the task, or, where the cases are judgements, those of any."""

    task: str
    model: str
    cases: list[EvalCase]
    digests: dict[str, str]
    predictions: PredictionFile
    read_answer: ReadAnswer = read_text
    second_request: SecondRequest = no_second_request
    failed: Counter[str] = field(default_factory=Counter)

    def unanswered(self) -> list[list[EvalCase]]:
        """By document, in the order in which they are asked."""
        return by_document(case for case in self.cases if case.case_id not in self.predictions.found)


def evaluate(
    config: EvaluateConfig,
    run_dir: RunDir,
    *,
    base_url: str,
    cases: Mapping[str, list[EvalCase]],
    api_key: str | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Counts and scores of every model, and the number of failed cases by reason, of the judge as `judge_<reason>`.

    `cases` are made by `task_cases`. Counts hold `cases`, `answered`, `resumed` (answered by an earlier, killed run),
    `retries` and for each model `<model>_<metric>` of each task, such as `<model>_needle_accuracy`,
    `<model>_needle_exact`, `<model>_heldout_loss` (Eq. 2) and `<model>_heldout_token_loss`; where tasks are judged,
    `judgements`, `judged`, `judge_resumed`, `judge_retries` and the judge's tokens too.
    Raises EvaluationError where the endpoint does not answer, lacks a model, or fails every case of a task.
    """
    return asyncio.run(_evaluate(config, run_dir, base_url, cases, api_key))


async def _evaluate(
    config: EvaluateConfig, run_dir: RunDir, base_url: str, cases: Mapping[str, list[EvalCase]], api_key: str | None
) -> tuple[dict[str, Any], dict[str, int]]:
    async with AsyncExitStack() as stack:
        judge = None
        if any(BENCHMARKS[task].judge_messages for task in cases):
            assert config.judge is not None  # the settings say so
            judge = await stack.enter_async_context(open_judge(config.judge))
            _tell_cost(config.judge, cases, num_models=len(config.models))
        endpoint = Endpoint(
            base_url,
            timeout_seconds=config.request_timeout_seconds,
            max_attempts=config.max_attempts,
            concurrency=config.concurrency,
            api_key=api_key,
        )
        await stack.enter_async_context(endpoint)
        await endpoint.check_models(config.models)
        for stale in run_dir.scores.glob("*.json"):
            stale.unlink()
        sheets = [
            _open_sheet(config, run_dir, task, model, of_task)
            for task, of_task in cases.items()
            for model in config.models
        ]
        resumed = sum(len(sheet.predictions.found) for sheet in sheets)
        try:
            await _ask_all(endpoint, sheets, concurrency=config.concurrency)
        finally:
            for sheet in sheets:
                sheet.predictions.close()
        judged, judge_counts = {}, {}
        if judge is not None and config.judge is not None:
            judged, judge_counts = await _judge(judge, config.judge, run_dir, sheets)
    counts: dict[str, Any] = {
        "cases": sum(len(sheet.cases) for sheet in sheets),
        "answered": sum(len(sheet.predictions.found) for sheet in sheets),
        "resumed": resumed,
        "retries": endpoint.num_retries,
        **judge_counts,
    }
    failed = sum((sheet.failed for sheet in sheets), Counter[str]())
    for judgements in judged.values():
        failed.update({f"judge_{reason}": number for reason, number in judgements.failed.items()})
    for number, sheet in enumerate(sheets):
        counts |= _score(run_dir, sheet, judged.get(number))
    return counts, dict(failed)


def _tell_cost(config: JudgeConfig, cases: Mapping[str, list[EvalCase]], *, num_models: int) -> None:
    """Logs what judging costs at most: answers and judgements as long as they may be, none kept from an earlier run."""
    prompts, completions = [], []
    for task, of_task in cases.items():
        if BENCHMARKS[task].judge_messages is not None:
            for case in of_task:
                calls = int(case.attributes["judge_calls"])
                longest = case.attributes["judge_tokens"] / calls + case.request["max_tokens"]
                prompts += [math.ceil(longest)] * calls * num_models
                completions += [config.max_new_tokens or BENCHMARKS[task].judge_max_tokens] * calls * num_models
    where = config.endpoint or f"no call, as {config.replay} has the replies"
    cost = judge_cost(config, prompts, completions)
    logger.info("judge %s (%s): at most %s", config.model, where, cost.describe())


async def _judge(
    judge: Endpoint | RecordedJudge, config: JudgeConfig, run_dir: RunDir, sheets: Sequence[_Sheet]
) -> tuple[dict[int, _Sheet], dict[str, int]]:
    """The judge's replies to the answers of each judged sheet, by the sheet's number, and the counts of all."""
    judged: dict[int, _Sheet] = {}
    for number, sheet in enumerate(sheets):
        messages = BENCHMARKS[sheet.task].judge_messages
        if messages is None:
            continue
        cases = [
            judge_case(config, case, one, conversation, max_tokens=BENCHMARKS[sheet.task].judge_max_tokens)
            for case in sheet.cases
            if case.case_id in sheet.predictions.found
            for one, conversation in enumerate(messages(case, sheet.predictions.found[case.case_id]))
        ]
        digests = {case.case_id: judge_digest(case.path, case.request) for case in cases}
        path = run_dir.predictions / f"{file_stem(sheet.task, sheet.model)}.judgements.jsonl"
        judged[number] = _Sheet(sheet.task, sheet.model, cases, digests, PredictionFile(path, digests))
    resumed = sum(len(sheet.predictions.found) for sheet in judged.values())
    try:
        await _ask_all(judge, list(judged.values()), concurrency=config.concurrency)
    finally:
        for sheet in judged.values():
            sheet.predictions.close()
    replies = [reply for sheet in judged.values() for reply in sheet.predictions.found.values()]
    return judged, {
        "judgements": sum(len(sheet.cases) for sheet in judged.values()),
        "judged": len(replies),
        "judge_resumed": resumed,
        "judge_retries": judge.num_retries,
        "judge_prompt_tokens": int(sum(reply.values.get("prompt_tokens", 0) for reply in replies)),
        "judge_completion_tokens": int(sum(reply.values.get("completion_tokens", 0) for reply in replies)),
    }


def _open_sheet(config: EvaluateConfig, run_dir: RunDir, task: str, model: str, cases: list[EvalCase]) -> _Sheet:
    """Digests tie an answer to request, model name, endpoint and exported weights: a retrained model is asked anew."""
    export = run_dir.manifest("export")
    weights = export.read_text(encoding="utf-8") if export.exists() else ""
    benchmark = BENCHMARKS[task]
    digests = {}
    for case in cases:
        requests = [case.request]
        if (second := benchmark.second_request(case, "")) is not None:
            requests.append(second)
        digests[case.case_id] = digest(config.endpoint, weights, model, case.path, *requests)
    path = run_dir.predictions / f"{file_stem(task, model)}.jsonl"
    file = PredictionFile(path, digests)
    return _Sheet(task, model, cases, digests, file, benchmark.read_answer, benchmark.second_request)


async def _ask_all(endpoint: Endpoint | RecordedJudge, sheets: Sequence[_Sheet], *, concurrency: int) -> None:
    """Every unanswered case of every sheet, at most `concurrency` at a time."""
    groups = list(_interleave([[(sheet, case) for case in group] for group in sheet.unanswered()] for sheet in sheets))
    done = 0
    with progress("evaluate", sum(map(len, groups))) as bar:

        async def ask(job: tuple[_Sheet, EvalCase]) -> None:
            nonlocal done
            await _ask(endpoint, *job)
            done += 1
            num_failed = sum(sheet.failed.total() for sheet in sheets)
            bar.advance(done, f"{num_failed} failed" if num_failed else "")

        await do_by_document(groups, ask, concurrency=concurrency)


async def _ask(endpoint: Endpoint | RecordedJudge, sheet: _Sheet, case: EvalCase) -> None:
    headers = {SESSION_HEADER: quote(f"{case.task}-{case.document}", safe="")}
    try:
        answer = await endpoint.post(case.path, {"model": sheet.model, **case.request}, headers=headers)
        prediction = _read_answer(sheet, case, answer)
        second = sheet.second_request(case, prediction.text)
        if second is not None:
            answer = await endpoint.post(case.path, {"model": sheet.model, **second}, headers=headers)
            prediction = replace(_read_answer(sheet, case, answer), first_answer=prediction.text)
    except (RequestFailed, AnswerError) as failure:
        if failure.reason not in sheet.failed:
            logger.warning(
                "%s of %s: case %s failed: %s: %s", sheet.task, sheet.model, case.case_id, failure.reason, failure
            )
        sheet.failed[failure.reason] += 1
        return
    sheet.predictions.append(replace(prediction, request_digest=sheet.digests[case.case_id]))


def _read_answer(sheet: _Sheet, case: EvalCase, answer: dict[str, Any]) -> Prediction:
    try:
        return sheet.read_answer(case, answer)
    except (KeyError, IndexError, TypeError) as error:
        raise AnswerError("bad_answer", f"not the OpenAI form ({error!r}): {str(answer)[:200]}") from error


def _interleave(lists: Iterable[Sequence[Any]]) -> Iterator[Any]:
    """The first of each list, then the second of each, ...: all models are busy at the same time."""
    lists = list(lists)
    for number in range(max(map(len, lists), default=0)):
        yield from (items[number] for items in lists if number < len(items))


def _score(run_dir: RunDir, sheet: _Sheet, judgements: _Sheet | None) -> dict[str, float]:
    """Writes the score file; returns the numbers for the manifest."""
    if not sheet.predictions.found:
        reasons = ", ".join(f"{reason} {number}" for reason, number in sheet.failed.most_common())
        raise EvaluationError(
            f"{sheet.task} of {sheet.model}: all {len(sheet.cases)} cases failed ({reasons}); see the warnings above, "
            f"put the endpoint right and run `longalign evaluate` again: answered cases are kept"
        )
    benchmark = BENCHMARKS[sheet.task]
    replies = judgements.predictions.found if judgements is not None else {}
    score, details = benchmark.score(sheet.cases, sheet.predictions.found | replies)
    write_json(
        run_dir.scores / f"{file_stem(sheet.task, sheet.model)}.json",
        {"model": sheet.model, **asdict(score), "failed_by_reason": dict(sheet.failed), **details},
    )
    if benchmark.write_published is not None:
        directory = run_dir.predictions / file_stem(sheet.task, sheet.model)
        benchmark.write_published(directory, sheet.cases, sheet.predictions.found)
    more = {f"{sheet.model}_{name}": details[detail] for detail, name in benchmark.in_manifest.items()}
    return {f"{sheet.model}_{score.metric}": score.value} | more

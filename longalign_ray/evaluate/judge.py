"""A model that rates answers: an OpenAI-compatible endpoint, or the recorded replies of one.

A judge's replies are kept as they come, with the digest of the request that each answers. That file is also what a
recorded judge reads: a run can be scored again without a call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign_ray.api_keys import read_key
from longalign_ray.config import JudgeConfig
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.endpoint import Endpoint, RequestFailed
from longalign_ray.evaluate.task import EvalCase, judgement_id
from longalign_ray.run_dir import digest

PATH = "/chat/completions"


@dataclass(frozen=True, slots=True)
class JudgeCost:
    """What judging takes; `price` is in the currency of the recipe's prices, None where it gives none."""

    num_calls: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None

    def describe(self) -> str:
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        price = "" if self.price is None else f", a price of {self.price:.2f}"
        return f"{self.num_calls:,} calls, {tokens}{price}"


def judge_cost(config: JudgeConfig, prompt_tokens: Sequence[int], completion_tokens: Sequence[int]) -> JudgeCost:
    """The cost of calls with these numbers of tokens."""
    prompt, completion = sum(prompt_tokens), sum(completion_tokens)
    price = None
    if config.price_per_million_prompt_tokens is not None and config.price_per_million_completion_tokens is not None:
        price = (
            prompt * config.price_per_million_prompt_tokens + completion * config.price_per_million_completion_tokens
        ) / 1e6
    return JudgeCost(len(prompt_tokens), prompt, completion, price)


def judge_case(
    config: JudgeConfig, case: EvalCase, number: int, messages: Sequence[Mapping[str, str]], *, max_tokens: int
) -> EvalCase:
    """The request for judgement `number` of the answer to a case; `max_tokens` where the settings name none."""
    request = {
        "model": config.model,  # in place of the model that is asked otherwise
        "messages": [dict(message) for message in messages],
        "max_tokens": config.max_new_tokens or max_tokens,
        "temperature": config.temperature,
    }
    name = judgement_id(case.case_id, number)
    return EvalCase(name, case.task, PATH, request, reference=None, document=case.case_id, num_tokens=0)


def open_judge(config: JudgeConfig) -> Endpoint | RecordedJudge:
    """A judge to post requests to, as an async context manager.

    Raises EvaluationError where the record cannot be read, ServingError where the key cannot.
    """
    if config.replay is not None:
        return RecordedJudge(Path(config.replay))
    key = None if config.api_key is None else read_key(config.api_key)
    return Endpoint(
        config.endpoint or "",
        timeout_seconds=config.request_timeout_seconds,
        max_attempts=config.max_attempts,
        concurrency=config.concurrency,
        api_key=key,
    )


class RecordedJudge:
    """Replies from a JSONL file with `request_digest` and `text`; a request that it does not hold fails by name."""

    num_retries = 0

    def __init__(self, path: Path):
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            self._replies = {row["request_digest"]: row["text"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"evaluate.judge.replay: {path} cannot be read ({error!r}): give the file of judgements of an earlier "
                f"run, evaluate/predictions/*.judgements.jsonl"
            ) from error

    async def __aenter__(self) -> RecordedJudge:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def post(
        self, path: str, body: dict[str, Any], *, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The recorded reply in the form of a chat completion. Raises RequestFailed where there is none."""
        reply = self._replies.get(judge_digest(path, body))
        if reply is None:
            raise RequestFailed("not_recorded", "the record holds no reply to this request")
        return {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]}


def judge_digest(path: str, body: Mapping[str, Any]) -> str:
    """What ties a judgement to its request: the judge's model, the messages and the sampling, wherever it is served."""
    return digest(path, body)

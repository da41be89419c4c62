"""Answers parts of a file of requests with an engine of its own: what an actor holds, which knows nothing of Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from longalign_ray.config import ServeConfig
from longalign_ray.errors import LongAlignError, ServingError
from longalign_ray.run_dir import whole_file, write_json
from longalign_ray.serve.answer import ServedModel, answer, served_model
from longalign_ray.serve.api_errors import serving_error, validation_error
from longalign_ray.serve.ask import asked_by_chat, asked_by_completion
from longalign_ray.serve.replica import load_engine
from longalign_ray.serve.request_parts import RequestPart
from longalign_ray.serve.schema import ApiError, ChatRequest, CompletionRequest
from longalign_ray.serve.whole_answer import chat_response, completion_response


class PartAnswerer:
    """Up to `serve.max_ongoing_requests` requests of a part are under way at a time; the engine computes them together.

    A call writes the answers to a part and then its counts, and gives back what went wrong with the whole, if anything.
    """

    def __init__(
        self, model_dir: str, config: ServeConfig, *, name: str, dtype: str, chat_template: str | None, output: str
    ):
        self._load = (model_dir, name, dtype, chat_template)
        self._config = config
        self._output = Path(output)
        self._loop = asyncio.new_event_loop()  # one for all parts: an engine may be bound to it
        self._model: ServedModel | None = None

    def __call__(self, part: dict[str, Any]) -> dict[str, str]:
        try:
            self._loop.run_until_complete(self._answer(RequestPart(**part)))
        except LongAlignError as error:
            return {"problem": str(error)}
        return {"problem": ""}

    async def _answer(self, part: RequestPart) -> None:
        if self._model is None:
            model_dir, name, dtype, chat_template = self._load
            engine = load_engine(model_dir, self._config, dtype=dtype)
            self._model = served_model(name, engine, Path(model_dir), chat_template=chat_template)
        model, gate = self._model, asyncio.Semaphore(self._config.max_ongoing_requests)

        async def one(number: int, line: bytes) -> dict[str, Any]:
            async with gate:
                return await answer_line(model, line, self._config, place=f"line {number}")

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(one(number, line)) for number, line in part.lines()]
        rows = [task.result() for task in asked]
        if not getattr(model.engine, "is_alive", True):
            raise ServingError("the engine that owns the model has ended; see the log, and run the same command again")
        with whole_file(part.answers(self._output)) as temporary:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text(text, encoding="utf-8")
        write_json(part.done(self._output), counts(rows))


async def answer_line(model: ServedModel, line: bytes, config: ServeConfig, *, place: str) -> dict[str, Any]:
    """The body of the endpoint's answer under the request's own id, or `{"id", "error": {...}}` as the endpoint has it.

    place: of the line in its file, for what is no request with an id.
    """
    name: Any = None
    try:
        try:
            body = json.loads(line)
        except ValueError as error:
            raise ApiError(400, f"{place} is not valid JSON: {error}", code="bad_json") from error
        if not isinstance(body, dict) or not isinstance(body.get("id"), str | int):
            raise ApiError(400, f"{place} is no JSON object with an id, text or a number", param="id", code="no_id")
        name = body["id"]
        return {**await _respond(model, body, config), "id": name}
    except ApiError as error:
        return {"id": name, **error.body()}
    except ServingError as error:
        return {"id": name, **serving_error(error).body()}


async def _respond(model: ServedModel, body: dict[str, Any], config: ServeConfig) -> dict[str, Any]:
    if body.get("model", model.name) != model.name:
        raise ApiError(
            404, f"the request is for {body['model']!r}, and {model.name} answers: leave model out", param="model",
            code="model_not_found",
        )  # fmt: skip
    kind = ChatRequest if "messages" in body else CompletionRequest
    try:
        request = kind.model_validate({**body, "model": model.name, "stream": None})
    except ValidationError as error:
        raise validation_error([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error
    named: dict[str, Any] = {"id": "", "created": int(time.time()), "model": model.name}
    if isinstance(request, ChatRequest):
        asked = await asked_by_chat(model, request, config)
        streams = {each.index: answer(model, each) for each in asked}
        made = await chat_response(model, request, asked, streams, named=named)
    else:
        asked = await asked_by_completion(model, request, config)
        streams = {each.index: answer(model, each) for each in asked}
        made = await completion_response(model, request, asked, streams, named=named)
    return made.model_dump()


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """`counts` of requests, answers and their tokens, and `dropped`, the failed ones by the error's code."""
    answered = [row for row in rows if "error" not in row]
    failed = Counter(row["error"]["code"] or "bad_request" for row in rows if "error" in row)
    usage = [row["usage"] for row in answered]
    return {
        "counts": {
            "requests": len(rows),
            "answered": len(answered),
            "prompt_tokens": sum(each["prompt_tokens"] for each in usage),
            "completion_tokens": sum(each["completion_tokens"] for each in usage),
            "cached_tokens": sum(each["prompt_tokens_details"]["cached_tokens"] for each in usage),
        },
        "dropped": dict(failed),
    }

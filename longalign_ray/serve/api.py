"""The HTTP layer: an OpenAI-compatible FastAPI application over served models. It knows engines, but not Ray."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from longalign_ray.config import ServeConfig
from longalign_ray.errors import ServingError
from longalign_ray.serve.answer import Piece, ServedModel, answer, completion_logprobs
from longalign_ray.serve.api_errors import add_error_handlers
from longalign_ray.serve.engine import Sampling, Token
from longalign_ray.serve.schema import (
    AnswerMessage,
    ApiError,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    GenerationRequest,
    ModelCard,
    ModelList,
    UsageInfo,
)
from longalign_ray.serve.stream import chat_chunks, event_stream, text_chunks, usage_info

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
Health = Callable[[], Awaitable[Mapping[str, bool]]]


def build_api(models: Mapping[str, ServedModel], config: ServeConfig, *, health: Health) -> FastAPI:
    """The application. `health` says of each model whether it is ready to answer."""
    api = FastAPI(title="longalign_ray", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    started = int(time.time())
    add_error_handlers(api)

    def card(model: ServedModel) -> ModelCard:
        return ModelCard(id=model.name, created=started, max_model_len=_context(model, config))

    @api.get("/health")
    async def get_health() -> Response:
        ready = dict(await health())
        complete = all(ready.get(name, False) for name in models)
        return JSONResponse({"status": "ok" if complete else "starting", "models": ready}, 200 if complete else 503)

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[card(model) for model in models.values()])

    @api.get("/v1/models/{name:path}")
    async def get_model(name: str) -> ModelCard:
        return card(_find(models, name))

    @api.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Response:
        model = _find(models, request.model)
        messages = [message.as_dict() for message in request.messages]
        token_ids = await asyncio.to_thread(model.encode_chat, messages)
        sampling = _sampling(model, request, len(token_ids), request.wanted_tokens, config, param="messages")
        pieces = answer(model, token_ids, sampling, stop=request.stop_strings)
        answer_id, created = _answer_id("chatcmpl"), int(time.time())
        if request.stream:
            chunks = chat_chunks(request, pieces, answer_id=answer_id, created=created, num_prompt=len(token_ids))
            return await event_stream(chunks)
        text, last, _ = await _collect(pieces)
        assert last.finish_reason is not None
        choice = ChatChoice(message=AnswerMessage(content=text), finish_reason=last.finish_reason)
        usage = usage_info(len(token_ids), last)
        made = ChatResponse(id=answer_id, created=created, model=request.model, choices=[choice], usage=usage)
        return _json(made)

    @api.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        model = _find(models, request.model)
        encoded = [await asyncio.to_thread(model.encode_text, prompt) for prompt in request.prompts]
        wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        samplings = [_sampling(model, request, len(ids), wanted, config, param="prompt") for ids in encoded]
        answer_id, created = _answer_id("cmpl"), int(time.time())
        if request.stream:
            pieces = answer(model, encoded[0], samplings[0], stop=request.stop_strings)
            chunks = text_chunks(request, pieces, answer_id=answer_id, created=created, num_prompt=len(encoded[0]))
            return await event_stream(chunks)
        made = await _all(
            [
                _complete(model, request, prompt, ids, sampling, index)
                for index, (prompt, ids, sampling) in enumerate(zip(request.prompts, encoded, samplings, strict=True))
            ]
        )
        choices, usages = [choice for choice, _ in made], [usage for _, usage in made]
        usage = UsageInfo(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            total_tokens=sum(usage.total_tokens for usage in usages),
        )
        return _json(
            CompletionResponse(id=answer_id, created=created, model=request.model, choices=choices, usage=usage)
        )

    return api


async def _complete(
    model: ServedModel,
    request: CompletionRequest,
    prompt: str | list[int],
    token_ids: list[int],
    sampling: Sampling,
    index: int,
) -> tuple[CompletionChoice, UsageInfo]:
    """One choice of /v1/completions: scores the prompt where it is echoed with log-probabilities, then generates."""
    text, tokens = "", []
    last = Piece("", (), 0, 0, "length")
    wants_logprobs = request.logprobs is not None
    prompt_score = None
    if request.echo and wants_logprobs:
        prompt_score = await model.engine.score(token_ids, num_top=sampling.num_top)
    if sampling.max_tokens > 0:
        text, last, tokens = await _collect(answer(model, token_ids, sampling, stop=request.stop_strings))
    if request.echo:
        text = (prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)) + text
    logprobs = None
    if wants_logprobs:
        logprobs = completion_logprobs(model, prompt_ids=token_ids, prompt_score=prompt_score, tokens=tokens)
    choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=last.finish_reason)
    return choice, usage_info(len(token_ids), last)


def _json(made: BaseModel) -> Response:
    return Response(made.model_dump_json(), media_type="application/json")


async def _all(calls: Sequence[Any]) -> list[Any]:
    """Results of concurrent calls; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _find(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    if name not in models:
        known = ", ".join(sorted(models))
        raise ApiError(
            404, f"the model {name!r} does not exist; served: {known}", param="model", code="model_not_found"
        )
    return models[name]


def _context(model: ServedModel, config: ServeConfig) -> int:
    return min(model.context_length, config.max_prompt_tokens + config.max_output_tokens)


def _sampling(
    model: ServedModel,
    request: GenerationRequest,
    num_prompt: int,
    wanted: int | None,
    config: ServeConfig,
    *,
    param: str,
) -> Sampling:
    """What the engine is asked for. Raises ApiError where prompt or answer are longer than the limits."""
    if num_prompt == 0:
        raise ApiError(400, "the prompt has no tokens; send at least one", param=param)
    if num_prompt > config.max_prompt_tokens:
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and serve.max_prompt_tokens is {config.max_prompt_tokens}; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if wanted is not None and wanted > config.max_output_tokens:
        limit = config.max_output_tokens
        raise ApiError(400, f"max_tokens = {wanted} is above serve.max_output_tokens = {limit}", param="max_tokens")
    room = model.context_length - num_prompt
    if room < (1 if wanted is None else wanted):
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and the answer may have {1 if wanted is None else wanted}, but "
            f"{model.name} has a context of {model.context_length} tokens; shorten the prompt or lower max_tokens",
            param=param,
            code="context_length_exceeded",
        )
    return Sampling(
        max_tokens=min(config.max_output_tokens, room) if wanted is None else wanted,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop_token_ids=model.stop_token_ids,
        num_top=(request.logprobs or 0) if isinstance(request, CompletionRequest) else 0,
    )


def _answer_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


async def _collect(pieces: AsyncGenerator[Piece, None]) -> tuple[str, Piece, list[Token]]:
    """The whole text, the last piece and all tokens."""
    texts: list[str] = []
    tokens: list[Token] = []
    last = None
    async with aclosing(pieces):
        async for piece in pieces:
            texts.append(piece.text)
            tokens += piece.tokens
            last = piece
    if last is None:
        raise ServingError("the engine gave no answer; ask again")
    return "".join(texts), last, tokens

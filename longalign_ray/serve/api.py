"""The HTTP layer: an OpenAI-compatible FastAPI application over served models. It knows engines, but not Ray."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from longalign_ray.config import ServeConfig
from longalign_ray.serve.answer import Asked, ServedModel, answer, merged
from longalign_ray.serve.api_errors import add_error_handlers
from longalign_ray.serve.ask import asked_by_chat, asked_by_completion, context_of
from longalign_ray.serve.document_page import add_page
from longalign_ray.serve.guard import Guard
from longalign_ray.serve.metrics import Metered, Metrics
from longalign_ray.serve.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from longalign_ray.serve.stream import chat_chunks, event_stream, text_chunks
from longalign_ray.serve.whole_answer import chat_response, completion_response

Health = Callable[[], Awaitable[Mapping[str, bool]]]


def build_api(
    models: Mapping[str, ServedModel], config: ServeConfig, *, health: Health, key_digests: Sequence[bytes] = ()
) -> FastAPI:
    """The application. `health` says of each model whether it is ready; without digests no key is asked for."""
    api = FastAPI(title="longalign_ray", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    started = int(time.time())
    metrics = Metrics()
    add_error_handlers(api)
    add_page(api)

    def card(model: ServedModel) -> ModelCard:
        return ModelCard(id=model.name, created=started, max_model_len=context_of(model, config), parent=model.parent)

    def streams(model: ServedModel, asked: Sequence[Asked]) -> dict[int, Any]:
        return {each.index: metrics.watched(model.name, each, answer(model, each)) for each in asked}

    @api.get("/health")
    async def get_health() -> Response:
        ready = dict(await health())
        complete = all(ready.get(name, False) for name in models)
        return JSONResponse({"status": "ok" if complete else "starting", "models": ready}, 200 if complete else 503)

    @api.get("/metrics")
    async def get_metrics() -> Response:
        return await metrics.response({name: model.engine for name, model in models.items() if model.parent is None})

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[card(model) for model in models.values()])

    @api.get("/v1/models/{name:path}")
    async def get_model(name: str) -> ModelCard:
        return card(_find(models, name))

    @api.post("/v1/tokenize")
    async def tokenize(request: TokenizeRequest) -> TokenizeResponse:
        model = _find(models, request.model)
        if request.messages is not None:
            token_ids = await asyncio.to_thread(model.encode_chat, [each.as_dict() for each in request.messages])
        else:
            token_ids = await asyncio.to_thread(model.encode_text, request.prompt or "")
        return TokenizeResponse(tokens=token_ids, count=len(token_ids), max_model_len=context_of(model, config))

    @api.post("/v1/detokenize")
    async def detokenize(request: DetokenizeRequest) -> DetokenizeResponse:
        model = _find(models, request.model)
        token_ids = model.encode_text(request.tokens)
        return DetokenizeResponse(prompt=await asyncio.to_thread(model.tokenizer.decode, token_ids))

    @api.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Response:
        model = _find(models, request.model)
        asked = await asked_by_chat(model, request, config)
        named: dict[str, Any] = {"id": _answer_id("chatcmpl"), "created": int(time.time()), "model": request.model}
        if request.stream:
            return await event_stream(chat_chunks(model, request, asked, merged(streams(model, asked)), named=named))
        return _json(await chat_response(model, request, asked, streams(model, asked), named=named))

    @api.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        model = _find(models, request.model)
        asked = await asked_by_completion(model, request, config)
        named: dict[str, Any] = {"id": _answer_id("cmpl"), "created": int(time.time()), "model": request.model}
        if request.stream:
            return await event_stream(text_chunks(model, request, asked, merged(streams(model, asked)), named=named))
        return _json(await completion_response(model, request, asked, streams(model, asked), named=named))

    paths = frozenset(str(getattr(route, "path", "")) for route in api.routes)
    api.add_middleware(Guard, key_digests=key_digests, max_body_bytes=config.max_body_bytes)
    api.add_middleware(Metered, metrics=metrics, paths=paths)  # outside, as it counts what the guard refuses too
    return api


def _json(made: BaseModel) -> Response:
    return Response(made.model_dump_json(), media_type="application/json")


def _find(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    if name not in models:
        known = ", ".join(sorted(models))
        raise ApiError(
            404, f"the model {name!r} does not exist; served: {known}", param="model", code="model_not_found"
        )
    return models[name]


def _answer_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"

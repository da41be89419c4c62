"""Errors as OpenAI clients read them: a status and `{"error": {"message", "type", "param", "code"}}`; no traces."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from longalign_ray.errors import AnswerTimeoutError, OverloadedError, ReplicaLostError, ServingError
from longalign_ray.serve.schema import ApiError, ChatMessage, ChatRequest, CompletionRequest, StreamOptions

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2
MAX_PROBLEMS = 3
FIELDS = {
    *ChatRequest.model_fields,
    *CompletionRequest.model_fields,
    *ChatMessage.model_fields,
    *StreamOptions.model_fields,
}


def add_error_handlers(api: FastAPI) -> None:
    """Gives every error of the application its status and body."""

    @api.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(validation_error(error.errors()))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @api.exception_handler(ServingError)
    async def engine_failed(_: Request, error: ServingError) -> JSONResponse:
        return error_response(serving_error(error))

    @api.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:  # the server logs the traceback
        return error_response(
            ApiError(500, f"unexpected {type(error).__name__}; see the server's log", code="unexpected")
        )


def serving_error(error: ServingError) -> ApiError:
    """What an engine's failure is on the wire; those that a client should send again say when."""
    again = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="overloaded", headers=again)
    logger.error("%s", error)
    if isinstance(error, ReplicaLostError):
        return ApiError(503, str(error), code="replica_lost", headers=again)
    if isinstance(error, AnswerTimeoutError):
        return ApiError(504, str(error), code="timeout")
    return ApiError(500, str(error), code="engine_failed")


def validation_error(problems: Sequence[Any]) -> ApiError:
    """A 400 that names the fields at fault (FastAPI's own answer would be 422 in a shape of its own)."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} (character {first['loc'][1]})")
    if first["type"] == "value_error" and len(first["loc"]) == 1:
        return ApiError(400, first["msg"].removeprefix("Value error, "))
    if len(first["loc"]) == 1:
        return ApiError(400, "the body must be a JSON object, sent with the header Content-Type: application/json")
    # A value that may have several types has a problem with each of them; the one that got furthest was meant.
    placed = sorted(((_path(each["loc"]), each["msg"]) for each in problems), key=lambda pair: -pair[0].count("."))
    messages = [f"{path}: {message.removeprefix('Value error, ')}" for path, message in placed[:MAX_PROBLEMS]]
    return ApiError(400, "; ".join(messages), param=placed[0][0])


def _path(loc: Sequence[str | int]) -> str:
    """`messages.0.content`: pydantic's place without `body` and without the names of the members of a union."""
    return ".".join(str(part) for part in loc[1:] if isinstance(part, int) or part in FIELDS)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)

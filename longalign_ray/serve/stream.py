"""Streamed answers: pieces of text to OpenAI chunks to server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Send

from longalign_ray.errors import ServingError
from longalign_ray.serve.answer import Piece
from longalign_ray.serve.schema import (
    ApiError,
    ChatChunk,
    ChatChunkChoice,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Delta,
    PromptTokensDetails,
    UsageInfo,
)


async def chat_chunks(
    request: ChatRequest, pieces: AsyncGenerator[Piece, None], *, answer_id: str, created: int, num_prompt: int
) -> AsyncGenerator[BaseModel, None]:
    def chunk(choices: list[ChatChunkChoice], usage: UsageInfo | None = None) -> ChatChunk:
        return ChatChunk(id=answer_id, created=created, model=request.model, choices=choices, usage=usage)

    async with aclosing(pieces):
        is_first = True
        async for piece in pieces:
            if is_first:
                yield chunk([ChatChunkChoice(delta=Delta(role="assistant", content=""))])
                is_first = False
            if piece.text:
                yield chunk([ChatChunkChoice(delta=Delta(content=piece.text))])
            if piece.finish_reason is not None:
                yield chunk([ChatChunkChoice(delta=Delta(), finish_reason=piece.finish_reason)])
                if request.wants_usage_chunk:
                    yield chunk([], usage_info(num_prompt, piece))


async def text_chunks(
    request: CompletionRequest, pieces: AsyncGenerator[Piece, None], *, answer_id: str, created: int, num_prompt: int
) -> AsyncGenerator[BaseModel, None]:
    def chunk(choices: list[CompletionChoice], usage: UsageInfo | None = None) -> CompletionResponse:
        return CompletionResponse(id=answer_id, created=created, model=request.model, choices=choices, usage=usage)

    async with aclosing(pieces):
        async for piece in pieces:
            if piece.text or piece.finish_reason is not None:
                yield chunk([CompletionChoice(index=0, text=piece.text, finish_reason=piece.finish_reason)])
            if piece.finish_reason is not None and request.wants_usage_chunk:
                yield chunk([], usage_info(num_prompt, piece))


class ClosingResponse(StreamingResponse):
    """Closes its chunks when the client has left; otherwise the garbage collector would, whenever it runs."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator[str, None], self.body_iterator)):
            await super().stream_response(send)


async def event_stream(chunks: AsyncGenerator[BaseModel, None]) -> StreamingResponse:
    """Server-sent events. The first chunk is awaited here, so that a refusal still gets its own HTTP status."""
    first = await anext(chunks)

    async def events() -> AsyncIterator[str]:
        yield _event(first.model_dump_json())
        async with aclosing(chunks):
            try:
                async for chunk in chunks:
                    yield _event(chunk.model_dump_json())
            except ServingError as error:  # the status 200 is out, so the stream itself must say it
                yield _event(json.dumps(ApiError(500, str(error)).body()))
        yield _event("[DONE]")

    return ClosingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def usage_info(num_prompt: int, last: Piece) -> UsageInfo:
    return UsageInfo(
        prompt_tokens=num_prompt,
        completion_tokens=last.num_generated,
        total_tokens=num_prompt + last.num_generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=last.num_cached),
    )

"""Streamed answers: pieces of text to OpenAI chunks to server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Send

from longalign_ray.errors import ServingError
from longalign_ray.serve.answer import Asked, Piece, ServedModel
from longalign_ray.serve.api_errors import serving_error
from longalign_ray.serve.logprobs import chat_logprobs, completion_logprobs
from longalign_ray.serve.schema import (
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

Merged = AsyncGenerator[tuple[int, Piece], None]


async def chat_chunks(
    model: ServedModel, request: ChatRequest, asked: Sequence[Asked], pieces: Merged, *, named: dict[str, Any]
) -> AsyncGenerator[BaseModel, None]:
    """Chunks of all choices as they come; `named` are the id, time and model that every chunk repeats."""

    def chunk(index: int, delta: Delta, **more: Any) -> ChatChunk:
        return ChatChunk(**named, choices=[ChatChunkChoice(index=index, delta=delta, **more)])

    lasts: dict[int, Piece] = {}
    async with aclosing(pieces):
        async for index, piece in pieces:
            if index not in lasts:
                yield chunk(index, Delta(role="assistant", content=""))
            lasts[index] = piece
            logprobs = chat_logprobs(model, piece.tokens) if request.logprobs and piece.tokens else None
            if piece.text or logprobs:
                yield chunk(index, Delta(content=piece.text), logprobs=logprobs)
            if piece.finish_reason is not None:
                yield chunk(index, Delta(), finish_reason=piece.finish_reason)
    if request.wants_usage_chunk:
        yield ChatChunk(**named, choices=[], usage=usage_info(asked, [lasts[each.index] for each in asked]))


async def text_chunks(
    model: ServedModel, request: CompletionRequest, asked: Sequence[Asked], pieces: Merged, *, named: dict[str, Any]
) -> AsyncGenerator[BaseModel, None]:
    """The same for /v1/completions."""
    lasts: dict[int, Piece] = {}
    num_chars = dict.fromkeys([each.index for each in asked], 0)
    async with aclosing(pieces):
        async for index, piece in pieces:
            lasts[index] = piece
            logprobs = None
            if request.logprobs is not None:
                logprobs = completion_logprobs(model, piece.tokens, start=num_chars[index])
                num_chars[index] += sum(map(len, logprobs.tokens))
            if piece.text or piece.finish_reason is not None or (logprobs and logprobs.tokens):
                choice = CompletionChoice(
                    index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason
                )
                yield CompletionResponse(**named, choices=[choice])
    if request.wants_usage_chunk:
        yield CompletionResponse(**named, choices=[], usage=usage_info(asked, [lasts[each.index] for each in asked]))


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
                yield _event(json.dumps(serving_error(error).body()))
        yield _event("[DONE]")

    return ClosingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def usage_info(asked: Sequence[Asked], lasts: Sequence[Piece]) -> UsageInfo:
    """Counts over all choices, from the last piece of each; a prompt counts once, however many choices it has."""
    pairs = list(zip(asked, lasts, strict=True))
    num_prompt = sum(len(each.token_ids) for each in asked if not each.repeats)
    num_generated = sum(last.num_generated for last in lasts)
    return UsageInfo(
        prompt_tokens=num_prompt,
        completion_tokens=num_generated,
        total_tokens=num_prompt + num_generated,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(last.num_cached for each, last in pairs if not each.repeats)
        ),
    )

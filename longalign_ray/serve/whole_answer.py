"""Answers as a whole: the streams of all choices of a request to one response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from longalign_ray.errors import ServingError
from longalign_ray.serve.answer import Asked, Piece, ServedModel, score
from longalign_ray.serve.engine import Token
from longalign_ray.serve.logprobs import chat_logprobs, completion_logprobs
from longalign_ray.serve.schema import (
    AnswerMessage,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from longalign_ray.serve.stream import usage_info

Streams = Mapping[int, AsyncGenerator[Piece, None]]
"""What the engine gives for each choice, by its index."""


async def chat_response(
    model: ServedModel, request: ChatRequest, asked: Sequence[Asked], streams: Streams, *, named: dict[str, Any]
) -> ChatResponse:
    """The answer to a chat; `named` are its id, time and model."""
    made = await _all([_collect(stream) for stream in streams.values()])
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=text),
            logprobs=chat_logprobs(model, tokens) if request.logprobs else None,
            finish_reason=last.finish_reason,
        )
        for index, (text, last, tokens) in enumerate(made)
    ]
    return ChatResponse(**named, choices=choices, usage=usage_info(asked, [last for _, last, _ in made]))


async def completion_response(
    model: ServedModel, request: CompletionRequest, asked: Sequence[Asked], streams: Streams, *, named: dict[str, Any]
) -> CompletionResponse:
    """The same for plain completions."""
    made = await _all([_complete(model, request, each, streams[each.index]) for each in asked])
    usage = usage_info(asked, [last for _, last in made])
    return CompletionResponse(**named, choices=[choice for choice, _ in made], usage=usage)


async def _complete(
    model: ServedModel, request: CompletionRequest, asked: Asked, stream: AsyncGenerator[Piece, None]
) -> tuple[CompletionChoice, Piece]:
    """One choice of /v1/completions: scores the prompt where it is echoed with log-probabilities, then generates."""
    text, tokens = "", []
    last = Piece("", (), 0, 0, "length")
    wants_logprobs = request.logprobs is not None
    prompt_score = await score(model, asked) if request.echo and wants_logprobs else None
    if asked.sampling.max_tokens > 0:
        text, last, tokens = await _collect(stream)
    if request.echo:
        text = (asked.prompt if isinstance(asked.prompt, str) else model.tokenizer.decode(asked.prompt)) + text
    logprobs = None
    if wants_logprobs:
        logprobs = completion_logprobs(model, tokens, prompt_ids=asked.token_ids, prompt_score=prompt_score)
    return CompletionChoice(index=asked.index, text=text, logprobs=logprobs, finish_reason=last.finish_reason), last


async def _all(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results of concurrent calls; the first failure cancels the rest."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


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

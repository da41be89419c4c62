"""From a request to the choices it asks for: prompts in tokens, how to sample, and the limits of the recipe."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from longalign_ray.config import ServeConfig
from longalign_ray.serve.answer import Asked, ServedModel
from longalign_ray.serve.engine import Sampling
from longalign_ray.serve.schema import ApiError, ChatRequest, CompletionRequest


async def asked_by_chat(model: ServedModel, request: ChatRequest, config: ServeConfig) -> list[Asked]:
    """The choices 0 to n - 1. Raises ApiError where a limit is passed."""
    _check_choices(1, request, config)
    messages = [message.as_dict() for message in request.messages]
    token_ids = await asyncio.to_thread(model.encode_chat, messages)
    return _choices(model, request, [(token_ids, token_ids)], config, param="messages")


async def asked_by_completion(model: ServedModel, request: CompletionRequest, config: ServeConfig) -> list[Asked]:
    """n choices of the first prompt, then n of the next. Raises ApiError where a limit is passed."""
    _check_choices(len(request.prompts), request, config)
    prompts = [(prompt, await asyncio.to_thread(model.encode_text, prompt)) for prompt in request.prompts]
    return _choices(model, request, prompts, config, param="prompt")


def context_of(model: ServedModel, config: ServeConfig) -> int:
    """Tokens of prompt and answer together."""
    return min(model.context_length, config.max_prompt_tokens + config.max_output_tokens)


def _check_choices(num_prompts: int, request: ChatRequest | CompletionRequest, config: ServeConfig) -> None:
    asked = num_prompts * (request.n or 1)
    if asked > config.max_choices:
        raise ApiError(
            400,
            f"{num_prompts} prompts with n = {request.n or 1} ask for {asked} choices and serve.max_choices is "
            f"{config.max_choices}; send several requests",
            param="n",
        )


def _choices(
    model: ServedModel,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[tuple[str | list[int], list[int]]],
    config: ServeConfig,
    *,
    param: str,
) -> list[Asked]:
    deadline = asyncio.get_running_loop().time() + config.request_timeout_seconds
    num_choices = request.n or 1
    asked = []
    for prompt, token_ids in prompts:
        max_tokens = _max_tokens(model, request.wanted_tokens, len(token_ids), config, param=param)
        for choice in range(num_choices):
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=None if request.seed is None else _wrapped(request.seed + choice),
                stop_token_ids=model.stop_token_ids,
                num_top=request.num_top,
            )
            asked.append(
                Asked(len(asked), prompt, token_ids, sampling, request.stop_strings, deadline, repeats=choice > 0)
            )
    return asked


def _wrapped(seed: int) -> int:
    """Into the 64 bits of a seed: the one after 2^63 - 1 is -2^63."""
    return (seed + 2**63) % 2**64 - 2**63


def _max_tokens(model: ServedModel, wanted: int | None, num_prompt: int, config: ServeConfig, *, param: str) -> int:
    """Tokens that the answer may have, what is left where the request sets no limit.

    Raises ApiError where prompt or answer are longer than the limits.
    """
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
    return min(config.max_output_tokens, room) if wanted is None else wanted

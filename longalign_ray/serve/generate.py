"""One request on a transformers model, in small steps: prompt chunks first, then a token a step.

`generate` and `score` are Python generators that yield after every forward pass, so that whoever drives them can turn
to another request in between, or drop this one. Suffixes: K tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from longalign_ray.serve.engine import GenerationEvent, PromptScore, Sampling, Token, TopTokens

SCORE_CHUNK = 512
"""Prompt tokens scored at a time: their logits are the largest tensor (fp32, 128k vocabulary: 260 MB)."""


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room to spare; the stock layer copies all of them for every new token."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._key_buffer, self._value_buffer = key_states[:, :, :0], value_states[:, :, :0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of all keys and values so far, [1, heads, tokens, head width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            self._key_buffer = _grown(self._key_buffer, start, end)
            self._value_buffer = _grown(self._value_buffer, start, end)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values


def _grown(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    """A copy with an eighth more room than needed, at least 64 tokens: few copies, little waste."""
    batch, heads, _, width = buffer.shape
    grown = buffer.new_empty(batch, heads, needed + max(64, needed // 8), width)
    grown[:, :, :used] = buffer[:, :, :used]
    return grown


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for one request; layers with a sliding window or a state of their own keep their kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def generate(
    model: Any, token_ids: Sequence[int], sampling: Sampling, *, end_ids: frozenset[int], prefill_chunk: int
) -> Generator[GenerationEvent | None, None, None]:
    """None after each chunk of the prompt but the last, then an event a token."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache = new_cache(model)
    stop_ids = end_ids | set(sampling.stop_token_ids)
    logits_V = None
    for start in range(0, len(token_ids), prefill_chunk):
        if start:
            yield None
        logits_V = _forward(model, token_ids[start : start + prefill_chunk], cache, last_only=True)[0]
    for num_generated in range(1, sampling.max_tokens + 1):
        assert logits_V is not None
        token = _draw(logits_V, sampling, generator)
        if token.token_id in stop_ids:
            yield GenerationEvent((), num_generated, "stop")
            return
        if num_generated == sampling.max_tokens:
            yield GenerationEvent((token,), num_generated, "length")
            return
        yield GenerationEvent((token,), num_generated)
        logits_V = _forward(model, [token.token_id], cache, last_only=True)[0]


def score(model: Any, token_ids: Sequence[int], *, num_top: int) -> Generator[PromptScore | None, None, None]:
    """None after each chunk, then the score; logits exist for SCORE_CHUNK positions at a time."""
    cache = new_cache(model)
    log_probs: list[float] = []
    top: list[TopTokens] = []
    for start in range(0, len(token_ids) - 1, SCORE_CHUNK):
        inputs_K = token_ids[start : min(start + SCORE_CHUNK, len(token_ids) - 1)]
        targets_K = token_ids[start + 1 : start + 1 + len(inputs_K)]
        log_probs_KV = torch.log_softmax(_forward(model, inputs_K, cache, last_only=False), dim=-1)
        log_probs += log_probs_KV.gather(1, torch.tensor(targets_K, device=log_probs_KV.device)[:, None])[:, 0].tolist()
        top += _top(log_probs_KV, num_top)
        yield None
    yield PromptScore(tuple(log_probs), tuple(top))


@torch.inference_mode()
def _forward(model: Any, token_ids: Sequence[int], cache: DynamicCache, *, last_only: bool) -> torch.Tensor:
    """fp32 logits [K, V] of the given tokens, or [1, V] of the last; their keys and values go into the cache."""
    past = cache.get_seq_length()
    input_ids_1K = torch.tensor([list(token_ids)], device=model.device)
    position_ids_1K = torch.arange(past, past + len(token_ids), device=model.device)[None]
    out = model(
        input_ids=input_ids_1K,
        position_ids=position_ids_1K,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1 if last_only else 0,
    )
    return out.logits[0].float()


def _draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> Token:
    log_probs_V = torch.log_softmax(logits_V, dim=-1)
    token_id = sample(logits_V, temperature=sampling.temperature, top_p=sampling.top_p, generator=generator)
    log_prob = log_probs_V[token_id].item()
    if not math.isfinite(log_prob):
        raise FloatingPointError(f"the model gives the log-probability {log_prob}; its weights or dtype overflow")
    return Token(token_id, log_prob, _top(log_probs_V[None], sampling.num_top)[0])


def sample(logits_V: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id: the likeliest for temperature 0, else drawn from the smallest set with probability >= top_p.

    Drawn on the CPU, so that a seed gives the same token on every device that gives the same logits.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V.double().cpu() / temperature, dim=-1)
    if top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        outside_V = sorted_V.cumsum(0) - sorted_V >= top_p  # those before a token have top_p already
        probs_V = probs_V.index_fill(0, order_V[outside_V], 0.0)
    return int(torch.multinomial(probs_V, 1, generator=generator))


def _top(log_probs_KV: torch.Tensor, num_top: int) -> list[TopTokens]:
    if num_top == 0:
        return [()] * len(log_probs_KV)
    values, ids = log_probs_KV.topk(min(num_top, log_probs_KV.shape[-1]), dim=-1)
    return [tuple(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]

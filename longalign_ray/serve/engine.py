"""The generation protocol: token ids in, a stream of token ids out. Text is the business of those who call it.

An engine knows no chat template, no stop string and no HTTP, so that another can take its place.
`transformers_engine` holds the embedded implementation; `app` has one that passes calls on to a replica.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
TopTokens = tuple[tuple[int, float], ...]
"""The likeliest tokens in a place, best first: (token id, log-probability in nats)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; the model's own end tokens stop in any case."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    """Same seed, same draws, whatever is computed beside the request; none: others every time."""
    stop_token_ids: tuple[int, ...] = ()
    num_top: int = 0
    """Likeliest tokens reported with each token."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; its log-probability is that of the model, before temperature and top_p."""

    token_id: int
    log_prob: float
    top: TopTokens = ()


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """The next tokens, without the end token, and in the last event why it ended.

    The counts are those so far; `num_generated` includes the end token, as it was computed too.
    """

    tokens: tuple[Token, ...]
    num_generated: int
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    """Prompt tokens that were taken from an earlier request's cache."""


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Log-probabilities of a prompt's tokens 1..n-1, each given those before it; the first token has none."""

    log_probs: tuple[float, ...]
    top: tuple[TopTokens, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """`active` requests are being computed, `waiting` ones are not; the rest are totals since the start."""

    active: int
    waiting: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    """Of the prompt tokens, those that were taken from other requests' caches."""
    computed_tokens: int = 0
    """Of requests under way too, those of prompts by the chunk: what shows that an engine moves."""


class GenerationEngine(Protocol):
    """What the HTTP layer needs of an engine. Both calls raise OverloadedError where the queue is full and
    ServingError where the engine fails."""

    def submit(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[GenerationEvent, None]:
        """Events until one has a finish reason. Closing the generator cancels the request."""
        ...

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0) -> PromptScore:
        """Log-probabilities of the given tokens themselves."""
        ...

    async def stats(self) -> EngineStats:
        """What the engine is doing now."""
        ...

"""What the engine computes for a request, step by step: the next tokens, and what follows from their logits.

Suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longalign_ray.serve.batch_forward import Piece
from longalign_ray.serve.engine import GenerationEvent, PromptScore, Sampling, TopTokens
from longalign_ray.serve.kv_cache import KVCache
from longalign_ray.serve.prefix_cache import PrefixCache
from longalign_ray.serve.sampling import draw, new_generator, top_tokens
from longalign_ray.serve.schedule import Demand

SCORE_CHUNK = 512
"""Tokens scored in a step: their logits are the largest tensor (fp32, 128k vocabulary: 260 MB)."""


class GenerateRequest:
    """A prompt, then a token a step: `token_ids` grows by those drawn, and what the cache lacks of them is to do."""

    def __init__(
        self, token_ids: Sequence[int], sampling: Sampling, *, end_ids: frozenset[int], adapter: str | None = None
    ):
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_generated = 0
        self.num_cached = 0
        self.cache: KVCache | None = None
        self.adapter = adapter
        self._sampling = sampling
        self._stop_ids = end_ids | set(sampling.stop_token_ids)
        self._generator = new_generator(sampling.seed)

    def open(self, prefixes: PrefixCache) -> bool:
        """Whether it can begin now; else it is to be asked again when other requests have gone on."""
        self.cache = prefixes.open(self.token_ids, adapter=self.adapter)
        self.num_cached = self.cache.length if self.cache else 0
        return self.cache is not None

    @property
    def demand(self) -> Demand:
        assert self.cache is not None
        return Demand(len(self.token_ids) - self.cache.length, "decode" if self.num_generated else "prompt")

    def piece(self, num_tokens: int) -> Piece:
        """The next tokens; logits are wanted once the last is among them."""
        assert self.cache is not None
        start = self.cache.length
        end = start + num_tokens
        return Piece(self.cache, self.token_ids[start:end], int(end == len(self.token_ids)))

    def advance(self, logits_RV: torch.Tensor) -> GenerationEvent | None:
        """The token that follows, if all tokens are computed; R is 0 or 1."""
        if not len(logits_RV):
            return None
        token = draw(logits_RV[0], self._sampling, self._generator)
        self.num_generated += 1
        if token.token_id in self._stop_ids:
            return GenerationEvent((), self.num_generated, "stop", self.num_cached)
        self.token_ids.append(token.token_id)
        reason = "length" if self.num_generated == self._sampling.max_tokens else None
        return GenerationEvent((token,), self.num_generated, reason, self.num_cached)


class ScoreRequest:
    """A prompt whose own tokens get log-probabilities. It shares no cache, as every token's logits are needed."""

    num_generated = 0
    num_cached = 0

    def __init__(self, token_ids: Sequence[int], *, num_top: int, adapter: str | None = None):
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.cache: KVCache | None = None
        self.adapter = adapter
        self._num_top = num_top
        self._log_probs: list[float] = []
        self._top: list[TopTokens] = []

    def open(self, prefixes: PrefixCache) -> bool:
        """Always true."""
        self.cache = KVCache(self.token_ids, adapter=self.adapter)
        return True

    @property
    def demand(self) -> Demand:
        assert self.cache is not None
        return Demand(max(1, len(self.token_ids) - 1 - self.cache.length), "score")

    def piece(self, num_tokens: int) -> Piece:
        assert self.cache is not None
        return Piece(self.cache, self.token_ids[self.cache.length :][:num_tokens], num_tokens)

    def advance(self, logits_RV: torch.Tensor) -> PromptScore | None:
        """The score, after the last chunk. Logits are those of the R tokens just computed."""
        targets = self.token_ids[len(self._log_probs) + 1 :][: len(logits_RV)]
        log_probs_RV = torch.log_softmax(logits_RV[: len(targets)], dim=-1)
        index = torch.tensor(targets, dtype=torch.int64, device=log_probs_RV.device)
        self._log_probs += log_probs_RV.gather(1, index[:, None])[:, 0].tolist()
        self._top += top_tokens(log_probs_RV, self._num_top)
        if len(self._log_probs) + 1 < len(self.token_ids):
            return None
        return PromptScore(tuple(self._log_probs), tuple(self._top))

"""Caches of requests under way and of finished ones, to be taken over by prompts that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from longalign_ray.serve.kv_cache import KVCache, Segment

MIN_REUSED = 16
"""Shorter common beginnings are computed anew: less work than keeping count of them."""
MIN_AWAITED = 64
"""Tokens by which a request under way must be about to lengthen a common beginning for others to wait for it."""


class PrefixCache:
    """Finished caches stay up to `max_bytes`, the least recently used goes first; what refers to it goes with it.

    Not safe for threads: the engine's own thread uses it. A `max_bytes` of 0 turns all reuse off.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._active: dict[Segment, KVCache] = {}
        self._retained: OrderedDict[Segment, KVCache] = OrderedDict()

    @property
    def retained_bytes(self) -> int:
        """Held for caches whose requests are over."""
        return sum(segment.num_bytes for segment in self._retained)

    def open(self, token_ids: Sequence[int], *, adapter: str | None = None) -> KVCache | None:
        """A cache for a prompt, with what is known of its beginning; at least one token is left to compute.

        Known is what the same adapter computed: with other weights, keys and values are others.
        None where a request under way computes more of that beginning: ask again when it has.
        """
        if not self._max_bytes:
            return KVCache(token_ids, adapter=adapter)
        prompt = np.asarray(token_ids, dtype=np.int64)
        best, num_ready, num_coming = None, 0, 0
        for cache in (*self._retained.values(), *self._active.values()):
            if cache.adapter != adapter:
                continue
            common = min(_common_length(cache.token_ids, prompt), len(prompt) - 1)
            num_coming = max(num_coming, common)
            if min(common, cache.length) > num_ready:
                best, num_ready = cache, min(common, cache.length)
        if num_coming - num_ready >= MIN_AWAITED:
            return None
        if best is None or num_ready < MIN_REUSED:
            opened = KVCache(token_ids, adapter=adapter)
        else:
            self._touch(best)
            opened = best.branch(token_ids, num_ready)
        self._active[opened.own] = opened
        return opened

    def retain(self, cache: KVCache, token_ids: Sequence[int]) -> None:
        """The request is over; its cache, which holds these tokens or the first of them, stays if there is room."""
        if self._active.pop(cache.own, None) is None:
            return
        known = (*self._active, *self._retained)
        if not cache.own.length or not all(span.segment in known for span in cache.shared):
            return  # kept alone, it would hold memory that nobody counts
        cache.token_ids = np.asarray(token_ids[: cache.length], dtype=np.int64)
        self._retained[cache.own] = cache
        self._touch(cache)
        while self._retained and self.retained_bytes > self._max_bytes:
            self._forget(next(iter(self._retained)))

    def drop(self, cache: KVCache) -> None:
        """The request has failed: nobody takes over its cache any more."""
        self._active.pop(cache.own, None)
        self._forget(cache.own)

    def clear(self) -> None:
        """Forgets what finished requests left, to make room."""
        self._retained.clear()

    def _touch(self, cache: KVCache) -> None:
        for segment in (cache.own, *(span.segment for span in reversed(cache.shared))):
            if segment in self._retained:
                self._retained.move_to_end(segment)

    def _forget(self, segment: Segment) -> None:
        for own in [own for own, cache in self._retained.items() if own is segment or cache.refers_to(segment)]:
            del self._retained[own]


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    different = one[:shorter] != other[:shorter]
    return int(different.argmax()) if different.any() else shorter

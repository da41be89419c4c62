"""Keys and values of a request's tokens: segments taken over from earlier requests, then one of its own.

    cache of "document + question 2"     [document of request 1 | question 2 ...]
                                          shared, read only       own, grows

Suffixes: K key/value heads, n tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MIN_SHARED = 1_024
"""Shorter stretches are copied: a segment more costs a kernel call more in every layer of every step."""
MAX_SHARED = 2
"""Segments that a cache refers to; what lies behind them is copied, so that a long conversation stays fast."""


class Segment:
    """Keys and values of consecutive tokens, a buffer a layer. It grows at its end; what is in it never changes."""

    def __init__(self, *, reserve: int = 0):
        self.length = 0
        self._reserve = reserve + 64  # the first tokens of an answer
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, key_KnD: torch.Tensor, value_KnD: torch.Tensor) -> None:
        """Puts n tokens of a layer behind the first `length`, which the caller moves on after the last layer."""
        end = self.length + key_KnD.shape[1]
        key, value = self._layers.get(layer) or (_buffer(key_KnD, self._reserve), _buffer(value_KnD, self._reserve))
        if end > key.shape[1]:
            key, value = _grown(key, self.length, end), _grown(value, self.length, end)
        self._layers[layer] = key, value
        key[:, self.length : end] = key_KnD
        value[:, self.length : end] = value_KnD

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [K, end - start, D] of keys and values."""
        key, value = self._layers[layer]
        return key[:, start:end], value[:, start:end]

    def copy_from(self, other: Segment, num_tokens: int) -> None:
        """Appends the first tokens of another segment."""
        for layer in other._layers:
            self.write(layer, *other.read(layer, 0, num_tokens))
        self.length += num_tokens

    @property
    def num_bytes(self) -> int:
        """Of the buffers, room to spare included."""
        return sum(key.nbytes + value.nbytes for key, value in self._layers.values())


def _buffer(like_KnD: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Empty [K, num_tokens, D] in the order of memory that the kernel reads without a copy.

    A head's tokens lie together on the CPU (1.3 times faster to decode); a token's heads do on a GPU.
    """
    heads, _, width = like_KnD.shape
    if like_KnD.device.type == "cuda":
        return like_KnD.new_empty(num_tokens, heads, width).transpose(0, 1)
    return like_KnD.new_empty(heads, num_tokens, width)


def _grown(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    """A copy with an eighth more room than needed, at least 64 tokens: few copies, little waste."""
    grown = _buffer(buffer, needed + max(64, needed // 8))
    grown[:, :used] = buffer[:, :used]
    return grown


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The first tokens of a segment."""

    segment: Segment
    length: int


class KVCache:
    """The cache of one request; `token_ids` are those it is to hold, `length` says how many it holds.

    adapter: with whose weights its keys and values are computed; none: the model's own.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        shared: Sequence[Span] = (),
        own: Segment | None = None,
        adapter: str | None = None,
    ):
        self.token_ids = np.asarray(token_ids, dtype=np.int64)
        self.shared = tuple(shared)
        self.own = own or Segment(reserve=len(token_ids))
        self.adapter = adapter

    @property
    def length(self) -> int:
        """Tokens whose keys and values are here."""
        return self.num_shared + self.own.length

    @property
    def num_shared(self) -> int:
        return sum(span.length for span in self.shared)

    def refers_to(self, segment: Segment) -> bool:
        return any(span.segment is segment for span in self.shared)

    def branch(self, token_ids: Sequence[int], num_tokens: int) -> KVCache:
        """A cache for `token_ids`, of which the first `num_tokens` are those of this one and taken from it."""
        shared: list[Span] = []
        own: Segment | None = None
        left = num_tokens
        for span in (*self.shared, Span(self.own, self.own.length)):
            taken = min(left, span.length)
            if own is None and taken >= MIN_SHARED and len(shared) < MAX_SHARED:
                shared.append(Span(span.segment, taken))
            elif taken:
                own = own or Segment(reserve=len(token_ids) - (num_tokens - left))
                own.copy_from(span.segment, taken)
            left -= taken
        own = own or Segment(reserve=len(token_ids) - num_tokens)
        return KVCache(token_ids, shared=shared, own=own, adapter=self.adapter)

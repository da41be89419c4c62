"""Attention of one step's tokens, of many requests in a row, each to its own cache; registered with transformers.

A step is cut into blocks of queries and keys for the kernels of ring attention (flash attention of the CPU or the GPU),
whose results merge by their log-sum-exps. So there is no mask over the step, and keys are read where they lie:

    request a, decoding   [ 1 ] x [ all its keys ]
    request b, prompt     [ n ] x [ n, causal ]  +  [ n ] x [ earlier keys ]
    a and b alike         [ 1 + n ] x [ document that both share ], once for all of them

Suffixes: H query heads, K key/value heads, T tokens of the step, q queries and k keys of a block, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longalign_ray.errors import ModelError
from longalign_ray.serve.kv_cache import KVCache, Segment
from longalign_ray.serve.product_attention import ProductKernel
from longalign_ray.train.attention import refuse_unsupported
from longalign_ray.train.block_attention import Block, CpuKernel, FlashKernel
from longalign_ray.train.ring_attention import merge

NAME = "longalign_ragged"

Kernel = CpuKernel | FlashKernel | ProductKernel


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel call: the step's rows `rows` look at tokens `keys` of a segment."""

    rows: tuple[int, int]
    segment: Segment
    keys: tuple[int, int]
    block: Block
    is_first: bool = False
    """Its result begins that of the rows; others are merged into it."""


class RaggedStep:
    """Whose tokens stand where in a step: `pieces` are caches with the number of tokens that each computes."""

    def __init__(self, pieces: Sequence[tuple[KVCache, int]]):
        self.pieces = tuple(pieces)
        self.layers_seen: list[int] = []
        self._works: dict[int | None, list[Work]] = {}

    def works(self, window: int | None) -> list[Work]:
        """The kernel calls of a layer with this sliding window; the same for all such layers."""
        if window not in self._works:
            self._works[window] = plan_works(self.pieces, window=window)
        return self._works[window]


def plan_works(pieces: Sequence[tuple[KVCache, int]], *, window: int | None) -> list[Work]:
    """Kernel calls by which each row sees all tokens up to its own once; a row's first comes before its others.

    Neighbours that share a span of tokens look at it in one call, unless a window shows each another part of it.
    """
    firsts: list[Work] = []
    others: list[Work] = []
    open_spans: dict[tuple[Segment, int], int] = {}  # to the place in `others`
    row = 0
    for cache, num_tokens in pieces:
        rows, earlier, position = (row, row + num_tokens), cache.own.length, cache.length
        if num_tokens == 1:
            lowest = 0 if window is None else max(0, earlier + 1 - window)
            block = Block((0, 1), (0, earlier + 1 - lowest))
            firsts.append(Work(rows, cache.own, (lowest, earlier + 1), block, is_first=True))
        else:
            block = Block((0, num_tokens), (0, num_tokens), (0, num_tokens), window=window)
            firsts.append(Work(rows, cache.own, (earlier, earlier + num_tokens), block, is_first=True))
            others += _earlier(rows, cache.own, earlier, position - earlier, position, window)
        start = 0
        for span in cache.shared:
            place = open_spans.get((span.segment, span.length))
            if window is not None:
                others += _earlier(rows, span.segment, span.length, start, position, window)
            elif place is not None and others[place].rows[1] == row:
                whole = (others[place].rows[0], rows[1])
                block = Block((0, whole[1] - whole[0]), (0, span.length))
                others[place] = Work(whole, span.segment, (0, span.length), block)
            else:
                open_spans[span.segment, span.length] = len(others)
                others += _earlier(rows, span.segment, span.length, start, position, None)
            start += span.length
        row = rows[1]
    return firsts + others


def _earlier(
    rows: tuple[int, int], segment: Segment, num_keys: int, start: int, position: int, window: int | None
) -> list[Work]:
    """Rows from `position` on look at keys before them, from `start` on: none, or one call on what the window shows."""
    first, last = 0, rows[1]
    if window is not None:
        first = max(0, position - window + 1 - start)
        last = min(last, rows[0] + start + num_keys - 1 + window - position)
    if first >= num_keys or rows[0] >= last:
        return []
    num_rows = last - rows[0]
    masked = window if num_rows > 1 else None  # a single row sees all the keys that are left
    block = Block((0, num_rows), (0, num_keys - first), distance=position - start - first, window=masked)
    return [Work((rows[0], last), segment, (first, num_keys), block)]


def register() -> str:
    """Makes `attn_implementation="longalign_ragged"` known to transformers; returns the name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, ragged_attention)
    return NAME


def ragged_attention(
    module: nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    ragged_step: RaggedStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output [1, T, H, D]; the step's keys and values go into its caches, whose lengths the caller moves on.

    Raises ModelError where the step did not reach this layer, or the model asks for what the kernels do not compute.
    """
    if ragged_step is None:
        raise ModelError(
            f"{type(module).__name__} did not pass the requests' places on to attention, so it cannot be served here"
        )
    refuse_unsupported(module, attention_mask, dropout=dropout, sliding_window=sliding_window, settings=kwargs)
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    ragged_step.layers_seen.append(layer)
    query_HTD, key_KTD, value_KTD = query_1HTD[0], key_1KTD[0], value_1KTD[0]
    row = 0
    for cache, num_tokens in ragged_step.pieces:
        cache.own.write(layer, key_KTD[:, row : row + num_tokens], value_KTD[:, row : row + num_tokens])
        row += num_tokens
    kernel = select_kernel(query_HTD.device, query_HTD.dtype, softcap)
    scale = scaling if scaling is not None else query_HTD.shape[-1] ** -0.5
    exact = torch.promote_types(query_HTD.dtype, torch.float32)
    out_HTD = torch.empty((*query_HTD.shape[:2], value_KTD.shape[-1]), dtype=exact, device=query_HTD.device)
    lse_HT = torch.empty(query_HTD.shape[:2], dtype=exact, device=query_HTD.device)
    for work in ragged_step.works(sliding_window):
        rows = slice(*work.rows)
        part = attend(kernel, query_HTD[:, rows], *work.segment.read(layer, *work.keys), work.block, scale)
        if work.is_first:
            out_HTD[:, rows], lse_HT[:, rows] = part
        else:
            merge(out_HTD[:, rows], lse_HT[:, rows], *part)
    return out_HTD.to(query_HTD.dtype).transpose(0, 1)[None], None


def attend(
    kernel: Kernel, q_HqD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [H, q, D] and log-sum-exp [H, q] of a block.

    Where all queries see all keys, the query heads that share a key head become queries of one head: the CPU's kernel
    prepares keys in bf16 anew for every query head (decoding, 3 query heads to a key head: 6 times faster so).
    """
    heads, groups = len(q_HqD), len(q_HqD) // len(k_KkD)
    if groups == 1 or block.boundaries or block.window is not None:
        return kernel.forward(q_HqD, k_KkD, v_KkD, block, scaling)
    num_queries = q_HqD.shape[1]
    folded = Block((0, groups * num_queries), block.keys)
    out, lse = kernel.forward(q_HqD.reshape(len(k_KkD), -1, q_HqD.shape[-1]), k_KkD, v_KkD, folded, scaling)
    return out.reshape(heads, num_queries, -1), lse.reshape(heads, num_queries)


def select_kernel(device: torch.device, dtype: torch.dtype, softcap: float | None) -> Kernel:
    """torch's flash attention, or plain products where it does not serve: capped scores, and fp32 on a GPU."""
    if softcap is not None or (device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16)):
        return ProductKernel(softcap)
    return FlashKernel() if device.type == "cuda" else CpuKernel()

"""Attention of one block of queries to one block of keys, with the log-sum-exp by which blocks are merged.

Suffixes: H query heads, K key/value heads, q queries and k keys of the block, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

QUERY_CHUNK = 1_024  # queries that share a mask where a sliding window cuts into a block, on the CPU


@dataclass(frozen=True, slots=True)
class Block:
    """Queries and keys of one kernel call, as ranges of the two ranks' own tokens."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    boundaries: tuple[int, ...] = ()
    """Of the sequences in a causal block over one rank's own tokens; empty: all keys lie before all queries."""
    distance: int = 0
    """Positions from the first key to the first query."""
    window: int | None = None
    """A query sees keys less than this many positions before it; none: all."""


class Kernel(Protocol):
    """Attention of one block; tensors are the block's queries and keys alone."""

    def forward(
        self, q_HqD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [H, q, D] and log-sum-exp [H, q], the latter in fp32 or better."""
        ...

    def backward(
        self,
        grad_HqD: torch.Tensor,
        q_HqD: torch.Tensor,
        k_KkD: torch.Tensor,
        v_KkD: torch.Tensor,
        out_HqD: torch.Tensor,
        lse_Hq: torch.Tensor,
        block: Block,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, given output and log-sum-exp over all keys, not just the block's."""
        ...


class CpuKernel:
    """torch's flash attention for the CPU, a sequence at a time; also in fp64."""

    def forward(
        self, q_HqD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def attend(q: slice, k: slice, causal: bool, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_HqD[None, :, q], k_KkD[None, :, k], v_KkD[None, :, k], 0.0, causal, attn_mask=mask, scale=scaling
            )
            return out[0], lse[0]

        pieces = _pieces(block, q_HqD.dtype)
        if len(pieces) == 1:  # as in decoding, where a copy of the result takes a third as long as the kernel
            return attend(*pieces[0])
        out_HqD = torch.empty((*q_HqD.shape[:2], v_KkD.shape[-1]), dtype=q_HqD.dtype)
        lse_Hq = torch.empty(q_HqD.shape[:2], dtype=torch.promote_types(q_HqD.dtype, torch.float32))
        for piece in pieces:
            out_HqD[:, piece[0]], lse_Hq[:, piece[0]] = attend(*piece)
        return out_HqD, lse_Hq

    def backward(
        self,
        grad_HqD: torch.Tensor,
        q_HqD: torch.Tensor,
        k_KkD: torch.Tensor,
        v_KkD: torch.Tensor,
        out_HqD: torch.Tensor,
        lse_Hq: torch.Tensor,
        block: Block,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = (torch.zeros_like(x, dtype=lse_Hq.dtype) for x in (q_HqD, k_KkD, v_KkD))
        for q, k, causal, mask in _pieces(block, q_HqD.dtype):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_HqD[None, :, q], q_HqD[None, :, q], k_KkD[None, :, k], v_KkD[None, :, k],
                out_HqD[None, :, q], lse_Hq[None, :, q], 0.0, causal, attn_mask=mask, scale=scaling,
            )  # fmt: skip
            dq[:, q] += found[0][0]
            dk[:, k] += found[1][0]
            dv[:, k] += found[2][0]
        return dq, dk, dv


def _pieces(block: Block, dtype: torch.dtype) -> list[tuple[slice, slice, bool, torch.Tensor | None]]:
    """(queries, keys, causal, mask) of the calls that make up a block: no mask unless a window cuts into the piece."""
    if not block.boundaries:
        ranges = [(0, block.queries[1] - block.queries[0], 0, block.keys[1] - block.keys[0])]
    else:
        ranges = [(start, end, start, end) for start, end in pairwise(block.boundaries)]
    pieces: list[tuple[slice, slice, bool, torch.Tensor | None]] = []
    for first, end, first_key, end_key in ranges:
        if block.window is None or block.distance + end - 1 - first_key < block.window:
            pieces.append((slice(first, end), slice(first_key, end_key), bool(block.boundaries), None))
            continue
        for start in range(first, end, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, end)
            lowest = max(first_key, start + block.distance - block.window + 1)
            highest = min(end_key, stop + block.distance)
            ago = torch.arange(start, stop)[:, None] + block.distance - torch.arange(lowest, highest)
            mask = torch.zeros(ago.shape, dtype=dtype).masked_fill((ago < 0) | (ago >= block.window), -torch.inf)
            pieces.append((slice(start, stop), slice(lowest, highest), False, mask))
    return pieces


class FlashKernel:
    """torch's own flash attention for GPUs, in fp16 or bf16; `operations` is torch.ops.aten or a test's stand-in."""

    def __init__(self, operations: Any = torch.ops.aten):
        self.operations = operations

    def forward(
        self, q_HqD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, causal, windows = self._arguments(block, q_HqD.device)
        out_qHD, lse_Hq, *_ = self.operations._flash_attention_forward(
            *_by_token(q_HqD, k_KkD, v_KkD), *lengths, 0.0, causal, False, scale=scaling, **windows
        )
        return out_qHD.transpose(0, 1), lse_Hq

    def backward(
        self,
        grad_HqD: torch.Tensor,
        q_HqD: torch.Tensor,
        k_KkD: torch.Tensor,
        v_KkD: torch.Tensor,
        out_HqD: torch.Tensor,
        lse_Hq: torch.Tensor,
        block: Block,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths, causal, windows = self._arguments(block, q_HqD.device)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_HqD.device)
        grads = self.operations._flash_attention_backward(
            *_by_token(grad_HqD, q_HqD, k_KkD, v_KkD, out_HqD), lse_Hq.contiguous(), *lengths, 0.0, causal,
            no_dropout, torch.empty(0, device=q_HqD.device), scale=scaling, **windows,
        )  # fmt: skip
        dq, dk, dv = (grad.transpose(0, 1) for grad in grads)
        return dq, dk, dv

    @staticmethod
    def _arguments(block: Block, device: torch.device) -> tuple[tuple[Any, ...], bool, dict[str, int]]:
        """((cu_q, cu_k, max_q, max_k), causal, windows). The kernel lines up the last query with the last key."""
        num_queries, num_keys = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
        cu_q = block.boundaries or (0, num_queries)
        cu_k = block.boundaries or (0, num_keys)
        left, right = -1, 0 if block.boundaries else -1
        if block.window is not None:
            left = block.window - 1 - (0 if block.boundaries else block.distance + num_queries - num_keys)
        lengths = tuple(torch.tensor(cu, dtype=torch.int32, device=device) for cu in (cu_q, cu_k))
        longest = tuple(max(end - start for start, end in pairwise(cu)) for cu in (cu_q, cu_k))
        return (*lengths, *longest), (left, right) == (-1, 0), {"window_size_left": left, "window_size_right": right}


def _by_token(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[H, t, D] -> [t, H, D], contiguous as the kernel wants it."""
    return tuple(x.transpose(0, 1).contiguous() for x in tensors)

"""Ring attention for packed sequences: the ranks of a ring hold parts of a pack and pass keys and values round.

A rank attends from its own queries to one rank's keys at a time (arXiv 2310.01889). Blocks merge exactly by their
log-sum-exps: with (out_a, lse_a) and (out_b, lse_b) over two disjoint sets of keys,

    lse = log(exp(lse_a) + exp(lse_b))        out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

The backward pass goes round again: given the whole log-sum-exp, each block's gradients are final and only add up.
A pack of T tokens is cut into 2 R chunks, and rank r holds chunks r and 2 R - 1 - r, so that causal work is shared
evenly. Suffixes: T tokens of the pack, t of the rank, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import distributed as dist

from longalign_ray.train.sequence_parallel import SequenceGroup, chunks_of_ring

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


@lru_cache(maxsize=64)  # of all steps of a pack, for every layer
def blocks_of_step(
    boundaries: tuple[int, ...], ring_degree: int, query_rank: int, key_rank: int, window: int | None
) -> tuple[Block, ...]:
    """What the tokens of `query_rank` see of those of `key_rank`."""
    size = boundaries[-1] // (2 * ring_degree)
    blocks: list[Block] = []
    if query_rank == key_rank:
        cuts = {0, size, 2 * size}
        for place, chunk in enumerate(chunks_of_ring(ring_degree, query_rank)):
            first = chunk * size
            cuts |= {b - first + place * size for b in boundaries if first < b < first + size}
        blocks.append(Block((0, 2 * size), (0, 2 * size), tuple(sorted(cuts)), window=window))
    for query_place, query_chunk in enumerate(chunks_of_ring(ring_degree, query_rank)):
        for key_place, key_chunk in enumerate(chunks_of_ring(ring_degree, key_rank)):
            if key_chunk >= query_chunk:
                continue
            # Of all sequences, only the one that the query chunk begins in can reach back to the key chunk.
            number = bisect_right(boundaries, query_chunk * size) - 1
            queries = (query_chunk * size, min(boundaries[number + 1], (query_chunk + 1) * size))
            keys = (max(boundaries[number], key_chunk * size), (key_chunk + 1) * size)
            if window is not None:
                queries = (queries[0], min(queries[1], keys[1] - 1 + window))
                keys = (max(keys[0], queries[0] - window + 1), keys[1])
            if keys[0] >= keys[1] or queries[0] >= queries[1]:
                continue
            to_own_query, to_own_key = (query_place - query_chunk) * size, (key_place - key_chunk) * size
            blocks.append(
                Block(
                    (queries[0] + to_own_query, queries[1] + to_own_query),
                    (keys[0] + to_own_key, keys[1] + to_own_key),
                    distance=queries[0] - keys[0],
                    window=window,
                )
            )
    return tuple(blocks)


def ring_attention(
    query_HtD: torch.Tensor,
    key_KtD: torch.Tensor,
    value_KtD: torch.Tensor,
    *,
    group: SequenceGroup,
    boundaries: tuple[int, ...],
    scaling: float,
    sliding_window: int | None,
    **_: Any,
) -> torch.Tensor:
    """[t, H, D] over the tokens of all ranks of the ring. Every rank of the ring calls it (collective)."""
    kernel = FlashKernel() if query_HtD.device.type == "cuda" else CpuKernel()
    spec = _Ring(kernel, group, boundaries, scaling, sliding_window)
    return _RingAttention.apply(query_HtD, key_KtD, value_KtD, spec).transpose(0, 1)  # pyright: ignore[reportOptionalMemberAccess]


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


@dataclass(frozen=True, slots=True, eq=False)
class _Ring:
    kernel: Kernel
    group: SequenceGroup
    boundaries: tuple[int, ...]
    scaling: float
    window: int | None

    def blocks(self, step: int) -> tuple[int, tuple[Block, ...]]:
        """(rank whose keys are here in this step, what is to be computed)."""
        rank, degree = self.group.ring_rank, self.group.ring_degree
        source = (rank - step) % degree
        return source, blocks_of_step(self.boundaries, degree, rank, source, self.window)

    def send(self, tensor: torch.Tensor) -> _Passing:
        """Starts passing `tensor` to the next rank of the ring and taking the one of the rank before."""
        ranks = dist.get_process_group_ranks(self.group.ring_group)
        own, degree = self.group.ring_rank, self.group.ring_degree
        received = torch.empty_like(tensor)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, ranks[(own + 1) % degree], self.group.ring_group),
                dist.P2POp(dist.irecv, received, ranks[(own - 1) % degree], self.group.ring_group),
            ]
        )
        return _Passing(tensor, received, works)


@dataclass(frozen=True, slots=True, eq=False)
class _Passing:
    sent: torch.Tensor  # kept alive until it is gone
    received: torch.Tensor
    works: list[Any]

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_HtD: torch.Tensor, key_KtD: torch.Tensor, value_KtD: torch.Tensor, ring: _Ring
    ) -> torch.Tensor:
        exact = torch.promote_types(query_HtD.dtype, torch.float32)
        width = key_KtD.shape[-1]
        out_HtD = torch.zeros((*query_HtD.shape[:2], value_KtD.shape[-1]), dtype=exact, device=query_HtD.device)
        lse_Ht = torch.full(query_HtD.shape[:2], -torch.inf, dtype=exact, device=query_HtD.device)
        keys_values = torch.cat([key_KtD, value_KtD], dim=-1)
        for step in range(ring.group.ring_degree):
            passing = ring.send(keys_values) if step + 1 < ring.group.ring_degree else None
            key, value = keys_values[..., :width], keys_values[..., width:]
            for block in ring.blocks(step)[1]:
                q, k = slice(*block.queries), slice(*block.keys)
                part = ring.kernel.forward(query_HtD[:, q], key[:, k], value[:, k], block, ring.scaling)
                _merge(out_HtD[:, q], lse_Ht[:, q], *part)
            keys_values = passing.wait() if passing else keys_values
        out_HtD = out_HtD.to(query_HtD.dtype)
        ctx.save_for_backward(query_HtD, key_KtD, value_KtD, out_HtD, lse_Ht)
        ctx.ring = ring
        return out_HtD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query_HtD, key_KtD, value_KtD, out_HtD, lse_Ht = ctx.saved_tensors
        ring, grad_HtD, width = ctx.ring, grads[0], key_KtD.shape[-1]
        dquery_HtD = torch.zeros_like(query_HtD, dtype=lse_Ht.dtype)
        keys_values = torch.cat([key_KtD, value_KtD], dim=-1)
        sums = torch.zeros_like(keys_values, dtype=lse_Ht.dtype)  # gradients of the keys and values that are here
        for step in range(ring.group.ring_degree):
            passing = ring.send(keys_values) if step + 1 < ring.group.ring_degree else None
            key, value = keys_values[..., :width], keys_values[..., width:]
            for block in ring.blocks(step)[1]:
                q, k = slice(*block.queries), slice(*block.keys)
                dq, dk, dv = ring.kernel.backward(
                    grad_HtD[:, q], query_HtD[:, q], key[:, k], value[:, k], out_HtD[:, q], lse_Ht[:, q],
                    block, ring.scaling,
                )  # fmt: skip
                dquery_HtD[:, q] += dq
                sums[:, k, :width] += dk
                sums[:, k, width:] += dv
            keys_values = passing.wait() if passing else keys_values
            sums = ring.send(sums).wait()  # after the last step they come home
        return (
            dquery_HtD.to(query_HtD.dtype),
            sums[..., :width].to(key_KtD.dtype),
            sums[..., width:].to(value_KtD.dtype),
            None,
        )


def _merge(out_HqD: torch.Tensor, lse_Hq: torch.Tensor, more_HqD: torch.Tensor, more_lse_Hq: torch.Tensor) -> None:
    """Adds the result over further keys to `out` and `lse`, in place."""
    lse = torch.logaddexp(lse_Hq, more_lse_Hq.to(lse_Hq.dtype))
    out_HqD.mul_((lse_Hq - lse).exp()[..., None]).add_(more_HqD * (more_lse_Hq - lse).exp()[..., None])
    lse_Hq.copy_(lse)


class CpuKernel:
    """torch's flash attention for the CPU, a sequence at a time; also in fp64."""

    def forward(
        self, q_HqD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_HqD = torch.empty((*q_HqD.shape[:2], v_KkD.shape[-1]), dtype=q_HqD.dtype)
        lse_Hq = torch.empty(q_HqD.shape[:2], dtype=torch.promote_types(q_HqD.dtype, torch.float32))
        for q, k, causal, mask in _pieces(block, q_HqD.dtype):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_HqD[None, :, q], k_KkD[None, :, k], v_KkD[None, :, k], 0.0, causal, attn_mask=mask, scale=scaling
            )
            out_HqD[:, q], lse_Hq[:, q] = out[0], lse[0]
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

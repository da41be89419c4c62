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
from typing import Any

import torch
from torch import distributed as dist

from longalign_ray.errors import ModelError
from longalign_ray.train.block_attention import Block, CpuKernel, FlashKernel, Kernel
from longalign_ray.train.sequence_parallel import SequenceGroup, chunks_of_ring


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
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """[t, H, D] over the tokens of all ranks of the ring. Every rank of the ring calls it (collective).

    Raises ModelError where scores are capped, which the kernels of a ring do not do.
    """
    if softcap is not None:
        raise ModelError(
            f"the model caps its attention scores at {softcap:g}, which a ring of {group.ring_degree} ranks does not "
            "compute: set train.sp_degree to a divisor of the model's attention heads"
        )
    kernel = FlashKernel() if query_HtD.device.type == "cuda" else CpuKernel()
    spec = _Ring(kernel, group, boundaries, scaling, sliding_window)
    return _RingAttention.apply(query_HtD, key_KtD, value_KtD, spec).transpose(0, 1)  # pyright: ignore[reportOptionalMemberAccess]


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
                merge(out_HtD[:, q], lse_Ht[:, q], *part)
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


def merge(out_HqD: torch.Tensor, lse_Hq: torch.Tensor, more_HqD: torch.Tensor, more_lse_Hq: torch.Tensor) -> None:
    """Adds the result over further keys to `out` and `lse`, in place."""
    lse = torch.logaddexp(lse_Hq, more_lse_Hq.to(lse_Hq.dtype))
    out_HqD.mul_((lse_Hq - lse).exp()[..., None]).add_(more_HqD * (more_lse_Hq - lse).exp()[..., None])
    lse_Hq.copy_(lse)

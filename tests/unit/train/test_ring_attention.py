"""Blocks of the ring against a dense mask, both kernels against dense attention, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from longalign_ray.errors import ModelError
from longalign_ray.train import block_attention
from longalign_ray.train.block_attention import Block, CpuKernel, FlashKernel, Kernel
from longalign_ray.train.ring_attention import blocks_of_step, merge, ring_attention
from longalign_ray.train.sequence_parallel import SequenceGroup

TOKENS, SCALING = 48, 0.3
PACKS = {"one sequence": (0, 48), "a border on a chunk's": (0, 12, 30, 48), "many": (0, 1, 2, 9, 10, 23, 31, 41, 48)}


def visible_pairs(boundaries: tuple[int, ...], window: int | None) -> torch.Tensor:
    """bool[T, T]."""
    position = torch.arange(boundaries[-1])
    sequence = torch.bucketize(position, torch.tensor(boundaries[1:]), right=True)
    ago = position[:, None] - position
    return (sequence[:, None] == sequence) & (ago >= 0) & (ago < (window or TOKENS))


def own_tokens(ring_degree: int, rank: int) -> torch.Tensor:
    return torch.from_numpy(SequenceGroup(ring_degree=ring_degree, part=rank).own_tokens(TOKENS))


@pytest.mark.parametrize("ring_degree", [2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 13, 40])
@pytest.mark.parametrize("pack", PACKS)
def test_every_pair_that_sees_is_in_one_block(pack: str, window: int | None, ring_degree: int) -> None:
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.int64)
    for rank in range(ring_degree):
        for source in range(ring_degree):
            queries, keys = own_tokens(ring_degree, rank), own_tokens(ring_degree, source)
            for block in blocks_of_step(PACKS[pack], ring_degree, rank, source, window):
                q, k = queries[slice(*block.queries)], keys[slice(*block.keys)]
                ago = q[:, None] - k
                inside = (ago >= 0) & (ago < (window or TOKENS))
                if block.boundaries:
                    place = torch.arange(len(q))
                    cuts = torch.bucketize(place, torch.tensor(block.boundaries[1:]), right=True)
                    inside &= cuts[:, None] == cuts
                else:
                    assert ago[0, 0] == block.distance
                    assert inside.any(dim=1).all()  # else a kernel would divide by 0
                seen[q[:, None], k] += inside
    assert torch.equal(seen, visible_pairs(PACKS[pack], window).long())


def test_causal_work_is_even() -> None:
    """A single sequence: every rank has the same number of pairs, up to the diagonal."""
    pairs = visible_pairs((0, TOKENS), None).sum(dim=1)
    assert len({int(pairs[own_tokens(4, rank)].sum()) for rank in range(4)}) == 1


def random(heads: int, *, seed: int) -> torch.Tensor:
    return torch.randn(heads, TOKENS, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    return (q @ k.transpose(1, 2) * SCALING).masked_fill(~visible, -torch.inf).softmax(dim=-1) @ v


class DenseFlash:
    """What torch's flash attention documents, by dense matrices: windows are lined up with the last key."""

    def _scores(self, q: torch.Tensor, k: torch.Tensor, causal: bool, left: int, right: int) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * SCALING
        ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
        furthest_ahead, furthest_back = 0 if causal else right, left
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= (ahead > furthest_ahead) & (furthest_ahead >= 0)
        hidden |= (-ahead > furthest_back) & (furthest_back >= 0)
        return scores.masked_fill(hidden, -torch.inf)

    def _flash_attention_forward(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *rest: Any, **named: Any) -> Any:
        max_q, max_k, dropout, causal, debug = rest
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        assert (dropout, debug, named["scale"], cu_q.dtype) == (0.0, False, SCALING, torch.int32)
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=q.dtype)
        for i, j in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            i, j = slice(*i), slice(*j)
            s = self._scores(q[i], k[j], causal, named["window_size_left"], named["window_size_right"])
            lse[:, i] = s.logsumexp(dim=-1)
            values = v[j].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            out[i] = torch.einsum("hqk,khd->qhd", s.softmax(dim=-1), values)
        return out, lse, None, None, None

    def _flash_attention_backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **named: Any
    ) -> Any:
        cu_q, cu_k, _, _, _, causal, *_ = rest
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        repeats = q.shape[1] // k.shape[1]
        for i, j in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            i, j = slice(*i), slice(*j)
            s = self._scores(q[i], k[j], causal, named["window_size_left"], named["window_size_right"])
            p = (s - lse[:, i, None]).exp()
            dp = torch.einsum("qhd,khd->hqk", grad[i], v[j].repeat_interleave(repeats, dim=1))
            ds = p * (dp - (grad[i] * out[i]).sum(dim=-1).T[..., None]) * SCALING
            dq[i] = torch.einsum("hqk,khd->qhd", ds, k[j].repeat_interleave(repeats, dim=1))
            dk[j] = torch.einsum("hqk,qhd->khd", ds, q[i]).unflatten(1, (-1, repeats)).sum(dim=2)
            dv[j] = torch.einsum("hqk,qhd->khd", p, grad[i]).unflatten(1, (-1, repeats)).sum(dim=2)
        return dq, dk, dv


KERNELS: dict[str, Kernel] = {"cpu": CpuKernel(), "flash": FlashKernel(DenseFlash())}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 5, 13, 40])
@pytest.mark.parametrize("pack", PACKS)
def test_merged_blocks_equal_dense_attention(
    pack: str, window: int | None, kv_heads: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of a ring, one after the other: outputs, and gradients that add up over the steps."""
    monkeypatch.setattr(block_attention, "QUERY_CHUNK", 4)
    q, k, v, grad = random(4, seed=0), random(kv_heads, seed=1), random(kv_heads, seed=2), random(4, seed=3)
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = dense(wanted[0], wanted[1], wanted[2], visible_pairs(PACKS[pack], window))
    expected.backward(grad)
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for rank in range(2):
        own = own_tokens(2, rank)
        out, lse = torch.zeros(4, len(own), 8, dtype=q.dtype), torch.full((4, len(own)), -torch.inf, dtype=q.dtype)
        parts = [
            (own_tokens(2, s), block) for s in range(2) for block in blocks_of_step(PACKS[pack], 2, rank, s, window)
        ]
        calls: list[tuple[torch.Tensor, torch.Tensor, slice, Block]] = []
        for of_source, block in parts:
            place = slice(*block.queries)
            calls.append((own[place], of_source[slice(*block.keys)], place, block))
        for i, j, place, block in calls:
            merge(out[:, place], lse[:, place], *KERNELS[kernel].forward(q[:, i], k[:, j], v[:, j], block, SCALING))
        torch.testing.assert_close(out, expected[:, own].detach(), rtol=0, atol=1e-12)
        for i, j, place, block in calls:
            dq, dk, dv = KERNELS[kernel].backward(
                grad[:, i], q[:, i], k[:, j], v[:, j], out[:, place], lse[:, place], block, SCALING
            )
            found[0][:, i] += dq
            found[1][:, j] += dk
            found[2][:, j] += dv
    for gradient, leaf in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-11)


def test_torch_flash_attention_takes_these_arguments() -> None:
    """The installed operations name the parameters in the order in which the kernel gives them."""
    forward = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    backward = [a.name for a in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    named = {"scale", "window_size_left", "window_size_right"}
    assert forward[:10] == ["query", "key", "value", *lengths, "return_debug_mask"]
    assert backward[:14] == ["grad_out", "query", "key", "value", "out", "logsumexp", *lengths, "rng_state", "unused"]
    assert named <= set(forward) & set(backward)


def test_capped_scores_are_refused() -> None:
    query = torch.zeros(3, 6, 4)
    group = SequenceGroup(ring_degree=3)
    with pytest.raises(ModelError, match=r"caps its attention scores at 50, which a ring of 3 ranks"):
        ring_attention(
            query, query, query, group=group, boundaries=(0, 6), scaling=1.0, sliding_window=None, softcap=50.0
        )

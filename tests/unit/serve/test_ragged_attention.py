"""Attention of a step of mixed requests, against dense attention of each request alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from longalign_ray.errors import ModelError
from longalign_ray.serve import kv_cache, ragged_attention
from longalign_ray.serve.kv_cache import KVCache, Segment, Span
from longalign_ray.serve.product_attention import ProductKernel
from longalign_ray.serve.ragged_attention import RaggedStep, plan_works, select_kernel
from longalign_ray.train.block_attention import CpuKernel, FlashKernel
from tests.unit.train.test_ring_attention import SCALING, DenseFlash

HEADS, KEY_HEADS, WIDTH = 6, 2, 4
KERNELS: dict[str, Any] = {"cpu": CpuKernel(), "gpu": FlashKernel(DenseFlash()), "products": ProductKernel(None)}


def segment_of(keys: torch.Tensor, values: torch.Tensor) -> Segment:
    segment = Segment()
    segment.write(0, keys, values)
    segment.length = keys.shape[1]
    return segment


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, softcap: float | None):
    """[H, q, D]; the queries are the last of the tokens."""
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=0) for x in (key, value))
    scores = query @ key.mT * SCALING
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    ago = torch.arange(key.shape[1] - query.shape[1], key.shape[1])[:, None] - torch.arange(key.shape[1])
    hidden = (ago < 0) | (ago >= (window or key.shape[1]))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


class Crowd:
    """Requests with keys and values of earlier tokens: of nobody else, of a document, of two, with few new tokens."""

    LENGTHS = (  # (first document, second document, own earlier tokens, new tokens)
        (0, 0, 0, 5),
        (0, 0, 20, 1),
        (12, 0, 0, 1),
        (12, 0, 7, 6),
        (12, 9, 3, 1),
        (12, 9, 0, 4),
        (5, 0, 2, 2),
    )

    def __init__(self) -> None:
        torch.manual_seed(0)
        made = [torch.randn(KEY_HEADS, 16, WIDTH, dtype=torch.float64) for _ in range(4)]
        documents = [made[:2], made[2:]]
        segments = [segment_of(*document) for document in documents]
        self.pieces, self.whole, new = [], [], []
        for *taken, earlier, num_new in self.LENGTHS:
            own = [torch.randn(KEY_HEADS, earlier + num_new, WIDTH, dtype=torch.float64) for _ in range(2)]
            spans = [Span(segment, length) for segment, length in zip(segments, taken, strict=True) if length]
            segment = segment_of(*(x[:, :earlier] for x in own)) if earlier else Segment()
            self.pieces.append((KVCache([0] * 40, shared=spans, own=segment), num_new))
            parts = [[x[:, :length] for x in document] for document, length in zip(documents, taken, strict=True)]
            self.whole.append([torch.cat(tensors, dim=1) for tensors in zip(*parts, own, strict=True)])
            new.append([x[:, earlier:] for x in own])
        self.keys, self.values = (torch.cat(tensors, dim=1) for tensors in zip(*new, strict=True))
        self.queries = torch.randn(HEADS, self.keys.shape[1], WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 1, 4, 10, 15, 100])
@pytest.mark.parametrize("kernel", [*KERNELS, "capped"])
def test_a_step_equals_dense_attention_of_each(kernel, window, monkeypatch):
    softcap = 0.7 if kernel == "capped" else None
    if softcap is None:
        monkeypatch.setattr(ragged_attention, "select_kernel", lambda *_: KERNELS[kernel])
    crowd, module = Crowd(), nn.Module()
    module.layer_idx = 0  # pyright: ignore[reportArgumentType]
    out, _ = ragged_attention.ragged_attention(
        module,
        crowd.queries[None],
        crowd.keys[None],
        crowd.values[None],
        None,
        scaling=SCALING,
        sliding_window=window,
        softcap=softcap,
        ragged_step=RaggedStep(crowd.pieces),
    )
    row = 0
    for (_, num_new), (key, value) in zip(crowd.pieces, crowd.whole, strict=True):
        expected = dense(crowd.queries[:, row : row + num_new], key, value, window, softcap)
        torch.testing.assert_close(out[0, row : row + num_new].transpose(0, 1), expected)
        row += num_new


def test_products_of_few_queries_at_a_time_are_the_same(monkeypatch):
    from longalign_ray.serve import product_attention

    monkeypatch.setattr(product_attention, "MAX_SCORES", 40)
    test_a_step_equals_dense_attention_of_each("capped", 10, monkeypatch)


def test_neighbours_look_at_a_shared_document_together():
    crowd = Crowd()
    works = plan_works(crowd.pieces, window=None)
    # rows 6 to 18 are those of the four requests with 12 tokens of the first document, of which two have the second too
    documents = {id(span.segment) for span in crowd.pieces[4][0].shared}
    shared = [(work.rows, work.keys) for work in works if id(work.segment) in documents]
    assert shared == [((6, 18), (0, 12)), ((13, 18), (0, 9)), ((18, 20), (0, 5))]
    assert [work.is_first for work in works] == [True] * 7 + [False] * (len(works) - 7)


def test_a_layer_that_the_step_does_not_reach_is_refused():
    nothing = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ModelError, match="did not pass the requests' places"):
        ragged_attention.ragged_attention(nn.Module(), nothing, nothing, nothing, None)


def test_kernels_by_device_and_dtype():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(select_kernel(cpu, torch.bfloat16, None), CpuKernel)
    assert isinstance(select_kernel(cpu, torch.float32, 5.0), ProductKernel)
    assert isinstance(select_kernel(gpu, torch.bfloat16, None), FlashKernel)
    assert isinstance(select_kernel(gpu, torch.float32, None), ProductKernel)


def test_a_segment_grows_without_losing_anything():
    tokens = torch.randn(2, 300, 4)
    segment = Segment(reserve=10)
    for start, end in ((0, 7), (7, 100), (100, 101), (101, 300)):
        segment.write(0, tokens[:, start:end], -tokens[:, start:end])
        segment.length = end
    key, value = segment.read(0, 3, 300)
    torch.testing.assert_close(key, tokens[:, 3:])
    torch.testing.assert_close(value, -tokens[:, 3:])
    assert 2 * 300 * 2 * 4 * 4 <= segment.num_bytes <= 1.4 * 2 * 300 * 2 * 4 * 4


def test_short_stretches_are_copied_and_long_ones_referred_to(monkeypatch):
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 10)
    tokens = [torch.randn(2, 40, 4) for _ in range(3)]
    first, second, third = (segment_of(x, -x) for x in tokens)
    cache = KVCache(range(120), shared=[Span(first, 40), Span(second, 40)], own=third)

    def held(branch: KVCache) -> torch.Tensor:
        spans = [*branch.shared, Span(branch.own, branch.own.length)]
        return torch.cat([span.segment.read(0, 0, span.length)[0] for span in spans if span.length], dim=1)

    for num_tokens, num_shared in ((5, 0), (10, 10), (40, 40), (45, 40), (50, 50), (80, 80), (110, 80)):
        branch = cache.branch(range(130), num_tokens)
        assert (branch.length, branch.num_shared) == (num_tokens, num_shared)
        torch.testing.assert_close(held(branch), torch.cat(tokens, dim=1)[:, :num_tokens])

"""Parts of a pack hold all of it once, and the all-to-all brings every token of a share of the heads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from longalign_ray.data.store import Pack
from longalign_ray.errors import ModelError
from longalign_ray.train import sequence_parallel
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.loss import LossKind
from longalign_ray.train.sequence_parallel import (
    SequenceGroup,
    attend,
    check_model,
    heads_of_all_parts,
    tokens_of_all_parts,
)


def group(part: int, heads_degree: int, ring_degree: int = 1) -> SequenceGroup:
    return SequenceGroup(part=part, heads_degree=heads_degree, ring_degree=ring_degree)


def test_places_by_hand() -> None:
    assert [group(p, 2).own_tokens(6).tolist() for p in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [group(p, 1, 2).own_tokens(8).tolist() for p in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [group(p, 2, 2).own_tokens(8).tolist() for p in range(4)] == [[0, 1], [6, 7], [2, 3], [4, 5]]


@pytest.mark.parametrize("loss", ["sequence", "token"])
@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (2, 2), (1, 3)])
def test_parts_conserve_tokens_labels_and_weights(degrees: tuple[int, int], loss: LossKind) -> None:
    random = np.random.default_rng(0)
    ids, weight = random.integers(1, 99, 41, dtype=np.int32), random.choice([0, 30, 100], 41).astype(np.uint8)
    pack = Pack(ids, weight, np.array([0, 11, 12, 30, 41], np.int32), ("a", "b", "c", "d"))
    whole = to_batch(pack, loss=loss)
    parts = [group(part, *degrees) for part in range(degrees[0] * degrees[1])]
    batches = [to_batch(pack, loss=loss, sequence_group=part) for part in parts]
    num_tokens = batches[0].boundaries[-1]
    assert (num_tokens % parts[0].multiple, num_tokens - 41 < parts[0].multiple) == (0, True)
    assert len({batch.boundaries for batch in batches}) == 1
    assert batches[0].boundaries[:5] == whole.boundaries
    ids_T, positions_T, weights_T, labels_T = (np.full(num_tokens, -1.0) for _ in range(4))
    for part, batch in zip(parts, batches, strict=True):
        own = part.own_tokens(num_tokens)
        assert (ids_T[own] == -1).all()  # in no other part
        ids_T[own], positions_T[own] = batch.input_ids_t, batch.position_ids_t
        scored = batch.weights_N > 0
        places = own[batch.target_positions_N[scored]]
        weights_T[places], labels_T[places] = batch.weights_N[scored], batch.labels_N[scored]
    assert ids_T[:41].tolist() == ids.tolist()
    assert positions_T[:41].tolist() == whole.position_ids_t.tolist()
    assert (ids_T[41:] == 0).all()  # padding: a sequence of its own, without targets
    assert positions_T[41:].tolist() == list(range(num_tokens - 41))
    expected = np.full((2, num_tokens), -1.0)
    expected[:, whole.target_positions_N] = np.stack([whole.weights_N, whole.labels_N])
    assert np.array_equal([weights_T, labels_T], expected)


def test_a_part_without_targets_scores_a_position_with_weight_zero() -> None:
    batch = to_batch(dummy_pack(), loss="sequence", sequence_group=group(3, 4))
    assert (batch.boundaries, batch.weights_N.tolist(), batch.input_ids_t.tolist()) == ((0, 2, 4), [0.0], [0])


def on_threads(degree: int, work: Callable[[SequenceGroup], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`work` of every part, an all-to-all apart from each other: threads in place of ranks."""
    barrier, sent = threading.Barrier(degree), [torch.empty(0)] * degree

    def all_to_all(out: torch.Tensor, x: torch.Tensor, *, group: int) -> None:
        sent[group] = x
        barrier.wait(10)
        out.copy_(torch.stack([other[group] for other in sent]))
        barrier.wait(10)

    monkeypatch.setattr(sequence_parallel.dist, "all_to_all_single", all_to_all)
    groups = [SequenceGroup(part=part, heads_degree=degree, heads_group=part) for part in range(degree)]
    with ThreadPoolExecutor(degree) as pool:
        return list(pool.map(work, groups))


@pytest.mark.parametrize("degree", [2, 3])
def test_all_to_all_and_back(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, tokens = 2 * degree, 5 * degree
    x_HTD = torch.arange(heads * tokens * 4).reshape(heads, tokens, 4)

    def work(part: SequenceGroup) -> tuple[torch.Tensor, torch.Tensor]:
        own = x_HTD[:, part.own_tokens(tokens)]
        some_heads = tokens_of_all_parts(own, part)
        return some_heads, heads_of_all_parts(some_heads.transpose(0, 1), part)

    for part, (some_heads, back) in enumerate(on_threads(degree, work, monkeypatch)):
        assert torch.equal(some_heads, x_HTD[2 * part : 2 * part + 2])
        assert torch.equal(back.transpose(0, 1), x_HTD[:, 5 * part : 5 * part + 5])


@pytest.mark.parametrize(("degree", "kv_heads"), [(2, 4), (2, 1), (4, 2), (3, 2), (6, 4)])
def test_each_query_head_keeps_its_own_key_head(degree: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that names the key head of every query head by its index."""
    heads = 12
    key_KTD = torch.arange(kv_heads)[:, None, None].expand(kv_heads, degree, 1)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert len(q) % len(k) == 0
        return k.repeat_interleave(len(q) // len(k), dim=0).transpose(0, 1)

    def work(part: SequenceGroup) -> torch.Tensor:
        return attend(kernel, torch.zeros(heads, 1, 1, dtype=torch.int64), key_KTD[:, :1], key_KTD[:, :1], part)

    expected = torch.arange(kv_heads).repeat_interleave(heads // kv_heads)
    for out_tHD in on_threads(degree, work, monkeypatch):
        assert torch.equal(out_tHD[0, :, 0], expected)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_by_the_longest_position_is_refused(kind: str) -> None:
    shape = {"num_attention_heads": 4, "rope_scaling": {"type": kind}}
    check_model(shape, 1)
    check_model({**shape, "rope_scaling": {"type": "yarn"}}, 2)
    with pytest.raises(ModelError, match=rf"RoPE of type {kind}.*train\.sp_degree = 2.*set train\.sp_degree=1"):
        check_model(shape, 2)


def test_a_degree_that_makes_a_ring_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_model({"num_attention_heads": 12}, 4)
    assert not caplog.messages
    check_model({"num_attention_heads": 12}, 8)
    [message] = caplog.messages
    assert message.startswith("train.sp_degree = 8 does not divide the model's 12 attention heads, so 2 ranks pass")
    assert message.endswith("with one of 1, 2, 3, 4, 6, 12 none has to")

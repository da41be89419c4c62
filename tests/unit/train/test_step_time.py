"""The forecast of a step's seconds, by hand."""

from __future__ import annotations

import pytest

from longalign_ray.train.memory import Levers
from longalign_ray.train.model_shape import ModelShape
from longalign_ray.train.step_time import step_seconds

SHAPE = ModelShape(layers=3, hidden=8, heads=4, kv_heads=2, head_dim=2, mlp=16, vocabulary=100)


def test_by_hand() -> None:
    """4 of 8 ranks of a node share a pack: 2 key/value heads are sent twice, three quarters of everything leave."""
    took = step_seconds(SHAPE, Levers(ranks=8, sp_degree=4), compute_seconds=6.0, tokens_per_rank=1e9, micro_steps=2)
    assert took.compute == pytest.approx(8.0)
    assert took.all_to_all == pytest.approx(3 * 3 * 2 * (2 * 8 + 2 * 4 * 2) * 1e9 * 0.75 / 400e9)
    assert took.overhead == pytest.approx(0.16)
    assert took.total == pytest.approx(took.compute + took.all_to_all + took.overhead)


def test_across_nodes_and_without_recomputation() -> None:
    """16 ranks on 4 heads: 4 trade heads in a node, and 4 such rows pass 2 heads, held twice, from node to node."""
    levers = Levers(ranks=16, sp_degree=16, gradient_checkpointing=False)
    took = step_seconds(SHAPE, levers, compute_seconds=6.0, tokens_per_rank=1e9, micro_steps=1)
    assert took.compute == 6.0
    assert took.all_to_all == pytest.approx(2 * 3 * 2 * (2 * 8 + 2 * 4 * 2) * 1e9 * 3 / 4 / 400e9)
    assert took.ring == pytest.approx(3 * (2 * 3 * 2 + 4 * 4) * (2 * 4 * 2) * 1e9 / 50e9)
    assert took.total == pytest.approx(took.compute + took.all_to_all + took.ring + took.overhead)
    alone = step_seconds(SHAPE, Levers(), compute_seconds=6.0, tokens_per_rank=1e9, micro_steps=1)
    assert alone.all_to_all == alone.ring == 0


def test_a_ring_inside_a_node() -> None:
    """3 ranks on 4 heads trade none; of 6, two on a node trade theirs, and three nodes are the ring."""
    took = step_seconds(SHAPE, Levers(ranks=6, sp_degree=3), compute_seconds=6.0, tokens_per_rank=1e9, micro_steps=1)
    assert took.all_to_all == 0
    assert took.ring == pytest.approx(3 * (3 * 2 * 2 + 4 * 3) * (2 * 4) * 1e9 / 400e9)
    pairs = step_seconds(
        SHAPE, Levers(ranks=6, sp_degree=6, ranks_per_node=2), compute_seconds=6.0, tokens_per_rank=1e9, micro_steps=1
    )
    assert pairs.all_to_all == pytest.approx(3 * 3 * 2 * (2 * 8 + 2 * 4) * 1e9 / 2 / 400e9)
    assert pairs.ring == pytest.approx(took.ring * 400 / 50)

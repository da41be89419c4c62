from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.data.cost import SequenceCost, sequence_cost

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def test_polynomial() -> None:
    assert SequenceCost(2.0, 3.0)(np.array([1, 10])).tolist() == [5.0, 320.0]


def test_llama_2_7b() -> None:
    """6.476e9 weights outside embedding and head; attention 6 * 32 * 4096 * l**2."""
    cost = sequence_cost(LLAMA_2_7B)
    assert cost.linear == 6 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert cost.linear / 6 == pytest.approx(6.476e9, rel=1e-3)
    assert cost.quadratic == 6 * 32 * 4096


def test_a_64k_document_costs_far_more_than_64k_tokens_of_chat() -> None:
    cost = sequence_cost(LLAMA_2_7B)
    assert cost(np.array([65_536]))[0] / cost(np.full(64, 1_024)).sum() > 2


def test_grouped_heads_and_head_dim_are_read() -> None:
    grouped = sequence_cost({**LLAMA_2_7B, "num_key_value_heads": 8, "head_dim": 64})
    assert grouped.linear == 6 * 32 * (4096 * (2 * 2048 + 2 * 512) + 3 * 4096 * 11008)
    assert grouped.quadratic == 6 * 32 * 2048

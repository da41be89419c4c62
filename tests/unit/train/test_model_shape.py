"""Shapes read from config.json mappings: parameters as published, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from longalign_ray.errors import ConfigError
from longalign_ray.train.model_shape import LLAMA_2_7B, ModelShape

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
}


def test_counted_by_hand() -> None:
    shape = ModelShape.of(SMALL)
    assert (shape.width, shape.kv_width, shape.tied, shape.qk_norm) == (8, 4, False, False)
    assert shape.layer_parameters == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, three of the MLP
    assert shape.parameters == 2 * shape.layer_parameters + 2 * 10 * 8
    tied = ModelShape.of({**SMALL, "tie_word_embeddings": True, "head_dim": 6, "model_type": "qwen3"})
    assert (tied.width, tied.kv_width, tied.qk_norm) == (24, 12, True)
    assert tied.parameters == 2 * tied.layer_parameters + 10 * 8
    assert ModelShape.of({**SMALL, "num_key_value_heads": None}).kv_heads == 4


def test_parameters_are_those_published() -> None:
    assert pytest.approx(6.738e9, rel=1e-3) == LLAMA_2_7B.parameters


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": None, "hidden_size": None}, "hidden_size is missing; vocab_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is no whole number above 0"),
        ({"hidden_size": "8"}, "hidden_size = '8'"),
        ({"head_dim": -1}, "head_dim = -1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ({"hidden_size": 3}, "hidden_size = 3 is below num_attention_heads = 4"),
        ({"num_local_experts": 8}, "num_local_experts = 8: experts are not counted"),
    ],
)
def test_what_is_no_dense_decoder(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape.of({**SMALL, **changed})

"""What a sequence costs to train: floating-point operations linear and quadratic in its length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """cost(l) = linear * l + quadratic * l**2, in FLOPs of forward and backward of one sequence of l tokens."""

    linear: float
    quadratic: float

    def __call__(self, lengths: np.ndarray | int) -> np.ndarray:
        """float64, the shape of `lengths`."""
        exact = np.asarray(lengths, dtype=np.float64)
        return self.linear * exact + self.quadratic * exact * exact


LLAMA_2_7B = SequenceCost(linear=6 * 6.738e9, quadratic=6 * 32 * 4_096)
"""By all its parameters, embedding and head too: for lengths that come without a model."""


def sequence_cost(model: Mapping[str, Any]) -> SequenceCost:
    """The cost under a model with this Hugging Face config.

    6 FLOPs a weight and token, and 6 * layers * (heads * head_dim) * l**2 for causal attention, half of the square
    (recomputation would scale both terms alike). Embedding and head are left out: the
    first is a look-up, the second runs on targets only.
    """
    hidden, layers, heads = model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"]
    head_dim = model.get("head_dim") or hidden // heads
    width, kv_width = heads * head_dim, (model.get("num_key_value_heads") or heads) * head_dim
    weights = layers * (hidden * (2 * width + 2 * kv_width) + 3 * hidden * model["intermediate_size"])
    return SequenceCost(linear=6.0 * weights, quadratic=6.0 * layers * width)

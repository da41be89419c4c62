"""Lengths like those of long-context fine-tuning."""

from __future__ import annotations

import numpy as np


def long_context_mix(number: int, *, seed: int) -> np.ndarray:
    """int64[number]: 90 % lognormal with median 900, at most 8,192; 10 % uniform in 8,192..65,536; random order."""
    random = np.random.default_rng(seed)
    num_long = number // 10
    short = np.clip(random.lognormal(np.log(900), 1.0, number - num_long), 1, 8_192).astype(np.int64)
    return random.permutation(np.concatenate([short, random.integers(8_192, 65_537, num_long)]))

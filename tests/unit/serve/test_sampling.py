"""Draws against the probabilities they are drawn from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from longalign_ray.serve.sampling import sample


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities 0.644, 0.237, 0.087, 0.032
    generator = torch.Generator().manual_seed(0)

    def shares(**settings: float) -> list[float]:
        drawn = Counter(sample(logits, generator=generator, **settings) for _ in range(2000))
        return [drawn[token_id] / 2000 for token_id in range(4)]

    assert shares(temperature=1.0, top_p=1.0) == pytest.approx([0.644, 0.237, 0.087, 0.032], abs=0.05)
    assert shares(temperature=2.0, top_p=1.0) == pytest.approx([0.455, 0.276, 0.167, 0.102], abs=0.05)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.731, 0.269, 0, 0], abs=0.05)  # 0.644 < 0.7
    assert shares(temperature=1.0, top_p=0.6) == [1, 0, 0, 0]
    assert shares(temperature=0.0, top_p=1.0) == [1, 0, 0, 0]
    assert shares(temperature=1e-4, top_p=1.0) == [1, 0, 0, 0]

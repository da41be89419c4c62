from __future__ import annotations

from itertools import pairwise

import pytest

from longalign_ray.train.schedule import learning_rate


def test_hand_worked_points() -> None:
    """100 steps, 3 of them warm-up: 1/3, 2/3, 1 of the peak, then a cosine that halves in the middle."""
    rates = [learning_rate(step, 100, peak=3.0, warmup_ratio=0.03) for step in range(100)]
    assert rates[:4] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert learning_rate(3 + 97 // 2, 3 + 96, peak=3.0, warmup_ratio=0.03) == pytest.approx(1.5)
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert 0 < rates[-1] < 0.01


def test_minimum_is_the_floor() -> None:
    rates = [learning_rate(step, 10, peak=1.0, warmup_ratio=0.0, minimum=0.1) for step in range(11)]
    assert rates[0] == 1.0
    assert rates[10] == pytest.approx(0.1)
    assert min(rates) == rates[10]


def test_a_single_step_and_warmup_only() -> None:
    assert learning_rate(0, 1, peak=1.0, warmup_ratio=0.03) == 1.0
    assert [learning_rate(s, 4, peak=1.0, warmup_ratio=1.0) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]

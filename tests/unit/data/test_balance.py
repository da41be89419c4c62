from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.data.balance import bands, imbalance


def test_bands_put_like_costs_together() -> None:
    slots = bands(np.array([1.0, 9.0, 2.0, 8.0]), micro_steps=2, groups=2)
    assert slots.tolist() == [[1, 3], [2, 0]]


def test_missing_packs_leave_slots_empty() -> None:
    assert bands(np.array([5.0]), micro_steps=2, groups=2).tolist() == [[0, -1], [-1, -1]]


def test_imbalance_by_hand() -> None:
    # micro-steps of (4, 2) and (1, 1): slowest 4 + 1 = 5, mean 3 + 1 = 4
    assert imbalance(np.array([[[4.0, 2.0], [1.0, 1.0]]])).tolist() == [1.25]


@pytest.mark.parametrize("seed", range(5))
def test_bands_never_wait_longer_than_the_given_order(seed: int) -> None:
    costs = np.random.default_rng(seed).lognormal(0, 1, 32)
    banded = costs[bands(costs, micro_steps=8, groups=4)]
    assert sorted(banded.ravel()) == sorted(costs)
    assert imbalance(banded[None])[0] <= imbalance(costs.reshape(1, 8, 4))[0]
    assert imbalance(banded[None])[0] >= 1

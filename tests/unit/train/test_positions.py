from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.train.positions import reset_position_ids


@pytest.mark.parametrize(
    ("cu_seqlens", "expected"), [([0, 3, 5, 9], [0, 1, 2, 0, 1, 0, 1, 2, 3]), ([0, 1], [0]), ([0, 1, 2, 3], [0, 0, 0])]
)
def test_positions_restart(cu_seqlens: list[int], expected: list[int]) -> None:
    assert reset_position_ids(np.array(cu_seqlens)).tolist() == expected

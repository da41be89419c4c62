"""Position ids of packed sequences."""

from __future__ import annotations

import numpy as np


def reset_position_ids(cu_seqlens: np.ndarray) -> np.ndarray:
    """int64[T] that restarts at 0 in every sequence.

    cu_seqlens: int[S+1], first 0, last T, e.g. [0, 3, 5] -> [0, 1, 2, 0, 1].
    """
    lengths = np.diff(cu_seqlens)
    starts = np.repeat(np.asarray(cu_seqlens[:-1], dtype=np.int64), lengths)
    return np.arange(int(cu_seqlens[-1]), dtype=np.int64) - starts

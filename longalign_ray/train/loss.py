"""Loss weights of packed sequences (LongAlign, arXiv 2401.18058, Eq. 2-4).

Suffixes: T tokens of a pack, S sequences of a pack.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from longalign_ray.data.store import FULL_WEIGHT

LossKind = Literal["sequence", "token"]


def shift_labels(input_ids_T: np.ndarray, loss_weight_T: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """int64[T]: the token that position t predicts, or -100 where t+1 is no target or begins another sequence."""
    following_T = np.append(input_ids_T[1:], 0).astype(np.int64)
    return np.where(shift_weights(loss_weight_T, cu_seqlens) > 0, following_T, -100)


def shift_weights(loss_weight_T: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """float64[T]: weight of the token that position t predicts; loss_weight_T[t], per cent, is that of token t itself.

    The last position of a sequence predicts nothing: the first token of the next has no predictor.
    """
    weights_T = np.append(loss_weight_T[1:], 0) / FULL_WEIGHT
    weights_T[cu_seqlens[1:] - 1] = 0.0
    return weights_T


def target_weights(loss_weight_T: np.ndarray, cu_seqlens: np.ndarray, kind: LossKind) -> np.ndarray:
    """float64[T]: weight of the loss at position t.

    `sequence`: w_t / (sum of w over the sequence), which is 1/N_i, the weights of Eq. 4, where all targets of sequence
    i weigh the same; `token`: w_t. Divided by M, the sequences of the optimizer step that have a target (`sequence`),
    or by the sum of w over the step (`token`), the weights of a whole step sum to 1.
    """
    weights_T = shift_weights(loss_weight_T, cu_seqlens)
    if kind == "token":
        return weights_T
    lengths_S = np.diff(cu_seqlens)
    sum_of_T = np.repeat(np.add.reduceat(weights_T, cu_seqlens[:-1]), lengths_S)
    return np.divide(weights_T, sum_of_T, out=np.zeros_like(weights_T), where=sum_of_T > 0)


def backward_scale(world_size: int, step_total: float) -> float:
    """Factor of a rank's weighted sum before backward: R / M; R for a step without targets, whose sum is 0.

    Data-parallel averaging divides by R = world_size and micro-steps only add, so the gradient of an optimizer step is
    that of the loss divided by M = step_total, whatever the number of ranks and micro-steps.
    """
    return world_size / step_total if step_total > 0 else world_size

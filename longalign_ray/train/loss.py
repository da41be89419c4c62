"""Loss weights of packed sequences (LongAlign, arXiv 2401.18058, Eq. 2-4).

Suffixes: T tokens of a pack, S sequences of a pack.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

LossKind = Literal["sequence", "token"]


def shift_labels(input_ids_T: np.ndarray, loss_mask_T: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """int64[T]: the token that position t predicts, or -100 where t+1 is no target or begins another sequence.

    loss_mask_T[t] says that token t itself is a target; the first token of a sequence never is one.
    """
    labels_T = np.full(len(input_ids_T), -100, dtype=np.int64)
    is_target_T = loss_mask_T.astype(bool)
    is_target_T[cu_seqlens[:-1]] = False  # predicted from another sequence, or from nothing
    labels_T[:-1] = np.where(is_target_T[1:], input_ids_T[1:], -100)
    return labels_T


def target_weights(labels_T: np.ndarray, cu_seqlens: np.ndarray, kind: LossKind) -> np.ndarray:
    """float64[T]: `sequence`, weights of Eq. 4: 1/N_i on each target of sequence i; `token`: 1 on each target.

    Positions without a target weigh 0. Divided by M, the sequences of the optimizer step that have a target
    (`sequence`), or by its targets (`token`), the weights of a whole step sum to 1.
    """
    is_target_T = labels_T != -100
    if kind == "token":
        return is_target_T.astype(np.float64)
    sequence_of_T = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    num_targets_S = np.bincount(sequence_of_T[is_target_T], minlength=len(cu_seqlens) - 1)
    return is_target_T / np.maximum(num_targets_S, 1)[sequence_of_T]


def backward_scale(world_size: int, step_total: int) -> float:
    """Factor of a rank's weighted sum before backward: R / M.

    Data-parallel averaging divides by R = world_size and micro-steps only add, so the gradient of an optimizer step is
    that of the loss divided by M = step_total, whatever the number of ranks and micro-steps.
    """
    return world_size / max(step_total, 1)

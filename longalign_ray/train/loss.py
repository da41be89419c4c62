"""Loss weights of packed sequences (LongAlign, arXiv 2401.18058, Eq. 2-4).

The loss of an optimizer step is sum(target_weights * token loss) / step_totals over all its packs, a weighted mean: the
weights of a whole step sum to its total. Suffixes: T tokens of a pack, S sequences of a pack.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import FULL_WEIGHT, ExampleIndex

LossKind = Literal["sequence", "token", "pack", "sqrt"]


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
    """float64[T]: weight of the loss at position t, before the division by `step_totals`.

    With w_t the weight of the target and N_i the sum of w over sequence i, its number of targets where all count whole:
    `sequence`: w_t / N_i, Eq. 4; `token`: w_t; `pack`: w_t / (sum of N_i over the pack), Eq. 3; `sqrt`: w_t over the
    root of N_i, so that a sequence counts by the root of its targets, between the first two.
    """
    weights_T = shift_weights(loss_weight_T, cu_seqlens)
    if kind == "token":
        return weights_T
    if kind == "pack":
        return weights_T / (weights_T.sum() or 1.0)
    sums_S = np.add.reduceat(weights_T, cu_seqlens[:-1])
    divisor_T = np.repeat(np.sqrt(sums_S) if kind == "sqrt" else sums_S, np.diff(cu_seqlens))
    return np.divide(weights_T, divisor_T, out=np.zeros_like(weights_T), where=divisor_T > 0)


def step_totals(plan: StepPlan, index: ExampleIndex, kind: LossKind) -> np.ndarray:
    """float64[steps]: what the `target_weights` of a whole step sum to, over all ranks and micro-steps.

    `sequence`: M of Eq. 4, sequences with a target; `token`: sum of w; `pack`: K of Eq. 3, packs with a target, which
    are the slots of the plan and so depend on the number of ranks; `sqrt`: sum of sqrt(N_i). Every rank computes them
    from plan and index, so no collective is needed.
    """
    if kind == "sequence":
        return plan.num_sequences.astype(np.float64)
    if kind == "token":
        return plan.sum_weights
    sums = index.sum_weights[plan.example_rows]
    slot_of_example = np.repeat(np.arange(len(plan.offsets) - 1), np.diff(plan.offsets))
    values = np.sqrt(sums) if kind == "sqrt" else sums
    per_slot = np.bincount(slot_of_example, weights=values, minlength=len(plan.offsets) - 1).reshape(plan.num_steps, -1)
    return per_slot.sum(axis=1) if kind == "sqrt" else np.count_nonzero(per_slot, axis=1).astype(np.float64)


def backward_scale(world_size: int, step_total: float) -> float:
    """Factor of a rank's weighted sum before backward: R / M; R for a step without targets, whose sum is 0.

    Data-parallel averaging divides by R = world_size and micro-steps only add, so the gradient of an optimizer step is
    that of the loss divided by M = step_total (see `step_totals`), whatever the number of ranks and micro-steps.
    """
    return world_size / step_total if step_total > 0 else world_size

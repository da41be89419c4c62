"""Balance: the packs of one optimizer step to micro-steps and groups of ranks, so that nobody waits long. Pure."""

from __future__ import annotations

import numpy as np


def bands(costs: np.ndarray, *, micro_steps: int, groups: int) -> np.ndarray:
    """int64[micro_steps, groups]: a pack of the step for every slot, -1 where there are fewer packs than slots.

    Under ZeRO-3 every micro-step waits for its slowest group, so packs of like cost run together: sorted by cost, each
    micro-step takes the next band. The step as a whole is the set that it was, so its gradient does not change.
    """
    slots = np.full(micro_steps * groups, -1, dtype=np.int64)
    slots[: len(costs)] = np.argsort(-costs, kind="stable")
    return slots.reshape(micro_steps, groups)


def imbalance(slot_costs: np.ndarray) -> np.ndarray:
    """float64[steps]: time that a step takes over the time it would take if all ranks shared its work evenly, >= 1.

    slot_costs: float64[steps, micro_steps, groups]; every micro-step ends with its slowest group.
    """
    slowest = slot_costs.max(axis=2).sum(axis=1)
    mean = slot_costs.mean(axis=2).sum(axis=1)
    return slowest / np.maximum(mean, np.finfo(np.float64).tiny)

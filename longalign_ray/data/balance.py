"""Balance: the packs of one optimizer step to micro-steps and groups of ranks, so that nobody waits long. Pure.

A group is the ranks that share a pack by sequence parallelism; a slot is what one group computes in one micro-step.
Slot s of a step belongs to micro-step s // groups and group s % groups. The step as a whole stays the set that it was,
so its gradient does not change.
"""

from __future__ import annotations

import numpy as np
from numba import njit

CLOSE_ENOUGH = 1e-3
"""Swaps end when the heaviest group is this little above the mean."""


def place(
    costs: np.ndarray, *, micro_steps: int, groups: int, balance: str = "lock_step", packs_a_slot: int = 1
) -> np.ndarray:
    """int64[steps, packs]: slot of every pack. costs: float64[steps, packs], 0 where a step has fewer packs.

    A slot takes `packs_a_slot` packs, and there is room for all packs.
    - `lock_step`: ranks meet in every micro-step (ZeRO-2, ZeRO-3), so packs of like cost run together: sorted by cost,
      each micro-step takes the next band.
    - `sums`: ranks meet once a step (ZeRO-1), so only the sum of a group's packs counts.
    - `none`: in the order given.
    """
    steps, packs = costs.shape
    num_slots = micro_steps * groups
    padded = np.zeros((steps, num_slots * packs_a_slot))
    padded[:, :packs] = costs
    if balance == "none":
        return np.broadcast_to(np.arange(packs) // packs_a_slot, costs.shape)
    if balance == "sums":
        group, turn = deal_evenly(padded, groups)
        return ((turn // packs_a_slot) * groups + group)[:, :packs]
    slot = np.arange(num_slots)[None] if packs_a_slot == 1 else deal_evenly(padded, num_slots)[0]
    slot = np.broadcast_to(slot, padded.shape)
    return np.take_along_axis(bands(slot_sums(padded, slot, num_slots)), slot, axis=1)[:, :packs]


def bands(slot_costs: np.ndarray) -> np.ndarray:
    """int64[steps, slots]: new number of every slot, the heaviest first, so that a micro-step's are alike."""
    return np.argsort(np.argsort(-slot_costs, axis=1, kind="stable"), axis=1, kind="stable")


def slot_sums(costs: np.ndarray, slots: np.ndarray, num_slots: int) -> np.ndarray:
    """float64[steps, num_slots]: cost of every slot, from cost and slot of every pack, both [steps, packs]."""
    keys = slots + num_slots * np.arange(len(costs))[:, None]
    sums = np.bincount(keys.ravel(), weights=costs.ravel(), minlength=len(costs) * num_slots)
    return sums.reshape(len(costs), num_slots)


def step_times(slot_costs: np.ndarray, balance: str = "lock_step") -> np.ndarray:
    """float64[steps]: cost that passes until all groups are done. slot_costs: float64[steps, micro_steps, groups].

    Every micro-step ends with its slowest group; under `sums`, only the whole step does.
    """
    return slot_costs.sum(axis=1).max(axis=1) if balance == "sums" else slot_costs.max(axis=2).sum(axis=1)


def imbalance(slot_costs: np.ndarray, balance: str = "lock_step") -> np.ndarray:
    """float64[steps]: time that a step takes over the time it would take if all groups shared its work evenly, >= 1."""
    mean = slot_costs.mean(axis=2).sum(axis=1)
    return step_times(slot_costs, balance) / np.maximum(mean, np.finfo(np.float64).tiny)


@njit(cache=True)
def deal_evenly(costs: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64[steps, packs] group of each pack, the same of its turn in the group): sums alike, counts equal.

    costs: float64[steps, turns * groups]. In each turn the heaviest pack left goes to the lightest group; then the
    heaviest group swaps packs with the others for as long as that brings it down.
    """
    steps, packs = costs.shape
    group_of, turn_of = np.empty((steps, packs), np.int64), np.empty((steps, packs), np.int64)
    turns = packs // groups
    held = np.empty((groups, turns), np.int64)  # packs of each group
    for step in range(steps):
        order = np.argsort(-costs[step], kind="mergesort")
        sums = np.zeros(groups)
        for turn in range(turns):
            by_sum = np.argsort(sums, kind="mergesort")
            for j in range(groups):
                pack = order[turn * groups + j]
                held[by_sum[j], turn] = pack
                sums[by_sum[j]] += costs[step, pack]
        _swap(costs[step], held, sums)
        for group in range(groups):
            for turn in range(turns):
                group_of[step, held[group, turn]] = group
                turn_of[step, held[group, turn]] = turn
    return group_of, turn_of


@njit(cache=True)
def _swap(costs: np.ndarray, held: np.ndarray, sums: np.ndarray) -> None:
    """Swaps a pack of the heaviest group with one of another group, the best such pair each time."""
    groups, turns = held.shape
    for _ in range(4 * groups):
        heaviest = np.argmax(sums)
        if sums[heaviest] <= sums.mean() * (1 + CLOSE_ENOUGH):
            return
        best, best_turn, best_group, best_other = sums[heaviest], -1, -1, -1
        for group in range(groups):
            gap = sums[heaviest] - sums[group]
            for turn in range(turns):
                for other in range(turns):
                    change = costs[held[heaviest, turn]] - costs[held[group, other]]
                    if 0 < change < gap:
                        after = max(sums[heaviest] - change, sums[group] + change)
                        if after < best:
                            best, best_turn, best_group, best_other = after, turn, group, other
        if best_turn < 0:
            return
        change = costs[held[heaviest, best_turn]] - costs[held[best_group, best_other]]
        sums[heaviest] -= change
        sums[best_group] += change
        pack = held[heaviest, best_turn]
        held[heaviest, best_turn] = held[best_group, best_other]
        held[best_group, best_other] = pack

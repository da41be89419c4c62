"""deal: a random set of examples for every step, dealt by cost, the heaviest first, to the cheapest slot with room.

Full packs are no goal here: with variable-length attention empty room costs nothing, waiting does. Two parts:
1. `step_sets` decides which examples form a step, by tokens alone. It also packs them into as many packs as the step
   has, so that any number of ranks, micro-steps and sequence-parallel ranks can hold the step.
2. `deal` spreads a step over its slots by cost. Where that leaves an example without room, the packs of 1 are used.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numba import njit

from longalign_ray.data.balance import bands, place, step_times
from longalign_ray.data.best_fit import BLOCK_BITS, pop, push, smallest_room

MOST_FILL = 0.96
"""A step is planned no fuller than this to save a step at the end of an epoch; dealing needs room to choose."""
POSITION_BITS = 40


@dataclass(frozen=True, slots=True, eq=False)
class StepSets:
    """Step s trains members[offsets[s]:offsets[s+1]], positions in the array of lengths, the longest first."""

    members: np.ndarray
    """int64[n]: every position once."""
    offsets: np.ndarray
    """int64[steps+1]."""
    pack_of_member: np.ndarray
    """int32[n]: pack within the step."""
    num_carried: int
    """Times that an example found no room in its step and waited for the next."""

    @property
    def step_of_member(self) -> np.ndarray:
        """int64[n], ascending."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def step_sets(lengths: np.ndarray, *, capacity: int, packs: int, fill: float) -> StepSets:
    """Cuts the examples, in their order, into steps of about fill * packs * capacity tokens.

    The steps of an epoch are about equally full, the last one too. What best-fit decreasing cannot put into the `packs`
    packs of a step is carried to the front of the next. lengths: int[n], each in 1..capacity.
    """
    found = _step_sets(np.asarray(lengths, dtype=np.int64), capacity, packs, fill)
    return StepSets(*found)


def deal(
    lengths: np.ndarray, costs: np.ndarray, sets: StepSets, *, capacity: int, micro_steps: int, groups: int,
    packs_a_slot: int = 1, balance: str = "lock_step",
) -> np.ndarray:  # fmt: skip
    """int64[n]: slot, within its step, of every member. Lengths and costs are those of the members, in their order."""
    steps, num_slots = len(sets.offsets) - 1, micro_steps * groups
    step, num_packs = sets.step_of_member, int(sets.pack_of_member.max()) + 1
    pack_costs = np.bincount(step * num_packs + sets.pack_of_member, weights=costs, minlength=steps * num_packs)
    pack_slot = place(
        pack_costs.reshape(steps, num_packs),
        micro_steps=micro_steps, groups=groups, balance=balance, packs_a_slot=packs_a_slot,
    )  # fmt: skip
    packed = pack_slot[step, sets.pack_of_member]
    if balance == "none":
        return packed
    columns = groups if balance == "sums" else num_slots
    dealt, fits = _deal(
        lengths, costs, sets.offsets, columns, num_slots // columns, capacity * packs_a_slot, groups
    )  # a column's k-th slot is number k * columns + column
    if balance == "lock_step":
        sums = np.bincount(step * num_slots + dealt, weights=costs, minlength=steps * num_slots)
        dealt = bands(sums.reshape(steps, num_slots))[step, dealt]

    def times(slot: np.ndarray) -> np.ndarray:
        sums = np.bincount(step * num_slots + slot, weights=costs, minlength=steps * num_slots)
        return step_times(sums.reshape(steps, micro_steps, groups), balance)

    better = fits & (times(dealt) <= times(packed))
    return np.where(better[step], dealt, packed)


@njit(cache=True)
def _step_sets(
    lengths: np.ndarray, capacity: int, packs: int, fill: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    n = len(lengths)
    members, pack_of = np.empty(n, np.int64), np.empty(n, np.int32)
    offsets = [0]
    waiting = np.empty(n, np.int64)  # positions: carried ones, then those new in the step
    keys = np.empty(n, np.int64)
    top = np.full(capacity + 1, -1, np.int32)
    in_block = np.zeros((capacity >> BLOCK_BITS) + 1, np.int32)
    below, rooms = np.empty(packs, np.int32), np.empty(packs, np.int64)
    tokens_left = lengths.sum()
    done = taken = num_carried = num_waiting = waiting_tokens = 0
    while done < n:
        steps_left = _steps_for(tokens_left, packs * capacity, fill)
        target = tokens_left / steps_left
        while taken < n and (num_waiting == 0 or waiting_tokens + lengths[taken] / 2 <= target):
            waiting[num_waiting] = taken
            waiting_tokens += lengths[taken]
            num_waiting += 1
            taken += 1
        for i in range(num_waiting):  # longest first, equal ones by position
            keys[i] = ((capacity - lengths[waiting[i]]) << POSITION_BITS) | waiting[i]
        keys[:num_waiting].sort()
        for pack in range(packs - 1, -1, -1):
            push(top, below, in_block, capacity, pack)
            rooms[pack] = capacity
        chosen, num_waiting = num_waiting, 0
        for i in range(chosen):
            item = keys[i] & ((1 << POSITION_BITS) - 1)
            room = smallest_room(top, in_block, int(lengths[item]))
            if room < 0:
                waiting[num_waiting] = item
                num_waiting += 1
                continue
            pack = pop(top, below, in_block, room)
            rooms[pack] = room - lengths[item]
            push(top, below, in_block, rooms[pack], pack)
            members[done], pack_of[done] = item, pack
            done += 1
            tokens_left -= lengths[item]
            waiting_tokens -= lengths[item]
        for pack in range(packs):
            top[rooms[pack]] = -1
            in_block[rooms[pack] >> BLOCK_BITS] = 0
        num_carried += num_waiting
        offsets.append(done)
    return members, np.array(offsets), pack_of, num_carried


@njit(cache=True)
def _steps_for(tokens: int, room: int, fill: float) -> int:
    """Steps for so many tokens: the number that comes nearest to `fill`, one more where that is too full."""
    steps = max(1, round(tokens / (room * fill)))
    return steps if tokens <= steps * room * max(fill, MOST_FILL) else steps + 1


@njit(cache=True)
def _deal(
    lengths: np.ndarray, costs: np.ndarray, offsets: np.ndarray, columns: int, slots: int, capacity: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int64[n] slot of each member, bool[steps] whether all members of the step found room).

    A column is what is to cost alike: a slot, or under `sums` a group with all its slots.
    """
    slot_of = np.zeros(len(lengths), np.int64)
    fits = np.ones(len(offsets) - 1, np.bool_)
    rooms, most_room = np.empty((columns, slots), np.int64), np.empty(columns, np.int64)
    for step in range(len(fits)):
        first, last = offsets[step], offsets[step + 1]
        level = -_head_starts(costs[first:last], columns, groups) if slots == 1 else np.zeros(columns)
        rooms[:] = capacity
        most_room[:] = capacity
        cheapest = [(level[column], column) for column in range(columns)]
        heapq.heapify(cheapest)
        full = [
            (0, 0) for _ in range(0)
        ]  # (-room, column): no room for the present length, but perhaps for a later one
        for i in range(first, last):
            while len(full) > 0 and -full[0][0] >= lengths[i]:
                column = heapq.heappop(full)[1]
                heapq.heappush(cheapest, (level[column], column))
            while len(cheapest) > 0 and most_room[cheapest[0][1]] < lengths[i]:
                column = heapq.heappop(cheapest)[1]
                heapq.heappush(full, (-most_room[column], column))
            if len(cheapest) == 0:
                fits[step] = False
                break
            column = cheapest[0][1]
            slot = -1
            for other in range(slots):  # best fit among the slots of the column
                if rooms[column, other] >= lengths[i] and (slot < 0 or rooms[column, other] < rooms[column, slot]):
                    slot = other
            rooms[column, slot] -= lengths[i]
            most_room[column] = rooms[column].max()
            level[column] += costs[i]
            heapq.heapreplace(cheapest, (level[column], column))
            slot_of[i] = slot * columns + column
    return slot_of, fits


@njit(cache=True)
def _head_starts(costs: np.ndarray, columns: int, groups: int) -> np.ndarray:
    """float64[columns]: how much more than the common level a slot may cost, because its micro-step waits anyway.

    The heaviest examples lie alone at first, `groups` of them in each micro-step. Where the heaviest of a micro-step
    costs more than the level at which all the work would be shared evenly, the slots beside it fill up to its cost.
    """
    starts = np.zeros(columns)
    leaders = costs[:columns:groups]
    work, left = costs.sum(), columns // groups
    for band in range(len(leaders)):
        if leaders[band] * left * groups <= work:
            break
        work -= leaders[band] * groups
        left -= 1
    common = work / (left * groups) if left > 0 else leaders[-1]
    for column in range(columns):
        band = column // groups
        if band < len(leaders):
            starts[column] = max(leaders[band] - common, 0.0)
    return starts

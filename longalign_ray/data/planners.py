"""Planners: lengths to packs. Pure, and the result depends on the lengths and their order alone.

To add one: write a function with the signature of `best_fit` and add a line to PLANNERS. It drops nothing. `deal` plans
whole steps and is in `deal.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

from longalign_ray.data.best_fit import BLOCK_BITS, pack_decreasing, pop, push, smallest_room

WINDOW = 2_048
MOST_OPEN = 256


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Pack p holds the items members[offsets[p]:offsets[p+1]], positions in the array of lengths."""

    members: np.ndarray
    """int64[n]: every position once."""
    offsets: np.ndarray
    """int64[packs+1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def pack_of_member(self) -> np.ndarray:
        """int64[n], ascending."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


Planner = Callable[[np.ndarray, int], Packs]
"""(lengths int[n], each in 1..capacity; capacity) -> packs, none of them empty."""


def naive(lengths: np.ndarray, capacity: int) -> Packs:
    """One item a pack, in order: unpacked training, the paper's baseline."""
    return Packs(np.arange(len(lengths)), np.arange(len(lengths) + 1))


def by_length(lengths: np.ndarray, capacity: int) -> Packs:
    """One item a pack, the longest first: the paper's sorted batching, once groups of them are shuffled.

    The paper leaves out the remainder of the last group, its longest sequences; here it stays, and is the shortest.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    return Packs(order, np.arange(len(lengths) + 1))


def next_fit(lengths: np.ndarray, capacity: int) -> Packs:
    """The paper's packer: in order, into the one open pack, which is closed by the first item without room.

    LongAlign's script closes a pack when it would *reach* the capacity (its test is >=), leaves out items of exactly
    the capacity and never writes its last pack: its packs are next_fit(lengths[lengths < capacity], capacity - 1)
    without the last. This one loses nothing.
    """
    return _grouped(np.arange(len(lengths)), _next_fit(np.asarray(lengths, dtype=np.int64), capacity))


def best_fit(lengths: np.ndarray, capacity: int) -> Packs:
    """Best-fit decreasing: the longest item first, each into the fullest pack that has room for it.

    Equal lengths keep their order. At most 11/9 of the fewest packs possible (Johnson 1973), on real mixes within one
    pack of them. O(n log n) time and O(n + capacity) memory.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    return _grouped(order, pack_decreasing(lengths[order], capacity))


def streaming(lengths: np.ndarray, capacity: int) -> Packs:
    """Best fit in one pass: of every 2,048 items the longest first, into the packs that are open.

    An item that fits nowhere opens a pack; after each window the fullest packs are closed for good, until 256 are open.
    So all that a stream must keep are these and the items of a window.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((-lengths, np.arange(len(lengths)) // WINDOW))
    return _grouped(order, _streaming(lengths[order], capacity, WINDOW, MOST_OPEN))


def _grouped(order: np.ndarray, pack_of: np.ndarray) -> Packs:
    """Packs from the pack number of each item of `order`."""
    by_pack = np.argsort(pack_of, kind="stable")
    return Packs(order[by_pack], np.concatenate([[0], np.cumsum(np.bincount(pack_of), dtype=np.int64)]))


@njit(cache=True)
def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    pack_of = np.empty(len(lengths), np.int32)
    pack, used = 0, 0
    for i in range(len(lengths)):
        if used > 0 and used + lengths[i] > capacity:
            pack, used = pack + 1, 0
        pack_of[i] = pack
        used += lengths[i]
    return pack_of


@njit(cache=True)
def _streaming(lengths: np.ndarray, capacity: int, window: int, most_open: int) -> np.ndarray:
    pack_of = np.empty(len(lengths), np.int32)
    below = np.empty(len(lengths), np.int32)
    top = np.full(capacity + 1, -1, np.int32)
    in_block = np.zeros((capacity >> BLOCK_BITS) + 1, np.int32)
    num_packs = num_open = 0
    for i in range(len(lengths)):
        if i % window == 0:
            room = 0
            while num_open > most_open:  # closes the fullest
                room = smallest_room(top, in_block, room)
                pop(top, below, in_block, room)
                num_open -= 1
        room = smallest_room(top, in_block, lengths[i])
        if room < 0:
            pack, room = num_packs, capacity
            num_packs += 1
            num_open += 1
        else:
            pack = pop(top, below, in_block, room)
        pack_of[i] = pack
        push(top, below, in_block, room - lengths[i], pack)
    return pack_of


PLANNERS: dict[str, Planner] = {
    "best_fit": best_fit,
    "streaming": streaming,
    "next_fit": next_fit,
    "sorted": by_length,
    "naive": naive,
}

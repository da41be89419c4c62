"""Planners: lengths to packs. Pure, and the result depends on the lengths and their order alone.

To add one: write a function with the signature of `best_fit` and add a line to PLANNERS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

BLOCK_BITS = 8  # residuals are searched in blocks of 256: first inside one, then over the counts of blocks


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Pack p holds the items members[offsets[p]:offsets[p+1]], positions in the array of lengths."""

    members: np.ndarray
    """int64[n]: every position once."""
    offsets: np.ndarray
    """int64[packs+1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


Planner = Callable[[np.ndarray, int], Packs]


def naive(lengths: np.ndarray, capacity: int) -> Packs:
    """One item a pack, in order: unpacked training, the paper's baseline."""
    return Packs(np.arange(len(lengths)), np.arange(len(lengths) + 1))


def best_fit(lengths: np.ndarray, capacity: int) -> Packs:
    """Best-fit decreasing: the longest item first, each into the fullest pack that has room for it.

    lengths: int[n], each in 1..capacity; equal lengths keep their order. At most 11/9 of the fewest packs possible
    (Johnson 1973), on real mixes within one pack of them. O(n log n) time and O(n + capacity) memory.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    pack_of = _best_fit(np.asarray(lengths, dtype=np.int64)[order], capacity)
    by_pack = np.argsort(pack_of, kind="stable")
    return Packs(order[by_pack], np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=0))]))


@njit(cache=True)
def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64[n]: pack of each item, given in the order of packing.

    Open packs are kept in stacks by their free room, `top[room]`, with the number of packs in each block of rooms.
    """
    n = len(lengths)
    pack_of = np.empty(n, np.int64)
    below = np.empty(n, np.int64)  # the pack under this one in its stack
    top = np.full(capacity + 1, -1, np.int64)
    in_block = np.zeros((capacity >> BLOCK_BITS) + 1, np.int64)
    num_packs = 0
    for i in range(n):
        room = _smallest_room(top, in_block, lengths[i])
        if room < 0:
            pack, room = num_packs, capacity
            num_packs += 1
        else:
            pack = top[room]
            top[room] = below[pack]
            in_block[room >> BLOCK_BITS] -= 1
        pack_of[i] = pack
        room -= lengths[i]
        if room > 0:
            below[pack] = top[room]
            top[room] = pack
            in_block[room >> BLOCK_BITS] += 1
    return pack_of


@njit(cache=True)
def _smallest_room(top: np.ndarray, in_block: np.ndarray, length: int) -> int:
    """The smallest room >= length that a pack has, or -1."""
    block = length >> BLOCK_BITS
    first = length
    while block < len(in_block):
        if in_block[block] > 0:
            for room in range(first, min((block + 1) << BLOCK_BITS, len(top))):
                if top[room] >= 0:
                    return room
        block += 1
        first = block << BLOCK_BITS
    return -1


PLANNERS: dict[str, Planner] = {"best_fit": best_fit, "naive": naive}

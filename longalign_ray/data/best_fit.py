"""Best fit: an item goes to the fullest pack that has room for it. The kernels, shared by the planners.

Open packs lie in stacks by their free room. The smallest room that fits is found in blocks of 256 rooms: first inside
one, then over the number of packs in each block. So an item costs the same among ten packs and among a million.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK_BITS = 8


@njit(cache=True)
def pack_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int32[n]: pack of each item, in the order given, opening a pack where none has room."""
    n = len(lengths)
    pack_of = np.empty(n, np.int32)
    below = np.empty(n, np.int32)  # the pack under this one in its stack
    top = np.full(capacity + 1, -1, np.int32)
    in_block = np.zeros((capacity >> BLOCK_BITS) + 1, np.int32)
    num_packs = 0
    for i in range(n):
        room = smallest_room(top, in_block, lengths[i])
        if room < 0:
            pack, room = num_packs, capacity
            num_packs += 1
        else:
            pack = pop(top, below, in_block, room)
        pack_of[i] = pack
        push(top, below, in_block, room - lengths[i], pack)
    return pack_of


@njit(cache=True)
def smallest_room(top: np.ndarray, in_block: np.ndarray, length: int) -> int:
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


@njit(cache=True)
def push(top: np.ndarray, below: np.ndarray, in_block: np.ndarray, room: int, pack: int) -> None:
    below[pack] = top[room]
    top[room] = pack
    in_block[room >> BLOCK_BITS] += 1


@njit(cache=True)
def pop(top: np.ndarray, below: np.ndarray, in_block: np.ndarray, room: int) -> int:
    pack = top[room]
    top[room] = below[pack]
    in_block[room >> BLOCK_BITS] -= 1
    return pack


def lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """Packs that any packer needs at least: bound L2 of Martello and Toth (1990), and at least sum / capacity.

    For a threshold a <= capacity / 2, items longer than capacity - a lie alone, other items longer than half lie one a
    pack, and items of a and more have only the room beside the latter. The best a is taken. O(n + capacity).
    """
    return lower_bound_of_counts(np.bincount(lengths, minlength=capacity + 1))


def lower_bound_of_counts(counts: np.ndarray) -> int:
    """`lower_bound` from counts[l], the number of items of length l for l = 0..capacity."""
    capacity = len(counts) - 1
    half = capacity // 2
    number, tokens = np.cumsum(counts), np.cumsum(counts * np.arange(capacity + 1))  # of items up to each length
    a = np.arange(half + 1)
    num_alone = number[capacity] - number[capacity - a]
    num_halves = number[capacity - a] - number[half]
    tokens_halves = tokens[capacity - a] - tokens[half]
    tokens_beside = tokens[half] - tokens[a] + counts[a] * a
    missing = tokens_beside - (num_halves * capacity - tokens_halves)
    return int((num_alone + num_halves + np.maximum(-(-missing // capacity), 0)).max())

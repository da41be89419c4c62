"""Plans beyond 10^8 sequences: groups of the sequences, drawn by seed, are planned alone, one after the other.

Which sequences form a group follows from a permutation that is computed, not stored. So a group needs no memory for the
others, and any machine can plan any group. The steps of a group are random sets, as those of the whole would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import GROUP, PlanSettings, plan_lengths
from longalign_ray.data.plan import StepPlan


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group's part of the whole plan."""

    plan: StepPlan
    """Its example_rows are positions in the lengths of all groups."""
    num_dropped: int
    """Sequences of the group that no pack can hold."""


def plan_groups(
    lengths: np.ndarray, settings: PlanSettings, *, cost: SequenceCost, group: int = GROUP
) -> Iterator[GroupPlan]:
    """One epoch in groups of about equal size, at most `group`; lengths int[n], which may be memory-mapped.

    Sequences of no tokens or of more than capacity * sp_degree are left out and counted.
    """
    n, longest = len(lengths), settings.capacity * settings.sp_degree
    num_groups = max(-(-n // group), 1)
    for number in range(num_groups):
        first, last = n * number // num_groups, n * (number + 1) // num_groups
        rows = seeded_rows(first, last, n, settings.seed) if num_groups > 1 else np.arange(n)
        own = np.asarray(lengths[rows] if num_groups > 1 else lengths)
        fits = (own >= 1) & (own <= longest)
        if not fits.any():
            continue
        if not fits.all():
            rows, own = rows[fits], own[fits]
        plan = plan_lengths(own, replace(settings, epochs=1), cost=cost)
        settings = replace(settings, strategy=plan.strategy)  # what `auto` chose for the first
        yield GroupPlan(replace(plan, example_rows=rows[plan.example_rows]), int(len(fits) - fits.sum()))


@njit(cache=True)
def seeded_rows(first: int, last: int, n: int, seed: int) -> np.ndarray:
    """int64[last - first]: places first..last-1 of a permutation of 0..n-1 that `seed` chooses.

    Four rounds of multiplication by an odd number and of a shift, each invertible modulo a power of two; a result of n
    or more goes through again until it is below n.
    """
    bits = 1
    while (1 << bits) < n:
        bits += 1
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(bits // 2 + 1)
    state = np.uint64(seed)
    odd, add = np.empty(4, np.uint64), np.empty(4, np.uint64)
    for turn in range(4):
        state = _mixed(state + np.uint64(turn + 1))
        odd[turn], add[turn] = state | np.uint64(1), _mixed(state)
    rows = np.empty(last - first, np.int64)
    for place in range(first, last):
        x = np.uint64(place)
        while True:
            for turn in range(4):
                x = (x * odd[turn] + add[turn]) & mask
                x ^= x >> shift
            if x < np.uint64(n):
                break
        rows[place - first] = np.int64(x)
    return rows


@njit(cache=True)
def _mixed(x: np.uint64) -> np.uint64:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

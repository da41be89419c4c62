"""Packs hold every item once and never more than the capacity; each planner follows its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_ray.data.best_fit import lower_bound
from longalign_ray.data.planners import MOST_OPEN, PLANNERS, WINDOW, Packs, best_fit, by_length, naive, next_fit
from longalign_ray.data.planners import streaming as stream
from tests.unit.data.mixes import long_context_mix


def reference_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, in quadratic time: longest first, each to the fullest pack that has room."""
    packs: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [(capacity - sum(lengths[i] for i in pack), number) for number, pack in enumerate(packs)]
        fitting = [room for room in rooms if room[0] >= lengths[item]]
        if fitting:
            packs[min(fitting)[1]].append(item)
        else:
            packs.append([item])
    return packs


def paper_packs(lengths: list[int], capacity: int) -> list[list[int]]:
    """LongAlign's rule: closed when the next would reach the capacity, the longest left out, the last not written."""
    packs: list[list[int]] = []
    open_pack: list[int] = []
    for item, length in enumerate(lengths):
        if length >= capacity:
            continue
        if sum(lengths[i] for i in open_pack) + length >= capacity:
            packs.append(open_pack)
            open_pack = []
        open_pack.append(item)
    return packs


def contents(packs: Packs) -> list[list[int]]:
    return [packs.members[a:b].tolist() for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]


def loads(packs: Packs, lengths: np.ndarray) -> np.ndarray:
    return np.array([lengths[members].sum() for members in contents(packs)])


def test_hand_example() -> None:
    # 7 opens a pack with room 3; 5 opens one with room 5; 4 fits there (room 1); 3 fills the first; 2 opens a third.
    packs = best_fit(np.array([4, 7, 2, 3, 5]), 10)
    assert contents(packs) == [[1, 3], [4, 0], [2]]
    assert packs.pack_of_member.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("capacity", [10, 255, 256, 257, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_reference(capacity: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, size=120)
    packs = best_fit(lengths, capacity)
    reference = reference_best_fit(lengths.tolist(), capacity)
    assert len(packs) == len(reference)
    assert sorted(loads(packs, lengths)) == sorted(sum(lengths[i] for i in pack) for pack in reference)


@given(
    capacity=st.sampled_from([1, 8, 255, 256, 300]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    name=st.sampled_from(sorted(PLANNERS)),
)
@settings(max_examples=300, deadline=None)
def test_every_item_in_exactly_one_pack_within_capacity(capacity: int, shares: list[float], name: str) -> None:
    lengths = np.array([max(1, round(share * capacity)) for share in shares])
    packs = PLANNERS[name](lengths, capacity)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert loads(packs, lengths).max() <= capacity
    assert all(len(members) > 0 for members in contents(packs))
    assert lower_bound(lengths, capacity) <= len(packs)


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_an_item_of_exactly_the_capacity_survives_and_the_last_pack_is_kept(name: str) -> None:
    assert sorted(map(sorted, contents(PLANNERS[name](np.array([64, 64, 1]), 64)))) == [[0], [1], [2]]


def test_naive_keeps_order_and_sorted_sorts() -> None:
    assert contents(naive(np.array([3, 1, 2, 3]), 8)) == [[0], [1], [2], [3]]
    assert contents(by_length(np.array([3, 1, 2, 3]), 8)) == [[0], [3], [2], [1]]


def test_next_fit_by_hand() -> None:
    # 3 + 4 = 7; 2 would make 9; 2 + 6 = 8 is exactly full; 1 would make 9
    assert contents(next_fit(np.array([3, 4, 2, 6, 1]), 8)) == [[0, 1], [2, 3], [4]]


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_next_fit_gives_the_papers_packs(lengths: list[int]) -> None:
    """As its docstring says: a capacity less by one, without the longest and without the last pack."""
    kept = np.flatnonzero(np.array(lengths) < 16)
    if len(kept) == 0:
        return
    packs = contents(next_fit(np.array(lengths)[kept], 15))
    assert [kept[pack].tolist() for pack in packs[:-1]] == paper_packs(lengths, 16)


def test_streaming_by_hand() -> None:
    """One window, so best-fit decreasing; after a window of sixes 256 packs stay open, for as many of the 316 fours."""
    assert sorted(map(sorted, contents(stream(np.array([4, 7, 2, 3, 5]), 10)))) == [[0, 4], [1, 3], [2]]
    lengths = np.concatenate([np.full(WINDOW, 6), np.full(MOST_OPEN + 60, 4)])
    packs = stream(lengths, 10)
    assert np.bincount(loads(packs, lengths))[[6, 8, 10]].tolist() == [WINDOW - MOST_OPEN, 30, MOST_OPEN]


def test_streaming_keeps_no_more_than_256_packs_open() -> None:
    lengths = np.random.default_rng(0).integers(1, 1_000, 20_000)
    packs = stream(lengths, 1_000)
    window = np.arange(len(lengths)) // WINDOW
    first = np.array([window[members].min() for members in contents(packs)])
    last = np.array([window[members].max() for members in contents(packs)])
    for number in range(1, window[-1] + 1):
        assert np.count_nonzero((first < number) & (last >= number)) <= MOST_OPEN


def test_long_tailed_mix_is_within_one_pack_of_the_bound() -> None:
    lengths = long_context_mix(10_000, seed=0)
    bound = lower_bound(lengths, 65_536)
    assert bound == -(-lengths.sum() // 65_536)
    assert len(best_fit(lengths, 65_536)) <= bound + 1
    assert len(stream(lengths, 65_536)) <= bound + 2


@pytest.mark.parametrize(
    ("lengths", "fewest"),
    [
        ([31] * 20 + [21] * 20 + [8] * 20, 20),  # 31 + 21 + 8 = 60
        ([31, 32, 33, 34, 35] * 4, 20),  # no two of them share a pack
        ([12] * 100, 20),
        ([12] * 101, 21),
    ],
    ids=["thirds", "halves", "equal", "equal and one more"],
)
@pytest.mark.parametrize("name", ["best_fit", "streaming"])
def test_as_few_packs_as_there_can_be(name: str, lengths: list[int], fewest: int) -> None:
    shuffled = np.random.default_rng(0).permutation(lengths)
    assert len(PLANNERS[name](shuffled, 60)) == fewest == lower_bound(shuffled, 60)


def slow_lower_bound(lengths: list[int], capacity: int) -> int:
    """The definition of L2, a threshold at a time."""
    best = 0
    for a in range(capacity // 2 + 1):
        alone = [x for x in lengths if x > capacity - a]
        halves = [x for x in lengths if capacity / 2 < x <= capacity - a]
        small = [x for x in lengths if a <= x <= capacity / 2]
        missing = sum(small) - (len(halves) * capacity - sum(halves))
        best = max(best, len(alone) + len(halves) + max(0, -(-missing // capacity)))
    return best


def test_lower_bound_by_hand() -> None:
    assert lower_bound(np.array([6, 6, 6]), 10) == 3  # two of them never share
    assert lower_bound(np.array([5, 5, 5]), 10) == 2
    assert lower_bound(np.array([8, 8, 3, 3, 3]), 10) == 3  # the 3s find no room beside the 8s


@given(capacity=st.integers(1, 30), shares=st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_lower_bound_equals_its_definition(capacity: int, shares: list[float]) -> None:
    lengths = [max(1, round(share * capacity)) for share in shares]
    assert lower_bound(np.array(lengths), capacity) == slow_lower_bound(lengths, capacity)
    assert lower_bound(np.array(lengths), capacity) >= -(-sum(lengths) // capacity)

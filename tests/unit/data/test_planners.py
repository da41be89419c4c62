"""Packs hold every item once, never more than the capacity, and as few of them as best-fit decreasing can."""

from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.data.planners import PLANNERS, Packs, best_fit, naive


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


def contents(packs: Packs) -> list[list[int]]:
    return [packs.members[a:b].tolist() for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]


def loads(packs: Packs, lengths: np.ndarray) -> np.ndarray:
    return np.array([lengths[members].sum() for members in contents(packs)])


def test_hand_example() -> None:
    # 7 opens a pack with room 3; 5 opens one with room 5; 4 fits there (room 1); 3 fills the first; 2 opens a third.
    packs = best_fit(np.array([4, 7, 2, 3, 5]), 10)
    assert contents(packs) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize("capacity", [10, 255, 256, 257, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_reference(capacity: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, size=120)
    packs = best_fit(lengths, capacity)
    reference = reference_best_fit(lengths.tolist(), capacity)
    assert len(packs) == len(reference)
    assert sorted(loads(packs, lengths)) == sorted(sum(lengths[i] for i in pack) for pack in reference)


@pytest.mark.parametrize("name", sorted(PLANNERS))
@pytest.mark.parametrize("lengths", [[1], [8], [8, 8, 8], [1] * 30, [3, 8, 5, 1, 2, 7, 4, 6]])
def test_every_item_in_exactly_one_pack_within_capacity(name: str, lengths: list[int]) -> None:
    packs = PLANNERS[name](np.array(lengths), 8)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert loads(packs, np.array(lengths)).max() <= 8
    assert all(len(members) > 0 for members in contents(packs))


def test_an_item_of_exactly_the_capacity_survives_and_the_last_pack_is_kept() -> None:
    packs = best_fit(np.array([64, 64, 1]), 64)
    assert contents(packs) == [[0], [1], [2]]


def test_naive_keeps_order() -> None:
    assert contents(naive(np.array([3, 1, 2]), 8)) == [[0], [1], [2]]


def test_long_tailed_mix_is_within_one_pack_of_the_bound() -> None:
    """A mix as in long-context SFT: 90 % lognormal of median 900, 10 % uniform 8k-64k."""
    random = np.random.default_rng(0)
    short = np.clip(random.lognormal(np.log(900), 1.0, 9_000), 1, 8_192).astype(np.int64)
    lengths = random.permutation(np.concatenate([short, random.integers(8_192, 65_537, 1_000)]))
    packs = best_fit(lengths, 65_536)
    assert len(packs) <= -(-lengths.sum() // 65_536) + 1

"""Packs to slots: every pack in one, bands and sums as small as they can be, imbalance as by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_ray.data.balance import bands, deal_evenly, imbalance, place, slot_sums


def slot_costs(costs: list[float], **how) -> np.ndarray:
    """float64[micro_steps, groups] of one step."""
    packs = np.array([costs], dtype=np.float64)
    num_slots = how["micro_steps"] * how["groups"]
    return slot_sums(packs, place(packs, **how), num_slots).reshape(how["micro_steps"], how["groups"])


def test_lock_step_puts_like_costs_together() -> None:
    assert place(np.array([[1.0, 9.0, 2.0, 8.0]]), micro_steps=2, groups=2).tolist() == [[3, 0, 2, 1]]
    assert slot_costs([1, 9, 2, 8], micro_steps=2, groups=2).tolist() == [[9, 8], [2, 1]]


def test_missing_packs_leave_slots_empty() -> None:
    assert slot_costs([5], micro_steps=2, groups=2).tolist() == [[5, 0], [0, 0]]


def test_none_keeps_the_order() -> None:
    assert slot_costs([1, 9, 2, 8], micro_steps=2, groups=2, balance="none").tolist() == [[1, 9], [2, 8]]
    assert slot_costs([1, 9, 2, 8], micro_steps=1, groups=2, balance="none", packs_a_slot=2).tolist() == [[10, 10]]


def test_sums_by_hand() -> None:
    """7 and 6, then 6 to the lighter and 3 to the other: 10 and 12, the best there is. 7, 6, 5, 4: 11 and 11."""
    costs = slot_costs([7, 6, 6, 3], micro_steps=2, groups=2, balance="sums")
    assert costs.sum(axis=0).tolist() == [10, 12]
    costs = slot_costs([7, 6, 5, 4], micro_steps=2, groups=2, balance="sums")
    assert costs.sum(axis=0).tolist() == [11, 11]
    assert np.count_nonzero(costs) == 4


def test_swaps_bring_down_what_turns_left() -> None:
    """Turns alone: 7, 3, 1 and 3, 3, 1, so 11 and 7; a 3 for a 1 makes 9 and 9."""
    costs = slot_costs([7, 3, 3, 3, 1, 1], micro_steps=3, groups=2, balance="sums").sum(axis=0)
    assert costs.tolist() == [9, 9]


def test_a_slot_of_several_ranks_takes_several_packs() -> None:
    costs = slot_costs([8, 7, 2, 1, 4, 4, 4, 4], micro_steps=2, groups=2, packs_a_slot=2)
    assert costs.sum() == 34
    assert costs.max() == 9


def test_imbalance_by_hand() -> None:
    # micro-steps of (4, 2) and (1, 1): slowest 4 + 1 = 5, mean 3 + 1 = 4; sums 5 and 3
    costs = np.array([[[4.0, 2.0], [1.0, 1.0]]])
    assert imbalance(costs).tolist() == [1.25]
    assert imbalance(np.array([[[4.0, 2.0], [1.0, 3.0]]])).tolist() == [7 / 5]
    assert imbalance(np.array([[[4.0, 2.0], [1.0, 3.0]]]), "sums").tolist() == [1]


@given(
    costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=24),
    micro_steps=st.integers(1, 4),
    groups=st.integers(1, 4),
    packs_a_slot=st.integers(1, 3),
    balance=st.sampled_from(["lock_step", "sums", "none"]),
)
@settings(max_examples=200, deadline=None)
def test_no_slot_has_too_many_packs(
    costs: list[float], micro_steps: int, groups: int, packs_a_slot: int, balance: str
) -> None:
    packs = np.array([costs[: micro_steps * groups * packs_a_slot]])
    slots = place(packs, micro_steps=micro_steps, groups=groups, packs_a_slot=packs_a_slot, balance=balance)
    assert slots.shape == packs.shape
    assert 0 <= slots.min() <= slots.max() < micro_steps * groups
    assert np.bincount(slots[0]).max() <= packs_a_slot


@pytest.mark.parametrize("seed", range(5))
def test_bands_never_wait_longer_than_the_given_order(seed: int) -> None:
    costs = np.random.default_rng(seed).lognormal(0, 1, (3, 32))
    banded = np.empty_like(costs)
    np.put_along_axis(banded, bands(costs), costs, axis=1)
    assert np.array_equal(banded, -np.sort(-costs, axis=1))
    given_order = imbalance(costs.reshape(3, 8, 4))
    assert (imbalance(banded.reshape(3, 8, 4)) <= given_order).all()


@pytest.mark.parametrize("seed", range(5))
def test_even_dealing_beats_turns_alone(seed: int) -> None:
    """Against a reference without swaps, and within 1 % of the mean for four packs a group."""
    costs = np.random.default_rng(seed).uniform(1, 2, 32)
    group, turn = deal_evenly(costs[None], 8)
    assert sorted(zip(group[0].tolist(), turn[0].tolist(), strict=True)) == [(g, t) for g in range(8) for t in range(4)]
    sums = np.bincount(group[0], weights=costs)
    reference = np.zeros(8)
    for first in range(0, 32, 8):
        reference[np.argsort(reference, kind="stable")] += -np.sort(-costs)[first : first + 8]
    assert sums.max() <= reference.max()
    assert sums.max() < 1.01 * costs.sum() / 8

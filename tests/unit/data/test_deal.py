"""deal: step sets by tokens alone, slots by cost; nothing lost, nothing above the room, and the goals of balance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_ray.data.balance import imbalance
from longalign_ray.data.cost import LLAMA_2_7B, SequenceCost
from longalign_ray.data.deal import StepSets, _deal, deal, step_sets
from longalign_ray.data.make_plan import PlanSettings, plan_lengths
from tests.unit.data.mixes import long_context_mix

CAPACITY = 65_536
LINEAR = SequenceCost(1.0, 0.0)


def members_of_steps(sets: StepSets) -> list[list[int]]:
    return [sets.members[a:b].tolist() for a, b in zip(sets.offsets[:-1], sets.offsets[1:], strict=True)]


def test_step_sets_by_hand() -> None:
    """Room 20 a step, half of it wanted: 24 tokens are two steps of 12 in the order given, the longest first."""
    sets = step_sets(np.array([3, 4, 5, 2, 9, 1]), capacity=10, packs=2, fill=0.5)
    assert members_of_steps(sets) == [[2, 1, 0], [4, 3, 5]]
    assert sets.num_carried == 0


def test_an_example_belongs_to_the_step_that_holds_its_middle() -> None:
    """Two steps of 12 of 24 tokens: the middle of the 6 that begins at 8 is at 11."""
    sets = step_sets(np.array([8, 6, 2, 8]), capacity=20, packs=1, fill=0.5)
    assert members_of_steps(sets) == [[0, 1], [3, 2]]


def test_what_does_not_fit_is_carried_to_the_next_step() -> None:
    """Of 6, 6, 6 (18 of 20 tokens) the third fits into neither of two packs of 10."""
    sets = step_sets(np.array([6, 6, 6] + [1] * 18), capacity=10, packs=2, fill=0.9)
    assert members_of_steps(sets) == [[0, 1], [2, 3, 4, 5, 6, 7, 8], list(range(9, 21))]
    assert sets.num_carried == 1


def test_the_steps_of_an_epoch_are_equally_full() -> None:
    lengths = long_context_mix(20_000, seed=1)
    sets = step_sets(lengths, capacity=CAPACITY, packs=64, fill=0.9)
    tokens = np.add.reduceat(lengths[sets.members], sets.offsets[:-1])
    assert len(tokens) == round(lengths.sum() / (0.9 * 64 * CAPACITY))
    assert tokens.min() > 0.97 * tokens.mean()


def test_dealt_by_hand() -> None:
    """Costs 6, 5, 4, 3 to two slots of 20 tokens: 6 + 3 and 5 + 4."""
    lengths = np.array([6, 5, 4, 3])
    sets = step_sets(lengths, capacity=20, packs=2, fill=0.45)
    slots = deal(lengths, LINEAR(lengths), sets, capacity=20, micro_steps=1, groups=2)
    assert slots.tolist() == [0, 1, 1, 0]


def test_slots_beside_a_heavy_one_fill_up_to_it() -> None:
    """Two micro-steps of two slots, a document of cost 100 and 24 chats of 10.

    Dealing all slots alike gives 100, 80, 80, 80 and the time 100 + 80. But beside the 100 another 100 costs no time.
    """
    lengths = np.array([100] + [10] * 24)
    sets = step_sets(lengths, capacity=100, packs=4, fill=0.85)
    slots = deal(lengths, LINEAR(lengths), sets, capacity=100, micro_steps=2, groups=2)
    assert np.bincount(slots, weights=lengths).tolist() == [100, 100, 70, 70]


def test_a_slot_without_room_comes_back_for_a_shorter_example() -> None:
    """Slot 0 costs least but has room for 2 only: the 3 goes to slot 1, the 2 after it to slot 0."""
    lengths, costs = np.array([8, 7, 3, 2]), np.array([1.0, 5.0, 1.0, 1.0])
    slots, fits = _deal(lengths, costs, np.array([0, 4]), 2, 1, 10, 2)
    assert slots.tolist() == [0, 1, 1, 0]
    assert fits.all()


def test_a_group_packs_its_slots_by_best_fit() -> None:
    """6, 5, 4, 3, 2 into two slots of 10 of one group: 6 + 4 and 5 + 3 + 2."""
    lengths = np.array([6, 5, 4, 3, 2])
    slots, fits = _deal(lengths, LINEAR(lengths), np.array([0, 5]), 1, 2, 10, 1)
    assert slots.tolist() == [0, 1, 0, 1, 1]
    assert fits.all()


def test_full_steps_fall_back_on_their_packs() -> None:
    """Dealt by cost, 7 + 4 and 5 + 4 leave no room for the last 4 in two slots of 12; best fit does."""
    lengths = np.array([7, 5, 4, 4, 4])
    sets = step_sets(lengths, capacity=12, packs=2, fill=1.0)
    assert members_of_steps(sets) == [[0, 1, 2, 3, 4]]
    slots = deal(lengths, lengths**2.0, sets, capacity=12, micro_steps=1, groups=2)
    assert np.bincount(slots, weights=lengths).tolist() == [12, 12]
    costs = np.array([49.0, 25.0, 16.0, 16.0, 0.0])  # the last one is without room, though it costs nothing
    slots = deal(lengths, costs, sets, capacity=12, micro_steps=1, groups=2)
    assert np.bincount(slots, weights=lengths).tolist() == [12, 12]


@pytest.mark.parametrize(
    ("ranks", "sp_degree", "micro_steps", "balance", "most"),
    [
        (64, 2, 1, "lock_step", 1.003),
        (8, 2, 1, "lock_step", 1.012),
        (64, 1, 16, "lock_step", 1.01),
        (64, 1, 64, "lock_step", 1.01),
        (64, 1, 4, "sums", 1.01),
        (8, 1, 16, "lock_step", 1.01),
        (8, 1, 64, "lock_step", 1.01),
        (8, 1, 4, "sums", 1.01),
    ],
)
def test_goals_of_balance(ranks: int, sp_degree: int, micro_steps: int, balance: str, most: float) -> None:
    lengths = long_context_mix(60_000, seed=2)
    plan = plan_lengths(
        lengths,
        PlanSettings(
            capacity=CAPACITY,
            packs_per_step=ranks * micro_steps,
            world_size=ranks,
            sp_degree=sp_degree,
            balance=balance,
        ),
        cost=LLAMA_2_7B,
    )
    assert plan.time_over_ideal() <= most
    assert plan.step_imbalance().mean() <= most
    if micro_steps == 1:
        assert plan.fill() >= 0.85


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    micro_steps=st.integers(1, 3),
    groups=st.integers(1, 4),
    packs_a_slot=st.integers(1, 2),
    balance=st.sampled_from(["lock_step", "sums", "none"]),
    fill=st.sampled_from([0.5, 0.9, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_never_above_the_room_and_never_worse_than_the_packs(
    lengths: list[int], micro_steps: int, groups: int, packs_a_slot: int, balance: str, fill: float
) -> None:
    packs = micro_steps * groups * packs_a_slot
    sets = step_sets(np.array(lengths), capacity=50, packs=packs, fill=fill)
    assert sorted(sets.members.tolist()) == list(range(len(lengths)))
    own, steps, num_slots = np.array(lengths)[sets.members], len(sets.offsets) - 1, micro_steps * groups
    packed_tokens = np.bincount(sets.step_of_member * packs + sets.pack_of_member, weights=own)
    assert packed_tokens.max() <= 50

    def costs(how: str) -> np.ndarray:
        slots = deal(
            own, own**2.0, sets, capacity=50, micro_steps=micro_steps, groups=groups,
            packs_a_slot=packs_a_slot, balance=how,
        )  # fmt: skip
        keys = sets.step_of_member * num_slots + slots
        assert np.bincount(keys, weights=own).max() <= 50 * packs_a_slot
        return np.bincount(keys, weights=own**2.0, minlength=steps * num_slots).reshape(steps, micro_steps, groups)

    assert (imbalance(costs(balance), balance) <= imbalance(costs("none"), balance) + 1e-9).all()

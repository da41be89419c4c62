"""Weights of LongAlign Eq. 2-4 on the numbers of a hand-worked example, and what they sum to over a step."""

from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.data.cost import LLAMA_2_7B
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import Example, ExampleIndex
from longalign_ray.train.loss import LossKind, backward_scale, shift_labels, shift_weights, step_totals, target_weights

IGNORE = -100


def test_labels_shift_inside_a_sequence_only() -> None:
    ids = np.array([10, 11, 12, 20, 21])
    weight = np.array([100, 0, 100, 100, 1], np.uint8)  # a target on the first token of a sequence has no predictor
    cu_seqlens = np.array([0, 3, 5])
    assert shift_labels(ids, weight, cu_seqlens).tolist() == [IGNORE, 12, IGNORE, 21, IGNORE]
    assert shift_weights(weight, cu_seqlens).tolist() == [0, 1.0, 0, 0.01, 0]


def test_the_weights_of_the_pack_are_left_alone() -> None:
    weight = np.full(4, 100, np.uint8)
    target_weights(weight, np.array([0, 2, 4]), "sequence")
    assert (weight == 100).all()


# Three sequences of 1, 3 and 10 targets whose losses sum to 2, 9 and 20.
CU_SEQLENS = np.array([0, 2, 6, 17])
WEIGHT = np.where(np.isin(np.arange(17), CU_SEQLENS[:-1]), 0, 100).astype(np.uint8)
LOSSES = np.select([np.arange(17) < 2, np.arange(17) < 6], [2.0, 3.0], 2.0)


def plan_of(slots: list[list[int]], *, micro_steps: int = 1, groups: int = 1, sums: np.ndarray) -> StepPlan:
    """Example rows of each slot; `sums` of the weights of all examples."""
    rows = np.concatenate([np.array(slot, np.int64) for slot in slots])
    starts = np.cumsum([0, *map(len, slots)])
    steps = len(slots) // (micro_steps * groups)
    step = np.repeat(np.arange(len(slots)) // (micro_steps * groups), np.diff(starts))
    return StepPlan(
        example_rows=rows,
        lengths=np.full(len(rows), 2, np.int32),
        offsets=starts,
        shape=(steps, micro_steps, groups),
        num_sequences=np.bincount(step, weights=sums[rows] > 0, minlength=steps).astype(np.int64),
        num_targets=np.zeros(steps, np.int64),
        sum_weights=np.bincount(step, weights=sums[rows], minlength=steps),
        epoch=np.zeros(steps, np.int64),
        capacity=64,
        seed=0,
        cost=LLAMA_2_7B,
    )


def index_of(sums: np.ndarray) -> ExampleIndex:
    unused = np.zeros(len(sums), np.int32)
    return ExampleIndex(unused, unused, unused, sums, unused, unused, unused, unused)


HAND_WORKED: dict[LossKind, float] = {
    "sequence": 7 / 3,
    "token": 31 / 14,
    "pack": 19 / 8,
    "sqrt": (2 + 3 * 3**0.5 + 2 * 10**0.5) / (1 + 3**0.5 + 10**0.5),
}


@pytest.mark.parametrize("kind", HAND_WORKED)
@pytest.mark.parametrize(("micro_steps", "groups"), [(2, 1), (1, 2)])
def test_hand_worked_means(kind: LossKind, micro_steps: int, groups: int) -> None:
    """The first two sequences are one pack, the third another; a third and a fourth slot make a step of their own."""
    sums = np.array([1.0, 3.0, 10.0, 0.0])
    plan = plan_of([[0, 1], [2], [3], [2]], micro_steps=micro_steps, groups=groups, sums=sums)
    first = target_weights(WEIGHT[:6], CU_SEQLENS[:3], kind)
    second = target_weights(WEIGHT[6:], CU_SEQLENS[2:] - 6, kind)
    weights = np.concatenate([first, second])
    totals = step_totals(plan, index_of(sums), kind)
    assert totals.dtype == np.float64
    assert (weights * LOSSES).sum() / totals[0] == pytest.approx(HAND_WORKED[kind], abs=1e-12)
    assert weights.sum() == pytest.approx(totals[0], abs=1e-12)
    assert second.sum() == pytest.approx(totals[1], abs=1e-12)  # a pack without a target counts for nothing
    assert not weights[CU_SEQLENS[1:] - 1].any()


@pytest.mark.parametrize("kind", HAND_WORKED)
@pytest.mark.parametrize("seed", range(3))
def test_the_weights_of_a_step_sum_to_its_total(kind: LossKind, seed: int) -> None:
    random = np.random.default_rng(seed)
    examples = []
    for _ in range(40):
        weight = random.choice(np.array([0, 0, 1, 30, 100], np.uint8), int(random.integers(2, 9)))
        weight[:] = 0 if random.random() < 0.3 else weight
        examples.append(Example("", np.zeros(len(weight), np.int32), weight))
    sums = np.array([example.sum_weights for example in examples])
    slots = [part.tolist() for part in np.split(random.permutation(40), np.sort(random.integers(0, 41, 11)))]
    plan = plan_of(slots, micro_steps=2, groups=2, sums=sums)
    totals = step_totals(plan, index_of(sums), kind)
    assert len(totals) == 3
    for step, total in enumerate(totals):
        parts = [[examples[row] for row in slot] for slot in slots[4 * step : 4 * step + 4] if slot]
        weights = [
            target_weights(
                np.concatenate([example.loss_weight for example in part]),
                np.cumsum([0, *(example.length for example in part)]),
                kind,
            ).sum()
            for part in parts
        ]
        assert sum(weights) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sequence", [0.2, 0.8, 0, 1, 0]),
        ("token", [0.25, 1, 0, 0.03, 0]),
        ("pack", [0.25 / 1.28, 1 / 1.28, 0, 0.03 / 1.28, 0]),
        ("sqrt", [0.25 / 1.25**0.5, 1 / 1.25**0.5, 0, 0.03**0.5, 0]),
    ],
)
def test_weights_below_one_by_hand(kind: LossKind, expected: list[float]) -> None:
    """In a sequence, a weighted mean: 0.25 and 1 of 1.25; one target alone counts whole, whatever it weighs."""
    weights = target_weights(np.array([0, 25, 100, 0, 3], np.uint8), np.array([0, 3, 5]), kind)
    assert weights == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", HAND_WORKED)
@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_without_targets_weighs_nothing(kind: LossKind, seed: int) -> None:
    random = np.random.default_rng(seed)
    cu_seqlens = np.array([0, 5, 12, 30])
    weight = random.choice(np.array([0, 0, 35, 100], np.uint8), 30)
    weight[[1, 29]] = 35
    weight[6:12] = 0
    weights = target_weights(weight, cu_seqlens, kind)
    assert not weights[5:12].any()
    per_sequence = [weights[:5].sum(), weights[12:].sum()]
    sums = np.array([weight[1:5].sum() / 100, weight[13:].sum() / 100])
    expected = {"sequence": sums / sums, "token": sums, "pack": sums / sums.sum(), "sqrt": np.sqrt(sums)}
    assert per_sequence == pytest.approx(expected[kind])


@pytest.mark.parametrize("kind", HAND_WORKED)
def test_a_pack_without_targets_weighs_nothing(kind: LossKind) -> None:
    weights = target_weights(np.array([100, 0, 0, 0], np.uint8), np.array([0, 2, 4]), kind)
    assert weights.tolist() == [0, 0, 0, 0]


def test_backward_scale() -> None:
    assert backward_scale(8, 96) == 8 / 96
    assert backward_scale(8, 0.5) == 16
    assert backward_scale(8, 0) == 8  # a step without targets has a loss of 0 and no division

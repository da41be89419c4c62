"""Weights of LongAlign Eq. 2-4 on the numbers of a hand-worked example."""

from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.train.loss import LossKind, backward_scale, shift_labels, shift_weights, target_weights

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


@pytest.mark.parametrize(("kind", "total", "expected"), [("sequence", 3, 7 / 3), ("token", 14, 31 / 14)])
def test_hand_worked_means(kind: LossKind, total: int, expected: float) -> None:
    weights = target_weights(WEIGHT, CU_SEQLENS, kind)
    assert (weights * LOSSES).sum() / total == pytest.approx(expected, abs=1e-12)
    assert weights.sum() == pytest.approx(total)
    assert not weights[CU_SEQLENS[1:] - 1].any()


@pytest.mark.parametrize(("kind", "expected"), [("sequence", [0.2, 0.8, 0, 1, 0]), ("token", [0.25, 1, 0, 0.03, 0])])
def test_weights_below_one_by_hand(kind: LossKind, expected: list[float]) -> None:
    """A weighted mean in a sequence: 0.25 and 1 of 1.25; one target alone counts whole, whatever it weighs."""
    weights = target_weights(np.array([0, 25, 100, 0, 3], np.uint8), np.array([0, 3, 5]), kind)
    assert weights == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", ["sequence", "token"])
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
    sums = [weight[1:5].sum() / 100, weight[13:].sum() / 100]
    assert per_sequence == pytest.approx([1.0, 1.0] if kind == "sequence" else sums)


def test_backward_scale() -> None:
    assert backward_scale(8, 96) == 8 / 96
    assert backward_scale(8, 0.5) == 16
    assert backward_scale(8, 0) == 8  # a step without targets has a loss of 0 and no division

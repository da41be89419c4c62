"""Weights of LongAlign Eq. 2-4 on the numbers of a hand-worked example."""

from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.train.loss import LossKind, backward_scale, shift_labels, target_weights

IGNORE = -100


def test_labels_shift_inside_a_sequence_only() -> None:
    ids = np.array([10, 11, 12, 20, 21])
    mask = np.array([True, False, True, True, True])  # a target on the first token of a sequence has no predictor
    labels = shift_labels(ids, mask, np.array([0, 3, 5]))
    assert labels.tolist() == [IGNORE, 12, IGNORE, 21, IGNORE]


def test_labels_leave_the_mask_alone() -> None:
    mask = np.ones(4, np.bool_)
    shift_labels(np.arange(4), mask, np.array([0, 2, 4]))
    assert mask.all()


# Three sequences of 1, 3 and 10 targets whose losses sum to 2, 9 and 20.
CU_SEQLENS = np.array([0, 2, 6, 17])
LABELS = np.where(np.isin(np.arange(17), [1, 5, 16]), IGNORE, 1)
LOSSES = np.select([np.arange(17) < 2, np.arange(17) < 6], [2.0, 3.0], 2.0)


@pytest.mark.parametrize(("kind", "total", "expected"), [("sequence", 3, 7 / 3), ("token", 14, 31 / 14)])
def test_hand_worked_means(kind: LossKind, total: int, expected: float) -> None:
    weights = target_weights(LABELS, CU_SEQLENS, kind)
    assert (weights * LOSSES).sum() / total == pytest.approx(expected, abs=1e-12)
    assert weights.sum() == pytest.approx(total)
    assert not weights[LABELS == IGNORE].any()


@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_without_targets_weighs_nothing(kind: LossKind, seed: int) -> None:
    random = np.random.default_rng(seed)
    cu_seqlens = np.array([0, 5, 12, 30])
    labels = np.where(random.random(30) < 0.5, 7, IGNORE)
    labels[5:12] = IGNORE
    weights = target_weights(labels, cu_seqlens, kind)
    assert not weights[5:12].any()
    per_sequence = [weights[:5].sum(), weights[12:].sum()]
    counts = [np.count_nonzero(labels[:5] != IGNORE), np.count_nonzero(labels[12:] != IGNORE)]
    assert per_sequence == pytest.approx([1.0, 1.0] if kind == "sequence" else counts)


def test_backward_scale() -> None:
    assert backward_scale(8, 96) == 8 / 96
    assert backward_scale(8, 0) == 8  # a step without targets has a loss of 0 and no division

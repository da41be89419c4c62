from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from longalign_ray.config import TrainConfig
from longalign_ray.errors import LongAlignError
from longalign_ray.train.loss_watch import MIN_STEPS, WINDOW, LossWatch


def watch(max_ratio: float | None, recent: list[float] | None = None, *, sp_degree: int = 1) -> LossWatch:
    """Two groups and two micro-steps, whose packs are called by step, micro-step and group; the last one is empty."""

    def pack(step: int, micro_step: int, group: int) -> Any:
        if (micro_step, group) == (1, 1):
            return None
        return SimpleNamespace(example_ids=(f"a{step}{micro_step}{group}", f"b{step}{micro_step}{group}"))

    plan = SimpleNamespace(shape=(9, 2, 2), sp_degree=sp_degree, world_size=2 * sp_degree)
    return LossWatch(cast(Any, SimpleNamespace(plan=plan, pack=pack)), max_ratio=max_ratio, recent=recent or [])


def shares(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_rank_whose_share_is_not_finite_and_its_examples_alone(bad: float) -> None:
    with pytest.raises(LongAlignError) as error:
        watch(None).check(7, shares(1.0, bad))
    message = str(error.value)
    assert f"the loss of step 7 is {bad}: not finite on rank 1 of 2" in message
    assert "rank 1, micro-step 0: a701, b701." in message
    assert "rank 0" not in message
    assert "train.learning_rate" in message


def test_finite_shares_whose_sum_is_not_are_all_named() -> None:
    with pytest.raises(LongAlignError, match=r"on rank 0, 1 of 2.*a300, b300; rank 0, micro-step 1: a310.*a301"):
        watch(None).check(3, shares(1.7e308, 1.7e308))


def test_ranks_that_share_a_pack_are_named_with_the_pack_of_their_group() -> None:
    with pytest.raises(LongAlignError, match=r"on rank 3 of 4, whose examples were rank 3, micro-step 0: a001, b001"):
        watch(None, sp_degree=2).check(0, shares(1, 1, 1, float("nan")))


def test_a_leap_over_the_median_stops() -> None:
    recent = [9.0] * (MIN_STEPS // 2) + [1.0] * (MIN_STEPS // 2 + 1)  # median 1, mean above 4
    watched = watch(3.0, recent)
    assert watched.check(20, shares(0.5, 2.5)) == 3.0  # 3 times the median is not more
    with pytest.raises(LongAlignError) as error:
        watch(3.0, recent).check(20, shares(0.5, 2.6))
    message = str(error.value)
    assert "is 3.1, more than train.max_loss_ratio = 3 times 1, the median of the 11 steps before" in message
    assert "the largest share on rank 1 of 2, whose examples were rank 1, micro-step 0: a2001, b2001" in message


def test_by_default_a_lost_model_stops_and_a_hard_step_does_not() -> None:
    usual = TrainConfig().max_loss_ratio
    assert usual is not None
    assert watch(usual, [1.6] * WINDOW).check(60, shares(3.5, 2.0)) == 5.5
    with pytest.raises(LongAlignError, match="raise it, or set null"):
        watch(usual, [1.6] * WINDOW).check(60, shares(5.2, 5.2))
    assert watch(usual, [0.01] * WINDOW).check(60, shares(0.4, 0.4)) == 0.8  # learned by heart: 80 times the median


def test_no_rule_where_none_is_set_and_none_before_there_is_a_usual_loss() -> None:
    assert watch(None, [1.0] * WINDOW).check(60, shares(500, 500)) == 1_000
    early = watch(2.0, [1.0] * (MIN_STEPS - 1))
    early.check(9, shares(500, 500))
    with pytest.raises(LongAlignError, match="max_loss_ratio"):
        early.check(10, shares(2, 0.1))  # now ten steps stand behind the median, the leap among them


def test_only_the_last_steps_count() -> None:
    watched = watch(2.0, [100.0] * WINDOW)
    for step in range(WINDOW):
        watched.check(step, shares(1, 0))
    with pytest.raises(LongAlignError, match=f"times 1, the median of the {WINDOW} steps before"):
        watched.check(WINDOW, shares(3, 0))


def test_a_gradient_that_is_not_finite_stops_with_all_examples_of_the_step() -> None:
    watched = watch(None)
    for fine in (None, 0.0, 1e30):
        watched.check_gradient(7, fine)
    with pytest.raises(LongAlignError) as error:
        watched.check_gradient(7, float("inf"))
    message = str(error.value)
    assert "the gradient norm of step 7 is inf: not finite, though the loss is, on rank 0, 1 of 2" in message
    assert "rank 0, micro-step 0: a700, b700; rank 0, micro-step 1: a710, b710; rank 1, micro-step 0: a701" in message

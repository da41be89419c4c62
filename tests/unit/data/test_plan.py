"""Every example is planned once an epoch, and the steps do not depend on the number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.plan import StepPlan, make_plan
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import PlanMismatchError

COST = SequenceCost(1.0, 0.01)


def make_index(lengths: list[int], *, targets: list[int] | None = None, heldout: tuple[int, ...] = ()) -> ExampleIndex:
    n = len(lengths)
    return ExampleIndex(
        example_id=np.array([f"e{i}" for i in range(n)], dtype=object),
        length=np.array(lengths, np.int32),
        num_targets=np.array(targets if targets is not None else [1] * n, np.int32),
        sum_weights=np.array(targets if targets is not None else [1] * n, np.float64) / 2,
        file=np.zeros(n, np.int32),
        row=np.arange(n, dtype=np.int32),
        source=np.full(n, "corpus", object),
        heldout=np.isin(np.arange(n), heldout),
    )


def plan_of(index: ExampleIndex, **changes) -> StepPlan:
    settings = {"planner": "best_fit", "capacity": 64, "packs_per_step": 4, "world_size": 2, "cost": COST, "seed": 0}
    return make_plan(index, **{**settings, **changes})


@pytest.fixture
def index() -> ExampleIndex:
    return make_index(np.random.default_rng(1).integers(1, 65, 50).tolist(), heldout=(3, 7))


@pytest.mark.parametrize("planner", ["best_fit", "naive"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("epochs", [1, 2])
def test_every_example_exactly_once_an_epoch(index: ExampleIndex, planner: str, world_size: int, epochs: int) -> None:
    plan = plan_of(index, planner=planner, world_size=world_size, epochs=epochs)
    expected = [row for row in range(50) if row not in (3, 7)] * epochs
    assert sorted(plan.example_rows.tolist()) == sorted(expected)
    assert plan.slot_tokens().max() <= 64
    assert plan.slot_tokens().sum() == epochs * (index.length.sum() - index.length[[3, 7]].sum())


def step_sets(plan: StepPlan) -> list[list[int]]:
    _, micro_steps, groups = plan.shape
    return [
        sorted(row for m in range(micro_steps) for g in range(groups) for row in plan.slot(step, m, g).tolist())
        for step in range(plan.num_steps)
    ]


def test_steps_are_the_same_on_any_number_of_ranks(index: ExampleIndex) -> None:
    plans = [plan_of(index, world_size=world_size, epochs=2) for world_size in (1, 2, 4, 5)]
    assert len({plan.digest for plan in plans}) == 1
    assert len({plan.layout_digest for plan in plans}) == 4
    assert all(step_sets(plan) == step_sets(plans[0]) for plan in plans)
    assert [plan.shape[1:] for plan in plans] == [(4, 1), (2, 2), (1, 4), (1, 5)]


def test_totals_of_a_step_by_hand() -> None:
    """Six sequences, one without a target: M counts five of them."""
    plan = plan_of(make_index([30] * 6, targets=[2, 3, 0, 1, 1, 4]), packs_per_step=8)
    assert plan.num_steps == 1
    assert plan.num_sequences.tolist() == [5]
    assert plan.num_targets.tolist() == [11]
    assert plan.sum_weights.tolist() == [5.5]


def test_totals_agree_with_the_slots(index: ExampleIndex) -> None:
    targets = np.random.default_rng(2).integers(0, 3, 50)
    index = make_index(index.length.tolist(), targets=targets.tolist())
    plan = plan_of(index, epochs=2)
    for step, rows in enumerate(step_sets(plan)):
        assert plan.num_sequences[step] == np.count_nonzero(targets[rows])
        assert plan.num_targets[step] == targets[rows].sum()


def test_seed_and_epoch_change_the_order(index: ExampleIndex) -> None:
    assert plan_of(index).digest == plan_of(index).digest
    assert plan_of(index).digest != plan_of(index, seed=1).digest
    first, second = np.split(plan_of(index, epochs=2, packs_per_step=1, world_size=1).example_rows, 2)
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_max_steps_cuts_the_end(index: ExampleIndex) -> None:
    whole, cut = plan_of(index), plan_of(index, max_steps=2)
    assert cut.num_steps == 2 < whole.num_steps
    assert step_sets(cut) == step_sets(whole)[:2]


def test_costs_fill_and_imbalance() -> None:
    plan = plan_of(make_index([64, 32, 32, 64]), packs_per_step=2, world_size=2)
    assert plan.fill() == 1.0
    costs = sorted(plan.slot_costs()[plan.slot_tokens() > 0])
    assert costs == pytest.approx([64 + 0.01 * 2 * 32**2, 64 + 0.01 * 64**2, 64 + 0.01 * 64**2])
    assert plan.imbalance() > 1


def test_save_and_load(index: ExampleIndex, tmp_path: Path) -> None:
    plan = plan_of(index)
    plan.save(tmp_path / "plan.npz")
    again = StepPlan.load(tmp_path / "plan.npz")
    assert (again.digest, again.layout_digest, again.shape, again.cost) == (
        plan.digest,
        plan.layout_digest,
        plan.shape,
        plan.cost,
    )
    assert again.epoch.tolist() == plan.epoch.tolist()


def test_an_altered_or_missing_plan_is_refused(index: ExampleIndex, tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    with pytest.raises(PlanMismatchError, match="longalign prepare"):
        StepPlan.load(path)
    plan_of(index).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["num_sequences"] = arrays["num_sequences"] + 1
    np.savez(path, **arrays)
    with pytest.raises(PlanMismatchError, match="altered"):
        StepPlan.load(path)
    path.write_bytes(b"not a plan")
    with pytest.raises(PlanMismatchError, match="no step plan"):
        StepPlan.load(path)


def test_too_long_and_empty_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"65 tokens and packing\.capacity = 64"):
        plan_of(make_index([65]))
    with pytest.raises(PlanMismatchError, match="no example is left"):
        plan_of(make_index([5], heldout=(0,)))

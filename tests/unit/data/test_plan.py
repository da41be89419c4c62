"""Every example is planned once an epoch, and the steps do not depend on the number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import PlanSettings, make_plan, plan_lengths
from longalign_ray.data.plan import ARRAYS, SCALARS, StepPlan
from longalign_ray.data.planners import PLANNERS
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import PlanMismatchError

COST = SequenceCost(1.0, 0.01)
STRATEGIES = ["deal", *PLANNERS]
TOTALS = ("num_sequences", "num_targets", "sum_weights", "epoch")


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
    chosen = {"strategy": "best_fit", "capacity": 64, "packs_per_step": 4, "world_size": 2}
    return make_plan(index, PlanSettings(**{**chosen, **changes}), cost=COST)


@pytest.fixture
def index() -> ExampleIndex:
    return make_index(np.random.default_rng(1).integers(1, 65, 50).tolist(), heldout=(3, 7))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("epochs", [1, 2])
def test_every_example_exactly_once_an_epoch(index: ExampleIndex, strategy: str, world_size: int, epochs: int) -> None:
    plan = plan_of(index, strategy=strategy, world_size=world_size, epochs=epochs)
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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_are_the_same_on_any_world(index: ExampleIndex, strategy: str) -> None:
    worlds = [(1, 1), (2, 1), (4, 1), (5, 1), (2, 2), (4, 2), (4, 4), (6, 3)]
    plans = [plan_of(index, strategy=strategy, world_size=r, sp_degree=p, epochs=2) for r, p in worlds]
    plans += [plan_of(index, strategy=strategy, balance=balance, epochs=2) for balance in ("sums", "none")]
    assert len({plan.digest for plan in plans}) == 1
    assert len({plan.layout_digest for plan in plans}) > 4
    assert all(step_sets(plan) == step_sets(plans[0]) for plan in plans)
    assert [plan.shape[1:] for plan in plans[:8]] == [(4, 1), (2, 2), (1, 4), (1, 5), (2, 1), (1, 2), (1, 1), (1, 2)]
    for plan in plans:
        assert plan.slot_tokens().max() <= 64 * plan.sp_degree
        assert all(np.array_equal(getattr(plan, name), getattr(plans[0], name)) for name in TOTALS)


@pytest.mark.parametrize("strategy", ["deal", "best_fit"])
@pytest.mark.parametrize("cut", [0, 3, 6])
def test_a_plan_is_cut_at_any_step_and_continued_elsewhere(index: ExampleIndex, strategy: str, cut: int) -> None:
    first = plan_of(index, strategy=strategy, world_size=2)
    second = plan_of(index, strategy=strategy, world_size=4, sp_degree=2, balance="sums")
    assert first.num_steps == second.num_steps > 6
    trained = [row for rows in step_sets(first)[:cut] + step_sets(second)[cut:] for row in rows]
    assert sorted(trained) == [row for row in range(50) if row not in (3, 7)]


@pytest.mark.parametrize("strategy", ["deal", "best_fit"])
def test_an_example_longer_than_a_ranks_room_needs_a_group(strategy: str) -> None:
    """100 of 64 tokens: two ranks or more share it; the steps are those of any degree that can hold it."""
    index = make_index([100, 20, 64, 30, 128, 1, 50, 60])
    with pytest.raises(PlanMismatchError, match=r"128 tokens and packing\.capacity = 64: raise"):
        plan_of(index, strategy=strategy)
    with pytest.raises(PlanMismatchError, match="5 ranks cannot form groups of sp_degree = 2"):
        plan_of(index, strategy=strategy, world_size=5, sp_degree=2)
    plans = [plan_of(index, strategy=strategy, world_size=r, sp_degree=p) for r, p in ((2, 2), (4, 2), (4, 4), (8, 4))]
    assert len({plan.digest for plan in plans}) == 1
    for plan in plans:
        assert sorted(plan.example_rows.tolist()) == list(range(8))
        assert plan.slot_tokens().max() <= 64 * plan.sp_degree


@pytest.mark.parametrize("strategy", ["deal", "best_fit"])
def test_three_ranks_a_pack_take_other_steps_where_two_would_do(strategy: str) -> None:
    """The longest of twice the capacity: degrees 2, 4 and 6 pack for two ranks, 3 for three, and steps hold 6 of 6."""
    index = make_index([128, 100, 64, 30, 128, 1, 50, 60] * 3)
    how = {"strategy": strategy, "packs_per_step": 6}
    plans = [plan_of(index, world_size=r, sp_degree=p, **how) for r, p in ((2, 2), (4, 4), (6, 6), (3, 3), (6, 3))]
    assert [plan.digest == plans[0].digest for plan in plans] == [True, True, True, False, False]
    assert plans[3].digest == plans[4].digest
    with pytest.raises(
        PlanMismatchError,
        match=r"packs_per_step = 8 is no multiple of 3, the ranks of train\.sp_degree = 3 .* 128 tokens.* 6 or 9",
    ):
        plan_of(index, strategy=strategy, world_size=3, sp_degree=3, packs_per_step=8)
    short = make_index([64, 30, 1] * 8)
    plans = [plan_of(short, strategy=strategy, world_size=3, sp_degree=p, packs_per_step=8) for p in (1, 3)]
    assert plans[0].digest == plans[1].digest


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
def test_more_examples_than_a_group_are_planned_group_by_group(index: ExampleIndex, strategy: str) -> None:
    """50 rows in groups of at most 20: three of them an epoch, the same for any ranks, each its own steps."""
    lengths, targets = index.length, index.num_targets
    weights = np.arange(50) / 100

    def planned(world_size: int, degree: int, **changes) -> StepPlan:
        how = {"strategy": strategy, "capacity": 64, "packs_per_step": 4, "epochs": 2, **changes}
        settings = PlanSettings(world_size=world_size, sp_degree=degree, **how)
        return plan_lengths(lengths, settings, cost=COST, num_targets=targets, sum_weights=weights, group=20)

    plan = planned(2, 1)
    assert sorted(plan.example_rows.tolist()) == sorted(2 * list(range(50)))
    assert plan.slot_tokens().max() <= 64
    assert plan.lengths.tolist() == lengths[plan.example_rows].tolist()
    steps = step_sets(plan)
    assert plan.num_sequences.tolist() == plan.num_targets.tolist() == [len(rows) for rows in steps]
    assert plan.sum_weights.tolist() == pytest.approx([weights[rows].sum() for rows in steps])
    ends = np.cumsum([len(rows) for rows in steps])
    assert {17, 34, 50, 67, 84, 100} <= set(ends.tolist())
    assert plan.epoch.tolist() == [int(end > 50) for end in ends]
    if strategy != "auto":  # its choice is made once, and named from then on
        assert {planned(*world).digest for world in ((1, 1), (4, 1), (5, 1), (2, 2), (4, 4), (6, 3))} == {plan.digest}
        cut = planned(2, 1, max_steps=len(steps) - 2)
        assert step_sets(cut) == steps[:-2]
        assert step_sets(planned(2, 1, max_steps=1)) == steps[:1]


def test_rows_may_repeat_and_change_with_the_epoch(index: ExampleIndex) -> None:
    twice = PlanSettings(capacity=64, packs_per_step=4, epochs=2)
    chosen = {0: np.array([1, 1, 5, 8]), 1: np.array([2, 5])}
    plan = make_plan(index, twice, cost=COST, rows=chosen.__getitem__)
    assert sorted(plan.example_rows.tolist()) == [1, 1, 2, 5, 5, 8]
    assert sorted(make_plan(index, twice, cost=COST, rows=chosen[0]).example_rows.tolist()) == [1, 1, 1, 1, 5, 5, 8, 8]


def test_auto_takes_the_plan_nearest_to_ideal_time(index: ExampleIndex, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plans = {strategy: plan_of(index, strategy=strategy) for strategy in ("deal", "best_fit")}
    best = min(plans.values(), key=StepPlan.time_over_ideal)
    assert plan_of(index, strategy="auto").layout_digest == best.layout_digest
    assert f"deal {1 / plans['deal'].time_over_ideal():.3f}" in caplog.text
    assert f"{best.strategy} it is" in caplog.text


def test_the_last_two_steps_share_what_is_left() -> None:
    """Nine packs, four a step: 4, 3 and 2 instead of 4, 4 and 1; `sorted` cuts between its groups."""
    index = make_index([60] * 9)
    assert [len(rows) for rows in step_sets(plan_of(index))] == [4, 3, 2]
    assert [len(rows) for rows in step_sets(plan_of(index, strategy="sorted", group_size=2))] == [4, 4, 1]
    assert [len(rows) for rows in step_sets(plan_of(index, packs_per_step=16))] == [9]


def test_sorted_keeps_groups_of_like_length_together() -> None:
    """Eight lengths in groups of two: with two ranks and no balancing, a micro-step is a group."""
    lengths = [5, 40, 7, 39, 20, 21, 60, 61]
    plan = plan_of(make_index(lengths), strategy="sorted", group_size=2, balance="none", packs_per_step=4)
    pairs = {tuple(sorted(pair)) for pair in plan.slot_tokens().reshape(-1, 2).tolist()}
    assert pairs == {(5, 7), (20, 21), (39, 40), (60, 61)}


def test_bare_lengths_count_all_tokens_but_the_first() -> None:
    plan = plan_lengths(np.array([1, 5, 9]), PlanSettings(capacity=16, packs_per_step=1), cost=COST)
    assert (plan.num_sequences.sum(), plan.num_targets.sum(), plan.sum_weights.sum()) == (2, 12, 12)


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80),
    strategy=st.sampled_from(STRATEGIES),
    balance=st.sampled_from(["lock_step", "sums", "none"]),
    groups=st.integers(1, 5),
    sp_degree=st.sampled_from([1, 2, 3, 4]),
    packs_per_step=st.integers(1, 12),
    fill=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 3),
    needs_group=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_conservation(
    lengths: list[int], strategy: str, balance: str, groups: int, sp_degree: int, packs_per_step: int, fill: float,
    seed: int,
    needs_group: bool,
) -> None:  # fmt: skip
    if needs_group:
        lengths, packs_per_step = [length * sp_degree for length in lengths], packs_per_step * sp_degree
    made = plan_lengths(
        np.array(lengths),
        PlanSettings(
            capacity=64,
            packs_per_step=packs_per_step,
            world_size=groups * sp_degree,
            sp_degree=sp_degree,
            strategy=strategy,
            balance=balance,
            fill=fill,
            seed=seed,
            epochs=2,
        ),
        cost=COST,
    )
    assert sorted(made.example_rows.tolist()) == sorted(2 * list(range(len(lengths))))
    assert made.lengths.tolist() == [lengths[row] for row in made.example_rows.tolist()]
    assert made.slot_tokens().max() <= 64 * sp_degree
    assert made.slot_tokens().sum(axis=(1, 2)).min() > 0
    assert made.step_imbalance().min() >= 1 - 1e-12


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seed_and_epoch_change_the_order(index: ExampleIndex, strategy: str) -> None:
    how = {"strategy": strategy, "group_size": 2, "epochs": 2, "packs_per_step": 1, "world_size": 1}
    plan = plan_of(index, **how)
    assert plan.digest == plan_of(index, **how).digest
    assert plan.digest != plan_of(index, **how, seed=1).digest
    assert plan.example_rows[:40].tolist() != plan.example_rows[-48:-8].tolist()


@pytest.mark.parametrize("strategy", ["best_fit", "naive"])
def test_epochs_end_with_a_pack(index: ExampleIndex, strategy: str) -> None:
    first, second = np.split(
        plan_of(index, strategy=strategy, epochs=2, packs_per_step=1, world_size=1).example_rows, 2
    )
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_the_epoch_of_a_step_is_that_of_its_earliest_example() -> None:
    """Three packs an epoch and two a step: the second step has one of each epoch."""
    plan = plan_of(make_index([60, 60, 60]), packs_per_step=2, epochs=2)
    assert plan.epoch.tolist() == [0, 0, 1]


def test_max_steps_cuts_the_end(index: ExampleIndex) -> None:
    whole, cut = plan_of(index), plan_of(index, max_steps=2)
    assert cut.num_steps == 2 < whole.num_steps
    assert step_sets(cut) == step_sets(whole)[:2]


def test_costs_fill_and_imbalance() -> None:
    plan = plan_of(make_index([64, 32, 32, 64]), packs_per_step=2, world_size=2)
    assert plan.fill() == 1.0
    costs = sorted(plan.slot_costs()[plan.slot_tokens() > 0])
    assert costs == pytest.approx([64 + 0.01 * 2 * 32**2, 64 + 0.01 * 64**2, 64 + 0.01 * 64**2])
    assert plan.time_over_ideal() > 1
    # Two steps of two ranks: 64 beside 32 + 32, and 64 beside nothing.
    took = [64 + 0.01 * 64**2] * 2
    ideal = [(128 + 0.01 * (64**2 + 2 * 32**2)) / 2, (64 + 0.01 * 64**2) / 2]
    assert sorted(plan.step_imbalance()) in (
        pytest.approx(sorted(np.array(took) / ideal)),
        pytest.approx([1, took[0] / ideal[1]]),
    )
    assert plan.time_over_ideal() >= min(plan.step_imbalance())


def test_save_and_load(index: ExampleIndex, tmp_path: Path) -> None:
    plan = plan_of(index, strategy="deal", sp_degree=2, balance="sums")
    plan.save(tmp_path / "plan.npz")
    again = StepPlan.load(tmp_path / "plan.npz")
    assert (again.digest, again.layout_digest, again.shape, again.cost) == (
        plan.digest,
        plan.layout_digest,
        plan.shape,
        plan.cost,
    )
    assert again.epoch.tolist() == plan.epoch.tolist()
    assert (again.strategy, again.balance, again.sp_degree, again.num_carried) == ("deal", "sums", 2, plan.num_carried)
    with np.load(tmp_path / "plan.npz") as file:
        assert file["sp_degree"] == 2
        assert file["shape"].tolist() == list(plan.shape)


def test_a_missing_or_broken_plan_is_refused(index: ExampleIndex, tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    with pytest.raises(PlanMismatchError, match="does not exist: run `longalign prepare`"):
        StepPlan.load(path)
    path.write_bytes(b"not a plan")
    with pytest.raises(PlanMismatchError, match=r"no step plan .*: delete it and run `longalign prepare` again"):
        StepPlan.load(path)


@pytest.mark.parametrize("name", [*ARRAYS, *SCALARS, "cost"])
def test_a_plan_altered_anywhere_is_refused(index: ExampleIndex, tmp_path: Path, name: str) -> None:
    path = tmp_path / "plan.npz"
    plan_of(index).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    changed = arrays[name].copy()
    changed.flat[0] = "none" if changed.dtype.kind == "U" else changed.flat[0] + 1
    np.savez(path, **{**arrays, name: changed})
    with pytest.raises(PlanMismatchError, match="altered"):
        StepPlan.load(path)


def test_too_long_and_empty_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"65 tokens and packing\.capacity = 64"):
        plan_of(make_index([65]))
    with pytest.raises(PlanMismatchError, match="no example is left"):
        plan_of(make_index([5], heldout=(0,)))

"""Groups: a permutation that is computed, every sequence once, and a file that anyone can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.cost import LLAMA_2_7B
from longalign_ray.data.make_plan import PlanSettings
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.plan_file import PlanWriter
from longalign_ray.data.plan_groups import plan_groups, seeded_rows
from tests.unit.data.mixes import long_context_mix

SETTINGS = PlanSettings(capacity=65_536, packs_per_step=8, world_size=4, sp_degree=2)


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1_023, 1_024, 1_025])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_seeded_rows_are_a_permutation(n: int, seed: int) -> None:
    rows = seeded_rows(0, n, n, seed)
    assert sorted(rows.tolist()) == list(range(n))
    third = n // 3
    assert np.concatenate([seeded_rows(0, third, n, seed), seeded_rows(third, n, n, seed)]).tolist() == rows.tolist()


def test_seeded_rows_look_random() -> None:
    """Neighbours are far apart, no group prefers a part of the data, and another seed gives another order."""
    n = 100_000
    rows = seeded_rows(0, n, n, 7)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(n), rows)[0, 1]) < 0.02
    in_tenths = np.histogram2d(np.arange(n), rows, bins=10)[0]
    assert abs(in_tenths - 1_000).max() < 150  # five standard deviations of a random permutation
    assert np.count_nonzero(rows == seeded_rows(0, n, n, 8)) < 20


@pytest.mark.parametrize("strategy", ["deal", "best_fit", "auto"])
def test_groups_plan_every_sequence_once_and_count_what_no_pack_holds(strategy: str, tmp_path: Path) -> None:
    lengths = long_context_mix(5_000, seed=3).astype(np.int32)
    lengths[[5, 77]] = 0, 131_073
    writer = PlanWriter(tmp_path / "plan.npz")
    dropped, planned = 0, []
    settings = PlanSettings(capacity=65_536, packs_per_step=8, world_size=4, sp_degree=2, strategy=strategy)
    for group in plan_groups(lengths, settings, cost=LLAMA_2_7B, group=1_500):
        assert np.array_equal(group.plan.lengths, lengths[group.plan.example_rows])
        writer.add(group.plan)
        planned.append(group.plan.example_rows)
        dropped += group.num_dropped
    writer.close()
    assert len(planned) == 4
    assert dropped == 2
    assert sorted(np.concatenate(planned).tolist()) == [row for row in range(5_000) if row not in (5, 77)]
    with np.load(tmp_path / "plan.npz") as file:
        arrays = dict(file)
    assert np.array_equal(arrays["example_rows"], np.concatenate(planned))
    assert len(arrays["offsets"]) == arrays["shape"].prod() + 1
    assert arrays["offsets"][-1] == 4_998
    sums = np.add.reduceat(np.append(lengths[arrays["example_rows"]], 0), arrays["offsets"][:-1])
    assert sums[np.diff(arrays["offsets"]) > 0].max() <= 131_072
    assert (arrays["sp_degree"], arrays["capacity"]) == (2, 65_536)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.npz"]


def test_one_group_is_written_as_a_whole_plan(tmp_path: Path) -> None:
    lengths = long_context_mix(500, seed=4)
    writer = PlanWriter(tmp_path / "new" / "plan.npz")
    (group,) = plan_groups(lengths, SETTINGS, cost=LLAMA_2_7B)
    writer.add(group.plan)
    writer.close()
    assert StepPlan.load(tmp_path / "new" / "plan.npz").digest == group.plan.digest


def test_a_group_does_not_depend_on_the_others() -> None:
    lengths = long_context_mix(2_000, seed=5)
    plans = [group.plan.digest for group in plan_groups(lengths, SETTINGS, cost=LLAMA_2_7B, group=500)]
    again = list(plan_groups(lengths, SETTINGS, cost=LLAMA_2_7B, group=500))[2]
    assert again.plan.digest == plans[2]
    assert len(set(plans)) == 4

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longalign_ray.errors import CheckpointError, PlanMismatchError
from longalign_ray.train.checkpoint import TrainState, newest_checkpoint

STATE = TrainState(step=4, tokens_seen=100, plan_digest="abc", world_size=2, zero_stage=3)


def test_newest_is_by_step_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    for name, step in [("z", 2), ("a", 12), ("m", 8)]:
        (tmp_path / name).mkdir()
        replace(STATE, step=step).save(tmp_path / name)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    assert newest_checkpoint(tmp_path).name == "a"
    assert TrainState.load(tmp_path / "a").step == 12


def test_no_checkpoint_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="longalign train"):
        newest_checkpoint(tmp_path)


def test_only_the_same_run_may_continue() -> None:
    STATE.check(plan_digest="abc", world_size=2, zero_stage=3)
    with pytest.raises(PlanMismatchError, match="plan abc"):
        STATE.check(plan_digest="xyz", world_size=2, zero_stage=3)
    with pytest.raises(CheckpointError, match=r"train\.num_workers=2"):
        STATE.check(plan_digest="abc", world_size=4, zero_stage=3)
    with pytest.raises(CheckpointError, match=r"train\.zero_stage=3"):
        STATE.check(plan_digest="abc", world_size=2, zero_stage=1)

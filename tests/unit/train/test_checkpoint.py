from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longalign_ray.errors import CheckpointError, PlanMismatchError
from longalign_ray.train.checkpoint import TrainState

STATE = TrainState(step=4, tokens_seen=100, plan_digest="abc", world_size=2, zero_stage=3)


def test_a_state_reads_back(tmp_path: Path) -> None:
    state = replace(STATE, heldout_loss=1.5)
    state.save(tmp_path)
    assert TrainState.load(tmp_path) == state


@pytest.mark.parametrize("text", [None, "{", "[]", '{"step": 1}'])
def test_what_is_no_state_is_an_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        TrainState.load(tmp_path)


def test_only_the_same_data_and_a_like_zero_stage_may_continue() -> None:
    STATE.check(plan_digest="abc", zero_stage=3)
    replace(STATE, zero_stage=1).check(plan_digest="abc", zero_stage=2)
    with pytest.raises(PlanMismatchError, match="plan abc"):
        STATE.check(plan_digest="xyz", zero_stage=3)
    with pytest.raises(CheckpointError, match=r"train\.zero_stage=3"):
        STATE.check(plan_digest="abc", zero_stage=1)
    with pytest.raises(CheckpointError, match=r"train\.zero_stage=0"):
        replace(STATE, zero_stage=0).check(plan_digest="abc", zero_stage=1)


def test_another_number_of_ranks_needs_a_conversion() -> None:
    assert STATE.fits(world_size=2, zero_stage=3)
    assert not STATE.fits(world_size=1, zero_stage=3)
    assert not replace(STATE, zero_stage=1).fits(world_size=2, zero_stage=2)
    assert replace(STATE, zero_stage=0).fits(world_size=7, zero_stage=0)  # every rank has all of it

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longalign_ray.errors import CheckpointError, LongAlignError, PlanMismatchError
from longalign_ray.train.checkpoint import TrainState, export_model
from longalign_ray.train.engine import TrainEngine

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


def test_another_model_is_refused_and_an_older_state_is_of_any(tmp_path: Path) -> None:
    state = replace(STATE, model_digest="m1")
    state.save(tmp_path)
    TrainState.load(tmp_path).check(plan_digest="abc", zero_stage=3, model_digest="m1")
    with pytest.raises(
        CheckpointError, match=r"step 4 belongs to another model \(m1; model\.path now has m2\).*run_dir"
    ):
        TrainState.load(tmp_path).check(plan_digest="abc", zero_stage=3, model_digest="m2")
    state.check(plan_digest="abc", zero_stage=3)  # who starts the ranks has no model
    written = json.loads((tmp_path / "state.json").read_text())
    del written["model_digest"]
    (tmp_path / "state.json").write_text(json.dumps(written))
    TrainState.load(tmp_path).check(plan_digest="abc", zero_stage=3, model_digest="m2")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Error(s) in loading state_dict: size mismatch for model.lm_head.weight"), CheckpointError),
        (EOFError("Ran out of input"), CheckpointError),
        (RuntimeError("Connection closed by peer"), RuntimeError),  # which a new start may mend
        (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError),
    ],
)
def test_shards_that_do_not_load_are_an_error_of_the_checkpoint(
    tmp_path: Path, error: Exception, told: type[Exception]
) -> None:
    def load_checkpoint(*arguments: Any, **settings: Any) -> Any:
        raise error

    engine = TrainEngine.__new__(TrainEngine)
    engine._engine, engine._quantized = SimpleNamespace(load_checkpoint=load_checkpoint), False
    with pytest.raises(told, match=f"remove {tmp_path}" if told is CheckpointError else str(error)) as raised:
        engine.load(tmp_path)
    assert isinstance(raised.value, LongAlignError) == (told is CheckpointError)


def test_an_export_of_another_model_or_of_a_broken_shard_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    replace(STATE, zero_stage=0).save(tmp_path)
    shard = tmp_path / "deepspeed" / "mp_rank_00_model_states.pt"
    shard.parent.mkdir()
    shard.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        export_model(tmp_path, tiny_model_dir, tmp_path / "model", dtype="float32")
    torch.save({"module": {"model.lm_head.weight": torch.zeros(260, 64)}}, shard)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model .*size mismatch for lm_head.*model\.path"):
        export_model(tmp_path, tiny_model_dir, tmp_path / "model", dtype="float32")
    assert not (tmp_path / "model").exists()

"""Room for checkpoints: those that are kept and one more, less what is there; and one where the ranks write first."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import RunConfig
from longalign_ray.errors import LongAlignError, ModelError
from longalign_ray.run_dir import RunDir
from longalign_ray.train import disk
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore
from longalign_ray.train.disk import check_disk, checkpoint_bytes, tensor_shapes

SHAPES = {
    "model.embed_tokens.weight": [40, 10],
    "model.layers.0.self_attn.q_proj.weight": [20, 10],
    "model.layers.0.mlp.down_proj.weight": [10, 30],
    "model.norm.weight": [10],
    "lm_head.weight": [40, 10],
}
WEIGHTS = 400 + 200 + 300 + 10 + 400
ONE = 16 * WEIGHTS


def config_of(tmp_path: Path, *, dtype: str = "auto", **train: Any) -> RunConfig:
    return RunConfig.model_validate({"run_dir": str(tmp_path / "run"), "model": {"dtype": dtype}, "train": train})


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    head = json.dumps({"__metadata__": {}, **{name: {"shape": shape} for name, shape in SHAPES.items()}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    (tmp_path / "run").mkdir()
    return tmp_path


class Disks:
    """Free bytes of the disk of the run, and of that of the temporary directory if it is another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, temporary: int | None):
        self.run, usage = 0, namedtuple("usage", "free")

        def free(path: Path) -> Any:
            return usage(self.run if temporary is None or path != Path(tempfile.gettempdir()) else temporary)

        monkeypatch.setattr(shutil, "disk_usage", free)
        monkeypatch.setattr(disk, "_share_a_disk", lambda *paths: temporary is None)

    def just_suffice(self, config: RunConfig, model_dir: Path, needed: int, *, ranks_are_here: bool = True) -> None:
        """The run's disk needs so much, and not a byte less."""
        run_dir = RunDir(model_dir / "run")
        self.run = needed
        check_disk(config, run_dir, model_dir=model_dir, ranks_are_here=ranks_are_here)
        if needed:
            self.run = needed - 1
            with pytest.raises(LongAlignError, match=r"run_dir.*0\.0 GB free.*keep_checkpoints"):
                check_disk(config, run_dir, model_dir=model_dir, ranks_are_here=ranks_are_here)


def test_what_is_kept_and_one_more_and_one_that_is_staged_on_the_same_disk(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = Disks(monkeypatch, temporary=None)
    disks.just_suffice(config_of(tmp_path), model_dir, 4 * ONE)
    disks.just_suffice(config_of(tmp_path), model_dir, 3 * ONE, ranks_are_here=False)
    best = config_of(tmp_path, keep_checkpoints=1, keep_best=True, heldout_every=100)
    disks.just_suffice(best, model_dir, 4 * ONE)
    disks.run = 0
    in_a_bucket = config_of(tmp_path, checkpoint_storage="s3://bucket/runs")
    check_disk(in_a_bucket, RunDir(model_dir / "run"), model_dir=model_dir, ranks_are_here=False)
    with pytest.raises(LongAlignError, match="TMPDIR"):
        check_disk(in_a_bucket, RunDir(model_dir / "run"), model_dir=model_dir, ranks_are_here=True)


def test_a_resumed_run_needs_room_for_what_is_not_there_yet(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the size that a checkpoint was found to have; one is written before the oldest goes."""
    disks = Disks(monkeypatch, temporary=10 * ONE)
    store = CheckpointStore.at(model_dir / "run" / "train" / "checkpoints")
    for number, needed in enumerate((2_000, 1_000, 1_000), start=1):
        name = f"step-0000000{number}-1"
        (Path(store.path) / name).mkdir(parents=True)
        store.finish(name, 0, {"shard.pt": (1_000, "")}, TrainState(number, 0, "plan", 1, 3))
        disks.just_suffice(config_of(tmp_path), model_dir, needed)


def test_the_temporary_directory_holds_one(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disks(monkeypatch, temporary=ONE).just_suffice(config_of(tmp_path), model_dir, 3 * ONE)
    disks = Disks(monkeypatch, temporary=ONE - 1)
    disks.just_suffice(config_of(tmp_path), model_dir, 3 * ONE, ranks_are_here=False)
    with pytest.raises(LongAlignError, match=r"temporary directory .* a checkpoint, .* TMPDIR"):
        disks.just_suffice(config_of(tmp_path), model_dir, 3 * ONE)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 16 * WEIGHTS),
        ({"adapter": {"rank": 2}}, 16 * 2 * (30 + 40) + 4 * WEIGHTS),
        ({"adapter": {"rank": 2, "target_modules": ["q_proj"]}}, 16 * 2 * 30 + 4 * WEIGHTS),
        ({"adapter": {"rank": 2}, "dtype": "bfloat16"}, 16 * 2 * (30 + 40) + 2 * WEIGHTS),
        ({"adapter": {"rank": 2}, "use_gpu": True, "zero_stage": 2}, 16 * 2 * (30 + 40) + 4 * WEIGHTS),
    ],
)
def test_frozen_weights_take_less(tmp_path: Path, model_dir: Path, settings: dict[str, Any], expected: int) -> None:
    assert tensor_shapes(model_dir) == SHAPES
    assert checkpoint_bytes(config_of(tmp_path, **settings), SHAPES) == expected


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1", (99).to_bytes(8, "little") + b"{"]
)
def test_half_a_model_is_told_before_training(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        tensor_shapes(tmp_path)

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from longalign_ray.run_dir import digest
from longalign_ray.train.checkpoint_store import CheckpointStore
from longalign_ray.train.ray_checkpoints import Uploads


def test_what_killed_ranks_have_left_goes_with_the_first_rank_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ranks were there before; not what is of another run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = CheckpointStore.at(tmp_path / "checkpoints")
    left = [f"longalign-{digest(store.path)}-{rank}-abc" for rank in (0, 7, 12)]
    for name in (*left, "longalign-0123456789abcdef-0-abc"):
        (tmp_path / name / "deepspeed").mkdir(parents=True)
    Uploads(store, rank=8, local_rank=1)
    assert all((tmp_path / name).exists() for name in left)
    Uploads(store, rank=7, local_rank=0)
    assert [path.name for path in tmp_path.iterdir()] == ["longalign-0123456789abcdef-0-abc"]

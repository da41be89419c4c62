"""Two ranks, then one, then two again: the losses of an undisturbed run. Checkpoints in an object store."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from longalign_ray.errors import StorageError
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore, list_files
from tests.integration.resume_ranks import CASES, Case
from tests.integration.test_corpora import google_bucket, google_storage, s3, s3_bucket  # noqa: F401  (fixtures)

Rows = list[list[float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rows]]:
    command = [sys.executable, "-m", "tests.integration.resume_ranks", str(tmp_path_factory.mktemp("resume"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3_000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_numbers_of_ranks_continue_exactly(runs: dict[str, list[Rows]], case: Case) -> None:
    """As many ranks continue bitwise."""
    undisturbed, same, one_rank, two_again = runs[str(case)]
    assert same == undisturbed[2:4]
    assert [row[0] for row in undisturbed] == [0, 1, 2, 3, 4, 5]
    assert [row[0] for row in one_rank] == [2, 3]
    assert [row[0] for row in two_again] == [3, 4, 5]  # the checkpoint after step 3 was damaged
    for row in one_rank + two_again:
        assert row == pytest.approx(undisturbed[int(row[0])], rel=1e-5 if case.dtype == "float32" else 1e-2)
    losses = [loss for _, loss, _ in undisturbed]
    assert max(losses) - min(losses) > 0.01  # or equal losses would say nothing


@pytest.mark.parametrize(("scheme", "server"), [("s3", "s3"), ("gs", "google_storage")])
def test_checkpoints_in_an_object_store(
    tmp_path: Path, request: pytest.FixtureRequest, scheme: str, server: str
) -> None:
    endpoint = request.getfixturevalue(server)
    system = {"s3": s3_bucket, "gs": google_bucket}[scheme](endpoint, "runs")
    opened = CheckpointStore.at(f"{scheme}://runs/mine/checkpoints", endpoint=endpoint)
    store: CheckpointStore = pickle.loads(pickle.dumps(opened))  # as every rank gets it
    assert store.newest() is None
    for step in (2, 4, 6):
        local = tmp_path / str(step)
        (local / "deepspeed").mkdir(parents=True)
        (local / "deepspeed" / "shard.pt").write_bytes(bytes([step]) * 100_000)
        store.upload(local, f"step-0000000{step}-1")
        store.finish(f"step-0000000{step}-1", 0, list_files(local), TrainState(step, 0, "plan", 1, 3))
    with system.open_output_stream("runs/mine/checkpoints/step-00000006-1/deepspeed/shard.pt") as stream:
        stream.write(bytes([6]) * 99_999 + bytes([7]))
    newest = store.newest()
    assert newest is not None
    assert newest.state.step == 4
    if scheme == "s3":  # Google's library tries for 15 minutes
        gone = CheckpointStore.at("s3://runs/mine/checkpoints", endpoint="http://127.0.0.1:9")
        for ask in (gone.names, lambda: gone.problem(newest), lambda: gone.upload(tmp_path / "2", "step-00000002-2")):
            with pytest.raises(StorageError, match="runs/mine/checkpoints in s3 cannot be read or written"):
                ask()
    with store.local_copy(newest.name) as directory:
        assert (directory / "deepspeed" / "shard.pt").read_bytes() == bytes([4]) * 100_000
    store.prune(upto="step-00000006-1", keep=2, keep_best=False)
    assert store.names() == ["step-00000006-1", "step-00000004-1"]
    with system.open_output_stream("runs/mine/checkpoints/checkpoint_manager_snapshot.json") as stream:
        stream.write(b"{}")
    store.clear()
    assert system.get_file_info("runs/mine/checkpoints/checkpoint_manager_snapshot.json").type == fs.FileType.NotFound
    assert store.names() == []

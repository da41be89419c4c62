"""Checkpoints that are unfinished or damaged are passed over, and old ones are removed but for the best."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from longalign_ray.errors import CheckpointError, StorageError
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore, checkpoint_name, list_files

WORLD_SIZE = 2


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore.at(tmp_path / "checkpoints")


def write(
    store: CheckpointStore,
    directory: Path,
    step: int,
    *,
    heldout_loss: float | None = None,
    time: str = "1",
    ranks=(0, 1),
) -> Path:
    """A checkpoint of two ranks, as far as `ranks` got with it; returns its directory."""
    name = f"{checkpoint_name(step)[:13]}-{time}"
    state = TrainState(step, 10 * step, "plan", WORLD_SIZE, 3, heldout_loss)
    for rank in ranks:
        local = directory / f"{name}-rank-{rank}"
        (local / "deepspeed").mkdir(parents=True)
        (local / "latest").write_text("deepspeed")  # both ranks have this one
        (local / "deepspeed" / f"shard-{rank}.pt").write_bytes(bytes([step, rank]) * 3_000)
        files = list_files(local)
        store.upload(local, name)
        store.finish(name, rank, files, state if rank == 0 else None)
    return Path(store.path_of(name))


def names(store: CheckpointStore) -> list[int]:
    return [int(name[5:13]) for name in store.names()]


def test_the_newest_is_by_step_and_nothing_but_it_is_read(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (2, 12, 8):
        write(store, tmp_path, step)
    newest = store.newest()
    assert newest is not None
    assert newest.state == TrainState(12, 120, "plan", WORLD_SIZE, 3)
    assert sorted(newest.files) == ["deepspeed/shard-0.pt", "deepspeed/shard-1.pt", "latest"]
    assert newest.files["deepspeed/shard-0.pt"][0] == 6_000


def test_no_checkpoint_is_none(store: CheckpointStore) -> None:
    assert store.newest() is None


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[4_321] ^= 1
    shard.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: flip(path / "deepspeed" / "shard-1.pt"), "damaged.*shard-1.pt has other bytes"),
    "truncated": (
        lambda path: (path / "deepspeed" / "shard-1.pt").write_bytes(b"\x08\x01" * 2_999),
        "damaged.*shard-1.pt has 5,998 bytes instead of 6,000",
    ),
    "missing": (lambda path: (path / "deepspeed" / "shard-0.pt").unlink(), "damaged.*shard-0.pt is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "not finished: it has no state.json"),
    "half a state": (lambda path: (path / "state.json").write_text('{"step": 8'), "state.json cannot be read"),
    "a rank short": (lambda path: (path / "files-00001.json").unlink(), "not finished: it has no files-00001.json"),
    "half a list": (lambda path: (path / "files-00001.json").write_text('{"deep'), "files-00001.json cannot be read"),
    "no list": (lambda path: (path / "files-00001.json").write_text("[1]"), "files-00001.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_one_is_named_and_the_one_before_is_used(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write(store, tmp_path, 4)
    bad = write(store, tmp_path, 8)
    assert store.newest().state.step == 8  # type: ignore[union-attr]
    spoil, warning = DAMAGES[damage]
    spoil(bad)
    with caplog.at_level("WARNING"):
        newest = store.newest()
    assert newest is not None
    assert newest.state.step == 4
    assert len(caplog.messages) == 1
    assert bad.name in caplog.messages[0]
    assert re.search(warning, caplog.messages[0])


def test_all_damaged_is_an_error_but_unfinished_ones_are_none(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, tmp_path, 2, ranks=(0,))  # killed in its first checkpoint: there was never one
    assert store.newest() is None
    for step in (4, 8):
        flip(write(store, tmp_path, step) / "deepspeed" / "shard-1.pt")
    with pytest.raises(CheckpointError, match=r"all 2 finished checkpoints .* damaged"):
        store.newest()


def test_the_ranks_together_read_everything(store: CheckpointStore, tmp_path: Path) -> None:
    stored = store.read(write(store, tmp_path, 8).name)
    flip(Path(store.path_of(stored.name)) / "deepspeed" / "shard-1.pt")
    problems = [store.problem(stored, part=part, parts=3) for part in range(3)]
    assert sum(problem is not None for problem in problems) == 1
    assert store.problem(stored, parts=0) is None


def test_the_best_is_by_heldout_loss(store: CheckpointStore, tmp_path: Path) -> None:
    for step, loss in [(2, 1.5), (4, 1.2), (6, None), (8, 1.2), (10, 1.4)]:
        write(store, tmp_path, step, heldout_loss=loss)
    best = store.newest(best=True)
    assert best is not None
    assert best.state.step == 8  # the newest of equals
    flip(Path(store.path_of(best.name)) / "deepspeed" / "shard-0.pt")
    assert store.newest(best=True).state.step == 4  # type: ignore[union-attr]


def test_without_a_heldout_loss_the_best_is_the_newest(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (2, 4):
        write(store, tmp_path, step)
    assert store.newest(best=True).state.step == 4  # type: ignore[union-attr]


def test_old_ones_go_but_for_the_best(store: CheckpointStore, tmp_path: Path) -> None:
    for step, loss in [(2, 1.5), (4, 1.2), (6, 1.6), (8, 1.7)]:
        write(store, tmp_path, step, heldout_loss=loss)
    write(store, tmp_path, 5, ranks=(0,))
    upto = write(store, tmp_path, 10)
    write(store, tmp_path, 12, ranks=(1,))  # is being written
    store.prune(upto=upto.name, keep=2, keep_best=True)
    assert names(store) == [12, 10, 8, 4]
    store.prune(upto=upto.name, keep=1, keep_best=False)
    assert names(store) == [12, 10]


def test_pruning_reads_no_list_of_files(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a rank: with a thousand ranks in an object store the next checkpoint would wait for them."""
    for step in (2, 4, 6):
        upto = write(store, tmp_path, step)
    read, original = [], CheckpointStore._read
    monkeypatch.setattr(CheckpointStore, "_read", lambda self, name: read.append(name) or original(self, name))
    store.prune(upto=upto.name, keep=2, keep_best=True)
    assert names(store) == [6, 4]
    assert len(read) == 3
    assert all(name.endswith("/state.json") for name in read)


def test_a_step_taken_again_counts_once(store: CheckpointStore, tmp_path: Path) -> None:
    """The first of step 6 may be damaged, as it was passed over: that of step 4 has to stay."""
    write(store, tmp_path, 4)
    write(store, tmp_path, 6, time="1")
    again = write(store, tmp_path, 6, time="2")
    store.prune(upto=again.name, keep=2, keep_best=False)
    assert store.names() == [again.name, again.name.replace("6-2", "4-1")]


def test_clearing_leaves_what_is_not_ours(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, tmp_path, 4)
    for name in ("checkpoint_manager_snapshot.json", "notes.txt"):
        (Path(store.path) / name).write_text("{}")
    (Path(store.path) / "other").mkdir()
    store.clear()
    assert sorted(path.name for path in Path(store.path).iterdir()) == ["notes.txt", "other"]


def test_a_store_travels_to_the_ranks(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, tmp_path, 4)
    assert pickle.loads(pickle.dumps(store)).names() == store.names()
    assert json.loads(Path(store.path_of(store.names()[0]), "files-00000.json").read_bytes())


def test_an_unreachable_store_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"train\.checkpoint_storage = nowhere://bucket/path"):
        CheckpointStore.at("nowhere://bucket/path")


def test_what_cannot_be_looked_at_is_not_taken_for_damaged(store: CheckpointStore, tmp_path: Path) -> None:
    """Else a store that fails for a moment would cost steps, and the best checkpoint."""
    for step in (2, 4, 6, 8):
        upto = write(store, tmp_path, step, heldout_loss=step)
    hidden = upto.with_name("step-00000002-1") / "state.json"
    content = hidden.read_bytes()
    hidden.unlink()
    hidden.mkdir()  # a file that cannot be opened, whoever tries
    told = f"the checkpoints below {store.path} cannot be read or written .* the same command then continues"
    for look in (store.newest, lambda: store.prune(upto=upto.name, keep=2, keep_best=True)):
        with pytest.raises(StorageError, match=told):
            look()
    assert names(store) == [8, 6, 4, 2]
    hidden.rmdir()
    hidden.write_bytes(content)
    store.prune(upto=upto.name, keep=2, keep_best=True)
    assert names(store) == [8, 6, 2]


def test_a_store_that_cannot_be_written_is_named(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    for ask in (lambda: write(store, tmp_path, 2), store.names):
        with pytest.raises(StorageError, match=f"below {store.path} cannot be read or written"):
            ask()

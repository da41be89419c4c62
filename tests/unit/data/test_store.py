"""Examples come back bit for bit, from the store by row and from packed blocks by slot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.packed import PackReader, num_packed_files, steps_for_block, write_layout, write_packed_file
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import BatchFile, Example, ExampleIndex, Pack, TokenStore, part_name, write_examples
from longalign_ray.errors import PackFormatError, PlanMismatchError

WEIGHTS = np.array([0, 0, 0, 7, 30, 100], np.uint8)


def random_examples(number: int, *, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(f"example-{i}", random.integers(0, 2**31 - 1, n, dtype=np.int32), random.choice(WEIGHTS, n))
        for i, n in enumerate(random.integers(1, 40, number).tolist())
    ]


def write_store(directory: Path, parts: list[list[Example]]) -> TokenStore:
    directory.mkdir()
    for number, examples in enumerate(parts):
        write_examples(directory / part_name(number), examples)
    flat = [example for part in parts for example in part]
    ExampleIndex(
        example_id=np.array([example.example_id for example in flat], dtype=object),
        length=np.array([example.length for example in flat], np.int32),
        num_targets=np.array([example.num_targets for example in flat], np.int32),
        sum_weights=np.array([example.sum_weights for example in flat]),
        file=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        row=np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts]),
        source=np.full(len(flat), "corpus", object),
        heldout=np.zeros(len(flat), np.bool_),
        parts=tuple(part_name(number) for number in range(len(parts))),
    ).save(directory / "index.parquet")
    return TokenStore(directory)


def assert_equal(one: Example, other: Example) -> None:
    assert one.example_id == other.example_id
    assert one.input_ids.dtype == np.int32
    assert one.loss_weight.dtype == np.uint8
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.loss_weight, other.loss_weight)


def test_rows_come_back_across_files_and_record_batches(tmp_path: Path) -> None:
    examples = random_examples(2_500)
    store = write_store(tmp_path / "store", [examples[:1_500], [], examples[1_500:]])
    assert len(store.index) == 2_500
    for row in [0, 1, 1_023, 1_024, 1_499, 1_500, 2_499]:
        assert_equal(store.example(row), examples[row])


def test_few_files_are_open_and_the_index_is_read_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longalign_ray.data.store.MAX_OPEN_FILES", 2)
    opened: list[str] = []

    class Watched(BatchFile):
        def __init__(self, path: Path):
            opened.append(path.name)
            super().__init__(path)

    monkeypatch.setattr("longalign_ray.data.store.BatchFile", Watched)
    examples = random_examples(8)
    store = write_store(tmp_path / "store", [examples[n : n + 2] for n in range(0, 8, 2)])
    for row in (0, 1, 2, 3, 7, 0):
        assert_equal(store.example(row), examples[row])
    assert opened == [part_name(number) for number in (0, 1, 3, 0)]
    assert len(store) == 8
    assert "index" not in vars(store)


def test_first_token_is_never_a_target() -> None:
    example = Example("a", np.arange(3, dtype=np.int32), np.array([100, 0, 29], np.uint8))
    assert (example.num_targets, example.sum_weights) == (1, 0.29)


def test_pack_of_by_hand() -> None:
    one = Example("a", np.array([1, 2, 3], np.int32), np.array([0, 100, 30], np.uint8))
    two = Example("b", np.array([4, 5], np.int32), np.array([0, 1], np.uint8))
    pack = Pack.of([one, two])
    assert pack.cu_seqlens.tolist() == [0, 3, 5]
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert pack.loss_weight.tolist() == [0, 100, 30, 0, 1]
    assert pack.example_ids == ("a", "b")


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    examples = random_examples(60)
    return write_store(tmp_path / "store", [examples[:20], examples[20:]])


def plan_for(store: TokenStore, world_size: int) -> StepPlan:
    settings = PlanSettings(strategy="best_fit", capacity=64, packs_per_step=5, world_size=world_size)
    return make_plan(store.index, settings, cost=SequenceCost(1.0, 0.1))


def write_packed(store: TokenStore, plan: StepPlan, directory: Path, *, steps_per_file: int = 3) -> None:
    directory.mkdir()
    for number in range(num_packed_files(plan, steps_per_file)):
        write_packed_file(store, plan, number, steps_per_file=steps_per_file, directory=directory)
    write_layout(directory, plan, steps_per_file=steps_per_file)


def test_packed_blocks_equal_the_store_in_every_slot(store: TokenStore, tmp_path: Path) -> None:
    plan = plan_for(store, world_size=2)
    write_packed(store, plan, tmp_path / "packed")
    sorted_blocks = PackReader(plan, store_dir=store.directory, packed_dir=tmp_path / "packed")
    gathered = PackReader(plan, store_dir=store.directory, packed_dir=tmp_path / "nowhere")
    assert sorted_blocks.is_sequential
    assert not gathered.is_sequential
    seen = []
    empty = 0
    for step, micro_step, group in np.ndindex(*plan.shape):
        one, other = sorted_blocks.pack(step, micro_step, group), gathered.pack(step, micro_step, group)
        if one is None or other is None:
            assert one is other
            empty += 1
            continue
        assert one.example_ids == other.example_ids
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.loss_weight, other.loss_weight)
        np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)
        seen += one.example_ids
    assert sorted(seen) == sorted(store.index.example_id)
    assert empty >= plan.num_steps  # 5 packs in 3 x 2 slots


@pytest.mark.parametrize("block_bytes", [1, 100, 1_000, 5_000, 10**9])
def test_a_file_of_packed_blocks_holds_no_more_steps_than_it_needs(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("longalign_ray.data.packed.BLOCK_BYTES", block_bytes)
    plan = plan_for(store, world_size=2)
    steps, bytes_per_step = steps_for_block(plan), 5 * store.index.length.sum() / plan.num_steps
    assert steps * bytes_per_step >= block_bytes > (steps - 1) * bytes_per_step


def test_another_world_size_reads_row_by_row(store: TokenStore, tmp_path: Path) -> None:
    write_packed(store, plan_for(store, world_size=2), tmp_path / "packed")
    reader = PackReader(plan_for(store, world_size=4), store_dir=store.directory, packed_dir=tmp_path / "packed")
    assert not reader.is_sequential
    pack = reader.pack(0, 0, 3)
    assert pack is not None
    assert pack.example_ids == tuple(store.index.example_id[reader.plan.slot(0, 0, 3)])


def test_missing_and_foreign_files_are_named(store: TokenStore, tmp_path: Path) -> None:
    (store.directory / part_name(1)).unlink()
    with pytest.raises(PackFormatError, match="part-00001"):
        TokenStore(store.directory).example(30)
    (tmp_path / "junk.arrow").write_bytes(b"junk")
    with pytest.raises(PackFormatError, match=r"junk\.arrow"):
        BatchFile(tmp_path / "junk.arrow")
    with pytest.raises(PackFormatError, match="longalign prepare"):
        TokenStore(tmp_path)


def test_plan_of_another_store_is_refused(store: TokenStore, tmp_path: Path) -> None:
    small = write_store(tmp_path / "small", [random_examples(5)])
    with pytest.raises(PlanMismatchError, match="does not belong"):
        PackReader(plan_for(store, 2), store_dir=small.directory, packed_dir=tmp_path / "packed")


@pytest.mark.parametrize("column", ["length", "sum_weights"])
def test_plan_of_the_same_store_made_otherwise_is_refused(store: TokenStore, tmp_path: Path, column: str) -> None:
    """As many rows, but the last has a token more, or weighs more."""
    changed = getattr(store.index, column).copy()
    changed[-1] += 1
    replace(store.index, **{column: changed}).save(store.directory / "index.parquet")
    with pytest.raises(PlanMismatchError, match="does not belong"):
        PackReader(plan_for(store, 2), store_dir=store.directory, packed_dir=tmp_path / "packed")

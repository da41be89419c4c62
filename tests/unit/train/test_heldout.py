from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longalign_ray.train.heldout import heldout_loss, heldout_packs, is_due, length_bucket
from longalign_ray.train.model import prepare_model
from tests.integration import watched_ranks
from tests.unit.train.process_group import alone


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, "0-4k"), (4_096, "0-4k"), (4_097, "4-8k"), (8_192, "4-8k"), (8_193, "8-16k"), (65_537, "64-128k")],
)
def test_buckets_double_from_4k(length: int, bucket: str) -> None:
    assert length_bucket(length) == bucket


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [7]), (0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (9, [7])]
)
def test_when_it_is_due(every: int | None, expected: list[int]) -> None:
    assert [done for done in range(1, 8) if is_due(done, 7, every)] == expected


def test_one_rank_equals_one_sequence_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, with buckets of 16 tokens, weights in per cent, and an example without a target."""
    for module in ("longalign_ray.train.heldout", "tests.integration.watched_ranks"):
        monkeypatch.setattr(f"{module}.length_bucket", lambda length: f"{length // 16}")
    packs = watched_ranks.write_training(tmp_path, world_size=1)
    heldout = heldout_packs(packs)
    assert heldout is not None
    assert sorted(heldout.plan.example_rows.tolist()) == watched_ranks.scored_rows(packs.store.index)
    model = prepare_model(watched_ranks.build(torch.float64, packed=True), gradient_checkpointing=True, head_chunk=8)
    with alone():
        measured = heldout_loss(model, heldout)
    assert model.training
    expected = watched_ranks.reference(packs)
    assert measured.loss == pytest.approx(expected["loss"], rel=1e-12)
    assert measured.token_loss == pytest.approx(expected["token_loss"], rel=1e-12)
    assert abs(measured.loss - measured.token_loss) > 1e-3, "the two means would be the same number here"
    assert len(measured.by_length) > 1
    assert list(measured.by_length) == list(expected["by_length"]), "not the shortest first"
    assert measured.by_length == pytest.approx(expected["by_length"], rel=1e-12)


def test_a_store_without_heldout_examples_has_no_heldout_loss(tmp_path: Path) -> None:
    packs = watched_ranks.write_training(tmp_path, world_size=1)
    packs.store.index.heldout[:] = False
    assert heldout_packs(packs) is None


def test_ranks_take_equally_many_passes_and_every_example_once(tmp_path: Path) -> None:
    packs = watched_ranks.write_training(tmp_path, world_size=4)
    heldout = heldout_packs(packs)
    assert heldout is not None
    assert heldout.plan.shape[1:] == (1, 4)
    assert np.bincount(heldout.plan.example_rows).max() == 1
    assert heldout.plan.slot_tokens().max() <= watched_ranks.CAPACITY

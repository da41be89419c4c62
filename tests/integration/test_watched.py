"""What is watched while ranks train under ZeRO-3: the same on one and two ranks, and it does not disturb training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.ranks import run_two


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    """What each of two ranks printed."""
    return run_two("tests.integration.watched_ranks", directory)


def heldout(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("step", "heldout_loss", "heldout_token_loss", "heldout_by_length")
    return [{name: row[name] for name in names} for row in rows if "heldout_loss" in row]


def test_heldout_loss_is_that_of_one_sequence_at_a_time(ranks: list[dict[str, Any]]) -> None:
    """The last one, after all updates; tests/unit/train/test_heldout.py holds one rank to the same reference."""
    rows = ranks[0]["rows"]
    measured, expected = heldout(rows), ranks[0]["reference"]
    assert [row["step"] + 1 for row in measured] == sorted({*range(2, len(rows) + 1, 2), len(rows)})
    for found in (measured[-1], *ranks[0]["shared"]):  # ranks with a pack each, and ranks that share them
        assert found["heldout_loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["heldout_token_loss"] == pytest.approx(expected["token_loss"], rel=1e-5)
        assert found["heldout_by_length"] == pytest.approx(expected["by_length"], rel=1e-5)
    assert measured[0]["heldout_loss"] != pytest.approx(expected["loss"], rel=1e-3), "training did nothing"


def test_measuring_it_leaves_training_as_it_was(ranks: list[dict[str, Any]]) -> None:
    watched, unwatched = ranks[0]["rows"], ranks[0]["without"]
    assert [row["loss"] for row in watched] == [row["loss"] for row in unwatched]
    assert not heldout(unwatched)


def test_every_rank_sees_the_same(ranks: list[dict[str, Any]]) -> None:
    assert heldout(ranks[0]["rows"]) == heldout(ranks[1]["rows"])
    for name in ("loss", "seen_imbalance", "data_seconds", "max_memory_gb"):
        assert [row[name] for row in ranks[0]["rows"]] == [row[name] for row in ranks[1]["rows"]]


def test_a_row_has_the_seen_imbalance_and_no_mfu_on_a_cpu(ranks: list[dict[str, Any]]) -> None:
    rows = ranks[0]["rows"]
    assert all(1 < row["seen_imbalance"] <= 2 for row in rows)
    assert all(0 < row["data_seconds"] < row["seconds"] for row in rows)
    assert {row["mfu"] for row in rows} == {None}


def test_each_rank_leaves_a_trace_of_the_step_asked_for(ranks: list[dict[str, Any]], directory: Path) -> None:
    assert len(ranks[0]["rows"]) > 2
    names = sorted(file.name for file in (directory / "profile").iterdir())
    assert names == ["steps-1-1-rank-0.json.gz", "steps-1-1-rank-1.json.gz"]


def test_a_loss_that_is_no_number_on_one_rank_stops_both(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["messages"] == ranks[1]["messages"]
    expected = "the loss of step 1 is nan: not finite on rank 1 of 2, whose examples were rank 1, micro-step 0: e"
    assert ranks[0]["messages"]["loss-3"].startswith(expected)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_gradient_that_is_no_number_stops_though_the_loss_is_one(ranks: list[dict[str, Any]], stage: int) -> None:
    """DeepSpeed itself would go on: without an update, or in ZeRO-0 with weights that are no numbers."""
    expected = (
        "the gradient norm of step 1 is inf: not finite, though the loss is, on rank 0, 1 of 2, whose examples were"
    )
    assert ranks[0]["messages"][f"gradient-{stage}"].startswith(expected)

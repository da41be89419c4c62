"""Checkpoints copied from a GPU into pinned memory; runs where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.train.test_async_checkpoint import check_copies

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_files_hold_what_there_was_when_training_went_on(tmp_path: Path) -> None:
    check_copies(tmp_path, device="cuda")

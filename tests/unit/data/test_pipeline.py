from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.packed import keep_if_same
from longalign_ray.data.pipeline import choose_heldout


def names(number: int) -> np.ndarray:
    return np.array([f"e{i}" for i in range(number)], dtype=object)


def test_heldout_number_and_cap() -> None:
    assert choose_heldout(names(200), fraction=0.05, at_most=64, seed=0).sum() == 10
    assert choose_heldout(names(200), fraction=0.5, at_most=64, seed=0).sum() == 64
    assert choose_heldout(names(200), fraction=0.0, at_most=64, seed=0).sum() == 0


def test_heldout_depends_on_seed_and_name_not_on_order() -> None:
    chosen = choose_heldout(names(200), fraction=0.1, at_most=64, seed=0)
    backwards = choose_heldout(names(200)[::-1], fraction=0.1, at_most=64, seed=0)[::-1]
    assert chosen.tolist() == backwards.tolist()
    assert chosen.tolist() != choose_heldout(names(200), fraction=0.1, at_most=64, seed=1).tolist()


def test_more_data_moves_few() -> None:
    before = set(np.flatnonzero(choose_heldout(names(200), fraction=0.1, at_most=64, seed=0)))
    after = set(np.flatnonzero(choose_heldout(names(220), fraction=0.1, at_most=64, seed=0)))
    assert len(before & after) >= 15


def test_a_directory_is_kept_only_for_the_same_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "packed"
    keep_if_same(directory, "one")
    for name in ("part-00000.arrow", "part-00001.arrow.0a.tmp"):
        (directory / name).touch()
    keep_if_same(directory, "one")
    assert sorted(path.name for path in directory.iterdir()) == ["fingerprint", "part-00000.arrow"]

    class Killed(BaseException):
        pass

    def half_way(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_way)
        with pytest.raises(Killed):
            keep_if_same(directory, "two")
    keep_if_same(directory, "one")  # what is left of it is not taken for whole
    assert sorted(path.name for path in directory.iterdir()) == ["fingerprint"]

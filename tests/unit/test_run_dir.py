from __future__ import annotations

from pathlib import Path

import pytest

from longalign_ray.errors import DiskError
from longalign_ray.run_dir import STAGES, Manifest, RunDir, digest, whole_file, write_json

MANIFEST = Manifest(
    stage="prepare",
    config_digest="0123456789abcdef",
    inputs=["a.jsonl"],
    outputs=["store"],
    counts={"examples": 3, "fill": 0.5},
    dropped_by_reason={"empty answer": 1},
    versions={"ray": "2.60.0"},
    seconds=1.5,
)


def test_every_artefact_is_below_the_root_and_has_its_own_name(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    names = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [getattr(run_dir, name) for name in names] + [run_dir.manifest(stage) for stage in STAGES]
    assert len(names) > 10
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_manifest_reads_back_equal(tmp_path: Path) -> None:
    path = RunDir(tmp_path / "new").manifest("prepare")
    MANIFEST.save(path)
    assert Manifest.load(path) == MANIFEST
    assert [file.name for file in path.parent.iterdir()] == ["manifest.json"]  # no temporary file stays


@pytest.mark.parametrize("content", [None, b"", b'{"stage": "pre', b"[1]", b'{"stage": "x"}', b"\xff"])
def test_manifest_that_is_missing_or_broken_means_not_done(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    assert Manifest.load(path) is None


def test_digest_depends_on_values_and_not_on_key_order() -> None:
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert len({digest(value) for value in (1, "1", [1], [[1]], None, {"1": 1}, 1.5)}) == 7
    assert digest("é", Path("x")) == digest("é", Path("x"))
    assert len(digest()) == 16


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    """One that was given up and ends late leaves a whole file too."""
    path = tmp_path / "part"
    with whole_file(path) as late, late.open("w") as file:
        print("late,", file=file, end="", flush=True)
        with whole_file(path) as other:
            other.write_text("other")
        print(" but whole", file=file, end="", flush=True)
        assert path.read_text() == "other"
    assert path.read_text() == "late, but whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x.json", tmp_path / "directory"):
        (tmp_path / "directory").mkdir(exist_ok=True)
        with pytest.raises(DiskError, match=f"{place.parent} cannot be written; is there space left"):
            write_json(place, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x" / "report.json"
    write_json(path, {"a": "长"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "长"\n}\n'

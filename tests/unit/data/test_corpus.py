from __future__ import annotations

from pathlib import Path

import pytest

from longalign_ray.data.corpus import corpus_files, cut_into_slices, read_lines
from longalign_ray.errors import CorpusError


@pytest.mark.parametrize("slice_bytes", [1, 7, 64, 10_000])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_slices_hold_every_line_once_with_its_number(tmp_path: Path, slice_bytes: int, ending: str) -> None:
    lines = [f"line {i} " + "x" * (i % 13) for i in range(1, 60)]
    lines[10] = ""  # line 11 is blank and is not given
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + ending)
    slices = cut_into_slices(path, slice_bytes=slice_bytes)
    assert [part.start for part in slices[1:]] == [part.end for part in slices[:-1]]
    read = [(number, line.decode()) for part in slices for number, line in read_lines(part)]
    assert read == [(number, line) for number, line in enumerate(lines, 1) if line]


def test_an_empty_file_has_no_slice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert cut_into_slices(tmp_path / "a.jsonl") == []


def test_patterns_are_sorted_and_missing_files_named(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in corpus_files([f"{tmp_path}/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(CorpusError, match=r"c\.jsonl does not exist"):
        corpus_files([f"{tmp_path}/c.jsonl"])
    with pytest.raises(CorpusError, match="matches no file"):
        corpus_files([f"{tmp_path}/*.json"])
    with pytest.raises(CorpusError, match="is a directory"):
        corpus_files([str(tmp_path)])

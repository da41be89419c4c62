"""A part of the store has a name by all that it depends on, and by nothing else."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import CorpusConfig
from longalign_ray.data.corpus_files import source_files
from longalign_ray.data.store_parts import StorePart, remove_others, store_parts
from longalign_ray.errors import CorpusError


def parts_of(contents: Any = None, **corpus: Any) -> tuple[list[StorePart], list[str]]:
    config = CorpusConfig(**corpus)
    return store_parts(config, config.named, source_files(config, config.named), contents)


def names_of(contents: Any = None, **corpus: Any) -> list[str]:
    parts, problems = parts_of(contents, **corpus)
    assert not problems
    return [part.name for part in parts]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    return [str(tmp_path / f"{name}.jsonl") for name in "abc"]


def test_names_stay_while_the_corpus_changes_around_them(paths: list[str]) -> None:
    a, b, c = names_of(paths=paths)
    assert len({a, b, c}) == 3
    assert names_of(paths=[paths[2], paths[0]]) == [c, a]
    sources = {"x": {"paths": paths[1:]}, "y": {"paths": [paths[0], paths[1]]}}
    assert names_of(sources=sources) == [b, c, a, b]  # a file of two sources is one part


def test_what_a_part_depends_on_changes_its_name(paths: list[str]) -> None:
    before = names_of(paths=paths)
    assert not set(before) & set(names_of("other settings", paths=paths))
    assert not set(before) & set(names_of(paths=paths, style="text"))
    os.utime(paths[1], ns=(1, 1))
    assert [one == other for one, other in zip(before, names_of(paths=paths), strict=True)] == [True, False, True]


def test_another_size_is_another_file_at_the_same_time_of_change(tmp_path: Path) -> None:
    """Of a compressed file, whose slice has no end that would tell."""
    path, names = tmp_path / "a.jsonl.gz", []
    for text in ("one", "one and more"):
        path.write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
        os.utime(path, ns=(1, 1))
        names += names_of(paths=[str(path)])
    assert names[0] != names[1]


def test_files_that_cannot_be_cut_are_named_with_their_setting(paths: list[str], tmp_path: Path) -> None:
    for name in ("cut.parquet", "broken.jsonl.gz"):
        (tmp_path / name).write_bytes(b"no such thing")
    sources = {"x": {"paths": [str(tmp_path / "cut.parquet"), paths[0]]}, "y": {"paths": [f"{tmp_path}/*.gz"]}}
    parts, problems = parts_of(sources=sources)
    assert [(part.source, part.setting, part.slice.path) for part in parts] == [
        ("x", "corpus.sources.x.paths", paths[0])
    ]
    assert len(problems) == 2
    assert problems[0].startswith(f"corpus.sources.x.paths: {tmp_path}/cut.parquet cannot be read")
    assert problems[1].startswith(f"corpus.sources.y.paths: {tmp_path}/broken.jsonl.gz cannot be read")
    sources = {"x": {"paths": ["/no/x.jsonl"]}, "y": {"paths": ["/no/y.jsonl"]}}
    with pytest.raises(
        CorpusError, match=r"sources\.x\.paths: /no/x.jsonl does[^\n]*\n.*sources\.y\.paths: /no/y.jsonl"
    ):
        parts_of(sources=sources)


def test_others_are_removed_and_the_index_that_names_them(tmp_path: Path) -> None:
    files = ["part-a.arrow", "part-a.json", "part-b.arrow", "part-b.json", "part-b.json.0c.tmp", "index.parquet"]
    for name in files:
        (tmp_path / name).touch()

    def left() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    remove_others(tmp_path, None)
    assert left() == sorted(set(files) - {"part-b.json.0c.tmp"})
    remove_others(tmp_path, {"part-a", "part-b"})
    assert "index.parquet" in left()
    remove_others(tmp_path, {"part-a"})
    assert left() == ["part-a.arrow", "part-a.json"]

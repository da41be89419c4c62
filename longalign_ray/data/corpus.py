"""Corpus files cut into slices of whole lines, so that one large file is read by many tasks."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longalign_ray.errors import CorpusError

SLICE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CorpusSlice:
    """Bytes start..end of a file, which are whole lines; the first of them has number first_line (from 1)."""

    path: str
    start: int
    end: int
    first_line: int


def corpus_files(patterns: Sequence[str]) -> list[Path]:
    """Files of the patterns in their order, each pattern's own sorted by name.

    Raises CorpusError where a pattern matches nothing or a file cannot be read.
    """
    files: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise CorpusError(f"corpus.paths: {pattern} matches no file; check the pattern")
        for match in matches:
            if not Path(match).is_file():
                state = "is a directory" if Path(match).is_dir() else "does not exist"
                raise CorpusError(f"corpus.paths: {match} {state}; give JSONL files or a pattern such as data/*.jsonl")
        files += [Path(match) for match in matches]
    return files


def cut_into_slices(path: Path, *, slice_bytes: int = SLICE_BYTES) -> list[CorpusSlice]:
    """Slices of about slice_bytes each, cut after a line break; an empty file has none. Raises CorpusError."""
    slices: list[CorpusSlice] = []
    start, first_line, position, line = 0, 1, 0, 1
    try:
        with path.open("rb") as file:
            while part := file.read(slice_bytes):
                part += file.readline()  # up to the end of the line that the cut went through
                position += len(part)
                line += part.count(b"\n")
                slices.append(CorpusSlice(str(path), start, position, first_line))
                start, first_line = position, line
    except OSError as error:
        raise CorpusError(f"corpus.paths: {path} cannot be read ({error.strerror}); check its permissions") from error
    return slices


def read_lines(part: CorpusSlice) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank."""
    with open(part.path, "rb") as file:
        file.seek(part.start)
        for number, line in enumerate(file.read(part.end - part.start).split(b"\n"), part.first_line):
            if line.strip():
                yield number, line

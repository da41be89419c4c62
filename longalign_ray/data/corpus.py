"""Corpus files cut into slices that tasks read alone, and the records of a slice.

Plain JSONL is cut by bytes, after a line break, and Parquet by row groups, so that many tasks read one large file; a
compressed file or a JSON array can be read from its beginning alone and is one slice.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from longalign_ray.data.corpus_files import CorpusFile, corpus_files, open_plain, open_random, unreadable
from longalign_ray.data.hub_datasets import hub_shards, read_hub_shard
from longalign_ray.data.record_readers import CHUNK_BYTES, read_json_array, read_jsonl, read_parquet
from longalign_ray.data.record_styles import RecordError

__all__ = ["CorpusSlice", "corpus_files", "cut_into_slices", "read_records"]

SLICE_BYTES = 16 << 20  # of text: about as many bytes of tokens
TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class CorpusSlice:
    """Part `start` to `end` of a file; its first record has number first_line (from 1).

    start and end count bytes of plain JSONL, row groups of Parquet and shards of a hub's data set; end = -1: all.
    """

    path: str
    start: int
    end: int
    first_line: int
    format: Literal["jsonl", "json", "parquet", "hf"] = "jsonl"
    compression: Literal["gzip", "zstd"] | None = None
    endpoint: str | None = None
    version: str = ""

    @property
    def file(self) -> CorpusFile:
        return CorpusFile(self.path, self.format, self.compression, version=self.version, endpoint=self.endpoint)


def cut_into_slices(file: CorpusFile, *, slice_bytes: int = SLICE_BYTES) -> list[CorpusSlice]:
    """Slices of plain JSONL of about slice_bytes each, else one a row group or file; an empty file has none.

    Raises CorpusError where the file cannot be read.
    """
    with _naming(file.path):
        if file.format == "hf":
            return [_slice(file, number, number + 1) for number in range(hub_shards(file.path, file.version))]
        if file.format == "json":
            first = _first_byte(file)
            if first in (b"", b"["):
                return [_slice(file, 0, -1)] if first else []
        if file.format == "parquet":
            return _row_groups(file) if file.compression is None else [_slice(file, 0, -1)]
        if file.compression is not None:
            return [_slice(file, 0, -1)] if _first_byte(file) else []
        return _cut_lines(file, slice_bytes)


def read_records(part: CorpusSlice) -> Iterator[tuple[int, Any | RecordError]]:
    """Number of the line, row or element, and the decoded record, or the RecordError that it is counted as.

    Raises CorpusError where the file cannot be read to the slice's end.
    """
    number = None
    try:
        for number, record in _read(part):
            yield number, record
    except (OSError, ValueError, pa.ArrowException) as error:
        place = "" if number is None else f" beyond record {number}"
        raise unreadable(part.path, error, place=place) from error


def _read(part: CorpusSlice) -> Iterator[tuple[int, Any]]:
    if part.format == "hf":
        yield from read_hub_shard(part.path, part.version, part.start)
    elif part.format == "parquet":
        with _parquet(part.file) as file:
            groups = range(part.start, file.num_row_groups if part.end < 0 else part.end)
            yield from read_parquet(file, groups=groups, first_row=part.first_line)
    elif part.compression is not None or part.end < 0:
        is_array = part.format == "json" and _first_byte(part.file) == b"["
        with open_plain(part.file) as stream:
            yield from read_json_array(stream) if is_array else read_jsonl(stream, first_line=1)
    else:
        with open_random(part.file) as file:
            file.seek(part.start)
            yield from read_jsonl(file, first_line=part.first_line, num_bytes=part.end - part.start)


def _slice(file: CorpusFile, start: int, end: int, first_line: int = 1) -> CorpusSlice:
    return CorpusSlice(file.path, start, end, first_line, file.format, file.compression, file.endpoint, file.version)


def _cut_lines(file: CorpusFile, slice_bytes: int) -> list[CorpusSlice]:
    slices: list[CorpusSlice] = []
    start, line = 0, 1
    with open_random(file) as stream:
        while True:
            end, breaks, last = start, 0, b""
            while chunk := stream.read(min(CHUNK_BYTES, start + slice_bytes - end)):
                end, breaks, last = end + len(chunk), breaks + chunk.count(b"\n"), chunk[-1:]
            if not last:
                return slices
            if last != b"\n":  # up to the end of the line that the cut went through
                while tail := stream.read(TAIL_BYTES):
                    length = tail.find(b"\n") + 1
                    end += length or len(tail)
                    if length:
                        breaks += 1
                        break
                stream.seek(end)
            slices.append(_slice(file, start, end, line))
            start, line = end, line + breaks


def _row_groups(file: CorpusFile) -> list[CorpusSlice]:
    with _parquet(file) as parquet:
        rows = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
    first_rows = list(itertools.accumulate(rows, initial=1))
    return [_slice(file, number, number + 1, first_rows[number]) for number, size in enumerate(rows) if size]


@contextmanager
def _parquet(file: CorpusFile) -> Iterator[pq.ParquetFile]:
    """A Parquet file is read from its end, so that a compressed one goes through a temporary file."""
    if file.compression is None:
        with open_random(file) as stream, pq.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False) as parquet:
            yield parquet
        return
    with tempfile.TemporaryFile() as plain:
        with open_plain(file) as stream:
            shutil.copyfileobj(stream, plain, CHUNK_BYTES)
        with pq.ParquetFile(plain, buffer_size=CHUNK_BYTES, pre_buffer=False) as parquet:
            yield parquet


def _first_byte(file: CorpusFile) -> bytes:
    """The first byte of the file's text that is not blank; nothing where there is none."""
    with open_plain(file) as stream:
        while chunk := stream.read(TAIL_BYTES):
            if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text[:1]
    return b""


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from error

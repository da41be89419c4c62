"""Decoded records out of open files, a reader a format; a bad record is given as a RecordError, never raised."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longalign_ray.data.conversation import decode_record
from longalign_ray.data.record_styles import ALL_KEYS, RecordError

MAX_RECORD_BYTES = 16 << 20  # some 4 million tokens: longer ones are mistakes, and would hold gigabytes as tokens
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 64  # rows decoded at a time; each may be a long document

Numbered = Iterator[tuple[int, Any]]


def read_jsonl(stream: Any, *, first_line: int, num_bytes: int | None = None) -> Numbered:
    """Number and record of each line that is not blank, of the stream's next num_bytes (None: of all)."""
    for number, line in enumerate(_lines(stream, num_bytes), first_line):
        if isinstance(line, int):
            yield number, _too_large(line)
        elif line.strip():
            try:
                yield number, decode_record(line)
            except RecordError as error:
                yield number, error


def _lines(stream: Any, num_bytes: int | None) -> Iterator[bytes | int]:
    """Each line, or its length where that is above MAX_RECORD_BYTES, of which no more is ever held."""
    held: list[bytes] = []
    size = 0
    left = num_bytes
    while chunk := stream.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
        left = None if left is None else left - len(chunk)
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield size if size > MAX_RECORD_BYTES else b"".join((*held, end))
            held, size = [], 0
        size += len(rest)
        held = [*held, rest] if size <= MAX_RECORD_BYTES else []
    if size:
        yield size if size > MAX_RECORD_BYTES else b"".join(held)


def read_json_array(stream: Any) -> Numbered:
    """Number, from 1, and value of each element of a JSON array, decoded one at a time.

    Raises ValueError where the text is no array: nothing after a broken element can be told apart, so that counting one
    reject would hide the loss of the rest.
    """
    text = _Text(stream)
    if text.next_char() != "[":
        raise ValueError("it does not begin with '['")
    text.position += 1
    number = 0
    while text.next_char() != "]":
        if number:
            if text.next_char() != ",":
                raise ValueError(f"no ',' after element {number}")
            text.position += 1
        number += 1
        yield number, text.next_value(number)
    text.position += 1
    if rest := text.next_char():
        raise ValueError(f"{rest!r} after the array's end")


class _Text:
    """A window on a stream of UTF-8, from which JSON values are taken one after the other."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._ended = False
        self.window = ""
        self.position = 0

    def _more(self, num_bytes: int) -> None:
        chunk = self._stream.read(num_bytes)
        self._ended = not chunk
        self.window = self.window[self.position :] + self._decode(chunk, final=not chunk)
        self.position = 0

    def next_char(self) -> str:
        """The next character that is not blank, which is not taken; nothing at the end."""
        while True:
            while self.position < len(self.window) and self.window[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.window) or self._ended:
                return self.window[self.position : self.position + 1]
            self._more(CHUNK_BYTES)

    def next_value(self, number: int) -> Any:
        """The JSON value that comes next. Each failure doubles what is read, so that the work stays linear."""
        self.next_char()
        while True:
            try:
                value, end = self._json.raw_decode(self.window, self.position)
            except RecursionError as error:
                raise ValueError(f"element {number} is nested too deeply") from error
            except ValueError as error:
                if self._ended or len(self.window) - self.position > MAX_RECORD_BYTES:
                    raise ValueError(
                        f"element {number} is not valid JSON, or larger than the limit: {error}"
                    ) from error
            else:
                if end < len(self.window) or self._ended:  # else a number might go on
                    self.position = end
                    return value
            self._more(max(CHUNK_BYTES, len(self.window) - self.position))


def read_parquet(file: pq.ParquetFile, *, groups: range, first_row: int) -> Numbered:
    """Number and record of each row of the row groups; of the columns only those that a style knows, if any."""
    columns = [name for name in file.schema_arrow.names if name in ALL_KEYS] or None
    number = first_row
    for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=columns):
        for record in _rows(batch):
            yield number, record
            number += 1


def _rows(batch: pa.RecordBatch) -> list[Any]:
    if batch.nbytes <= MAX_RECORD_BYTES:
        with suppress(UnicodeDecodeError, OverflowError):
            return batch.to_pylist()
    return [_row(batch.slice(row, 1)) for row in range(batch.num_rows)]


def _row(batch: pa.RecordBatch) -> Any:
    if batch.nbytes > MAX_RECORD_BYTES:
        return _too_large(batch.nbytes)
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RecordError("not_utf8", f"a text is not valid UTF-8: {error.reason}")
    except OverflowError as error:
        return RecordError("bad_value", f"a value has no counterpart in Python: {error}")


def within_limit(record: Any) -> Any:
    """A decoded record, or the RecordError that stands for one whose texts are too large."""
    size = _text_bytes(record)
    return record if size <= MAX_RECORD_BYTES else _too_large(size)


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list | tuple) else 0


def _too_large(size: int) -> RecordError:
    return RecordError(
        "record_too_large", f"{size:,} bytes, and a record has at most {MAX_RECORD_BYTES:,}: cut it into several"
    )

"""One slice of the corpus to its files in the token store: the work of one task of `prepare`.

A slice leaves three files with the name of its StorePart: `.arrow` (tokens and weights), `.parquet` (its rows of the
index) and, last, `.json` (its rejects and counts), which says that the slice is done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longalign_ray.config import DataConfig
from longalign_ray.data.conversation import Conversation, RecordError, parse_record
from longalign_ray.data.corpus import CorpusSlice, read_records
from longalign_ray.data.decontaminate import contamination
from longalign_ray.data.dedup import fingerprint, fingerprint_bytes
from longalign_ray.data.record_styles import printable
from longalign_ray.data.store import Example, write_examples
from longalign_ray.data.template import load_tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer
from longalign_ray.errors import CorpusError, DiskError
from longalign_ray.run_dir import whole_file, write_json

EVALUATION_FILE = "evaluation_runs.npy"
INDEX_ROWS = 1 << 16


def tokens_file(store: Path, name: str) -> Path:
    """Examples of the part `name`."""
    return store / f"{name}.arrow"


def index_file(store: Path, name: str) -> Path:
    """Index rows of the part `name`: id, length, targets, weights, row in its file, line in the corpus."""
    return store / f"{name}.parquet"


def summary_file(store: Path, name: str) -> Path:
    """Rejects and counts of the part `name`."""
    return store / f"{name}.json"


def tokenise_slice(item: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Writes a slice's store file, its index rows (.parquet), and last its rejects and counts (.json).

    What stops it is in the result as `problem`, so that the other slices go on.
    """
    name, setting, settings = item.pop("name"), item.pop("setting"), settings | {"style": item.pop("style")}
    store, part = Path(settings["store"]), CorpusSlice(**item)
    if all(file(store, name).exists() for file in (tokens_file, index_file, summary_file)):
        return {"name": name, "problem": ""}
    rejects: list[dict[str, Any]] = []
    fingerprints = fingerprint_bytes(DataConfig(**settings["data"]).dedup)
    counts = Counter(records=0, examples=0, cut_examples=0, cut_answers=0, cut_tokens=0, text_pieces=0)
    try:
        with whole_file(index_file(store, name)) as temporary, IndexWriter(temporary, fingerprints) as index:
            write_examples(tokens_file(store, name), index.noting(_examples(part, settings, rejects, counts)))
        write_json(summary_file(store, name), {"rejects": rejects, "counts": counts})
    except CorpusError as error:
        return {"name": name, "problem": f"{setting}: {error}"}
    except DiskError as error:
        return {"name": name, "problem": str(error)}
    return {"name": name, "problem": ""}


class IndexWriter:
    """Index rows to a Parquet file, INDEX_ROWS at a time: a compressed file is one slice, however many it holds."""

    def __init__(self, path: Path, fingerprint_width: int):
        columns = {
            "example_id": pa.string(),
            "length": pa.int32(),
            "num_targets": pa.int32(),
            "sum_weights": pa.float64(),
            "row": pa.int32(),
            "line": pa.int64(),
        }
        if fingerprint_width:
            columns["fingerprint"] = pa.binary(fingerprint_width)
        self._schema = pa.schema(list(columns.items()))
        self._file = pq.ParquetWriter(path, self._schema)
        self._rows: list[tuple[Any, ...]] = []
        self._row = 0

    def noting(self, examples: Iterable[tuple[int, bytes, Example]]) -> Iterator[Example]:
        """The examples of (line, fingerprint, example), each noted."""
        for line, mark, example in examples:
            noted = (example.example_id, example.length, example.num_targets, example.sum_weights, self._row, line)
            self._rows.append((*noted, mark))
            self._row += 1
            if len(self._rows) == INDEX_ROWS:
                self._write()
            yield example

    def _write(self) -> None:
        columns = zip(self._schema, zip(*self._rows, strict=True), strict=False)
        self._file.write_table(pa.table([pa.array(column, field.type) for field, column in columns], self._schema))
        self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None and self._rows:
            self._write()
        self._file.close()


def _examples(
    part: CorpusSlice, settings: dict[str, Any], rejects: list[dict[str, Any]], counts: Counter[str]
) -> Iterator[tuple[int, bytes, Example]]:
    """Line, fingerprint and example, one by one; what is no example goes to rejects, and everything is counted."""
    data = DataConfig(**settings["data"])
    evaluation = np.load(Path(settings["store"]) / EVALUATION_FILE, mmap_mode="r")
    fingerprints: dict[int, bytes] = {}
    maker = _cached_maker(
        settings["model_dir"], settings["chat_template"], json.dumps(settings["data"]), settings["tokenising"]
    )
    source = printable(part.path)

    def parsed() -> Iterator[tuple[int, Conversation | RecordError]]:
        for line_number, record in read_records(part):
            counts["records"] += 1
            try:
                conversation = parse_record(
                    record,
                    source=source,
                    line_number=line_number,
                    style=settings["style"],
                    role_order=settings["role_order"],
                )
                if (shared := contamination(conversation, evaluation, data.decontaminate.ngram)) is not None:
                    raise RecordError("contaminated", f"has these words of an evaluation text: {shared}")
                fingerprints[line_number] = fingerprint(conversation, data.dedup)
                yield line_number, conversation
            except RecordError as error:
                yield line_number, error

    for line_number, made in maker.many(parsed()):
        mark = fingerprints.pop(line_number, b"")
        if isinstance(made, RecordError):
            if made.reason == "too_long" and settings["data"]["too_long"] == "error":
                raise CorpusError(f"{source}, line {line_number}: {made}; raise it, or let data.too_long skip or cut")
            rejects.append({"file": source, "line": line_number, "reason": made.reason, "detail": str(made)})
            continue
        counts.update(
            examples=len(made.examples),
            cut_examples=int(made.num_cut > 0),
            cut_answers=int(made.cut_answer),
            cut_tokens=made.num_cut,
            text_pieces=len(made.examples) if len(made.examples) > 1 else 0,
        )
        yield from ((line_number, mark, example) for example in made.examples)


@lru_cache(maxsize=1)
def _cached_maker(model_dir: str, chat_template: str | None, data: str, tokenising: str) -> ConversationTokenizer:
    """`tokenising` is a digest of the contents of the files that are read here, which a process may outlive."""
    return ConversationTokenizer(
        load_tokenizer(model_dir, chat_template=chat_template), DataConfig.model_validate_json(data)
    )

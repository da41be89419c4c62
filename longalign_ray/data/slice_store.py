"""One slice of the corpus to its files in the token store: the work of one task of `prepare`.

A slice leaves three files with the name of its StorePart: `.arrow` (tokens and weights), `.parquet` (its rows of the
index) and, last, `.json` (its rejects and counts), which says that the slice is done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    counts = Counter(records=0, examples=0, cut_examples=0, cut_answers=0, cut_tokens=0, text_pieces=0)
    rows: list[tuple[str, int, int, float, int, bytes]] = []

    def noted() -> Iterator[Example]:
        for line, mark, example in _examples(part, settings, rejects, counts):
            rows.append((example.example_id, example.length, example.num_targets, example.sum_weights, line, mark))
            yield example

    try:
        write_examples(tokens_file(store, name), noted())
        with whole_file(index_file(store, name)) as temporary:
            pq.write_table(_index_table(rows, DataConfig(**settings["data"])), temporary)
        write_json(summary_file(store, name), {"rejects": rejects, "counts": counts})
    except CorpusError as error:
        return {"name": name, "problem": f"{setting}: {error}"}
    except DiskError as error:
        return {"name": name, "problem": str(error)}
    return {"name": name, "problem": ""}


def _index_table(rows: list[tuple[str, int, int, float, int, bytes]], data: DataConfig) -> pa.Table:
    index = {
        "example_id": pa.array([row[0] for row in rows], pa.string()),
        "length": pa.array([row[1] for row in rows], pa.int32()),
        "num_targets": pa.array([row[2] for row in rows], pa.int32()),
        "sum_weights": pa.array([row[3] for row in rows], pa.float64()),
        "row": pa.array(range(len(rows)), pa.int32()),
        "line": pa.array([row[4] for row in rows], pa.int64()),
    }
    if width := fingerprint_bytes(data.dedup):
        index["fingerprint"] = pa.array([row[5] for row in rows], pa.binary(width))
    return pa.table(index)


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

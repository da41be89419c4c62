"""Mangled records: none stops the reading, every one is an example or is counted with its file and line."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longalign_ray.data.conversation import Conversation, RecordError, parse_record
from longalign_ray.data.corpus import corpus_files, cut_into_slices, read_records
from longalign_ray.data.record_styles import MAX_DETAIL_CHARS
from longalign_ray.errors import CorpusError
from tests.mangled import GOOD, mangled_lines


def read(path: Path) -> tuple[list[Conversation], list[tuple[int, RecordError]]]:
    taken: list[Conversation] = []
    refused: list[tuple[int, RecordError]] = []
    for file in corpus_files([str(path)]):
        for part in cut_into_slices(file, slice_bytes=200_000):
            for number, record in read_records(part):
                try:
                    taken.append(parse_record(record, source=part.path, line_number=number))
                except RecordError as error:
                    refused.append((number, error))
    return taken, refused


@pytest.mark.parametrize("seed", range(3))
def test_every_mangled_record_is_taken_or_counted(tmp_path: Path, seed: int) -> None:
    lines = list(mangled_lines(5_000, seed=seed))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    taken, refused = read(path)
    num_blank = sum(not line.strip() for line in lines)
    assert len(taken) + len(refused) + num_blank == len(lines)
    numbers = [number for number, _ in refused]
    assert numbers == sorted(set(numbers))
    reasons = Counter(error.reason for _, error in refused)
    assert len(taken) > 500  # else the wounds are too deep to show anything
    assert len(reasons) > 15, reasons
    for number, error in refused:
        reject = json.dumps({"line": number, "reason": error.reason, "detail": str(error)}, ensure_ascii=False)
        assert 0 < len(str(error)) <= MAX_DETAIL_CHARS
        reject.encode("utf-8")
    for talk in taken:  # what is taken can be stored, and given to a template
        pa.array([talk.example_id], pa.string())
        json.dumps([talk.as_dicts(), talk.tools], allow_nan=False, ensure_ascii=False).encode("utf-8")
        (talk.text or "").encode("utf-8")
        assert talk.text or any(message.role == "assistant" or message.loss_weight for message in talk.messages)


def test_the_records_are_good_without_their_wounds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in GOOD))
    taken, refused = read(tmp_path / "a.jsonl")
    assert (len(taken), refused) == (len(GOOD), [])


def wounded(source: random.Random, data: bytes) -> bytes:
    """A file cut short, with some bytes changed, or with a piece put in or lost."""
    at, kind = source.randrange(len(data)), source.random()
    if kind < 0.3:
        return data[:at]
    if kind < 0.6:
        changed = bytearray(data)
        for _ in range(source.choice([1, 5, 50])):
            changed[source.randrange(len(data))] = source.randrange(256)
        return bytes(changed)
    if kind < 0.8:
        return data[:at] + source.randbytes(source.randrange(1, 100)) + data[at:]
    return data[:at] + data[at + source.randrange(1, 200) :]


def test_a_wounded_file_is_read_or_named(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"q{n}" * 20}, {"role": "assistant", "content": f"a{n}" * 30}]}
        for n in range(300)
    ]
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(talks), parquet, row_group_size=50)
    files = {
        "a.parquet": parquet.getvalue(),
        "a.jsonl.gz": gzip.compress("\n".join(map(json.dumps, talks)).encode()),
        "a.json": json.dumps(talks).encode(),
    }
    outcomes: Counter[tuple[str, str]] = Counter()
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert len(read(path)[0]) == len(talks)
        for seed in range(200):
            path.write_bytes(wounded(random.Random(seed), data))
            try:
                read(path)
                outcome = "read"
            except CorpusError as error:
                outcome = "named" if str(error).startswith(f"{path} cannot be read") else str(error)
            outcomes[name, outcome] += 1
    assert {outcome for _, outcome in outcomes} == {"read", "named"}, outcomes
    assert min(outcomes[name, "named"] for name in files) > 100, outcomes
    assert outcomes["a.jsonl.gz", "read"] == 0  # its checksum sees everything

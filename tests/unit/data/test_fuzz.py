"""Mangled records: none stops the reading, every one is an example or is counted with its file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from longalign_ray.data.conversation import Conversation, RecordError, parse_record
from longalign_ray.data.corpus import corpus_files, cut_into_slices, read_records
from longalign_ray.data.record_styles import MAX_DETAIL_CHARS
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

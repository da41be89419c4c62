"""The record of answers: a JSONL file that grows as answers come, and from which a killed run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from longalign_ray.evaluate.task import Prediction


class PredictionFile:
    """The answers of one model to one task; `found` are those from before, by case.

    digests: request digest of each case. An answer counts only if it has the digest of its case; others, and a
    half-written last line, are dropped from the file.
    """

    def __init__(self, path: Path, digests: Mapping[str, str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found = _read(path, digests)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("".join(_line(prediction) for prediction in self.found.values()), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, prediction: Prediction) -> None:
        """On disk when this returns, so far as a killed process is concerned."""
        self.found[prediction.case_id] = prediction
        self._file.write(_line(prediction))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def file_stem(task: str, model: str) -> str:
    """`<task>-<model>` with what a file name cannot hold escaped, as in needle-org%2Fname."""
    return f"{task}-{quote(model, safe='')}"


def _line(prediction: Prediction) -> str:
    # not `asdict`, which copies all the way down: an answer is written before the next request goes out
    return json.dumps({name: getattr(prediction, name) for name in Prediction.__slots__}, ensure_ascii=False) + "\n"


def _read(path: Path, digests: Mapping[str, str]) -> dict[str, Prediction]:
    found: dict[str, Prediction] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            prediction = Prediction(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if digests.get(prediction.case_id) == prediction.request_digest:
            found[prediction.case_id] = prediction
    return found

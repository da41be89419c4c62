"""A file of requests in parts of so many lines, each with a digest of all that its answers depend on.

requests.jsonl    |  part 0  |  part 1  |  part 2 |       answers     part-00000.jsonl, part-00001.jsonl, ...
                                                          done/       00000-<digest>.json: its counts
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from longalign_ray.errors import ServingError
from longalign_ray.run_dir import digest


@dataclass(frozen=True, slots=True)
class RequestPart:
    """Bytes `start` to `stop` of a file, whole lines of which the first has the number `first_line`, from 1."""

    number: int
    path: str
    start: int
    stop: int
    first_line: int
    digest: str

    def lines(self) -> list[tuple[int, bytes]]:
        """(number, line) of each that is not blank."""
        with Path(self.path).open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.stop - self.start).split(b"\n")
        return [(number, line) for number, line in enumerate(lines, start=self.first_line) if line.strip()]

    def answers(self, output: Path) -> Path:
        return output / f"part-{self.number:05}.jsonl"

    def done(self, output: Path) -> Path:
        """Written after the answers; holds their counts."""
        return output / "done" / f"{self.number:05}-{self.digest}.json"


def request_parts(path: Path, *, num_lines: int, tied: Any) -> list[RequestPart]:
    """The parts of a file, `num_lines` each, the last one shorter; `tied` goes into their digests.

    Raises ServingError where it cannot be read or has no line.
    """
    parts: list[RequestPart] = []
    start = 0
    try:
        with path.open("rb") as file:
            while lines := list(islice(file, num_lines)):
                content = b"".join(lines)
                of_part = digest(tied, hashlib.sha256(content).hexdigest())
                stop = start + len(content)
                parts.append(
                    RequestPart(len(parts), str(path.resolve()), start, stop, len(parts) * num_lines + 1, of_part)
                )
                start = stop
    except OSError as error:
        raise ServingError(
            f"generate.requests: {path} cannot be read ({error.strerror or error}): name a file of JSON lines"
        ) from error
    if not parts:
        raise ServingError(f"generate.requests: {path} is empty: give a JSON object a line, with id and messages")
    return parts


def open_parts(parts: list[RequestPart], output: Path) -> list[RequestPart]:
    """The parts that are not done. Raises ServingError where the directory holds answers to others."""
    ours = {part.done(output).name for part in parts}
    others = sorted(path.name for path in (output / "done").glob("*.json") if path.name not in ours)
    if others:
        raise ServingError(
            f"generate.output: {output} holds {len(others)} parts of answers to other requests, or of another model or "
            "other limits of serve: choose another directory, or remove it"
        )
    return [part for part in parts if not part.done(output).exists()]


def counts_of(parts: list[RequestPart], output: Path) -> list[dict[str, Any]]:
    return [json.loads(part.done(output).read_text(encoding="utf-8")) for part in parts]

"""Names of every artefact of a run, and the manifest that each stage leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign_ray.errors import DiskError

STAGES = ("construct", "prepare", "train", "export", "evaluate", "report")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths below one run directory; a property an artefact."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def conversations(self) -> Path:
        return self.root / "construct" / "conversations.jsonl"

    @property
    def store(self) -> Path:
        """Directory of the token store: `*.arrow`, index.parquet."""
        return self.root / "prepare" / "store"

    @property
    def packed(self) -> Path:
        """Directory of the packed blocks: `*.arrow`."""
        return self.root / "prepare" / "packed"

    @property
    def plan(self) -> Path:
        return self.root / "prepare" / "plan.npz"

    @property
    def rejects(self) -> Path:
        return self.root / "prepare" / "rejects.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "train" / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory that Ray Train writes checkpoints to."""
        return self.root / "train" / "checkpoints"

    @property
    def trained_recipe(self) -> Path:
        """The recipe that the checkpoints belong to, with the digest of what must stay for training to continue."""
        return self.root / "train" / "recipe.json"

    @property
    def model(self) -> Path:
        """The aligned model in Hugging Face layout."""
        return self.root / "model"

    @property
    def predictions(self) -> Path:
        return self.root / "evaluate" / "predictions"

    @property
    def scores(self) -> Path:
        return self.root / "evaluate" / "scores"

    @property
    def generated(self) -> Path:
        """Directory of the answers to a file of requests."""
        return self.root / "generate"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        return self.root / "report.json"

    def manifest(self, stage: str) -> Path:
        return self.root / stage / "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a stage did: written last, so that its presence says that the stage is complete.

    `config_digest` covers the config sections and the upstream manifest that the stage depends on. `counts` holds
    everything kept, `dropped_by_reason` everything that was not.
    """

    stage: str
    config_digest: str
    inputs: list[str]
    outputs: list[str]
    counts: dict[str, int | float]
    dropped_by_reason: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @staticmethod
    def load(path: Path) -> Manifest | None:
        """The manifest at `path`, or None where the stage has not finished."""
        try:
            return Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def digest(*values: Any) -> str:
    """16 hex digits of SHA-256 over the JSON form of `values`, keys sorted."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, which becomes `path` at the end: a reader sees the old file or the
    whole new one.

    No other process has the same name, also none on another machine, so that a writer that was given up and still runs
    cannot spoil the file. Raises DiskError where it cannot be written; then nothing of it is left.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise DiskError(f"{path.parent} cannot be written; is there space left? {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

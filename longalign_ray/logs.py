"""Logging set-up, progress on a terminal or in a log file, and the JSONL record of metrics."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)


def configure_logging() -> None:
    """One call at the entry point: messages of the package to stderr, warnings of everybody else."""
    from rich.console import Console
    from rich.logging import RichHandler

    handler: logging.Handler = (
        RichHandler(console=Console(stderr=True), show_path=False)
        if sys.stderr.isatty()
        else logging.StreamHandler(sys.stderr)
    )
    if not sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("longalign_ray").setLevel(logging.INFO)


class Progress(Protocol):
    """What a long stage calls as it goes."""

    def advance(self, done: int, message: str = "") -> None:
        """`done`: units finished so far, of the total."""
        ...


class _Lines:
    """Plain lines for a log file: the message where there is one, else a line for each tenth."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.next_tenth = title, max(total, 1), 0

    def advance(self, done: int, message: str = "") -> None:
        tenth = 10 * done // self.total
        if message or tenth >= self.next_tenth:
            self.next_tenth = tenth + 1
            logger.info("%s %d/%d %s", self.title, done, self.total, message)


class _Bar:
    def __init__(self, bar: Any, task: Any):
        self.bar, self.task = bar, task

    def advance(self, done: int, message: str = "") -> None:
        self.bar.update(self.task, completed=done, message=message)


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """A progress bar where a person watches, plain log lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(title, total=total, message=""))


class MetricsWriter:
    """Appends one JSON object a line; a resumed run first drops the lines of the steps that it will replay."""

    def __init__(self, path: Path, *, first_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] < first_step]
        temporary = path.with_suffix(".tmp")  # a writer killed here leaves the old file whole
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file in order; a half-written last line, as a killed writer leaves it, is not a row."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            logger.warning("%s: skipped a half-written line", path)
    return rows

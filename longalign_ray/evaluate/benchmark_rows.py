"""Rows of a benchmark's data and the texts of its prompts, from files on disk or from the Hugging Face hub.

Neither comes with the package: they are the benchmark's own, and a score compares only where they are unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from longalign_ray.data.hub_datasets import hub_shards, hub_version, read_hub_shard
from longalign_ray.errors import EvaluationError

HUB = "hf://"


Fields = Mapping[str, type | UnionType]


def read_rows(source: str, *, setting: str, fields: Fields, remedy: str) -> list[dict[str, Any]]:
    """Rows in their order, from `hf://ORG/NAME?...`, a JSON array, or JSON lines.

    Raises EvaluationError naming `setting` and `remedy` where there is no such file, and file and line where a row is
    not a JSON object with all `fields`, each of its type; CorpusError where the hub does not give the data set.
    """
    if source.startswith(HUB):
        places = [(f"{source}, row {number}", row) for number, row in _hub_rows(source)]
    else:
        places = _file_rows(Path(source), _text(Path(source), setting=setting, remedy=remedy))
    if not places:
        raise EvaluationError(f"{setting}: {source} holds no row; {remedy}")
    for place, row in places:
        wrong = [name for name, kind in fields.items() if not isinstance(row, dict) or not _fits(row, name, kind)]
        if wrong:
            raise EvaluationError(
                f"{place} lacks {', '.join(wrong)}, or it is of the wrong type: a row is a JSON object with "
                f"{', '.join(fields)}; {remedy}"
            )
    return [row for _, row in places]


def read_prompt(path: Path, *, setting: str, remedy: str) -> str:
    """A prompt's text. Raises EvaluationError naming `setting` and `remedy` where there is no such file."""
    return _text(path, setting=setting, remedy=remedy)


def filled(template: str, values: Mapping[str, str], *, placeholder: str) -> str:
    """The template with each placeholder replaced once: what a value holds is never taken for a placeholder.

    placeholder: a regular expression whose first group is the name, among `values`.
    """
    return re.sub(placeholder, lambda match: values[match[1]], template)


def _fits(row: dict[str, Any], name: str, kind: type | UnionType) -> bool:
    return name in row and isinstance(row[name], kind)


def _hub_rows(address: str) -> list[tuple[int, Any]]:
    version = hub_version(address)
    shards = range(hub_shards(address, version))
    return sorted(
        (row for shard in shards for row in read_hub_shard(address, version, shard)), key=lambda numbered: numbered[0]
    )


def _file_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}, row {number}", row) for number, row in enumerate(json.loads(text), start=1)]
    except ValueError as error:
        raise EvaluationError(f"{path} is not valid JSON ({error}): get the file anew") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except ValueError as error:
                raise EvaluationError(f"{path}, line {number} is not JSON ({error}): get the file anew") from error
    return rows


def _text(path: Path, *, setting: str, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise EvaluationError(f"{setting}: {path} cannot be read ({why}); {remedy}") from error

"""Scores of predictions in LongBench's published format: a file `<set>.jsonl` a set, a line `{"pred", "answers",
"all_classes", "length"}` a row.

Per set 100 times the mean of its rows; per category and language the mean of its sets; per language the mean of its six
categories, code being one in both. A category or an average that lacks a set is None: it would not compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.longbench_metrics import score_row
from longalign_ray.evaluate.longbench_sets import BUCKETS, LANGUAGES, LONGBENCH_SETS, LongBenchSet, bucket_of


@dataclass(frozen=True, slots=True)
class LongBenchScores:
    """Scores in per cent, two decimals; sets in the benchmark's order.

    `buckets` splits a set by `length`, as LongBench-E does; `rows` has the scored, unscored and published number of
    rows of a set, `row_scores` those of its rows, 0 to 1, None for an unscored one.
    """

    scores: dict[str, float]
    category_scores: dict[str, dict[str, float | None]]
    averages: dict[str, float | None]
    buckets: dict[str, dict[str, float | None]]
    rows: dict[str, dict[str, int]]
    row_scores: dict[str, list[float | None]]


def score_directory(directory: Path) -> LongBenchScores:
    """Scores of the sets that have a file in `directory`.

    A row whose `pred` is null or that has no reference answer is counted as unscored. Raises EvaluationError where
    there is no file, a file is of no set of LongBench, or a line is not in the format.
    """
    paths = {path.stem: path for path in sorted(directory.glob("*.jsonl"))}
    if not paths:
        why = "holds no file <set>.jsonl" if directory.is_dir() else "is no directory"
        raise EvaluationError(f"{directory} {why}: name the directory of LongBench predictions, such as pred/MODEL")
    if unknown := sorted(set(paths) - set(LONGBENCH_SETS)):
        raise EvaluationError(
            f"{paths[unknown[0]]}: LongBench has no set {unknown[0]!r}; move the file away, or name it after one of "
            f"{', '.join(LONGBENCH_SETS)}"
        )
    row_scores, lengths = {}, {}
    for name, of in LONGBENCH_SETS.items():
        if name in paths:
            row_scores[name], lengths[name] = _score_file(paths[name], of)
    return summed_up(row_scores, lengths)


def summed_up(
    row_scores: Mapping[str, Sequence[float | None]], lengths: Mapping[str, Sequence[int]]
) -> LongBenchScores:
    """All scores, from those of the rows of each set and the rows' lengths."""
    means = {name: _mean([score for score in of_set if score is not None]) for name, of_set in row_scores.items()}
    buckets = {
        name: {bucket: _mean(_in_bucket(bucket, row_scores[name], lengths[name])) for bucket in BUCKETS}
        for name in row_scores
    }
    categories = {language: _category_means(means, language) for language in LANGUAGES}
    averages = {language: _mean_of_all(list(of_language.values())) for language, of_language in categories.items()}
    rows = {}
    for name, of_set in row_scores.items():
        unscored = sum(score is None for score in of_set)
        rows[name] = {
            "scored": len(of_set) - unscored,
            "unscored": unscored,
            "published": LONGBENCH_SETS[name].num_rows,
        }
    return LongBenchScores(
        scores={name: percent for name, mean in means.items() if (percent := _percent(mean)) is not None},
        category_scores={
            language: {category: _percent(mean) for category, mean in of_language.items()}
            for language, of_language in categories.items()
        },
        averages={language: _percent(mean) for language, mean in averages.items()},
        buckets={name: {bucket: _percent(mean) for bucket, mean in of.items()} for name, of in buckets.items()},
        rows=rows,
        row_scores={name: list(of_set) for name, of_set in row_scores.items()},
    )


def _score_file(path: Path, of: LongBenchSet) -> tuple[list[float | None], list[int]]:
    """Score and length of every row of a file."""
    scores, lengths = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 ({error}): write it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _checked(json.loads(line))
            pred, answers, classes = row["pred"], row["answers"], row["all_classes"]
            if pred is None or not answers:
                scores.append(None)
            else:
                scores.append(score_row(of, pred, answers=answers, all_classes=classes))
        except ValueError as error:
            raise EvaluationError(
                f'{path}, line {number}: {error}; a line is {{"pred": "...", "answers": ["..."], "all_classes": null, '
                f'"length": 1234}}: correct it or delete the line'
            ) from error
        lengths.append(row["length"])
    if not scores:
        raise EvaluationError(f"{path} holds no row: delete it, or write the predictions of {of.name} there")
    return scores, lengths


def _checked(row: Any) -> dict[str, Any]:
    """The row; ValueError where a field is missing or of another kind."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, and it is {type(row).__name__}")
    rules = {
        "pred": lambda value: value is None or isinstance(value, str),
        "answers": _are_texts,
        "all_classes": lambda value: value is None or _are_texts(value),
        "length": lambda value: isinstance(value, int) and not isinstance(value, bool),
    }
    for field, fits in rules.items():
        if field not in row:
            raise ValueError(f"the field {field!r} is missing")
        if not fits(row[field]):
            raise ValueError(f"the field {field!r} is {str(row[field])[:80]!r}")
    return row


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _in_bucket(bucket: str, scores: Sequence[float | None], lengths: Sequence[int]) -> list[float]:
    return [
        score
        for score, length in zip(scores, lengths, strict=True)
        if score is not None and bucket_of(length) == bucket
    ]


def _category_means(means: Mapping[str, float | None], language: str) -> dict[str, float | None]:
    """Mean of the sets of each category, None where one of them is missing."""
    of_category: dict[str, list[float | None]] = {}
    for name, of in LONGBENCH_SETS.items():
        if language in of.averaged_in:
            of_category.setdefault(of.category, []).append(means.get(name))
    return {category: _mean_of_all(of_sets) for category, of_sets in of_category.items()}


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return _mean(there) if len(there) == len(values) else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _percent(mean: float | None) -> float | None:
    return None if mean is None else round(100 * mean, 2)

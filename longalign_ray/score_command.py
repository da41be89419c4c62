"""`longalign score`: scores of predictions on disk, whoever made them; no model and no recipe is needed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.agreement import agreement
from longalign_ray.evaluate.benchmark_rows import read_rows
from longalign_ray.evaluate.longbench_score import LongBenchScores, score_directory
from longalign_ray.evaluate.longbench_sets import BUCKETS, LONGBENCH_SETS


def describe_scores(arguments: argparse.Namespace) -> str:
    """The text that the command prints: a table, or one JSON object without the scores of single rows."""
    if arguments.benchmark == "agreement":
        return _agreement(Path(arguments.predictions), arguments.reference)
    scores = score_directory(Path(arguments.predictions))
    if arguments.json:
        return json.dumps({name: part for name, part in asdict(scores).items() if name != "row_scores"}, indent=1)
    return _as_text(scores)


def _agreement(scores: Path, reference: str | None) -> str:
    """Agreement of the scores of cases with those that people gave, or another judge, as JSON."""
    if reference is None:
        raise EvaluationError("score agreement needs --reference: JSON lines with case_id and score")
    try:
        by_case = json.loads(scores.read_text(encoding="utf-8"))["by_case"]
        mine = {case: value for part in by_case.values() for case, value in part.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{scores} is no score file with by_case ({error!r}): name one of a run, evaluate/scores/TASK-MODEL.json"
        ) from error
    rows = read_rows(
        reference,
        setting="--reference",
        fields={"case_id": str, "score": int | float},
        remedy="give JSON lines with case_id, as in the score file, and score",
    )
    pairs = [(mine[row["case_id"]], row["score"]) for row in rows if row["case_id"] in mine]
    found = agreement([one for one, _ in pairs], [other for _, other in pairs])
    return json.dumps(asdict(found) | {"num_scored": len(mine), "num_reference": len(rows)}, indent=1)


def _as_text(scores: LongBenchScores) -> str:
    lines = [_line("set", "metric", "score", *BUCKETS, "rows")]
    for name in scores.rows:
        rows = scores.rows[name]
        number = f"{rows['scored']}" if rows["scored"] == rows["published"] else f"{rows['scored']}/{rows['published']}"
        unscored = f", {rows['unscored']} unscored" if rows["unscored"] else ""
        of_buckets = (_number(scores.buckets[name][bucket]) for bucket in BUCKETS)
        metric = LONGBENCH_SETS[name].metric.replace("_", " ")
        lines.append(_line(name, metric, _number(scores.scores.get(name)), *of_buckets, number + unscored))
    for language, categories in scores.category_scores.items():
        lines += ["", f"{language}: {_number(scores.averages[language])}"]
        lines += [f"  {category:<14} {_number(mean):>6}" for category, mean in categories.items()]
    if absent := [name for name in LONGBENCH_SETS if name not in scores.scores]:
        lines += ["", f"not scored, and their averages left out: {', '.join(absent)}"]
    return "\n".join(lines)


def _line(name: str, metric: str, *numbers: str) -> str:
    return f"{name:<22}{metric:<17}" + "".join(f"{number:>8}" for number in numbers)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

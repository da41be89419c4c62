"""Scores of several models, of one run or of several, side by side: a table as Markdown or HTML, JSON, and JSON lines
for a leaderboard. Each score has its 95 % interval, and the difference to the first column one of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate import page
from longalign_ray.evaluate.confidence import difference, score_interval
from longalign_ray.evaluate.score_files import TITLES, model_scores, shown, unit
from longalign_ray.run_dir import RunDir

Comparison = dict[str, Any]

PARTS_COMPARED = ("lm_eval",)  # tasks of different kinds under one title


def compare(run_dirs: Sequence[RunDir]) -> Comparison:
    """`columns` (run, model), and by task its metric, `scores` and `changes`, one for each column, null where there is
    none: value, low and high of the 95 % interval, num_cases. A change is to the first column that has the task, over
    the cases that both answered. A task of PARTS_COMPARED is followed by its parts, as `task/part`.

    Empty where no run has a score. Raises EvaluationError where a score file cannot be read.
    """
    columns: list[dict[str, str]] = []
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run_dir in run_dirs:
        of_run: dict[str, int] = {}
        for task in TITLES:
            for model, score in _read(run_dir, task).items():
                if model not in of_run:
                    of_run[model] = len(columns)
                    columns.append({"run": run_dir.root.resolve().name, "model": model})
                for name, of_part in {task: score, **_parts(task, score)}.items():
                    found.setdefault(name, {})[of_run[model]] = of_part
    if not columns:
        return {}
    order = list(TITLES)
    names = sorted(found, key=lambda name: order.index(name.partition("/")[0]))  # stable: parts stay behind the whole
    return {"columns": columns, "tasks": {name: _of_task(found[name], len(columns)) for name in names}}


def describe_comparison(roots: Sequence[str], *, form: str) -> str:
    """The text of a form of FORMATS. Raises EvaluationError where a directory has no scores."""
    run_dirs = [RunDir(Path(root)) for root in roots]
    for run_dir in run_dirs:
        if not any(run_dir.scores.glob("*.json")):
            raise EvaluationError(
                f"{run_dir.root} has no scores in {run_dir.scores}: name the directory of a run whose recipe went "
                f"through `longalign evaluate`"
            )
    return FORMATS[form](compare(run_dirs))


def as_markdown(comparison: Comparison) -> str:
    head = ("Task", *_labels(comparison))
    rows = [head, tuple("---" for _ in head), *_rows(comparison)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def as_table(comparison: Comparison) -> str:
    """An HTML table, a part of a page."""
    return page.table(
        ("Task", *_labels(comparison)),
        [(first, *map(escape, middle), last) for first, *middle, last in _rows(comparison)],
    )


def as_html(comparison: Comparison) -> str:
    """A whole page."""
    runs = ", ".join(dict.fromkeys(column["run"] for column in comparison["columns"]))
    note = "95 % intervals by bootstrap over cases; changes are to the first column, over the cases that both answered."
    return page.page("longalign_ray: comparison", runs, [page.section("Scores", note, as_table(comparison))])


def as_rows(comparison: Comparison) -> str:
    """JSON lines, one a model: run, model, and by task the score."""
    lines = []
    for number, column in enumerate(comparison["columns"]):
        tasks = {
            task: {"metric": of_task["metric"], **of_task["scores"][number]}
            for task, of_task in comparison["tasks"].items()
            if of_task["scores"][number] is not None
        }
        lines.append(json.dumps(column | {"scores": tasks}, ensure_ascii=False))
    return "\n".join(lines)


FORMATS = {
    "markdown": as_markdown,
    "html": as_html,
    "json": lambda comparison: json.dumps(comparison, indent=1, ensure_ascii=False),
    "rows": as_rows,
}


def _read(run_dir: RunDir, task: str) -> dict[str, Any]:
    try:
        scores = model_scores(run_dir, task)
        for score in scores.values():
            for name in ("metric", "value", "num_cases", *(["parts"] if task in PARTS_COMPARED else [])):
                score[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"a file {task}-*.json of {run_dir.scores} cannot be read ({error!r}): `longalign evaluate` makes it anew"
        ) from error
    return scores


def _parts(task: str, score: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of the parts of a task, each as that of a task."""
    if task not in PARTS_COMPARED:
        return {}
    return {
        f"{task}/{name}": {
            **part,
            "value": score["by_group"][name],
            "by_case": {name: score["by_case"][name]} if score["by_case"] else {},
        }
        for name, part in score["parts"].items()
    }


def _of_task(scores: dict[int, dict[str, Any]], num_columns: int) -> dict[str, Any]:
    first = min(scores)
    made: dict[str, Any] = {"metric": scores[first]["metric"], "scores": [], "changes": []}
    for number in range(num_columns):
        score, change, interval = scores.get(number), None, None
        if score is not None:
            by_case = score.get("by_case")
            # Scores without those of their cases, as of an earlier version, have no interval.
            interval = asdict(score_interval(by_case)) if by_case else {"low": None, "high": None}
            interval |= {"value": score["value"], "num_cases": score["num_cases"]}
            if number > first and by_case and scores[first].get("by_case"):
                found = difference(scores[first]["by_case"], by_case)
                change = None if found is None else asdict(found)
        made["scores"].append(interval)
        made["changes"].append(change)
    return made


def _labels(comparison: Comparison) -> list[str]:
    several = len({column["run"] for column in comparison["columns"]}) > 1
    return [f"{column['run']}: {column['model']}" if several else column["model"] for column in comparison["columns"]]


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row of texts a task: its title, then for each column the score, its interval and the change with its own."""
    rows = []
    for task, of_task in comparison["tasks"].items():
        cells = []
        for score, change in zip(of_task["scores"], of_task["changes"], strict=True):
            cell = "–" if score is None else _with_interval(task, score)
            if change is not None:
                cell += f"; change {_with_interval(task, change, sign=True)}"
            cells.append(cell)
        whole, _, part = task.partition("/")
        rows.append((f"{TITLES[whole]}{part and f': {part}'} ({unit(whole)})", *cells))
    return rows


def _with_interval(task: str, value: dict[str, Any], *, sign: bool = False) -> str:
    plus = "+" if sign and value["value"] > 0 else ""
    text = f"{plus}{shown(task, value['value'])}"
    if value["low"] is None:
        return text
    return f"{text} [{shown(task, value['low'])}, {shown(task, value['high'])}], {value['num_cases']} cases"

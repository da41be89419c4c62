"""The section of the report page that has the scores of the models, before and after training."""

from __future__ import annotations

from longalign_ray.evaluate import page
from longalign_ray.evaluate.charts import bar_rows
from longalign_ray.evaluate.comparison import as_table
from longalign_ray.evaluate.heat_map import heat_map, scale_legend
from longalign_ray.evaluate.ruler.tasks import RULER_TASKS, THRESHOLD
from longalign_ray.evaluate.score_files import BENCHMARK_TITLES, shown, unit
from longalign_ray.evaluate.summary import Summary
from longalign_ray.evaluate.svg import short


def evaluation(summary: Summary) -> str:
    """Needle heat maps side by side, the held-out losses, a table for each other benchmark, RULER by length."""
    if needle := summary["needle"]:
        parts = [_needle(model, score) for model, score in needle.items()]
    else:
        parts = [page.missing("Needle test", summary["missing"]["needle"])]
    if heldout := summary["heldout"]:
        parts += [
            _heldout(
                heldout, "value", "Held-out loss, mean over sequences", "Every sequence counts equally, as in Eq. 2."
            ),
            _heldout(heldout, "token_loss", "Held-out loss, mean over tokens", "Every target token counts equally."),
        ]
    else:
        parts.append(page.missing("Held-out loss", summary["missing"]["heldout"]))
    explanation = "The same questions, asked of the served models before and after training."
    if comparison := summary["comparison"]:
        note = "95 % intervals by bootstrap over cases; a change is over the cases that both models answered, in pairs."
        parts.append(page.figure("Scores and changes with their intervals", as_table(comparison), note))
    parts += [
        _benchmark(task, summary["benchmarks"].get(task), summary["missing"].get(task))
        for task in BENCHMARK_TITLES
        if task in summary["benchmarks"] or task in summary["missing"]
    ]
    parts += [_ruler(model, score) for model, score in summary["benchmarks"].get("ruler", {}).items()]
    return page.section("What training changed", explanation, page.figures(*parts))


def _benchmark(task: str, scores: Summary | None, missing: str | None) -> str:
    """A row for the whole and one for each part of the benchmark, a column a model."""
    if scores is None:
        return page.missing(BENCHMARK_TITLES[task], missing or "")
    parts = list(dict.fromkeys(part for score in scores.values() for part in score["by_group"]))
    rows = [("all", *(shown(task, score["value"]) for score in scores.values()))]
    for part in parts:
        rows.append((part, *(_part(task, score, part) for score in scores.values())))
    answered = " ".join(dict.fromkeys(_answered(score) for score in scores.values()))
    return page.figure(f"{BENCHMARK_TITLES[task]} ({unit(task)})", page.table(("Part", *scores), rows), answered)


def _part(task: str, score: Summary, part: str) -> str:
    """The score of a part, with its standard error where the benchmark gives one."""
    value, stderr = score["by_group"].get(part), score.get("parts", {}).get(part, {}).get("stderr")
    if value is None:
        return "–"
    return shown(task, value) + ("" if stderr is None else f" ± {shown(task, stderr)}")


def _ruler(model: str, score: Summary) -> str:
    """A row for the average and one for each task, a column a length."""
    rows = [
        (task, *("–" if value is None else shown("ruler", value) for value in values))
        for task, values in (("average", score["averages"]), *zip(score["tasks"], score["grid"], strict=True))
    ]
    effective = f"{score['effective_length']:,}" if score["effective_length"] else f"below {min(score['lengths']):,}"
    note = (
        f"Effective length: {effective} tokens, the largest with an average of at least {THRESHOLD:.1%}. "
        f"{score['num_tasks']} of RULER's {len(RULER_TASKS)} tasks."
    )
    head = ("Task", *(f"{length:,}" for length in score["lengths"]))
    return page.figure(f"RULER by length, {model} ({unit('ruler')})", page.table(head, rows), note)


def _needle(model: str, score: Summary) -> str:
    lengths = score["lengths"]
    chart = heat_map(
        score["grid"],
        columns=[f"{length:,}" if len(lengths) < 8 else short(length) for length in lengths],
        rows=[f"{depth:g}" for depth in score["depths"]],
        title=f"needle accuracy of {model} by prompt length and depth",
        x_label="prompt length (tokens)",
        y_label="depth (%)",
    )
    return page.figure(
        f"Needle in a haystack, {model}: {score['value']:.1%} of the answer's words",
        chart + scale_legend("0 %", "100 %"),
        f"{score['exact']:.0%} of the answers quote the fact word by word. {_answered(score)}",
    )


def _heldout(scores: Summary, key: str, title: str, note: str) -> str:
    rows = [
        (model, score[key], f"{score[key]:.3f}", "before" if number == 0 and len(scores) > 1 else "accent")
        for number, (model, score) in enumerate(scores.items())
    ]
    chart = bar_rows(rows, title=f"{title} of each model", x_label="loss (nats a token), lower is better")
    answered = " ".join(dict.fromkeys(_answered(score) for score in scores.values()))
    return page.figure(title, chart, f"{note} {answered}")


def _answered(score: Summary) -> str:
    failed = ", ".join(f"{reason} {number}" for reason, number in score["failed_by_reason"].items())
    return f"{score['num_cases']} cases answered{f', not answered: {failed}' if failed else ''}."

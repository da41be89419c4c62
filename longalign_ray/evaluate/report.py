"""The report of a run: report.html, one self-contained page, and report.json with the same numbers."""

from __future__ import annotations

from longalign_ray.evaluate import page, sections
from longalign_ray.evaluate.score_files import BENCHMARK_TITLES, shown
from longalign_ray.evaluate.score_section import evaluation
from longalign_ray.evaluate.summary import Summary, summarize
from longalign_ray.run_dir import RunDir, write_json


def write_report(run_dir: RunDir) -> Summary:
    """Writes report.json and report.html from whatever artefacts exist; returns the summary that is in report.json."""
    summary = summarize(run_dir)
    try:
        config = run_dir.config.read_text(encoding="utf-8")
    except OSError:
        config = ""
    write_json(run_dir.report_json, summary)
    run_dir.report_html.write_text(render(summary, config=config), encoding="utf-8")
    return summary


def render(summary: Summary, *, config: str) -> str:
    """The page as one HTML document; `config` is the text of the resolved recipe."""
    seconds = sum(stage["seconds"] for stage in summary["stages"].values())
    subtitle = f"{len(summary['stages'])} stages finished, {sections.duration(seconds)} in all"
    body = [
        page.cards(sections.cards(summary)),
        evaluation(summary),
        sections.training(summary),
        sections.packing(summary),
        sections.flow(summary),
        sections.setup(summary, config),
    ]
    return page.page(f"longalign_ray: {summary['run']}", subtitle, body)


def summary_table(summary: Summary) -> str:
    """The headline numbers as plain text, a line each; what was not measured is left out.

    `dropped` counts what each stage cut, rejected or got no answer to; the report tells the reasons.
    """
    rows: dict[str, str] = {}
    if examples := summary["examples"]:
        rows["examples"] = "{num_examples:,} ({num_heldout:,} held out), {num_tokens:,} tokens".format(**examples)
    if packs := summary["packs"]:
        rows["packs"] = "{num_packs:,} of {capacity:,} tokens, fill {fill:.1%}".format(**packs)
        rows["rank imbalance"] = "{imbalance:.3f} (1 = nobody waits), {num_ranks} ranks".format(**packs)
    if training := summary["training"]:
        rows["training"] = "{num_steps:,} steps, {tokens_per_second:,.0f} tokens/s".format(**training)
    if heldout := summary["heldout"]:
        rows["held-out loss"] = ", ".join(f"{model} {score['value']:.3f}" for model, score in heldout.items())
    if needle := summary["needle"]:
        rows["needle accuracy"] = ", ".join(f"{model} {score['value']:.1%}" for model, score in needle.items())
    for task, scores in summary["benchmarks"].items():
        rows[BENCHMARK_TITLES[task]] = ", ".join(
            f"{model} {shown(task, score['value'])}" for model, score in scores.items()
        )
    dropped = {stage: sum(part["dropped_by_reason"].values()) for stage, part in summary["stages"].items()}
    rows["dropped"] = ", ".join(f"{stage} {number:,}" for stage, number in dropped.items() if number) or "nothing"
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())

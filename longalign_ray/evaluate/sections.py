"""The sections of the report page, each from its part of the summary."""

from __future__ import annotations

from longalign_ray.evaluate import page
from longalign_ray.evaluate.charts import Bars, Line, bar_chart, bar_rows, line_chart, slot_bars
from longalign_ray.evaluate.comparison import as_table
from longalign_ray.evaluate.heat_map import heat_map, scale_legend
from longalign_ray.evaluate.score_files import BENCHMARK_TITLES, shown, unit
from longalign_ray.evaluate.summary import FILL_BINS, Summary
from longalign_ray.evaluate.svg import short


def cards(summary: Summary) -> list[str]:
    """The headline numbers that there are."""
    made = []
    if needle := summary["needle"]:
        made.append(_change("Needle accuracy", needle, style="{:.0%}", better=1, unit=" points", factor=100))
    if heldout := summary["heldout"]:
        made.append(_change("Held-out loss", heldout, style="{:.3f}", better=-1, unit=" nats", factor=1))
    if trained := summary["training"]:
        note = f"{trained['num_steps']:,} steps, {duration(trained['seconds'])}"
        made.append(page.card("Training speed", f"{short(round(trained['tokens_per_second']))} tokens/s", note))
    if examples := summary["examples"]:
        note = f"{short(examples['num_tokens'])} tokens, longest {examples['longest']:,}"
        made.append(page.card("Examples", f"{examples['num_examples']:,}", note))
    if packs := summary["packs"]:
        note = f"{packs['num_packs']:,} packs, {packs['sequences_per_pack']:.1f} sequences each"
        made.append(page.card("Pack fill", f"{packs['fill']:.1%}", note))
        note = f"time over perfect sharing, {packs['num_ranks']} ranks"
        made.append(page.card("Rank imbalance", f"{packs['imbalance']:.3f}", note))
    return made


def _change(title: str, scores: Summary, *, style: str, better: int, unit: str, factor: float) -> str:
    """A card from the first model's value to the last one's; `better` is the sign of a change for the better."""
    names = list(scores)
    first, last = scores[names[0]]["value"], scores[names[-1]]["value"]
    if len(names) == 1:
        return page.card(title, style.format(first), f"of {names[0]}")
    change = last - first
    tone = "" if change == 0 else "good" if change * better > 0 else "bad"
    note = f"{change * factor:+.3g}{unit}, {names[0]} to {names[-1]}".replace("-", "−", 1)
    return page.card(title, style.format(last), note, before=style.format(first), tone=tone)


def evaluation(summary: Summary) -> str:
    """Needle heat maps side by side, the held-out losses, and a table for each other benchmark."""
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


def training(summary: Summary) -> str:
    """Loss, learning rate and throughput by step."""
    trained = summary["training"]
    explanation = "One point an optimizer step; the loss is that of the step's own examples, before its update."
    if not trained:
        return page.section("Training", explanation, page.missing("Training metrics", summary["missing"]["training"]))
    series = trained["series"]
    steps = [step + 1 for step in series["step"]]
    loss = line_chart(
        [
            Line("loss", steps, series["loss"], "accent"),
            Line("learning rate", steps, series["learning_rate"], "accent2", right=True),
        ],
        title="training loss and learning rate by step",
        x_label="step",
        y_label="loss (nats a token)",
        right_label="learning rate",
    )
    speed = line_chart(
        [Line("tokens/s", steps, series["tokens_per_second"], "accent")],
        title="training throughput by step",
        x_label="step",
        y_label="tokens a second",
        from_zero=True,
    )
    loss_note = "Steps hold different examples: the held-out loss above is what compares."
    speed_note = (
        f"{trained['tokens_per_second']:,.0f} tokens/s over all steps; peak memory of a rank "
        f"{trained['max_memory_gb']:.2f} GB."
    )
    figures = [page.figure("Loss", loss, loss_note), page.figure("Throughput of all ranks", speed, speed_note)]
    if heldout := trained["heldout"]:
        figures.append(_heldout_by_step(heldout))
    if imbalance := trained["imbalance"]:
        figures.append(_imbalance_by_step(imbalance))
    return page.section("Training", explanation, page.figures(*figures))


def _heldout_by_step(heldout: Summary) -> str:
    """Of all lengths, and of the shortest and the longest examples where lengths differ enough for buckets."""
    steps = [step + 1 for step in heldout["step"]]
    lines, buckets = [Line("all", steps, heldout["loss"], "accent")], list(heldout["by_length"].items())
    if len(buckets) > 1:
        (shortest, low), *_, (longest, high) = buckets
        lines += [Line(f"{shortest} tokens", steps, low, "before"), Line(f"{longest} tokens", steps, high, "accent2")]
    chart = line_chart(lines, title="held-out loss by step and length", x_label="step", y_label="loss (nats a token)")
    note = "; ".join(f"{name}: {losses[0]:.3f} to {losses[-1]:.3f}" for name, losses in buckets)
    return page.figure("Held-out loss while training", chart, f"By tokens of the example, {note}.")


def _imbalance_by_step(imbalance: Summary) -> str:
    steps, planned, seen = [step + 1 for step in imbalance["step"]], imbalance["planned"], imbalance["seen"]
    chart = line_chart(
        [Line("planned", steps, planned, "before"), Line("by the clock", steps, seen, "accent")],
        title="time of the step over that of perfect sharing, planned and by the clock",
        x_label="step",
        y_label="time / perfect sharing",
    )
    note = f"Means: {sum(planned) / len(planned):.3f} planned, {sum(seen) / len(seen):.3f} by the clock."
    return page.figure("Rank imbalance, planned and seen", chart, note)


def packing(summary: Summary) -> str:
    """Lengths of the examples, fill of the packs, balance over the ranks."""
    parts = []
    if examples := summary["examples"]:
        histogram = examples["histogram"]
        edges = [short(edge) for edge in histogram["edges"]]
        sets = [Bars("for training", histogram["train"], "accent"), Bars("held out", histogram["heldout"], "accent2")]
        counts = bar_chart(
            edges, sets, title="examples by length", x_label="length (tokens, log scale)", y_label="examples"
        )
        tokens = bar_chart(
            edges,
            [Bars("tokens", histogram["tokens"], "accent")],
            title="tokens by length of their example",
            x_label="length of the example (tokens, log scale)",
            y_label="tokens",
        )
        note = "Shortest {shortest:,}, median {median:,.0f}, longest {longest:,} tokens.".format(**examples)
        share = examples["num_targets"] / max(examples["num_tokens"], 1)
        parts += [
            page.figure("Examples by length", counts, note),
            page.figure("Tokens by length of their example", tokens, f"{share:.1%} of all tokens are targets."),
        ]
    else:
        parts.append(page.missing("Examples", summary["missing"]["examples"]))
    if packs := summary["packs"]:
        parts += [_fill(packs), _balance(packs), *_one_step(packs)]
    else:
        parts.append(page.missing("Packs", summary["missing"]["packs"]))
    explanation = "How examples were laid into packs, and how evenly the packs keep the ranks busy."
    return page.section("Data and packing", explanation, page.figures(*parts))


def _fill(packs: Summary) -> str:
    edges = [f"{100 * number // FILL_BINS}" for number in range(FILL_BINS + 1)]
    chart = bar_chart(
        edges,
        [Bars("packs", packs["fill_histogram"], "accent")],
        title="packs by fill",
        x_label=f"fill (% of {packs['capacity']:,} tokens)",
        y_label="packs",
    )
    return page.figure(
        "Pack fill",
        chart,
        "{num_packs:,} packs of {sequences_per_pack:.1f} sequences on average, {fill:.1%} full.".format(**packs),
    )


def _balance(packs: Summary) -> str:
    steps = list(range(1, packs["num_steps"] + 1))
    chart = line_chart(
        [
            Line("busiest rank", steps, packs["busiest_rank"], "accent"),
            Line("idlest rank", steps, packs["idlest_rank"], "before"),
            Line("time of the step", steps, packs["lock_step"], "accent2"),
        ],
        title="cost of the busiest and the idlest rank by step, and time of the step, over the mean of the ranks",
        x_label="step",
        y_label="cost / mean of the ranks",
    )
    where = "once, at its end" if packs["balance"] == "sums" else "in each"
    note = (
        f"1 = the mean rank. A step of {packs['micro_steps']} micro-steps waits for the slowest rank {where}; over "
        f"all steps that takes {packs['imbalance']:.3f} times the time of perfect sharing."
    )
    return page.figure(f"Balance over {packs['num_ranks']} ranks", chart, note)


def _one_step(packs: Summary) -> list[str]:
    """A typical step before and after planning: what each rank computes in each micro-step."""
    steps = packs["one_step"]
    highest = max(cost for step in steps.values() for ranks in step["costs"] for cost in ranks)
    made = []
    for name, what in (("shuffled", "full packs in random order"), ("planned", "as planned")):
        chart = slot_bars(
            steps[name]["costs"],
            title=f"cost of each rank in each micro-step of a step, {what}",
            y_label="cost / mean",
            highest=highest,
        )
        note = f"A typical step: {steps[name]['imbalance']:.3f} times the time of perfect sharing."
        made.append(page.figure(f"One step, {what}", chart, note))
    return made


def flow(summary: Summary) -> str:
    """The table of everything that the stages kept and dropped."""
    explanation = "What every stage kept, and what it cut, rejected or failed to do, by reason."
    if not summary["stages"]:
        why = "no stage has finished yet; `longalign run` runs them all"
        return page.section("Data flow", explanation, page.missing("Stages", why))
    rows = [
        (
            stage,
            page.chips({name: _value(value) for name, value in part["counts"].items()}),
            page.chips({name: f"{number:,}" for name, number in part["dropped_by_reason"].items()}, lost=True),
            duration(part["seconds"]),
        )
        for stage, part in summary["stages"].items()
    ]
    return page.section(
        "Data flow", explanation, page.table(("Stage", "Kept", "Cut, rejected or failed", "Time"), rows)
    )


def setup(summary: Summary, config: str) -> str:
    """Time of the stages, versions, and the recipe as it ran."""
    parts = []
    if stages := summary["stages"]:
        rows = [(name, part["seconds"], duration(part["seconds"]), "accent") for name, part in stages.items()]
        times = page.figure("Time of each stage", bar_rows(rows, title="time of each stage", x_label="linear scale"))
        versions = page.figure("Versions", page.table(("Package", "Version"), list(summary["versions"].items())))
        parts.append(page.figures(times, versions))
    parts.append(
        page.preformatted(config) if config else page.missing("Recipe", "no config.yaml; every command writes it")
    )
    return page.section("Time, versions and the exact recipe", "Everything that is needed to run this again.", *parts)


def _value(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6_000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3_600:.1f} h"

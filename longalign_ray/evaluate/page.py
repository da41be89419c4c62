"""The parts of a report page: cards, figures, tables and the style sheet. No script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { --paper: #f6f5f1; --card: #ffffff; --ink: #1b2430; --muted: #5d6875; --rule: #e1dfd8; --accent: #0b7a75;
  --accent2: #c4561a; --before: #8a94a3; --good: #0b7a75; --bad: #b3372f; --soft: #e3f1ef; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #11161c; --card: #19212a; --ink: #e7ebef; --muted: #9aa7b4;
  --rule: #2c3742; --accent: #45c4b6; --accent2: #f0955b; --before: #7f8b99; --good: #45c4b6; --bad: #f08a80;
  --soft: #17322f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 36px 24px 64px; }
header { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 4px 24px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 19px; margin: 40px 0 4px; letter-spacing: -0.01em; }
h2 + p { margin: 0 0 14px; color: var(--muted); max-width: 860px; }
header p { margin: 0; color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; margin: 24px 0 0; }
.card, figure, .table { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 14px 18px 13px; }
.card h3 { margin: 0; font-size: 13px; font-weight: 600; color: var(--muted); }
.card .value { font-size: 29px; line-height: 1.35; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.card .value .from { color: var(--muted); font-weight: 450; }
.card p { margin: 0; font-size: 13px; color: var(--muted); }
.card p.good { color: var(--good); } .card p.bad { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
@media (max-width: 860px) { .figures { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; padding: 14px 16px 12px; }
figcaption { font-weight: 600; }
figure p, .missing { margin: 2px 0 0; font-size: 13px; color: var(--muted); }
.missing { border: 1px dashed var(--rule); border-radius: 10px; padding: 14px 16px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg.scale { width: 320px; margin: 8px auto 0; }
svg text { font-size: 12px; fill: var(--muted); font-variant-numeric: tabular-nums; }
svg text.strong { fill: var(--ink); font-weight: 600; } svg text.label { fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .hatch { stroke: var(--muted); stroke-width: 1.5; opacity: .5; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .line.accent { stroke: var(--accent); } svg .line.accent2 { stroke: var(--accent2); stroke-dasharray: 6 5; }
svg .line.before { stroke: var(--before); }
svg .accent { fill: var(--accent); } svg .accent2 { fill: var(--accent2); } svg .before { fill: var(--before); }
svg .line.accent, svg .line.accent2, svg .line.before { fill: none; }
svg .bar:hover, svg .cell:hover { opacity: .8; }
.table { overflow-x: auto; }
.figures + .table { margin-top: 14px; } figure .table { border: 0; border-radius: 0; margin: 4px -16px -8px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 9px 16px; border-top: 1px solid var(--rule); }
thead th { border-top: 0; font-size: 13px; color: var(--muted); font-weight: 600; }
thead th:last-child { text-align: right; }
tbody th { font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
.chip { display: inline-block; white-space: nowrap; border-radius: 6px; padding: 1px 8px; margin: 1px 4px 1px 0;
  background: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.chip.lost { background: none; border: 1px solid var(--accent2); color: var(--accent2); }
.chip b { font-weight: 650; }
pre { margin: 0; padding: 14px 18px; overflow-x: auto; font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; columns: 2; column-gap: 40px; }
@media (max-width: 860px) { pre { columns: 1; } }
"""


def page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n" + "\n".join(body) + "\n"
        "</main>\n</body>\n</html>\n"
    )


def card(title: str, value: str, note: str, *, before: str = "", tone: str = "") -> str:
    """A headline number; `before` is the number that it grew out of, `tone` colours the note: good or bad."""
    start = f'<span class="from">{escape(before)} → </span>' if before else ""
    return (
        f'<div class="card"><h3>{escape(title)}</h3><div class="value">{start}{escape(value)}</div>'
        f'<p class="{tone}">{escape(note)}</p></div>'
    )


def cards(items: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(items)}</div>'


def section(title: str, explanation: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(explanation)}</p>{''.join(parts)}</section>"


def figures(*items: str) -> str:
    return f'<div class="figures">{"".join(items)}</div>'


def figure(title: str, chart: str, note: str = "") -> str:
    note = f"<p>{escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}{note}</figure>"


def missing(what: str, why: str) -> str:
    return f'<p class="missing">{escape(what)}: {escape(why)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first cell of a row is its head, the last a number, both text; those between are HTML."""
    head_cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in middle)
        + f'<td class="number">{escape(last)}</td></tr>'
        for first, *middle, last in rows
    )
    return f'<div class="table"><table><thead><tr>{head_cells}</tr></thead><tbody>{body}</tbody></table></div>'


def chips(values: Mapping[str, str], *, lost: bool = False) -> str:
    """Names with their values, as small labels; a dash where there are none."""
    kind = "chip lost" if lost else "chip"
    made = [
        f'<span class="{kind}">{escape(name.replace("_", " "))} <b>{escape(value)}</b></span>'
        for name, value in values.items()
    ]
    return "".join(made) or "–"


def preformatted(text: str) -> str:
    return f'<div class="table"><pre>{escape(text)}</pre></div>'

"""Charts as inline SVG: plain strings from plain numbers, coloured by the classes of the page that holds them.

Every chart has a title for those who cannot see it, axis labels with units, and a tooltip on each mark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from longalign_ray.evaluate.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    right_axis_marks,
    short,
    svg,
    tip,
    x_axis_marks,
    x_label_text,
    y_axis_marks,
)

MOST_POINTS = 400  # more would be closer than a pixel
CHAR_WIDTH = 6.4  # of the 12 px labels, to place a legend


@dataclass(frozen=True, slots=True)
class Line:
    """A named series; `style` is a colour class, `right` puts it on the right-hand axis."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """A named set of bar heights, one for each bin; sets are stacked."""

    name: str
    heights: Sequence[float]
    style: str


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, y_label: str, right_label: str = "", from_zero: bool = False
) -> str:
    """Lines over a common x axis; the right-hand axis has its own scale, from zero."""
    right_margin = 62 if right_label else RIGHT
    shown = [_thinned(line) for line in lines]
    x_axis = Axis.of([x for line in shown for x in line.xs], LEFT, WIDTH - right_margin, whole=True)
    left = [y for line in shown if not line.right for y in line.ys]
    y_axis = Axis.of(left, HEIGHT - BOTTOM, TOP, zero=from_zero)
    parts = [y_axis_marks(y_axis, y_label, WIDTH - right_margin), x_axis_marks(x_axis, x_label, WIDTH - right_margin)]
    right_axis = Axis.of([y for line in shown if line.right for y in line.ys], HEIGHT - BOTTOM, TOP, zero=True)
    if right_label:
        parts.append(right_axis_marks(right_axis, right_label, WIDTH - right_margin))
    for line in shown:
        axis = right_axis if line.right else y_axis
        points = [(x_axis.at(x), axis.at(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(points) <= 60:
            for (x, y), step, value in zip(points, line.xs, line.ys, strict=True):
                tip_text = f"{line.name}, {x_label} {short(step)}: {short(value)}"
                parts.append(
                    f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{tip(tip_text)}</circle>'
                )
    if len(lines) > 1:
        parts.append(_legend([(line.name, line.style) for line in lines]))
    return svg(title, parts)


def bar_chart(edges: Sequence[str], sets: Sequence[Bars], *, title: str, x_label: str, y_label: str) -> str:
    """Stacked bars between the labelled edges of bins: n + 1 edges for n heights."""
    totals = [sum(heights) for heights in zip(*(bars.heights for bars in sets), strict=True)]
    y_axis = Axis.of(totals, HEIGHT - BOTTOM, TOP, zero=True, whole=True)
    bin_width = (WIDTH - LEFT - RIGHT) / len(totals)
    parts = [y_axis_marks(y_axis, y_label, WIDTH - RIGHT)]
    for number in range(len(totals)):
        below = 0.0
        for bars in sets:
            height = bars.heights[number]
            y, base = y_axis.at(below + height), y_axis.at(below)
            below += height
            if height:
                tip_text = f"{edges[number]} to {edges[number + 1]}: {short(height)} {bars.name}"
                parts.append(
                    f'<rect class="bar {bars.style}" x="{LEFT + number * bin_width + 1:.1f}" y="{y:.1f}" '
                    f'width="{bin_width - 2:.1f}" height="{max(base - y, 0.5):.1f}" rx="2">{tip(tip_text)}</rect>'
                )
    crowding = len(edges) * (max(map(len, edges)) + 1.5) * CHAR_WIDTH / (WIDTH - LEFT - RIGHT)
    every = 1 << max(math.ceil(math.log2(crowding)), 0)  # 1, 2, 4, ...: the powers of two keep their labels
    for number in range(0, len(edges), every):
        x = LEFT + number * bin_width
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(edges[number])}</text>'
        )
    parts.append(x_label_text(x_label, WIDTH - RIGHT))
    if len(sets) > 1:
        parts.append(_legend([(bars.name, bars.style) for bars in sets]))
    return svg(title, parts)


def slot_bars(costs: Sequence[Sequence[float]], *, title: str, y_label: str, highest: float) -> str:
    """A bar for each rank in each micro-step, costs[micro_step][rank]; what a rank waits for stands above its bar.

    As many micro-steps are shown as leave a bar three pixels, at least one.
    """
    width = WIDTH - LEFT - RIGHT
    shown = costs[: max(int(width / 3 / (len(costs[0]) + 1)), 1)]
    y_axis = Axis.of([highest], HEIGHT - BOTTOM, TOP, zero=True)
    step_width = width / len(shown)
    bar_width = step_width / (len(shown[0]) + 1)
    parts = [y_axis_marks(y_axis, y_label, WIDTH - RIGHT)]
    for number, ranks in enumerate(shown):
        top = y_axis.at(max(ranks))
        for rank, cost in enumerate(ranks):
            x, y = LEFT + number * step_width + (rank + 0.5) * bar_width, y_axis.at(cost)
            place = f'x="{x:.1f}" width="{max(bar_width * 0.8, 0.5):.1f}"'
            tip_text = f"micro-step {number + 1}, rank {rank + 1}: {short(cost)}, waits {short(max(ranks) - cost)}"
            parts.append(
                f'<rect class="bar before" {place} y="{top:.1f}" height="{y - top:.1f}" opacity="0.35"/>'
                f'<rect class="bar accent" {place} y="{y:.1f}" height="{max(y_axis.at(0) - y, 0.5):.1f}">'
                f"{tip(tip_text)}</rect>"
            )
        if len(shown) <= 24:
            middle = LEFT + (number + 0.5) * step_width
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number + 1}</text>')
    rest = f", the first {len(shown)} of {len(costs)}" if len(shown) < len(costs) else ""
    parts.append(x_label_text(f"micro-step{rest}; a bar a rank", WIDTH - RIGHT))
    parts.append(_legend([("computes", "accent"), ("waits", "before")]))
    return svg(title, parts)


def bar_rows(rows: Sequence[tuple[str, float, str, str]], *, title: str, x_label: str) -> str:
    """Horizontal bars from zero; a row is (label, value, text beside the bar, colour class)."""
    label_width = max(len(label) for label, *_ in rows) * 7 + 14
    text_width = max(len(text) for _, _, text, _ in rows) * 7 + 12
    largest = max(value for _, value, _, _ in rows) or 1.0
    parts = []
    for number, (label, value, text, style) in enumerate(rows):
        y = 8 + number * 34
        width = (WIDTH - label_width - text_width) * value / largest
        parts += [
            f'<text class="strong" x="{label_width - 10}" y="{y + 17}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="bar {style}" x="{label_width}" y="{y + 2}" width="{max(width, 1):.1f}" height="22" rx="3">'
            f"{tip(f'{label}: {text}')}</rect>",
            f'<text class="strong" x="{label_width + width + 8:.1f}" y="{y + 17}">{escape(text)}</text>',
        ]
    bottom = 8 + len(rows) * 34
    parts.append(f'<text class="label" x="{label_width}" y="{bottom + 12}">{escape(x_label)}</text>')
    return svg(title, parts, height=bottom + 20)


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    parts, x = [], float(LEFT)
    for name, style in entries:
        parts.append(f'<rect class="bar {style}" x="{x:.0f}" y="8" width="12" height="4" rx="2"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="15">{escape(name)}</text>')
        x += 17 + len(name) * CHAR_WIDTH + 20
    return "".join(parts)


def _thinned(line: Line) -> Line:
    """The means of equal stretches, where there are more points than pixels."""
    size = math.ceil(len(line.xs) / MOST_POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.xs), size)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[start : start + size]) / len(values[start : start + size]) for start in starts]

    return Line(line.name, means(line.xs), means(line.ys), line.style, line.right)

"""The parts of a chart: a frame, an axis, a tooltip, a number for a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Size of a chart in pixels at its natural size, and the margins around what it plots.
WIDTH, HEIGHT = 560, 264
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 34, 46


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from values to pixels, with its ticks at round numbers."""

    low: float
    high: float
    first: float
    last: float
    ticks: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float], first: float, last: float, *, zero: bool = False, whole: bool = False) -> Axis:
        """`zero`: starts there; `whole`: no ticks between whole numbers. Else a little wider than the values."""
        low, high = (0.0 if zero else min(values, default=0.0)), max(values, default=1.0)
        if high <= low:
            low, high = (low, low + 1.0) if zero or whole else (low - 0.5, low + 0.5)
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
        step = max(step, 1.0) if whole else step
        if not whole or zero:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return Axis(low, high, first, last, tuple(number * step for number in count))

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def y_axis_marks(axis: Axis, label: str, right: float) -> str:
    parts = [turned_label(label, 15, (axis.first + axis.last) / 2)]
    for tick in axis.ticks:
        y = axis.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    return "".join(parts)


def right_axis_marks(axis: Axis, label: str, right: float) -> str:
    texts = [f'<text x="{right + 8}" y="{axis.at(tick) + 4:.1f}">{short(tick)}</text>' for tick in axis.ticks]
    return "".join(texts) + turned_label(label, WIDTH - 8, (axis.first + axis.last) / 2)


def x_axis_marks(axis: Axis, label: str, right: float) -> str:
    y = HEIGHT - BOTTOM + 17
    ticks = [f'<text x="{axis.at(tick):.1f}" y="{y}" text-anchor="middle">{short(tick)}</text>' for tick in axis.ticks]
    return "".join(ticks) + x_label_text(label, right)


def x_label_text(label: str, right: float) -> str:
    x = (LEFT + right) / 2
    return f'<text class="label" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'


def turned_label(label: str, x: float, y: float) -> str:
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
    return f'<text class="label" {place} text-anchor="middle">{escape(label)}</text>'


def short(value: float) -> str:
    """A number for a label: 1,234, 12.5k, 3.2M, 0.0312 or 2e-5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3 or value == int(value):
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def svg(title: str, parts: Sequence[str], *, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'

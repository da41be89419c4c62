"""A grid of values from 0 to 1 as coloured cells with their numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from longalign_ray.evaluate.svg import LEFT, RIGHT, WIDTH, svg, tip, turned_label

# Evenly spaced stops of a dark-to-light scale that stays ordered for every kind of colour vision and in grey.
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def heat_map(
    grid: Sequence[Sequence[float | None]], *, columns: Sequence[str], rows: Sequence[str], title: str,
    x_label: str, y_label: str,
) -> str:  # fmt: skip
    """Cells with a value of 0 to 1 shown in per cent; a cell without a value is hatched."""
    cell_width = (WIDTH - LEFT - RIGHT) / len(columns)
    cell_height = max(26.0, min(40.0, 240 / len(rows)))
    top, bottom = 8, 8 + cell_height * len(rows)
    parts = [
        '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line class="hatch" x1="0" y1="0" x2="0" y2="6"/></pattern></defs>'
    ]
    for i, row in enumerate(grid):
        y = top + i * cell_height
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + cell_height / 2 + 4:.1f}" text-anchor="end">{escape(rows[i])}</text>'
        )
        for j, value in enumerate(row):
            x = LEFT + j * cell_width
            fill, ink = ("url(#hatch)", "var(--muted)") if value is None else _shade(value)
            text = "–" if value is None else f"{100 * value:.0f}"
            where = f"{x_label} {columns[j]}, {y_label} {rows[i]}"
            tip_text = f"{where}: {'no answer' if value is None else f'{100 * value:.1f} %'}"
            parts.append(
                f'<g><rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_width - 2:.1f}" '
                f'height="{cell_height - 2:.1f}" rx="3" style="fill:{fill}"/><text class="strong" '
                f'x="{x + cell_width / 2:.1f}" y="{y + cell_height / 2 + 4:.1f}" text-anchor="middle" '
                f'style="fill:{ink}">{text}</text>{tip(tip_text)}</g>'
            )
    for j, column in enumerate(columns):
        x = LEFT + (j + 0.5) * cell_width
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{escape(column)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        f'<text class="label" x="{middle:.1f}" y="{bottom + 36:.1f}" text-anchor="middle">{escape(x_label)}</text>',
        turned_label(y_label, 15, (top + bottom) / 2),
    ]
    return svg(title, parts, height=bottom + 46)


def scale_legend(low: str, high: str) -> str:
    """The colours of `heat_map` from 0 to 100 per cent."""
    steps = 20
    cells = "".join(
        f'<rect x="{60 + 9 * number}" y="2" width="9.5" height="12" style="fill:{_shade(number / (steps - 1))[0]}"/>'
        for number in range(steps)
    )
    low_text = f'<text x="52" y="13" text-anchor="end">{escape(low)}</text>'
    return (
        f'<svg class="scale" viewBox="0 0 320 18" role="img" aria-label="colour scale from {escape(low)} to '
        f'{escape(high)}">{low_text}{cells}<text x="248" y="13">{escape(high)}</text></svg>'
    )


def _shade(value: float) -> tuple[str, str]:
    """Colour of a value of 0 to 1, and of text that is legible on it."""
    place = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    below = min(int(place), len(SCALE) - 2)
    mixed = [a + (b - a) * (place - below) for a, b in zip(SCALE[below], SCALE[below + 1], strict=True)]
    bright = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] > 130
    return f"rgb({', '.join(f'{part:.0f}' for part in mixed)})", "#10151b" if bright else "#ffffff"

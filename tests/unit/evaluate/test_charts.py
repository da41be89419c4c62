from __future__ import annotations

import re

import pytest

from longalign_ray.evaluate.charts import Bars, Line, bar_chart, bar_rows, line_chart
from longalign_ray.evaluate.heat_map import SCALE, heat_map, scale_legend
from longalign_ray.evaluate.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (1234, "1,234"),
        (12_500, "12.5k"),
        (3_200_000, "3.2M"),
        (0.0312, "0.0312"),
        (2e-5, "2e-5"),
        (1.25e-7, "1.25e-7"),
        (-3.5, "-3.5"),
    ],
)
def test_short_numbers(value: float, text: str):
    assert short(value) == text


def test_axis_ticks_are_round_and_hold_the_values():
    axis = Axis.of([1.03, 2.61], 100.0, 0.0)
    assert axis.ticks == pytest.approx((1.0, 1.5, 2.0, 2.5, 3.0))
    assert axis.at(1.0) == 100.0
    assert axis.at(3.0) == 0.0
    assert axis.at(2.0) == 50.0


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0], [0.0], [1e-9, 2e-9], [1e12, 3e12]])
def test_axis_of_odd_values_has_an_extent(values: list[float]):
    for zero in (False, True):
        for whole in (False, True):
            axis = Axis.of(values, 0.0, 100.0, zero=zero, whole=whole)
            assert axis.high > axis.low
            assert all(-1e-6 <= axis.at(value) <= 100 + 1e-6 for value in values)


def test_whole_axes_have_whole_ticks():
    assert Axis.of([1, 3], 0.0, 1.0, whole=True).ticks == (1, 2, 3)


def test_points_lie_where_their_values_say():
    chart = line_chart([Line("a", [1, 2, 3], [0.0, 5.0, 10.0], "accent")], title="t", x_label="x", y_label="y")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    assert points[
        1
    ] == f"{LEFT}.0,{HEIGHT - BOTTOM}.0 {(LEFT + WIDTH - RIGHT) / 2:.1f},{(TOP + HEIGHT - BOTTOM) / 2:.1f} " + (
        f"{WIDTH - RIGHT}.0,{TOP}.0"
    )


def test_long_series_are_thinned_to_means():
    ys = [float(number % 2) for number in range(4_000)]
    chart = line_chart([Line("a", list(range(4_000)), ys, "accent")], title="t", x_label="x", y_label="y")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    assert len(points[1].split()) == 400
    assert len({point.split(",")[1] for point in points[1].split()}) == 1  # every mean is one half


def test_stacked_bars_have_heights_in_proportion():
    chart = bar_chart(
        ["0", "1", "2"],
        [Bars("one", [10, 5], "accent"), Bars("two", [0, 5], "accent2")],
        title="t",
        x_label="x",
        y_label="y",
    )
    bars = re.findall(r'class="bar \w+" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" rx="2"', chart)
    (y1, h1), (y2, h2), (y3, h3) = [(float(y), float(height)) for y, height in bars[:3]]  # the legend follows
    assert h2 == pytest.approx(h1 / 2, abs=0.1)
    assert h3 == pytest.approx(h2, abs=0.1)
    assert y3 == pytest.approx(y1, abs=0.1)  # 5 on 5 is as high as 10
    assert y3 + h3 == pytest.approx(y2, abs=0.1)


def test_bar_rows_survive_zero():
    assert 'width="1.0"' in bar_rows([("a", 0.0, "0", "accent")], title="t", x_label="x")


def test_heat_map_cells():
    chart = heat_map(
        [[0.0, 1.0], [None, 0.5]], columns=["512", "1,024"], rows=["10", "90"], title="t", x_label="x", y_label="y"
    )
    fills = re.findall(r'class="cell"[^>]*style="fill:([^"]+)"', chart)
    assert fills == [f"rgb{SCALE[0]}", f"rgb{SCALE[-1]}", "url(#hatch)", f"rgb{SCALE[2]}"]
    assert re.findall(r">(\d+|–)</text><title>", chart) == ["0", "100", "–", "50"]
    assert "x 512, y 90: no answer" in chart
    assert scale_legend("a", "b").count("<rect") == 20

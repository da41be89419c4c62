from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign_ray.cli import main
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate import confidence
from longalign_ray.evaluate.comparison import compare, describe_comparison
from longalign_ray.evaluate.confidence import Interval, difference, score_interval
from longalign_ray.evaluate.report import write_report
from longalign_ray.run_dir import RunDir, write_json
from tests.unit.evaluate.test_report import check_html


def test_intervals_worked_by_hand(monkeypatch: pytest.MonkeyPatch):
    assert score_interval({"all": {"a": 0.25, "b": 0.25}}) == Interval(0.25, 0.25, 0.25, 2)
    # Two cases drawn with replacement give 0, 1/2 or 1, the ends with a chance of a quarter each.
    assert score_interval({"all": {"a": 0.0, "b": 1.0}}) == Interval(0.5, 0.0, 1.0, 2)
    # The mean of the parts' means, and a part without spread adds none.
    assert score_interval({"x": {"a": 1.0}, "y": {"b": 0.0, "c": 0.0, "d": 0.0}}) == Interval(0.5, 0.5, 0.5, 4)
    monkeypatch.setattr(confidence, "CHUNK_VALUES", 7)  # drawn in many chunks, the last one short
    assert score_interval({"all": {"a": 0.5, "b": 0.5, "c": 0.5}}) == Interval(0.5, 0.5, 0.5, 3)


def test_interval_is_that_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).beta(2, 1, size=150)
    mine = score_interval({"all": {str(number): float(value) for number, value in enumerate(values)}})
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=2_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert mine.high - mine.low == pytest.approx(2 * 1.96 * values.std() / 150**0.5, rel=0.08)


def test_a_difference_is_paired():
    before = {"all": {str(number): value for number, value in enumerate([0.1, 0.9, 0.2, 0.7, 0.4])}}
    after = {"all": {case: value + 0.125 for case, value in before["all"].items()} | {"only here": 0.0}}
    found = difference(before, after)
    assert found is not None  # the same gain on each case: no doubt about it, however unlike the cases are
    assert (found.value, found.low, found.high, found.num_cases) == pytest.approx((0.125, 0.125, 0.125, 5))
    assert difference(before, {"all": {"other": 1.0}}) is None
    alone = score_interval(before)
    assert alone.high - alone.low > 0.4


def write_scores(run_dir: Path, model: str, task: str, values: dict[str, float], metric: str = "m") -> None:
    value = sum(values.values()) / len(values)
    score: dict[str, Any] = {"model": model, "metric": metric, "value": value, "num_cases": len(values)}
    more = {"by_group": {}, "by_case": {"all": values}, "failed_by_reason": {}}
    write_json(RunDir(run_dir).scores / f"{task}-{model}.json", score | more)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    rng = random.Random(0)
    cases = {str(number): rng.random() for number in range(40)}
    better = {case: value + 0.25 for case, value in cases.items()}
    write_scores(tmp_path / "one", "base", "longeval", cases)
    write_scores(tmp_path / "one", "aligned", "longeval", better)
    write_scores(tmp_path / "two | x", "aligned", "longeval", {case: better[case] - 0.5 for case in list(better)[:30]})
    write_scores(tmp_path / "two | x", "aligned", "longbench_chat", {"1": 7.0, "2": 8.0}, "longbench_chat")
    return [str(tmp_path / "one"), str(tmp_path / "two | x")]


def test_runs_side_by_side(runs: list[str]):
    comparison = compare([RunDir(Path(run)) for run in runs])
    columns = [("one", "base"), ("one", "aligned"), ("two | x", "aligned")]
    assert [tuple(column.values()) for column in comparison["columns"]] == columns
    none, first, second = comparison["tasks"]["longeval"]["changes"]
    assert none is None
    assert (first["value"], first["low"], first["high"], first["num_cases"]) == pytest.approx((0.25, 0.25, 0.25, 40))
    assert (second["value"], second["num_cases"]) == pytest.approx((-0.25, 30))
    chat = comparison["tasks"]["longbench_chat"]
    assert chat["scores"][:2] == [None, None]
    assert chat["scores"][2] == {"value": 7.5, "low": 7.0, "high": 8.0, "num_cases": 2}
    assert chat["changes"] == [None, None, None]


def test_forms(runs: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["compare", *runs]) == 0
    head, _, longeval, chat = capsys.readouterr().out.splitlines()
    assert head == "| Task | one: base | one: aligned | two \\| x: aligned |"
    assert "change +25.0 [25.0, 25.0], 40 cases" in longeval
    assert chat == "| LongBench-Chat (1 to 10) | – | – | 7.500 [7.000, 8.000], 2 cases |"
    check_html(describe_comparison(runs, form="html"))
    assert json.loads(describe_comparison(runs, form="json")) == compare([RunDir(Path(run)) for run in runs])
    rows = [json.loads(line) for line in describe_comparison(runs, form="rows").splitlines()]
    assert [row["model"] for row in rows] == ["base", "aligned", "aligned"]
    assert rows[2]["scores"]["longbench_chat"] == {
        "metric": "longbench_chat",
        "value": 7.5,
        "low": 7.0,
        "high": 8.0,
        "num_cases": 2,
    }
    assert set(rows[0]["scores"]) == {"longeval"}


def test_the_report_has_intervals(runs: list[str]):
    run_dir = RunDir(Path(runs[0]))
    summary = write_report(run_dir)
    assert "by_case" not in summary["benchmarks"]["longeval"]["base"]
    assert summary["comparison"]["tasks"]["longeval"]["changes"][1]["num_cases"] == 40
    html = run_dir.report_html.read_text(encoding="utf-8")
    check_html(html)
    assert "change +25.0 [25.0, 25.0], 40 cases" in html


def test_scores_of_no_use_are_told(runs: list[str], tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"nowhere has no scores in .*: name the directory of a run"):
        describe_comparison([*runs, str(tmp_path / "nowhere")], form="json")
    path = RunDir(Path(runs[0])).scores / "longeval-base.json"
    old = json.loads(path.read_text())
    del old["by_case"]  # as an earlier version wrote it
    path.write_text(json.dumps(old))
    of_task = compare([RunDir(Path(runs[0]))])["tasks"]["longeval"]
    assert (of_task["scores"][0]["low"], of_task["changes"]) == (None, [None, None])
    path.write_text("{")
    with pytest.raises(EvaluationError, match=r"longeval-\*\.json of .* cannot be read"):
        compare([RunDir(Path(runs[0]))])

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import ExampleIndex
from longalign_ray.evaluate.report import summary_table, write_report
from longalign_ray.run_dir import Manifest, RunDir, write_json

VOID = {"meta", "br", "hr", "img", "input", "link"}
# Seven examples of these lengths, the last held out; two steps of two micro-steps on two groups.
LENGTHS = [60, 40, 100, 90, 30, 70, 50]
SLOTS = [[0, 1], [2], [3], [], [4], [], [], [5]]


class Checker(HTMLParser):
    """Collects tags and attributes; a tag closed out of order is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def check_html(text: str) -> Checker:
    """Well formed, and asks nothing of any network."""
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.stack == []
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert not [name for name, _ in checker.attributes if name in ("src", "href", "srcset", "onload", "onclick")]
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert not re.search(r"\bnan\b|\binf\b|None", text)
    return checker


def write_artefacts(run_dir: RunDir) -> None:
    run_dir.root.mkdir(parents=True, exist_ok=True)
    run_dir.config.write_text("seed: 0  # <b>\nevaluate:\n  models: [zero, after]\n", encoding="utf-8")
    lengths = np.array(LENGTHS, np.int32)
    index = ExampleIndex(
        example_id=np.array([f"e{number}" for number in range(7)], dtype=object),
        length=lengths,
        num_targets=np.full(7, 11, np.int32),
        sum_weights=np.full(7, 11.0),
        file=np.zeros(7, np.int32),
        row=np.arange(7, dtype=np.int32),
        source=np.full(7, "corpus", object),
        heldout=np.arange(7) == 6,
    )
    run_dir.store.mkdir(parents=True)
    index.save(run_dir.store / "index.parquet")
    rows = np.array([row for slot in SLOTS for row in slot], np.int64)
    plan = StepPlan(
        example_rows=rows,
        lengths=lengths[rows],
        offsets=np.concatenate([[0], np.cumsum([len(slot) for slot in SLOTS])]).astype(np.int64),
        shape=(2, 2, 2),
        num_sequences=np.array([4, 2]),
        num_targets=np.array([44, 22]),
        sum_weights=np.array([44.0, 22.0]),
        epoch=np.array([0, 0]),
        capacity=100,
        seed=0,
        cost=SequenceCost(linear=1.0, quadratic=0.0),
    )
    plan.save(run_dir.plan)
    run_dir.metrics.parent.mkdir()
    steps = [
        {"step": 0, "loss": 2.75, "learning_rate": 2e-5, "num_tokens": 290, "num_sequences": 4, "seconds": 2.0},
        {"step": 1, "loss": 2.25, "learning_rate": 1e-5, "num_tokens": 100, "num_sequences": 2, "seconds": 3.0},
    ]
    for step in steps:
        step |= {"grad_norm": 1.0, "tokens_per_second": step["num_tokens"] / step["seconds"], "max_memory_gb": 1.5}
    for step, seen, loss in ((0, 1.25, 3.5), (1, 1.75, 3.25)):
        by_length = {"0-4k": loss - 1, "8-16k": loss + 1}
        steps[step] |= {"rank_imbalance": 1.125, "seen_imbalance": seen}
        steps[step] |= {"heldout_loss": loss, "heldout_by_length": by_length}
    run_dir.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    for model, cells, loss in (("after", [[0.75, 1.0]], 1.625), ("zero", [[0.25, None]], 2.125)):
        answered = [cell for cell in cells[0] if cell is not None]
        common = {"model": model, "metric": "m", "failed_by_reason": {} if model == "after" else {"timeout": 1}}
        needle = {
            "metric": "needle_accuracy",
            "value": sum(answered) / len(answered),
            "num_cases": len(answered),
            "exact": 0.5,
            "grid": cells,
        }
        write_json(run_dir.scores / f"needle-{model}.json", common | needle | {"lengths": [512, 1024], "depths": [50]})
        heldout = {"value": loss, "num_cases": 1, "token_loss": loss + 1, "num_targets": 11}
        write_json(run_dir.scores / f"heldout-{model}.json", common | heldout)
    dropped = {"prepare": {"too_long": 17}, "evaluate": {"timeout": 2}}
    for stage, counts in (("prepare", {"examples": 7}), ("train", {"first_loss": 2.75}), ("evaluate", {"cases": 6})):
        versions = {"torch": "9.8.7"}
        Manifest(stage, "d", [], [], dict(counts), dropped.get(stage, {}), versions, 90.0).save(run_dir.manifest(stage))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "some run & more")


def test_numbers_by_hand(run_dir: RunDir):
    write_artefacts(run_dir)
    summary = write_report(run_dir)
    assert summary == json.loads(run_dir.report_json.read_text(encoding="utf-8"))
    examples, packs, training = summary["examples"], summary["packs"], summary["training"]
    assert (examples["num_examples"], examples["num_heldout"], examples["num_tokens"]) == (7, 1, 440)
    assert (examples["shortest"], examples["median"], examples["longest"]) == (30, 60, 100)
    histogram = examples["histogram"]
    assert histogram["edges"] == [16, 23, 32, 45, 64, 91, 128]
    assert histogram["train"] == [0, 1, 1, 1, 2, 1]
    assert histogram["heldout"] == [0, 0, 0, 1, 0, 0]
    assert histogram["tokens"] == [0, 30, 40, 110, 160, 100]
    # Packs of 100, 100, 90, 30 and 70 tokens of 100.
    assert packs["num_packs"] == 5
    assert packs["fill"] == pytest.approx(390 / 500)
    assert sum(packs["fill_histogram"]) == 5
    assert packs["fill_histogram"][-1] == 2
    # Step 0: ranks 190 and 100; slowest 100 + 90 of a mean 145. Step 1: ranks 30 and 70, one after
    # the other.
    assert packs["busiest_rank"] == pytest.approx([190 / 145, 70 / 50])
    assert packs["idlest_rank"] == pytest.approx([100 / 145, 30 / 50])
    assert packs["lock_step"] == pytest.approx([190 / 145, (30 + 70) / 50])
    assert packs["imbalance"] == pytest.approx((190 + 100) / (145 + 50))
    # Of two steps the one that waits longer: ranks of 30 and nothing, then nothing and 70.
    planned, shuffled = packs["one_step"]["planned"], packs["one_step"]["shuffled"]
    assert (planned["step"], planned["imbalance"]) == (1, 2)
    assert sorted(cost for ranks in planned["costs"] for cost in ranks) == pytest.approx([0, 0, 1.2, 2.8])
    assert (len(shuffled["costs"]), len(shuffled["costs"][0])) == (2, 2)
    assert sum(cost for ranks in shuffled["costs"] for cost in ranks) == pytest.approx(4)
    assert training["tokens_per_second"] == pytest.approx(390 / 5)
    assert (training["first_loss"], training["last_loss"]) == (2.75, 2.25)
    assert training["imbalance"] == {"step": [0, 1], "planned": [1.125, 1.125], "seen": [1.25, 1.75]}
    assert training["heldout"]["loss"] == [3.5, 3.25]
    assert list(summary["needle"]) == ["zero", "after"], "not in the order of evaluate.models"
    assert summary["missing"] == {}


def test_the_page_holds_the_numbers(run_dir: RunDir):
    write_artefacts(run_dir)
    write_report(run_dir)
    text = run_dir.report_html.read_text(encoding="utf-8")
    checker = check_html(text)
    assert checker.tags.count("svg") == 17  # 10 of data and training, 2 maps and their scales, 2 losses, 1 of times
    for number in ("78.0%", "78 tokens/s", "2.125", "1.625", "3.125", "9.8.7", "too long <b>17</b>"):
        assert number in text, number
    assert "Means: 1.125 planned, 1.500 by the clock." in text
    assert "0-4k: 2.500 to 2.250; 8-16k: 4.500 to 4.250." in text
    assert "some run &amp; more" in text
    assert "# &lt;b&gt;" in text, "the recipe was not escaped"
    assert "25% → </span>88%" in text  # (0.75 + 1) / 2
    assert "not answered: timeout 1" in text
    assert "url(#hatch)" in text  # the cell without an answer
    labels = [value for name, value in checker.attributes if name == "aria-label"]
    assert checker.attributes.count(("role", "img")) == len(labels) == checker.tags.count("svg")
    assert "prefers-color-scheme: dark" in text


def test_a_report_of_nothing_says_what_makes_each_part(run_dir: RunDir):
    run_dir.root.mkdir()
    summary = write_report(run_dir)
    text = run_dir.report_html.read_text(encoding="utf-8")
    check_html(text)
    assert set(summary["missing"]) == {"examples", "packs", "training", "needle", "heldout"}
    for command in ("longalign prepare", "longalign train", "longalign evaluate"):
        assert command in text
    assert summary_table(summary) == "dropped  nothing"


@pytest.mark.parametrize("kept", ["examples", "packs", "training", "needle", "heldout"])
def test_every_part_stands_alone(run_dir: RunDir, kept: str):
    write_artefacts(run_dir)
    files: dict[str, list[Path]] = {
        "examples": [run_dir.store / "index.parquet"],
        "packs": [run_dir.plan],
        "training": [run_dir.metrics],
        "needle": list(run_dir.scores.glob("needle*")),
        "heldout": list(run_dir.scores.glob("heldout*")),
    }
    for name, paths in files.items():
        for path in paths if name != kept else ():
            path.unlink()
    summary = write_report(run_dir)
    assert [name for name in files if summary[name] is not None] == [kept]
    check_html(run_dir.report_html.read_text(encoding="utf-8"))


def test_broken_artefacts_are_told_and_the_rest_is_shown(run_dir: RunDir):
    write_artefacts(run_dir)
    run_dir.plan.write_bytes(b"no zip")
    (run_dir.store / "index.parquet").write_bytes(b"no parquet")
    next(run_dir.scores.glob("needle*")).write_text("{", encoding="utf-8")
    summary = write_report(run_dir)
    assert {"packs", "examples", "needle"} == set(summary["missing"])
    text = run_dir.report_html.read_text(encoding="utf-8")
    assert text.count("cannot be read") == 3
    assert "2.125" in text


def test_summary_table(run_dir: RunDir):
    write_artefacts(run_dir)
    assert summary_table(write_report(run_dir)).splitlines() == [
        "examples         7 (1 held out), 440 tokens",
        "packs            5 of 100 tokens, fill 78.0%",
        "rank imbalance   1.487 (1 = nobody waits), 2 ranks",
        "training         2 steps, 78 tokens/s",
        "held-out loss    zero 2.125, after 1.625",
        "needle accuracy  zero 25.0%, after 87.5%",
        "dropped          prepare 17, evaluate 2",
    ]


def test_one_model_and_one_step_make_a_page(run_dir: RunDir):
    write_artefacts(run_dir)
    for path in run_dir.scores.glob("*-zero.json"):
        path.unlink()
    run_dir.metrics.write_text(run_dir.metrics.read_text().splitlines()[0] + "\n")
    write_report(run_dir)
    text = run_dir.report_html.read_text(encoding="utf-8")
    check_html(text)
    assert "of after" in text


def test_attribute_values_are_escaped(run_dir: RunDir):
    write_artefacts(run_dir)
    path = run_dir.scores / "needle-zero.json"
    score = json.loads(path.read_text())
    write_json(path, score | {"model": '"><script>x</script>'})
    write_report(run_dir)
    check_html(run_dir.report_html.read_text(encoding="utf-8"))


def test_other_benchmarks_are_tables_of_models_side_by_side(run_dir: RunDir):
    write_artefacts(run_dir)
    for model, value, by_group in (("after", 0.75, {"qasper": 0.5, "lcc": 1.0}), ("zero", 0.25, {"qasper": 0.25})):
        score = {"model": model, "value": value, "num_cases": 3, "by_group": by_group, "failed_by_reason": {}}
        write_json(run_dir.scores / f"longbench-{model}.json", score)
    (run_dir.scores / "longeval-zero.json").write_text("{", encoding="utf-8")
    summary = write_report(run_dir)
    text = run_dir.report_html.read_text(encoding="utf-8")
    check_html(text)
    assert list(summary["benchmarks"]) == ["longbench"]
    assert set(summary["missing"]) == {"longeval"}
    assert "LongEval: cannot be read" in text
    for row in (("Part", "zero", "after"), ("all", "25.0", "75.0"), ("qasper", "25.0", "50.0"), ("lcc", "–", "100.0")):
        cells = r"</t[dh]>\s*<t[dh][^>]*>".join(map(re.escape, row))
        assert re.search(rf">{cells}</t[dh]>", text), row
    assert "LongBench        zero 25.0, after 75.0" in summary_table(summary)

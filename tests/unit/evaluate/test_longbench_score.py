from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.cli import main
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.longbench_score import score_directory, summed_up
from longalign_ray.evaluate.longbench_sets import LONGBENCH_SETS

# Llama2-7B-chat-4k as the benchmark publishes it.
PUBLISHED = {
    "narrativeqa": 18.7, "qasper": 19.2, "multifieldqa_en": 36.8, "multifieldqa_zh": 11.9, "hotpotqa": 25.4,
    "2wikimqa": 32.8, "musique": 9.4, "dureader": 5.2, "gov_report": 27.3, "qmsum": 20.8, "multi_news": 25.8,
    "vcsum": 0.2, "trec": 61.5, "triviaqa": 77.8, "samsum": 40.7, "lsht": 19.8, "passage_count": 2.1,
    "passage_retrieval_en": 9.8, "passage_retrieval_zh": 0.5, "lcc": 52.4, "repobench-p": 43.8,
}  # fmt: skip


def row(pred: str | None, *answers: str, length: int = 100, **changes: Any) -> dict[str, Any]:
    return {"pred": pred, "answers": list(answers), "all_classes": None, "length": length} | changes


def write(directory: Path, name: str, rows: list[Any]) -> Path:
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows), encoding="utf-8")
    return path


def test_scores_by_hand(tmp_path: Path) -> None:
    write(
        tmp_path, "hotpotqa", [row("red", "red"), row("blue", "red", length=4_000), row("cat sat", "the cat sat down")]
    )
    write(tmp_path, "passage_count", [row("7", "7", length=9_000), row(None, "7"), row("7 8", "7", length=8_000)])
    scores = score_directory(tmp_path)
    assert scores.row_scores == {"hotpotqa": pytest.approx([1.0, 0.0, 0.8]), "passage_count": [1.0, None, 0.5]}
    assert scores.scores == {"hotpotqa": 60.0, "passage_count": 75.0}
    assert scores.buckets["hotpotqa"] == {"0-4k": 90.0, "4-8k": 0.0, "8k+": None}
    assert scores.buckets["passage_count"] == {"0-4k": None, "4-8k": None, "8k+": 75.0}
    assert scores.rows["passage_count"] == {"scored": 2, "unscored": 1, "published": 200}
    assert scores.category_scores["en"]["multi-doc QA"] is None  # two sets of it are missing
    assert scores.averages == {"en": None, "zh": None}


def test_averages_are_those_published() -> None:
    scores = summed_up({name: [PUBLISHED[name] / 100] for name in LONGBENCH_SETS}, {name: [0] for name in PUBLISHED})
    assert {language: round(mean or 0, 1) for language, mean in scores.averages.items()} == {"en": 31.0, "zh": 14.3}
    assert scores.category_scores["zh"]["code"] == scores.category_scores["en"]["code"] == pytest.approx(48.1)


def test_real_predictions_have_the_published_scores(shared_data: Path) -> None:
    pytest.importorskip("jieba", reason="the package jieba is not installed")
    directory = shared_data / "longbench_v1" / "pred" / "llama2-7b-chat-4k"
    if not directory.is_dir():
        pytest.skip(f"no predictions at {directory}")
    published = {
        name: json.loads((directory / f"{name}.json").read_text()) for name in ("result", "bucket_scores", "row_scores")
    }
    scores = score_directory(directory)
    assert scores.scores == published["result"]
    assert scores.buckets == published["bucket_scores"]
    assert sum(map(len, scores.row_scores.values())) == 4_750
    for name, of_rows in published["row_scores"].items():
        assert scores.row_scores[name] == pytest.approx(of_rows, abs=1e-6), name  # published to six decimals


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"pred": "a", "answers": ["a"], "len', "line 2: Unterminated string"),
        ('["a"]', "line 2: a JSON object was expected, and it is list"),
        ('{"answers": ["a"], "all_classes": null, "length": 1}', "line 2: the field 'pred' is missing"),
        ('{"pred": "a", "answers": "a", "all_classes": null, "length": 1}', "line 2: the field 'answers' is 'a'"),
        ('{"pred": 7, "answers": ["a"], "all_classes": null, "length": 1}', "line 2: the field 'pred' is '7'"),
        ('{"pred": "a", "answers": ["a"], "all_classes": null, "length": "1"}', "line 2: the field 'length' is '1'"),
        ('{"pred": "a", "answers": ["a"], "all_classes": null, "length": 1}', "line 2: all_classes is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = write(tmp_path, "trec", [row("a", "a", all_classes=["a"])])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(EvaluationError) as raised:
        score_directory(tmp_path)
    assert str(raised.value).startswith(f"{path}, {told}")
    assert "correct it or delete the line" in str(raised.value)


def test_bad_directories_and_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is no directory: name the directory"):
        score_directory(tmp_path / "none")
    with pytest.raises(EvaluationError, match=r"holds no file <set>\.jsonl"):
        score_directory(tmp_path)
    path = write(tmp_path, "hotpot", [row("a", "a")])
    with pytest.raises(EvaluationError, match=r"LongBench has no set 'hotpot'; .* hotpotqa"):
        score_directory(tmp_path)
    path.rename(tmp_path / "hotpotqa.jsonl").write_bytes(b"\xff")
    with pytest.raises(EvaluationError, match=r"hotpotqa\.jsonl is not UTF-8"):
        score_directory(tmp_path)
    write(tmp_path, "hotpotqa", [])
    with pytest.raises(EvaluationError, match="holds no row"):
        score_directory(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "hotpotqa", [row("red", "red"), row("blue", "red", length=5_000), row(None, "red")])
    assert main(["score", "longbench", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["scores", "category_scores", "averages", "buckets", "rows"]
    assert told["scores"] == {"hotpotqa": 50.0}
    assert main(["score", "longbench", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "50.00  100.00    0.00       -2/200, 1 unscored" in text
    assert "not scored, and their averages left out: narrativeqa, qasper" in text
    assert main(["score", "longbench", str(tmp_path / "none")]) == 1

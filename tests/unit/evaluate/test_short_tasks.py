from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import LmEvalConfig
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate import short_tasks
from longalign_ray.evaluate.comparison import compare, describe_comparison
from longalign_ray.evaluate.report import write_report
from longalign_ray.evaluate.short_tasks import TASK, PartScore, load_short_tasks, part_score, summed_up
from longalign_ray.run_dir import RunDir, write_json

CHOICE = {
    "results": {"arc": {"alias": "arc", "acc,none": 1.0, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.25}},
    "samples": {
        "arc": [
            {"doc_id": 0, "filter": "none", "acc": 1.0, "acc_norm": 1.0},
            {"doc_id": 7, "filter": "none", "acc": 1.0, "acc_norm": 0.0},
        ]
    },
}
GROUP = {
    "results": {"law": {"acc,none": 1.0}, "history": {"acc,none": 0.0}},
    "groups": {"mmlu": {"acc,none": 0.75, "acc_stderr,none": "N/A"}},
    "samples": {
        "law": [{"doc_id": number, "filter": "none", "acc": 1.0} for number in range(3)],
        "history": [{"doc_id": 0, "filter": "none", "acc": 0.0}],
    },
}
FILTERS = {
    "results": {"sums": {"exact_match,strict": 0.0, "exact_match_stderr,strict": 0.0, "exact_match,flexible": 1.0}},
    "samples": {
        "sums": [
            {"doc_id": 0, "filter": "strict", "exact_match": 0.0},
            {"doc_id": 0, "filter": "flexible", "exact_match": 1.0},
        ]
    },
}


def test_scores_of_tasks_and_groups():
    arc = part_score("arc", CHOICE)
    assert arc == PartScore("acc_norm", 0.5, 0.25, 2, {"0": 1.0, "7": 0.0})
    mmlu = part_score("mmlu", GROUP)
    assert (mmlu.metric, mmlu.value, mmlu.stderr, mmlu.num_cases) == ("acc", 0.75, None, 4)
    assert mmlu.by_case == {"law:0": 1.0, "law:1": 1.0, "law:2": 1.0, "history:0": 0.0}
    assert part_score("sums", FILTERS) == PartScore("exact_match", 0.0, 0.0, 1, {"0": 0.0})

    score = summed_up({"arc": arc, "mmlu": mmlu})
    assert (score.value, score.num_cases, score.by_group) == (0.625, 6, {"arc": 0.5, "mmlu": 0.75})
    assert score.by_case == {"arc": arc.by_case, "mmlu": mmlu.by_case}
    tasks_alike = PartScore("acc", 0.5, None, 4, mmlu.by_case)  # a group whose tasks count alike, whatever their sizes
    assert summed_up({"arc": arc, "mmlu": tasks_alike}).by_case == {}


def write_score(run_dir: RunDir, model: str, parts: dict[str, PartScore]) -> None:
    of_parts = {name: {"metric": p.metric, "stderr": p.stderr, "num_cases": p.num_cases} for name, p in parts.items()}
    score: dict[str, Any] = {"model": model, **asdict(summed_up(parts)), "failed_by_reason": {}, "parts": of_parts}
    write_json(run_dir.scores / f"{TASK}-{model}.json", score)


def test_each_task_is_compared_and_reported(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    arc, mmlu = part_score("arc", CHOICE), part_score("mmlu", GROUP)
    write_score(run_dir, "base", {"arc": arc, "mmlu": mmlu})
    write_score(run_dir, "aligned", {"arc": PartScore("acc_norm", 1.0, 0.0, 2, {"0": 1.0, "7": 1.0}), "mmlu": mmlu})
    comparison = compare([run_dir])
    assert list(comparison["tasks"]) == ["lm_eval", "lm_eval/arc", "lm_eval/mmlu"]
    of_arc = comparison["tasks"]["lm_eval/arc"]
    assert (of_arc["metric"], of_arc["scores"][0]["value"], of_arc["scores"][0]["num_cases"]) == ("acc_norm", 0.5, 2)
    assert (of_arc["changes"][1]["value"], of_arc["changes"][1]["num_cases"]) == (0.5, 2)
    assert comparison["tasks"]["lm_eval"]["changes"][1]["value"] == 0.25
    table = describe_comparison([str(tmp_path)], form="markdown")
    assert "| Short tasks: arc (%) | 50.0 [0.0, 100.0], 2 cases | 100.0 " in table
    write_report(run_dir)
    html = run_dir.report_html.read_text(encoding="utf-8")
    assert "50.0 ± 25.0" in html
    assert "Short tasks: mmlu (%)" in html


def test_a_missing_harness_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(short_tasks, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'longalign_ray\[short\]'"):
        load_short_tasks(LmEvalConfig())

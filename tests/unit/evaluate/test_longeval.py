from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import EvaluateConfig, LongEvalConfig
from longalign_ray.data.template import encode_prompt
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmarks import task_cases
from longalign_ray.evaluate.longeval import is_right, longeval_cases, score_longeval
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.task import Prediction, TaskInputs
from longalign_ray.run_dir import RunDir
from tests.unit.evaluate.stub_server import Reply, chat, stub_server
from tests.unit.evaluate.tokenizers import make_tokenizer

TOPICS = ["The psychology of creativity", "The impact of social media", "Creativity"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer("bytes", scratch=scratch, data=scratch)


@pytest.fixture
def config(tmp_path: Path) -> LongEvalConfig:
    lines = [{"prompt": f"lines {number}", "expected_number": 40 + number, "num_lines": 200} for number in range(3)]
    topics = [{"prompt": "topics" * 50, "topics": TOPICS, "test_id": 0, "prompt_length": -1}]
    for name, rows in (("200_lines", lines), ("3_topics", topics), ("notes", [{}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LongEvalConfig(data=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "wanted", "right"),
    [
        ("The <REGISTER_CONTENT> in line torpid-kid is 2416.", 2416, True),
        ("Line 2 says 2416", 2416, True),  # the last number counts
        ("2416 is in line 2", 2416, False),
        ("24 16", 2416, False),
        ("none", 2416, False),
        ("The first topic is the psychology of creativity.", TOPICS, True),
        ("Psychology of creativity", TOPICS, True),
        ("Psychology", TOPICS, False),
        ("The impact of social media", TOPICS, False),
        ("The psychology of creativity, and the impact of social media", TOPICS, False),
        ("", TOPICS, False),
    ],
)
def test_right_answers(text: str, wanted: int | list[str], right: bool):
    assert is_right(text, wanted) is right


def test_cases_and_scores_by_size(config: LongEvalConfig, tokenizer: Any, tmp_path: Path):
    cases = longeval_cases(config, tokenizer=tokenizer, seed=7)
    assert [case.case_id for case in cases] == ["200_lines-0", "200_lines-1", "200_lines-2", "3_topics-0"]
    assert [case.request["max_tokens"] for case in cases] == [100, 100, 100, 50]
    assert cases[0].request["messages"] == [{"role": "user", "content": "lines 0"}]
    assert cases[0].num_tokens == len(encode_prompt(tokenizer, cases[0].request["messages"]))
    assert len(longeval_cases(LongEvalConfig(data=config.data, rows_per_file=1), tokenizer=tokenizer, seed=7)) == 2
    texts = {"200_lines-0": "40", "200_lines-1": "it is 40", "3_topics-0": "psychology of creativity"}
    score, details = score_longeval(cases, {name: Prediction(name, text, "stop") for name, text in texts.items()})
    assert (score.value, score.num_cases) == (pytest.approx(2 / 3), 3)
    assert score.by_group == {"200 lines": 0.5, "3 topics": 1.0}
    assert details["mean_prompt_tokens"]["3 topics"] == cases[-1].num_tokens > 300


def test_a_run(config: LongEvalConfig, tokenizer: Any, tmp_path: Path):
    def behave(body: dict[str, Any], attempt: int) -> Reply:
        return chat("41" if body["messages"][0]["content"].startswith("lines") else "Creativity")

    settings = EvaluateConfig(needle=None, heldout_loss=False, longeval=config, models=("base",))
    with stub_server(behave) as stub:
        cases = task_cases(settings, TaskInputs([], "", tokenizer, seed=0))
        counts, failed = evaluate(settings, RunDir(tmp_path / "run"), base_url=stub.base_url, cases=cases)
    assert (counts["base_longeval_accuracy"], counts["answered"], failed) == (0.25, 4, {})


def test_bad_files_are_told(config: LongEvalConfig, tokenizer: Any, tmp_path: Path):
    with pytest.raises(EvaluationError, match="no such file; give a directory with N_lines"):
        longeval_cases(LongEvalConfig(data=str(tmp_path / "none")), tokenizer=tokenizer, seed=0)
    path = tmp_path / "200_lines.jsonl"
    path.write_text('{"prompt": "a", "expected_number": "7", "num_lines": 1}')
    with pytest.raises(EvaluationError, match=r"200_lines\.jsonl, line 1 lacks expected_number"):
        longeval_cases(config, tokenizer=tokenizer, seed=0)


def test_real_cases(shared_data: Path, tokenizer: Any):
    """An answer that gives the right line or topic is right in every case; another number, another topic of the case
    and all topics are not."""
    cases = longeval_cases(LongEvalConfig(data=str(shared_data / "longeval")), tokenizer=tokenizer, seed=0)
    wanted = [case.reference["answer"] for case in cases]
    assert [isinstance(answer, int) for answer in wanted].count(True) == 20 == len(wanted) / 2
    assert {case.reference["group"] for case in cases} == {"200 lines", "5 topics"}
    for answer in wanted:
        right, *wrong = [answer, answer + 1] if isinstance(answer, int) else [*answer, "; ".join(answer)]
        assert is_right(f"It is {right}.", answer)
        assert not any(is_right(f"It is {other}.", answer) for other in wrong)

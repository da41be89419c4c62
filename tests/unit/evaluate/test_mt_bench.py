"""MT-Bench on questions that are made up but have the benchmark's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import EvaluateConfig, MTBenchConfig
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.mt_bench import judge_messages, mt_bench_cases, score_mt_bench, second_request
from longalign_ray.evaluate.task import Prediction, judgement_id
from tests.unit.evaluate.mt_bench_files import PROMPTS, write_lines, write_mt_bench
from tests.unit.evaluate.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer("bytes", scratch=scratch, data=scratch)


@pytest.fixture
def config(tmp_path: Path) -> MTBenchConfig:
    return write_mt_bench(tmp_path)


def test_both_turns_are_asked_at_the_temperature_of_the_category(config: MTBenchConfig, tokenizer: Any):
    cases = mt_bench_cases(config, tokenizer=tokenizer, seed=3)
    assert [case.case_id for case in cases] == ["81", "105", "111", "141"]
    assert [case.request["temperature"] for case in cases] == [0.7, 0.0, 0.0, 0.1]
    first = cases[0].request
    assert first == {
        "messages": [{"role": "user", "content": "First 81 {answer}?"}],
        "max_tokens": 1_024,
        "temperature": 0.7,
        "seed": 3,
    }
    assert second_request(cases[0], "so {question}") == first | {
        "messages": [
            {"role": "user", "content": "First 81 {answer}?"},
            {"role": "assistant", "content": "so {question}"},
            {"role": "user", "content": "Second 81?"},
        ]
    }
    assert len(mt_bench_cases(config.model_copy(update={"rows": 2}), tokenizer=tokenizer, seed=3)) == 2


def test_the_judge_sees_the_first_turn_then_both_and_references_where_there_are_right_answers(
    config: MTBenchConfig, tokenizer: Any
):
    writing, _, math, _ = mt_bench_cases(config, tokenizer=tokenizer, seed=0)
    answer = Prediction("81", "two {ref_answer_1}\n", "stop", first_answer=" one {question_2}")
    assert judge_messages(writing, answer) == [
        [
            {"role": "system", "content": "You are single-v1."},
            {"role": "user", "content": "Rate. Q: First 81 {answer}? A: one {question_2} End."},
        ],
        [
            {"role": "system", "content": "You are single-v1-multi-turn."},
            {
                "role": "user",
                "content": "1 First 81 {answer}? = one {question_2} 2 Second 81? = two {ref_answer_1} End.",
            },
        ],
    ]
    (first, both) = judge_messages(math, Prediction("111", "two", "stop", first_answer="one"))
    assert first[0]["content"] == "You are single-math-v1."
    assert first[1]["content"] == "Compare. Q: First 111 {answer}? R: r1 111 A: one End."
    assert both[0]["content"] == "You are single-math-v1-multi-turn."
    assert both[1]["content"] == (
        "R1 First 111 {answer}? = r1 111 R2 Second 111? = r2 111 A1 First 111 {answer}? = one A2 Second 111? = two End."
    )
    # The estimate of the cost: both prompts in bytes, and three answers in all, of which two are added there.
    without = sum(len(m["content"]) for asked in judge_messages(math, Prediction("", "", "")) for m in asked)
    assert math.attributes == {"judge_calls": 2, "judge_tokens": without + 1_024}


def test_scores_by_hand_with_replies_that_hold_no_rating(config: MTBenchConfig, tokenizer: Any):
    cases = mt_bench_cases(config, tokenizer=tokenizer, seed=0)
    replies = {
        ("81", 0): "Like [[3]] at first, but no. Rating: [[8]]",
        ("81", 1): "Rating: [[6.5]]",
        ("105", 0): "Rating: [[rating]]",  # none
        ("105", 1): "[[1]]",
        ("111", 0): "Rating: [[11]]",  # off the scale
        # The second turn of 111 was never judged.
        ("141", 0): "[[10]] and the second [[",
        ("141", 1): "",  # none
    }
    predictions = {case.case_id: Prediction(case.case_id, "b", "stop", first_answer="a") for case in cases}
    for (name, number), text in replies.items():
        predictions[judgement_id(name, number)] = Prediction(judgement_id(name, number), text, "stop")
    score, details = score_mt_bench(cases, predictions)
    assert (score.metric, score.num_cases) == ("mt_bench", 3)
    assert score.value == pytest.approx((7.25 + 1 + 10) / 3)
    assert score.by_case == {"all": {"81": 7.25, "105": 1.0, "141": 10.0}}
    assert score.by_group == {
        "writing": 7.25,
        "reasoning": 1.0,
        "stem": 10.0,
        "turn 1": (8 + 10) / 2,
        "turn 2": (6.5 + 1) / 2,
    }
    assert details == {
        "if_unrated_worst": (8 + 6.5 + 1 + 10 + 4 * 1) / 8,
        "if_unrated_best": (8 + 6.5 + 1 + 10 + 4 * 10) / 8,
        "judgements": {"rated": 4, "unreadable": 3, "failed": 1},
    }
    with pytest.raises(EvaluationError, match=r"mt_bench: no answer has a rating: of 2 judgements 1 hold none and 1 f"):
        score_mt_bench(cases, {name: predictions[name] for name in ("111", "111#0")})


def test_what_is_missing_is_told_with_what_to_do(config: MTBenchConfig, tokenizer: Any, tmp_path: Path):
    def problem(**changes: Any) -> str:
        with pytest.raises(EvaluationError) as told:
            mt_bench_cases(config.model_copy(update=changes), tokenizer=tokenizer, seed=0)
        return str(told.value)

    def lines(name: str, *rows: dict[str, Any]) -> str:
        write_lines(tmp_path / name, rows)
        return str(tmp_path / name)

    nowhere = str(tmp_path / "nowhere")
    assert "evaluate.mt_bench.questions" in problem(questions=nowhere)
    assert "mt_bench/question.jsonl of fastchat/llm_judge/data/" in problem(questions=nowhere)
    assert "reference_answer/gpt-4.jsonl" in problem(reference_answers=nowhere)
    assert "judge_prompts.jsonl of" in problem(judge_prompts=nowhere)
    one_turn = {"question_id": 81, "category": "writing", "turns": ["a"]}
    assert "question_id 81: turns is no list of two texts" in problem(questions=lines("q", one_turn))
    odd = one_turn | {"turns": ["a", "b"], "category": "poetry"}
    assert "category 'poetry' is none of MT-Bench, which has writing," in problem(questions=lines("q", odd))
    assert "line 1 lacks turns" in problem(questions=lines("q", {"question_id": 81, "category": "writing"}))
    some = {"question_id": 105, "choices": [{"turns": ["a", "b"]}]}
    assert "has no answer to question_id 111, and math needs one" in problem(reference_answers=lines("r", some))
    assert "choices does not begin with an answer" in problem(reference_answers=lines("r", some | {"choices": []}))
    prompt = {"name": "single-v1", "system_prompt": "", "prompt_template": PROMPTS["single-v1"]}
    assert "has no single-math-v1" in problem(judge_prompts=lines("p", prompt))
    told = problem(judge_prompts=lines("p", prompt | {"prompt_template": "{question}"}))
    assert "single-v1" in told
    assert "has places for question, and must have them for answer, question" in told
    (tmp_path / "p").write_text("{")
    assert "line 1 is not JSON" in problem(judge_prompts=str(tmp_path / "p"))
    with pytest.raises(ValueError, match=r"evaluate\.mt_bench is judged, and evaluate\.judge is not set"):
        EvaluateConfig(mt_bench=config)

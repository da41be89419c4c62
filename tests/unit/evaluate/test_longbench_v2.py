"""LongBench v2 as a task, on questions and prompts that are made up but have the benchmark's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import EvaluateConfig, LongBenchV2Config
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmarks import task_cases
from longalign_ray.evaluate.longbench_v2 import longbench_v2_cases, read_choice, score_longbench_v2, second_request
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.task import Prediction, TaskInputs
from longalign_ray.run_dir import RunDir
from tests.unit.evaluate.stub_server import Reply, chat, stub_server
from tests.unit.evaluate.tokenizers import make_tokenizer

CHOICES = "(A) $C_A$ (B) $C_B$ (C) $C_C$ (D) $C_D$"
PROMPTS = {
    "0shot": f"Read.\n$DOC$\n$Q$ {CHOICES}",
    "0shot_cot": f"Read.\n$DOC$\n$Q$ {CHOICES} Think.",
    "0shot_cot_ans": f"Omitted.\n$Q$ {CHOICES}\nThoughts: $COT$\nAnswer.",
}
# Difficulty, length, right answer.
QUESTIONS = [("easy", "short", "A"), ("hard", "short", "B"), ("hard", "medium", "C"), ("easy", "long", "D")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer("bytes", scratch=scratch, data=scratch)


@pytest.fixture
def config(tmp_path: Path) -> LongBenchV2Config:
    for name, prompt in PROMPTS.items():
        (tmp_path / f"{name}.txt").write_text(prompt)
    rows = [
        {
            "_id": f"q{number}",
            "domain": "any",
            "sub_domain": "any",
            "difficulty": difficulty,
            "length": length,
            "question": f" Which, $C_A$? {number}\n",
            **{f"choice_{letter}": letter.lower() for letter in "ABCD"},
            "answer": answer,
            "context": f"  document $Q$ {number} ",
        }
        for number, (difficulty, length, answer) in enumerate(QUESTIONS)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows, indent=1))
    return LongBenchV2Config(data=str(tmp_path / "data.json"), prompts=str(tmp_path))


def changed(config: LongBenchV2Config, **changes: Any) -> LongBenchV2Config:
    return LongBenchV2Config.model_validate(config.model_dump() | changes)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is **B**.", "B"),
        ("The correct answer is A. No: The correct answer is (D)", "D"),  # parentheses go first
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("(A)", None),
        ("", None),
    ],
)
def test_the_choice_is_read_from_the_sentence_that_the_prompt_demands(text: str, choice: str | None):
    assert read_choice(text) == choice


def test_prompts_are_stripped_and_filled_once(config: LongBenchV2Config, tokenizer: Any):
    first, *others = longbench_v2_cases(config, tokenizer=tokenizer, seed=7)
    # The document and the question hold what looks like a placeholder.
    text = "Read.\ndocument $Q$ 0\nWhich, $C_A$? 0 (A) a (B) b (C) c (D) d"
    assert first.request == {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 128,
        "temperature": 0.1,
        "seed": 7,
    }
    assert (first.case_id, len(others), second_request(first, "so")) == ("q0", 3, None)
    assert len(longbench_v2_cases(changed(config, rows=2), tokenizer=tokenizer, seed=7)) == 2
    cut = longbench_v2_cases(changed(config, max_prompt_tokens=21), tokenizer=tokenizer, seed=7)[0]
    assert cut.request["messages"][0]["content"] == text[:10] + text[-10:]


def test_a_chain_of_thought_takes_a_second_prompt_without_the_document(config: LongBenchV2Config, tokenizer: Any):
    case = longbench_v2_cases(changed(config, chain_of_thought=True), tokenizer=tokenizer, seed=7)[1]
    assert case.request["messages"][0]["content"].endswith("(D) d Think.")
    assert case.request["max_tokens"] == 1_024
    second = second_request(case, " as $Q$ says \n")
    assert second is not None
    assert second["max_tokens"] == 128
    assert second["messages"][0]["content"] == (
        "Omitted.\nWhich, $C_A$? 1 (A) a (B) b (C) c (D) d\nThoughts: as $Q$ says\nAnswer."
    )


def test_accuracy_by_difficulty_and_length(config: LongBenchV2Config, tokenizer: Any):
    cases = longbench_v2_cases(config, tokenizer=tokenizer, seed=0)
    texts = ["The correct answer is (A)", "The correct answer is (A)", "", "The correct answer is D"]
    predictions = {f"q{number}": Prediction(f"q{number}", text, "stop") for number, text in enumerate(texts)}
    score, details = score_longbench_v2(cases, predictions)
    assert (score.value, score.num_cases, details) == (0.5, 4, {"no_choice": 1})
    assert score.by_group == {"easy": 1.0, "hard": 0.0, "short": 0.5, "medium": 0.0, "long": 1.0}
    assert list(score.by_group) == ["easy", "hard", "short", "medium", "long"]
    score, _ = score_longbench_v2(cases, {"q3": predictions["q3"]})
    assert (score.value, score.by_group) == (1.0, {"easy": 1.0, "long": 1.0})  # no group without an answer


def test_thoughts_are_kept_and_a_new_second_prompt_is_asked_anew(
    config: LongBenchV2Config, tokenizer: Any, tmp_path: Path
):
    def behave(body: dict[str, Any], attempt: int) -> Reply:
        asked = body["messages"][0]["content"]
        return chat("It is c, I think." if asked.endswith("Think.") else "The correct answer is (C)")

    settings = EvaluateConfig(
        needle=None, heldout_loss=False, longbench_v2=changed(config, chain_of_thought=True), models=("base",)
    )
    run_dir = RunDir(tmp_path / "run")

    def run(base_url: str) -> dict[str, Any]:
        cases = task_cases(settings, TaskInputs([], "", tokenizer, seed=0))
        return evaluate(settings, run_dir, base_url=base_url, cases=cases)[0]

    with stub_server(behave) as stub:
        counts = run(stub.base_url)
        assert (len(stub.asked), counts["answered"], counts["resumed"]) == (8, 4, 0)
        assert run(stub.base_url)["resumed"] == 4
        assert len(stub.asked) == 8
        (tmp_path / "0shot_cot_ans.txt").write_text(PROMPTS["0shot_cot_ans"] + " Now.")
        assert run(stub.base_url)["resumed"] == 0
    assert (counts["base_longbench_v2_accuracy"], counts["base_longbench_v2_no_choice"]) == (0.25, 0)
    lines = (run_dir.predictions / "longbench_v2-base.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["first_answer"] for line in lines} == {"It is c, I think."}


def test_what_is_not_on_disk_is_told_with_the_way_to_get_it(config: LongBenchV2Config, tokenizer: Any, tmp_path: Path):
    def told(**changes: Any) -> str:
        with pytest.raises(EvaluationError) as raised:
            longbench_v2_cases(changed(config, **changes), tokenizer=tokenizer, seed=0)
        return str(raised.value)

    assert "give the path of data.json of the data set THUDM/LongBench-v2" in told(data=str(tmp_path / "none.json"))
    (tmp_path / "none").mkdir()
    assert "0shot.txt cannot be read" in told(prompts=str(tmp_path / "none"))
    assert "0shot_cot.txt cannot be read" in told(prompts=str(tmp_path / "none"), chain_of_thought=True)
    (tmp_path / "data.json").write_text('[{"_id": 1}]')
    assert "data.json, row 1 lacks _id, difficulty" in told()
    (tmp_path / "data.json").write_text("[")
    assert "data.json is not valid JSON" in told()

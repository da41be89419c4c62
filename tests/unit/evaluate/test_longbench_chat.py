"""LongBench-Chat on questions that are made up but have the benchmark's form, judged over HTTP."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.config import EvaluateConfig, JudgeConfig, LongBenchChatConfig
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmarks import task_cases
from longalign_ray.evaluate.longbench_chat import judge_messages, longbench_chat_cases
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.task import Prediction, TaskInputs
from longalign_ray.run_dir import RunDir
from tests.unit.evaluate.stub_server import Reply, chat, stub_server
from tests.unit.evaluate.tokenizers import make_tokenizer

TEMPLATE = "Rate. Question: {} Reference: {} A: {} [[{}]] B: {} [[{}]] C: {} [[{}]] Rate this: {} Rating:"
QUESTIONS = ["Which {} colour?", "How many?", "谁写了这本书？"]
NUM_JUDGEMENTS = 2 * len(QUESTIONS) * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer("bytes", scratch=scratch, data=scratch)


@pytest.fixture
def config(tmp_path: Path) -> LongBenchChatConfig:
    rows = [
        {"idx": number, "prompt": f"Document {number}. {query}", "query": query, "answer": f"reference {number}"}
        for number, query in enumerate(QUESTIONS, start=1)
    ]
    few_shots = [
        [{"answer": f"{name}{number} {{}}", "score": score} for name, score in (("bad", 1), ("fair", 5), ("good", 10))]
        for number in range(1, 4)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "few_shots.json").write_text(json.dumps(few_shots), encoding="utf-8")
    (tmp_path / "judge_prompt.txt").write_text(TEMPLATE, encoding="utf-8")
    return LongBenchChatConfig(
        data=str(tmp_path / "questions.json"),
        few_shots=str(tmp_path / "few_shots.json"),
        judge_prompt=str(tmp_path / "judge_prompt.txt"),
    )


def settings(config: LongBenchChatConfig, base_url: str, **judge: Any) -> EvaluateConfig:
    of_judge = {"endpoint": base_url, "model": "judge", "request_timeout_seconds": 1.0, "max_attempts": 3} | judge
    return EvaluateConfig(
        needle=None, heldout_loss=False, longbench_chat=config, judge=JudgeConfig.model_validate(of_judge)
    )


def run(config: EvaluateConfig, run_dir: Path, base_url: str, tokenizer: Any) -> tuple[dict[str, Any], dict[str, int]]:
    cases = task_cases(config, TaskInputs([], "", tokenizer, seed=3))
    return evaluate(config, RunDir(run_dir), base_url=base_url, cases=cases)


def good(body: dict[str, Any], attempt: int = 1) -> Reply:
    """`aligned` gives answers that the judge rates 8, `base` ones that it rates 3."""
    if body["model"] != "judge":
        reply = chat(f"an answer\nof {body['model']}")
    else:
        reply = chat("[[8]]" if "of aligned" in body["messages"][-1]["content"] else "[[3]]")
    reply.body["usage"] = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
    return reply


def scores(run_dir: Path, model: str) -> dict[str, Any]:
    return json.loads((RunDir(run_dir).scores / f"longbench_chat-{model}.json").read_text())


def judge_prompts(asked: list[dict[str, Any]]) -> list[str]:
    return [body["messages"][-1]["content"] for body in asked if body["model"] == "judge"]


def test_the_judge_sees_the_question_and_three_rated_answers_but_not_the_document(
    config: LongBenchChatConfig, tokenizer: Any
):
    first, _, third = longbench_chat_cases(config, tokenizer=tokenizer, seed=3)
    assert first.request["messages"] == [{"role": "user", "content": "Document 1. Which {} colour?"}]
    assert (first.request["max_tokens"], first.request["temperature"]) == (1024, 0.0)
    assert (first.reference["language"], third.reference["language"]) == ("en", "zh")
    seen = judge_messages(first, Prediction("1", " blue {}\nsky\n", "stop"))
    shots = [(f"{name}1 {{}}", str(score)) for name, score in (("bad", 1), ("fair", 5), ("good", 10))]
    orders = [
        TEMPLATE.format("Which {} colour?", "reference 1", *itertools.chain(*order), "blue {}\nsky")
        for order in itertools.permutations(shots)
    ]
    for system, user in seen:
        assert system["role"] == "system"
        assert user["content"] in orders
        assert "Document" not in user["content"]
    calls = int(first.attributes["judge_calls"])
    assert calls == len(seen) == 2
    length = sum(len(user["content"]) for _, user in seen) - 2 * len("blue {}\nsky")
    assert first.attributes["judge_tokens"] == length  # the tokenizer's tokens are bytes

    flat = config.model_copy(update={"one_line_answers": True})
    case = longbench_chat_cases(flat, tokenizer=tokenizer, seed=3)[0]
    assert "blue {} sky Rating:" in judge_messages(case, Prediction("1", "blue {}\nsky", "stop"))[0][1]["content"]


def test_the_seed_orders_the_examples(config: LongBenchChatConfig, tokenizer: Any):
    def orders(seed: int) -> list[Any]:
        cases = longbench_chat_cases(config, tokenizer=tokenizer, seed=seed)
        return [prompt[0] for case in cases for prompt in case.reference["prompts"]]

    assert orders(3) == orders(3)
    assert orders(3) != orders(4)
    assert len(set(orders(3))) > len(QUESTIONS)  # the second judgement has another order, for some question


def test_scores_cost_and_records(
    config: LongBenchChatConfig, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="longalign_ray")
    prices = {"price_per_million_prompt_tokens": 30.0, "price_per_million_completion_tokens": 60.0}
    with stub_server(good) as stub:
        made = settings(config, stub.base_url, **prices)
        counts, failed = run(made, tmp_path / "a", stub.base_url, tokenizer)
        assert len(judge_prompts(stub.asked)) == NUM_JUDGEMENTS
    assert failed == {}
    assert counts == {
        "cases": 6,
        "answered": 6,
        "resumed": 0,
        "retries": 0,
        "judgements": 12,
        "judged": 12,
        "judge_resumed": 0,
        "judge_retries": 0,
        "judge_prompt_tokens": 1_200,
        "judge_completion_tokens": 60,
        "base_longbench_chat": 3.0,
        "aligned_longbench_chat": 8.0,
    }
    score = scores(tmp_path / "a", "aligned")
    assert (score["num_cases"], score["by_group"]) == (3, {"en": 8.0, "zh": 8.0})
    assert score["judgements"] == {"rated": 6, "unreadable": 0, "failed": 0}
    assert (score["if_unrated_worst"], score["if_unrated_best"]) == (8.0, 8.0)
    cost = next(record.getMessage() for record in caplog.records if "at most" in record.getMessage())
    found = re.search(r"at most 12 calls, ([\d,]+) prompt and 3,072 completion tokens, a price of ([\d.]+)", cost)
    assert found, cost
    prompt_tokens = int(found[1].replace(",", ""))
    assert prompt_tokens > 12 * 1024  # answers are counted as long as they may be
    assert float(found[2]) == pytest.approx((prompt_tokens * 30 + 3_072 * 60) / 1e6, abs=0.005)

    # The record of the judge's replies gives the same scores without a judge.
    record = RunDir(tmp_path / "a").predictions / "longbench_chat-aligned.judgements.jsonl"
    assert [json.loads(line)["text"] for line in record.read_text().splitlines()] == ["[[8]]"] * 6
    with stub_server(good) as stub:
        replayed = settings(config, stub.base_url, endpoint=None, replay=str(record))
        replayed = replayed.model_copy(update={"models": ("aligned",)})
        counts, failed = run(replayed, tmp_path / "b", stub.base_url, tokenizer)
        assert judge_prompts(stub.asked) == []
    assert (counts["aligned_longbench_chat"], failed) == (8.0, {})


def test_a_rough_judge_loses_nothing_and_unreadable_replies_are_no_scores(
    config: LongBenchChatConfig, tokenizer: Any, tmp_path: Path
):
    order: dict[str, int] = {}

    def rough(body: dict[str, Any], attempt: int) -> Reply:
        """Of the twelve judgements: two come at the second try, two cannot be read, three fail."""
        if body["model"] != "judge":
            return good(body)
        number = order.setdefault(body["messages"][-1]["content"], len(order))
        trouble = {
            0: Reply({"error": "slow down"}, 429, {"retry-after": "0.05"}) if attempt == 1 else good(body),
            1: Reply(b"oops", 500) if attempt == 1 else good(body),
            2: chat("11/10"),
            3: chat("between 7 and 8"),
            4: Reply(b"<html>"),
            5: Reply({"choices": []}),
            6: Reply({}, delay=3),  # no answer within the limit, at either try
        }
        return trouble.get(number, good(body))

    with stub_server(rough) as stub:
        made = settings(config, stub.base_url, concurrency=1, max_attempts=2)
        counts, failed = run(made, tmp_path, stub.base_url, tokenizer)
        assert failed == {"judge_bad_json": 1, "judge_bad_answer": 1, "judge_timeout": 1}
        assert (counts["judgements"], counts["judged"], counts["judge_retries"]) == (12, 9, 3)
        both = [scores(tmp_path, model) for model in ("base", "aligned")]
        assert sum((Counter(score["judgements"]) for score in both), Counter()) == {
            "rated": 7,
            "unreadable": 2,
            "failed": 3,
        }
        for score, rating in zip(both, (3, 8), strict=True):
            seen = score["judgements"]
            missing = seen["unreadable"] + seen["failed"]
            assert score["value"] == rating
            assert score["if_unrated_worst"] == pytest.approx((seen["rated"] * rating + missing) / 6)
            assert score["if_unrated_best"] == pytest.approx((seen["rated"] * rating + 10 * missing) / 6)

    with stub_server(good) as stub:  # what failed is asked again, and nothing else: a reply stands, readable or not
        config_again = settings(config, stub.base_url, concurrency=1)
        counts, failed = run(config_again, tmp_path, stub.base_url, tokenizer)
        again = len(stub.asked)
    assert (again, counts["judge_resumed"], counts["judged"], failed) == (3, 9, 12, {})


def test_a_judge_without_one_rating_is_an_error_and_the_answers_are_kept(
    config: LongBenchChatConfig, tokenizer: Any, tmp_path: Path
):
    def silent(body: dict[str, Any], attempt: int) -> Reply:
        return Reply({"error": "no such key"}, 401) if body["model"] == "judge" else good(body)

    with (
        stub_server(silent) as stub,
        pytest.raises(EvaluationError, match=r"of 6 judgements 0 hold none and 6 failed; .* the answers are kept"),
    ):
        run(settings(config, stub.base_url), tmp_path, stub.base_url, tokenizer)
    with stub_server(good) as stub:
        counts, _ = run(settings(config, stub.base_url), tmp_path, stub.base_url, tokenizer)
        assert len(stub.asked) == NUM_JUDGEMENTS
    assert counts["resumed"] == 6


def _run_in_child(config: EvaluateConfig, run_dir: Path, base_url: str, tokenizer: Any) -> None:
    run(config, run_dir, base_url, tokenizer)


def test_a_run_killed_while_it_judges_continues(config: LongBenchChatConfig, tokenizer: Any, tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    judged = fork.Semaphore(0)

    def slow(body: dict[str, Any], attempt: int) -> Reply:
        reply = good(body)
        if body["model"] == "judge":
            reply.delay = 0.1
            judged.release()
        return reply

    with stub_server(slow) as stub:
        made = settings(config, stub.base_url, concurrency=1)
        child = fork.Process(target=_run_in_child, args=(made, tmp_path, stub.base_url, tokenizer))
        child.start()
        for _ in range(5):
            assert judged.acquire(timeout=20)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    records = RunDir(tmp_path).predictions.glob("*.judgements.jsonl")
    kept = sum(len(path.read_text().splitlines()) for path in records)
    assert 3 <= kept < NUM_JUDGEMENTS
    with stub_server(good) as stub:
        counts, failed = run(settings(config, stub.base_url), tmp_path, stub.base_url, tokenizer)
        assert len(stub.asked) == NUM_JUDGEMENTS - kept
    assert (counts["resumed"], counts["judge_resumed"], counts["judged"], failed) == (6, kept, NUM_JUDGEMENTS, {})
    assert counts["aligned_longbench_chat"] == 8.0


def test_what_is_missing_is_told_with_what_to_do(config: LongBenchChatConfig, tokenizer: Any, tmp_path: Path):
    def problem(**changes: Any) -> str:
        with pytest.raises(EvaluationError) as told:
            longbench_chat_cases(config.model_copy(update=changes), tokenizer=tokenizer, seed=0)
        return str(told.value)

    nowhere = str(tmp_path / "nowhere")
    assert "LongBench_Chat/" in problem(data=nowhere)
    assert "few_shots.json" in problem(few_shots=nowhere)
    assert "text file with the judge's prompt" in problem(judge_prompt=nowhere)
    (tmp_path / "short.txt").write_text("Rate {} and {}")
    assert "has 2 times {}" in problem(judge_prompt=str(tmp_path / "short.txt"))
    (tmp_path / "other.json").write_text('[[{"answer": "a", "score": 1}]]')
    assert "is not a JSON list with 3 times answer and score" in problem(few_shots=str(tmp_path / "other.json"))
    few = json.loads(Path(config.few_shots).read_text())
    (tmp_path / "less.json").write_text(json.dumps(few[:2]))
    assert "question idx 3" in problem(few_shots=str(tmp_path / "less.json"))
    with pytest.raises(ValueError, match=r"evaluate\.judge is not set"):
        EvaluateConfig(longbench_chat=config)


def test_the_benchmarks_own_judge_files_are_read(config: LongBenchChatConfig, tokenizer: Any, shared_data: Path):
    of_benchmark = shared_data / "longbench_chat"
    changes = {
        "few_shots": str(of_benchmark / "few_shots.json"),
        "judge_prompt": str(of_benchmark / "judge_prompt.txt"),
    }
    case = longbench_chat_cases(config.model_copy(update=changes), tokenizer=tokenizer, seed=0)[1]
    template = (of_benchmark / "judge_prompt.txt").read_text(encoding="utf-8")
    shots = json.loads((of_benchmark / "few_shots.json").read_text(encoding="utf-8"))[1]
    orders = [
        template.format("How many?", "reference 2", *itertools.chain(*((s["answer"], s["score"]) for s in order)), "9")
        for order in itertools.permutations(shots)
    ]
    for _, user in judge_messages(case, Prediction("2", "9", "stop")):
        assert user["content"] in orders

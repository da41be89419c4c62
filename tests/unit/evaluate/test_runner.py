from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign_ray.config import EvaluateConfig, JudgeConfig, NeedleConfig, RulerConfig
from longalign_ray.data.store import Example
from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate import endpoint as endpoint_module
from longalign_ray.evaluate.benchmarks import task_cases
from longalign_ray.evaluate.haystack import default_haystack
from longalign_ray.evaluate.needle import NEEDLE
from longalign_ray.evaluate.report import summary_table, write_report
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.task import TaskInputs
from longalign_ray.run_dir import RunDir
from tests.unit.evaluate.mt_bench_files import write_mt_bench
from tests.unit.evaluate.stub_server import Reply, chat, echo, stub_server
from tests.unit.evaluate.tokenizers import make_tokenizer

NEEDLES = NeedleConfig(lengths=(1_000, 1_500), depths=(0, 50, 100))
HELDOUT = [Example(f"e{size}", np.arange(size, dtype=np.int32), 100 * (np.arange(size) > 2)) for size in (6, 4, 9)]
NUM_CASES = 2 * (6 + 3)
HAYSTACK = default_haystack(0, min_chars=10_000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer("bytes", scratch=scratch, data=scratch)


def settings(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig(needle=NEEDLES, request_timeout_seconds=20, max_attempts=3).model_copy(update=changes)


def run(config: EvaluateConfig, run_dir: Path, base_url: str, tokenizer: Any) -> tuple[dict[str, Any], dict[str, int]]:
    inputs = TaskInputs(HELDOUT, HAYSTACK, tokenizer, seed=0)
    return evaluate(config, RunDir(run_dir), base_url=base_url, cases=task_cases(config, inputs))


def good(body: dict[str, Any], attempt: int = 1) -> Reply:
    """`aligned` finds the needle and is sure of every token; `base` does neither."""
    aligned = body["model"] == "aligned"
    if body["path"] == "/v1/completions":
        assert body["echo"] is True
        assert body["max_tokens"] == 0
        return echo(body["prompt"], logprob=-0.5 if aligned else -2.0)
    assert body["temperature"] == 0
    return chat(NEEDLE.answer if aligned and NEEDLE.fact in body["messages"][0]["content"] else "no idea")


def scores(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((RunDir(run_dir).scores / f"{name}.json").read_text())


def lines(run_dir: Path, name: str) -> list[str]:
    return (RunDir(run_dir).predictions / f"{name}.jsonl").read_text().splitlines()


def every_kind(body: dict[str, Any], attempt: int = 1) -> Reply:
    """As `good`; of RULER `aligned` knows the noted number, of MT-Bench the judge rates it 8 and then 6, else 3."""
    if body["model"] == "judge":
        assert body["max_tokens"] == 2_048
        text = body["messages"][1]["content"]
        return chat("[[3]]" if "base" in text else "[[6]]" if "aligned, again" in text else "[[8]]")
    if body["path"] == "/v1/completions" and isinstance(body["prompt"], str):
        number = re.findall(r"is: (\d{7})\.", body["prompt"])[0] if body["model"] == "aligned" else "unknown"
        return Reply({"choices": [{"index": 0, "text": f" {number}.", "finish_reason": "stop"}]})
    asked = body.get("messages", [{"content": ""}])[-1]["content"]
    if asked.startswith("First"):
        return chat(body["model"])
    return chat(f"{body['model']}, again") if asked.startswith("Second") else good(body)


def test_scores_of_both_models(tmp_path: Path, tokenizer: Any):
    ruler = RulerConfig(lengths=(1_000, 2_000), tasks=("niah_single_1",), samples=2)
    mt_bench = write_mt_bench(tmp_path)
    with stub_server(every_kind) as stub:
        judge = JudgeConfig(endpoint=stub.base_url, model="judge")
        config = settings(ruler=ruler, mt_bench=mt_bench, judge=judge)
        counts, failed = run(config, tmp_path, stub.base_url, tokenizer)
        again, _ = run(config, tmp_path, stub.base_url, tokenizer)
    assert failed == {}
    num_cases = NUM_CASES + 2 * (4 + 4)
    assert counts == {
        "cases": num_cases,
        "answered": num_cases,
        "resumed": 0,
        "retries": 0,
        "judgements": 16,
        "judged": 16,
        "judge_resumed": 0,
        "judge_retries": 0,
        "judge_prompt_tokens": 0,
        "judge_completion_tokens": 0,
        "base_needle_accuracy": 0.0,
        "base_needle_exact": 0.0,
        "aligned_needle_accuracy": 1.0,
        "aligned_needle_exact": 1.0,
        "base_heldout_loss": 2.0,
        "base_heldout_token_loss": 2.0,
        "aligned_heldout_loss": 0.5,
        "aligned_heldout_token_loss": 0.5,
        "base_ruler": 0.0,
        "base_ruler_effective_length": 0,
        "base_ruler_tasks": 1,
        "aligned_ruler": 1.0,
        "aligned_ruler_effective_length": 2_000,
        "aligned_ruler_tasks": 1,
        "base_mt_bench": 3.0,
        "aligned_mt_bench": 7.0,
    }
    assert (again["resumed"], again["judge_resumed"], again["aligned_mt_bench"]) == (num_cases, 16, 7.0)
    assert scores(tmp_path, "needle-aligned")["grid"] == [[1.0, 1.0]] * 3
    assert scores(tmp_path, "heldout-base")["num_cases"] == 3
    assert scores(tmp_path, "heldout-base")["by_case"] == {"all": {"0:e6": 2.0, "1:e4": 2.0, "2:e9": 2.0}}
    assert scores(tmp_path, "mt_bench-aligned")["by_group"]["turn 2"] == 6.0
    assert scores(tmp_path, "ruler-aligned")["grid"] == [[1.0, 1.0]]
    assert len(lines(tmp_path, "needle-base")) == 6
    # Each question of MT-Bench is asked twice; the second run asks nothing.
    assert len(stub.asked) == num_cases + 2 * 4 + 16
    documents = [body["headers"]["x-session-id"] for body in stub.asked if isinstance(body.get("prompt"), str)]
    assert Counter(documents) == {"ruler-niah_single_1-1000": 4, "ruler-niah_single_1-2000": 4}
    report = write_report(RunDir(tmp_path))
    page = RunDir(tmp_path).report_html.read_text(encoding="utf-8")
    assert "Effective length: below 1,000 tokens" in page
    assert "Effective length: 2,000 tokens, the largest with an average of at least 85.6%. 1 of RULER" in page
    assert list(report["benchmarks"]) == ["ruler", "mt_bench"]
    table = summary_table(report)
    assert "RULER         " in table
    assert "base 0.0, aligned 100.0" in table
    assert "base 3.000, aligned 7.000" in table


def test_long_cases_go_first_and_no_more_are_in_flight_than_allowed(tmp_path: Path, tokenizer: Any):
    together = threading.Barrier(3)

    def in_threes(body: dict[str, Any], attempt: int) -> Reply:
        together.wait(timeout=20)  # passes only if three requests are in flight
        return good(body)

    with stub_server(in_threes) as stub:
        counts, failed = run(settings(concurrency=3), tmp_path / "a", stub.base_url, tokenizer)
    assert stub.most_in_flight == 3
    assert (counts["answered"], failed) == (NUM_CASES, {})
    with stub_server(good) as stub:
        run(settings(concurrency=1, models=("base",), heldout_loss=False), tmp_path / "b", stub.base_url, tokenizer)
    cells = [
        (len(body["messages"][0]["content"]) > 1_200, NEEDLE.fact in body["messages"][0]["content"][-300:])
        for body in stub.asked
    ]
    assert cells == [(True, True), (True, False), (True, False), (False, True), (False, False), (False, False)]
    assert [body["headers"]["x-session-id"] for body in stub.asked] == ["needle-haystack-1500"] * 3 + [
        "needle-haystack-1000"
    ] * 3


def test_a_rate_limited_failing_server_loses_nothing(tmp_path: Path, tokenizer: Any):
    def rough(body: dict[str, Any], attempt: int) -> Reply:
        trouble = [
            Reply({"error": "slow down"}, 429, {"retry-after": "0.05"}),
            Reply(b"oops", 500),
            Reply(drop=True),
            Reply({"error": "busy"}, 503),
        ]
        number = len(json.dumps(body)) % 5
        return trouble[number] if attempt < 3 and number < 4 else good(body)

    with stub_server(rough) as stub:
        counts, failed = run(settings(), tmp_path, stub.base_url, tokenizer)
    assert failed == {}
    assert counts["answered"] == NUM_CASES
    assert counts["aligned_needle_accuracy"] == 1.0
    assert counts["retries"] == len(stub.asked) - NUM_CASES > 5


def test_retry_after_is_waited_for(tmp_path: Path, tokenizer: Any):
    times: dict[int, float] = {}

    def once_limited(body: dict[str, Any], attempt: int) -> Reply:
        times[attempt] = time.monotonic()
        return Reply({}, 429, {"retry-after": "1"}) if attempt == 1 else good(body)

    config = settings(models=("base",), heldout_loss=False, needle=NeedleConfig(lengths=(500,), depths=(0,)))
    with stub_server(once_limited) as stub:
        run(config, tmp_path, stub.base_url, tokenizer)
    assert times[2] - times[1] >= 1.0  # without the header the pause is at most 0.5 s


def test_failures_are_counted_and_never_scored(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_module, "LONGEST_BACKOFF_SECONDS", 0.01)
    bad = {
        ("needle", 0): Reply({}, 500),
        ("needle", 1): Reply(b"<html>", 200),
        ("needle", 2): Reply({"choices": []}),
        ("needle", 3): Reply({"error": "too long"}, 400),
        ("needle", 4): Reply(b"[1]", 200),
        ("heldout", 6): Reply({"choices": [{"logprobs": None}]}),
        ("heldout", 4): Reply({}, delay=6.0),
    }
    order: dict[str, int] = {}
    lock = threading.Lock()

    def behave(body: dict[str, Any], attempt: int) -> Reply:
        if body["model"] == "base":
            return good(body)
        if body["path"] == "/v1/completions":
            return bad.get(("heldout", len(body["prompt"])), good(body))
        text = body["messages"][0]["content"]
        with lock:
            number = order.setdefault(text, len(order))
        return bad.get(("needle", number), good(body))

    config = settings(request_timeout_seconds=2.5, max_attempts=2)
    with stub_server(behave) as stub:
        counts, failed = run(config, tmp_path, stub.base_url, tokenizer)
    assert failed == {"http_500": 1, "bad_json": 2, "bad_answer": 2, "http_400": 1, "timeout": 1}
    assert counts["cases"] == NUM_CASES
    assert counts["answered"] == NUM_CASES - 7
    assert counts["retries"] == 2  # the 500 and the timeout; nothing else may be tried again
    assert counts["aligned_needle_accuracy"] == 1.0, "an unanswered cell was scored"
    assert counts["base_needle_accuracy"] == 0.0
    score = scores(tmp_path, "needle-aligned")
    assert score["num_cases"] == 1
    assert sum(cell is None for row in score["grid"] for cell in row) == 5
    assert score["failed_by_reason"] == {"http_500": 1, "bad_json": 2, "bad_answer": 1, "http_400": 1}


def test_a_task_without_any_answer_is_an_error_but_answers_are_kept(tmp_path: Path, tokenizer: Any):
    def no_completions(body: dict[str, Any], attempt: int) -> Reply:
        return Reply({"error": "not here"}, 404) if body["path"] == "/v1/completions" else good(body)

    with (
        stub_server(no_completions) as stub,
        pytest.raises(EvaluationError, match=r"all 3 cases failed \(http_404 3\)"),
    ):
        run(settings(), tmp_path, stub.base_url, tokenizer)
    with stub_server(good) as stub:
        counts, _ = run(settings(), tmp_path, stub.base_url, tokenizer)
    assert counts["resumed"] == 12
    assert len(stub.asked) == 6


def test_answers_count_only_for_the_same_request_and_weights(tmp_path: Path, tokenizer: Any):
    run_dir = RunDir(tmp_path)
    with stub_server(good) as stub:
        run(settings(), tmp_path, stub.base_url, tokenizer)
        stub.asked.clear()
        with (run_dir.predictions / "needle-base.jsonl").open("a") as file:
            file.write('{"case_id": "needle-1000-0", "te')  # as a killed writer leaves it
        counts, _ = run(settings(), tmp_path, stub.base_url, tokenizer)
        assert (counts["resumed"], stub.asked) == (NUM_CASES, [])
        assert len(lines(tmp_path, "needle-base")) == 6

        longer = NeedleConfig(lengths=(1_000, 1_800), depths=(0, 50, 100))
        counts, _ = run(settings(needle=longer), tmp_path, stub.base_url, tokenizer)
        assert counts["resumed"] == NUM_CASES - 6
        assert {body["path"] for body in stub.asked} == {"/v1/chat/completions"}

        run_dir.manifest("export").parent.mkdir()
        run_dir.manifest("export").write_text("other weights")
        counts, _ = run(settings(needle=longer), tmp_path, stub.base_url, tokenizer)
        assert counts["resumed"] == 0


def test_scores_of_a_task_that_is_no_longer_asked_go_away(tmp_path: Path, tokenizer: Any):
    with stub_server(good) as stub:
        run(settings(), tmp_path, stub.base_url, tokenizer)
        run(settings(needle=None), tmp_path, stub.base_url, tokenizer)
    assert sorted(path.name for path in RunDir(tmp_path).scores.iterdir()) == [
        "heldout-aligned.json",
        "heldout-base.json",
    ]


def _run_in_child(run_dir: Path, base_url: str, tokenizer: Any) -> None:
    run(settings(concurrency=2), run_dir, base_url, tokenizer)


def test_a_killed_run_continues(tmp_path: Path, tokenizer: Any):
    answered = multiprocessing.get_context("fork").Semaphore(0)

    def slow(body: dict[str, Any], attempt: int) -> Reply:
        reply = good(body)
        reply.delay = 0.1
        answered.release()
        return reply

    with stub_server(slow) as stub:
        child = multiprocessing.get_context("fork").Process(
            target=_run_in_child, args=(tmp_path, stub.base_url, tokenizer)
        )
        child.start()
        for _ in range(8):
            assert answered.acquire(timeout=20)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    kept = sum(len(path.read_text().splitlines()) for path in RunDir(tmp_path).predictions.iterdir())
    assert 4 <= kept < NUM_CASES
    with stub_server(good) as stub:
        counts, failed = run(settings(), tmp_path, stub.base_url, tokenizer)
    assert (counts["resumed"], counts["answered"], failed) == (kept, NUM_CASES, {})
    assert len(stub.asked) == NUM_CASES - kept
    assert counts["aligned_heldout_loss"] == 0.5


def test_a_bad_endpoint_or_model_is_told_at_once(tmp_path: Path, tokenizer: Any):
    with pytest.raises(EvaluationError, match=r"127\.0\.0\.1:9/v1/models does not answer .* set evaluate\.endpoint"):
        run(settings(), tmp_path, "http://127.0.0.1:9/v1", tokenizer)
    with stub_server(good, models=("base", "other")) as stub:
        with pytest.raises(EvaluationError, match=r"evaluate\.models names aligned, and .* serves base, other"):
            run(settings(), tmp_path, stub.base_url, tokenizer)
        with pytest.raises(EvaluationError, match="answers 404"):
            run(settings(), tmp_path, stub.base_url + "/wrong", tokenizer)
        assert stub.asked == []


def test_model_names_with_slashes_have_their_own_files(tmp_path: Path, tokenizer: Any):
    with stub_server(good, models=("org/a",)) as stub:
        counts, _ = run(settings(models=("org/a",)), tmp_path, stub.base_url, tokenizer)
    assert scores(tmp_path, "needle-org%2Fa")["model"] == "org/a"
    assert "org/a_needle_accuracy" in counts


def test_without_held_out_examples_their_loss_is_left_out(tmp_path: Path, tokenizer: Any):
    with stub_server(good) as stub:
        cases = task_cases(settings(), TaskInputs([], HAYSTACK, tokenizer, seed=0))
        counts, _ = evaluate(settings(), RunDir(tmp_path), base_url=stub.base_url, cases=cases)
    assert counts["cases"] == 12
    assert "base_heldout_loss" not in counts

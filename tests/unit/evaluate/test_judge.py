from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.cli import main
from longalign_ray.config import JudgeConfig
from longalign_ray.errors import EvaluationError, ServingError
from longalign_ray.evaluate.agreement import Agreement, agreement
from longalign_ray.evaluate.endpoint import RequestFailed
from longalign_ray.evaluate.judge import PATH, JudgeCost, judge_case, judge_cost, judge_digest, open_judge
from longalign_ray.evaluate.rating import RatedMean, rated_mean, read_rating
from longalign_ray.evaluate.task import EvalCase
from tests.unit.evaluate.stub_server import Reply, chat, stub_server

MESSAGES = [{"role": "user", "content": "Rate this: 好. Rating:"}]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("[[7]]", 7),
        (" [[ 10 ]]", 10),
        ("Rating: [[7.5]]", 7.5),
        ("The form is [[5]]. This answer is worse.\nRating: [[3]]", 3),
        ("[[7/10]]", 7),
        ("评分：[[8]]。", 8),
        ("[[８]]", 8),
        ("[[1]]", 1),
        ("[[10]]", 10),
        ("7", 7),
        ("Rating: 7/10.", 7),
        ("[6]", 6),
        ("得分：6分", 6),
        # Nothing that can be read as one rating of the scale:
        ("", None),
        ("   \n", None),
        ("[[]]", None),
        ("[[rating]]", None),
        ("[[seven]]", None),
        ("seven", None),
        ("七分", None),
        ("[[7 or 8]]", None),
        ("[[7-8]]", None),
        ("[[7, 8]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("[[11/10]]", None),
        ("[[4/5]]", None),
        ("11/10", None),
        ("[[7", None),
        ("[[1]", None),
        ("The answer has 3 errors and names 2 of 10 facts.", None),
        ("I would say 7, or perhaps 8.", None),
        ("[[7]] [[none]]", None),
        ("[[1e400]]", None),
        ("[[nan]]", None),
    ],
)
def test_a_rating_is_read_or_there_is_none(text: str, rating: float | None):
    assert read_rating(text, worst=1, best=10) == rating


def test_missing_ratings_give_bounds_and_no_score():
    assert rated_mean([8, None, 5, None], worst=1, best=10) == RatedMean(6.5, 15 / 4, 33 / 4, 2, 2)
    assert rated_mean([4, 6], worst=1, best=10) == RatedMean(5, 5, 5, 2, 0)
    assert rated_mean([None], worst=1, best=5) == RatedMean(None, 1, 5, 0, 1)


def test_agreement_worked_by_hand():
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * 2 / (4 * 15) = 0.8; five pairs agree and one does not: tau = 4 / 6.
    seen = agreement([2, 4, 6, 9], [1, 7, 5, 8])
    assert seen.spearman == pytest.approx(0.8)
    assert seen.kendall == pytest.approx(2 / 3)
    # A tie: ranks 1.5 1.5 3 against 1 2 3; rho = 1.5 / sqrt(1.5 * 2); two pairs agree, one is tied: 2 / sqrt(2 * 3).
    tied = agreement([5, 5, 9], [1, 2, 3])
    assert tied.spearman == pytest.approx(1.5 / 3**0.5)
    assert tied.kendall == pytest.approx(2 / 6**0.5)
    opposed = agreement([1, 2, 3], [9, 8, 7])
    assert (opposed.num_pairs, opposed.spearman, opposed.kendall) == (3, pytest.approx(-1), pytest.approx(-1))
    assert agreement([4, 4, 4], [1, 2, 3]) == Agreement(3, None, None)
    assert agreement([], []) == Agreement(0, None, None)


def test_agreement_of_a_score_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scores, reference = tmp_path / "longbench_chat-aligned.json", tmp_path / "people.jsonl"
    scores.write_text(json.dumps({"by_case": {"all": {"1": 2, "2": 4, "3": 6, "4": 9, "5": 1}}}))
    lines = [{"case_id": case, "score": score} for case, score in (("1", 1), ("2", 7), ("3", 5), ("4", 8), ("9", 3))]
    reference.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["score", "agreement", str(scores), "--reference", str(reference)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_pairs"], found["num_scored"], found["num_reference"]) == (4, 5, 5)
    assert (found["spearman"], found["kendall"]) == (pytest.approx(0.8), pytest.approx(2 / 3))
    assert main(["score", "agreement", str(scores)]) == 1
    assert main(["score", "agreement", str(reference), "--reference", str(reference)]) == 1


def test_cost_worked_by_hand():
    config = JudgeConfig(endpoint="http://127.0.0.1:9/v1", model="judge")
    assert judge_cost(config, [300, 500], [20, 30]) == JudgeCost(2, 800, 50, None)
    priced = config.model_copy(
        update={"price_per_million_prompt_tokens": 30.0, "price_per_million_completion_tokens": 60.0}
    )
    # The paper's run of about 32,000 tokens at these prices: 32,000 * 30 / 1,000,000 = 0.96.
    assert judge_cost(priced, [320] * 100, [0] * 100).price == pytest.approx(0.96)
    cost = judge_cost(priced, [1_000_000], [500_000])
    assert cost.price == pytest.approx(60)
    assert cost.describe() == "1 calls, 1,000,000 prompt and 500,000 completion tokens, a price of 60.00"


def request(config: JudgeConfig) -> dict[str, Any]:
    answered = EvalCase("7", "longbench_chat", "/chat/completions", {}, None, "d", 9)
    case = judge_case(config, answered, 1, MESSAGES, max_tokens=256)
    assert (case.case_id, case.path) == ("7#1", PATH)
    return case.request


def post(config: JudgeConfig, body: dict[str, Any]) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with open_judge(config) as judge:
            return await judge.post(PATH, body)

    return asyncio.run(run())


def test_the_key_comes_from_the_environment_and_goes_with_each_request(monkeypatch: pytest.MonkeyPatch):
    def behave(body: dict[str, Any], attempt: int) -> Reply:
        return chat(f"{body['headers'].get('Authorization')} [[7]]")

    with stub_server(behave) as stub:
        config = JudgeConfig(endpoint=stub.base_url, model="judge", api_key="env:JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "secret\n")
        answer = post(config, request(config))
        assert answer["choices"][0]["message"]["content"] == "Bearer secret [[7]]"
        assert {name: stub.asked[0][name] for name in ("model", "temperature", "max_tokens")} == {
            "model": "judge",
            "temperature": 0.0,
            "max_tokens": 256,
        }
        monkeypatch.delenv("JUDGE_KEY")
        with pytest.raises(ServingError, match="environment variable JUDGE_KEY holds no API key"):
            post(config, request(config))


def test_a_recorded_judge_repeats_its_replies_and_makes_none_up(tmp_path: Path):
    record = tmp_path / "a.judgements.jsonl"
    config = JudgeConfig(replay=str(record), model="judge")
    body = request(config)
    record.write_text(json.dumps({"request_digest": judge_digest(PATH, body), "text": "[[7]]"}) + "\n")
    assert post(config, body)["choices"][0]["message"]["content"] == "[[7]]"
    with pytest.raises(RequestFailed) as failure:
        post(config, body | {"temperature": 1.0})
    assert failure.value.reason == "not_recorded"
    record.write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"evaluate\.judge\.replay: .* cannot be read"):
        open_judge(config)
    with pytest.raises(ValueError, match="set one of them"):
        JudgeConfig(model="judge")

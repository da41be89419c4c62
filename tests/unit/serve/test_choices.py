"""Several choices of a request, log-probabilities of chat and of streams, token ids, and what /metrics counts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from longalign_ray.errors import ReplicaLostError, ServingError
from longalign_ray.serve.answer import Piece, ServedModel, merged
from longalign_ray.serve.engine import EngineStats, GenerationEvent, Token
from tests.unit.serve.test_api import CHAT, MESSAGES, broken_client, client_of, events_of

DRAWN = {**CHAT, "temperature": 1.5, "seed": 7, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def client(model: ServedModel) -> TestClient:
    return client_of(model)


def streamed_texts(chunks: list[Any], num_choices: int) -> list[str]:
    texts = [""] * num_choices
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return texts


def test_choice_k_is_drawn_with_seed_plus_k(client):
    made = client.post("/v1/chat/completions", json={**DRAWN, "n": 3}).json()
    alone = [client.post("/v1/chat/completions", json={**DRAWN, "seed": 7 + k}).json() for k in range(3)]
    texts = [each["choices"][0]["message"]["content"] for each in alone]
    assert [choice["message"]["content"] for choice in made["choices"]] == texts
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert made["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]  # the prompt counts once
    assert made["usage"]["completion_tokens"] == sum(each["usage"]["completion_tokens"] for each in alone)
    assert client.post("/v1/chat/completions", json={**DRAWN, "n": 2, "seed": 2**63 - 1}).status_code == 200


def test_streamed_choices_are_those_of_the_whole_answer(client):
    whole = client.post("/v1/chat/completions", json={**DRAWN, "n": 3}).json()
    *chunks, last = events_of(client.post("/v1/chat/completions", json={**DRAWN, "n": 3, "stream": True}))
    assert streamed_texts(chunks, 3) == [choice["message"]["content"] for choice in whole["choices"]]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert reasons == ["length"] * 3
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    body = {"model": "tiny", "prompt": ["ab", "xyz"], "n": 2, "seed": 1, "max_tokens": 5}
    whole = client.post("/v1/completions", json=body).json()
    chunks = events_of(client.post("/v1/completions", json={**body, "stream": True}))
    assert streamed_texts(chunks, 4) == [choice["text"] for choice in whole["choices"]]
    assert whole["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_are_those_of_completions(client, model, stream):
    ids = client.post("/v1/tokenize", json={"model": "tiny", "messages": MESSAGES}).json()["tokens"]
    plain = {"model": "tiny", "prompt": ids, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    expected = client.post("/v1/completions", json=plain).json()["choices"][0]["logprobs"]
    response = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2, "stream": stream})
    choices = [chunk["choices"][0] for chunk in events_of(response)] if stream else response.json()["choices"]
    content = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert [entry["logprob"] for entry in content] == pytest.approx(expected["token_logprobs"], abs=1e-5)
    assert [entry["token"] for entry in content] == expected["tokens"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 12
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)  # greedy
    for entry in content:
        assert entry["bytes"] == (None if "\ufffd" in entry["token"] else list(entry["token"].encode()))
    without = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]
    assert without["logprobs"] is None


def test_streamed_completion_has_the_logprobs_of_the_whole(client):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    expected = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    chunks = events_of(client.post("/v1/completions", json={**body, "stream": True}))
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"][name]] == expected[name]


def test_tokenize_and_back(client, model):
    made = client.post("/v1/tokenize", json={"model": "tiny", "prompt": "def f"}).json()
    assert made == {"tokens": model.tokenizer("def f")["input_ids"], "count": 5, "max_model_len": 364}
    back = client.post("/v1/detokenize", json={"model": "tiny", "tokens": made["tokens"]}).json()
    assert back == {"prompt": "def f"}


class CachedEngine:
    """Answers two tokens, with most of the prompt from a cache."""

    async def submit(self, token_ids: Any, sampling: Any) -> AsyncGenerator[GenerationEvent, None]:
        yield GenerationEvent((Token(65, -1.0),), 1, num_cached=len(token_ids) - 1)
        yield GenerationEvent((Token(66, -1.0),), 2, "length", num_cached=len(token_ids) - 1)

    async def score(self, token_ids: Any, *, num_top: int = 0) -> Any:
        raise ServingError("not asked")

    async def stats(self) -> EngineStats:
        return EngineStats(3, 5, 0, 0, 0, 0, 0)


def test_cached_tokens_reach_usage_and_metrics(model):
    client = client_of(dataclasses.replace(model, engine=CachedEngine()))
    body = {"model": "tiny", "prompt": ["abcd", "xyz"], "n": 2}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 8)
    client.post("/v1/completions", json={**body, "n": -1})
    client.get("/v1/nothing")
    lines = set(client.get("/metrics").text.splitlines())
    assert lines >= {
        'longalign_requests_total{path="/v1/completions",status="200"} 1.0',
        'longalign_requests_total{path="/v1/completions",status="400"} 1.0',
        'longalign_requests_total{path="other",status="404"} 1.0',
        'longalign_request_seconds_count{path="/v1/completions"} 2.0',
        'longalign_first_token_seconds_count{model="tiny"} 4.0',
        'longalign_prompt_tokens_total{model="tiny"} 14.0',
        'longalign_cached_prompt_tokens_total{model="tiny"} 10.0',
        'longalign_generated_tokens_total{model="tiny"} 8.0',
        'longalign_engine_requests{model="tiny",state="active"} 3.0',
        'longalign_engine_requests{model="tiny",state="waiting"} 5.0',
        "longalign_requests_in_progress 1.0",  # this one
    }


def test_metrics_come_without_an_engine_that_fails(model):
    client = broken_client(model, ReplicaLostError("gone"))
    response = client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert int(response.headers["retry-after"]) > 0
    client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    text = client.get("/metrics").text
    assert 'status="503"} 2.0' in text
    assert 'longalign_lost_answers_total{model="tiny"} 2.0' in text
    assert "longalign_engine_requests{" not in text


class GatheredEngine(CachedEngine):
    """Answers `ABCD` and an end token: A at once, then the others together."""

    async def submit(self, token_ids: Any, sampling: Any) -> AsyncGenerator[GenerationEvent, None]:
        yield GenerationEvent((Token(self.ids[0], -1.0),), 1)
        yield GenerationEvent(tuple(Token(each, -1.0) for each in self.ids[1:]), 5, "stop")

    def __init__(self, ids: list[int]):
        self.ids = ids


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"), [(None, "ABCD", 4), ("C", "AB", 3), ("BC", "A", 3), ("AB", "", 2), ("D", "ABC", 4)]
)
def test_tokens_after_a_stop_string_are_not_of_the_answer(model, stop, text, num_tokens):
    """Though they came with it."""
    engine = GatheredEngine(model.tokenizer("ABCD")["input_ids"])
    client = client_of(dataclasses.replace(model, engine=engine))
    body = {"model": "tiny", "prompt": "x", "stop": stop, "logprobs": 0, "max_tokens": 9}
    made = client.post("/v1/completions", json=body).json()
    (choice,) = made["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert choice["logprobs"]["tokens"] == list("ABCD"[:num_tokens])
    assert made["usage"]["completion_tokens"] == num_tokens + (stop is None)  # the end token counts


def test_failure_of_one_choice_closes_the_others() -> None:
    closed = []

    async def stream(name: int) -> AsyncGenerator[Piece, None]:
        try:
            for number in range(3):
                yield Piece("x", (), number, 0, None)
            if name == 1:
                raise ServingError("failed")
            await asyncio.Event().wait()  # as for a prompt that takes minutes
        finally:
            closed.append(name)

    async def read() -> None:
        async with asyncio.timeout(10):
            async for _ in merged({name: stream(name) for name in range(3)}):
                pass

    with pytest.raises(ServingError, match="failed"):
        asyncio.run(read())
    assert sorted(closed) == [0, 1, 2]

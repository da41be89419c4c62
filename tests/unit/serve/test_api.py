"""The HTTP layer over a real engine, without Ray."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from longalign_ray.config import ServeConfig
from longalign_ray.data.template import encode_prompt
from longalign_ray.errors import OverloadedError, ServingError
from longalign_ray.serve.answer import ServedModel
from longalign_ray.serve.api import build_api
from longalign_ray.serve.engine import GenerationEvent, Sampling, Token
from longalign_ray.serve.transformers_engine import TransformersEngine

CONFIG = ServeConfig(max_prompt_tokens=300, max_output_tokens=64, max_choices=6, max_body_bytes=1_000_000)
MESSAGES = [{"role": "user", "content": "Hello there"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


class BrokenEngine:
    """Fails in the way it is told to: at once, or after the first token."""

    def __init__(self, error: Exception, *, after_tokens: int = 0):
        self.error, self.after_tokens = error, after_tokens

    async def submit(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[GenerationEvent, None]:
        for number in range(self.after_tokens):
            yield GenerationEvent((Token(40 + number, -1.0),), number + 1)
        raise self.error

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0) -> Any:
        raise self.error

    async def stats(self) -> Any:
        raise self.error


@pytest.fixture(scope="module")
def client(model: ServedModel) -> TestClient:
    return client_of(model)


def client_of(model: ServedModel, config: ServeConfig = CONFIG, *, ready: bool = True, **more: Any) -> TestClient:
    async def health() -> dict[str, bool]:
        return {"tiny": ready}

    return TestClient(build_api({"tiny": model}, config, health=health, **more), raise_server_exceptions=False)


def broken_client(model: ServedModel, error: Exception, *, after_tokens: int = 0) -> TestClient:
    engine = BrokenEngine(error, after_tokens=after_tokens)
    return client_of(dataclasses.replace(model, engine=engine))


def events_of(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def plain_model(engine: TransformersEngine) -> Any:
    """The engine's weights with transformers' own attention."""
    plain = copy.deepcopy(engine._model)
    plain.set_attn_implementation("sdpa")
    return plain


def greedy_text(engine: TransformersEngine, model: ServedModel, prompt: list[int], num_tokens: int) -> str:
    inputs = torch.tensor([prompt])
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    out = plain_model(engine).generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    return model.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_chat_answers_the_prompt_of_training(client, engine, model):
    prompt = encode_prompt(model.tokenizer, MESSAGES)
    made = client.post("/v1/chat/completions", json=CHAT).json()
    choice = made["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == greedy_text(engine, model, prompt, 12).rstrip("\ufffd")
    assert choice["finish_reason"] == "length"
    assert (made["object"], made["model"]) == ("chat.completion", "tiny")
    assert made["usage"]["prompt_tokens"] == len(prompt)
    assert made["usage"]["completion_tokens"] == 12
    assert made["usage"]["total_tokens"] == len(prompt) + 12


def test_streamed_chat_is_the_same_text(client):
    whole = client.post("/v1/chat/completions", json=CHAT).json()
    response = client.post(
        "/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events_of(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        == (whole["choices"][0]["message"]["content"])
    )
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_content_parts_and_developer_role(client):
    parts = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": [{"type": "text", "text": "A"}]}]
    plain = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "A"}]
    answers = [
        client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).json() for messages in (parts, plain)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text(client, stream):
    text = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    stop = text[4:7]
    body = {**CHAT, "stop": ["never there", stop], "stream": stream}
    response = client.post("/v1/chat/completions", json=body)
    if stream:
        choices = [chunk["choices"][0] for chunk in events_of(response)]
        got, reason = "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        got, reason = choice["message"]["content"], choice["finish_reason"]
        assert response.json()["usage"]["completion_tokens"] < 12
    assert (got, reason) == (text[: text.index(stop)], "stop")


def test_text_that_only_begins_a_stop_string_is_given(client):
    text = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    body = {**CHAT, "stop": text[-2:] + "never there"}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "length")


def test_prompt_and_answer_must_fit_the_context(model):
    prompt = {"model": "tiny", "prompt": "x" * 30, "temperature": 0}
    client = client_of(dataclasses.replace(model, context_length=40))
    assert client.post("/v1/completions", json={**prompt, "max_tokens": 10}).status_code == 200
    refused = client.post("/v1/completions", json={**prompt, "max_tokens": 11})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "context of 40 tokens" in refused.json()["error"]["message"]
    # Without max_tokens a chat answer may fill what is left.
    num_prompt = len(encode_prompt(model.tokenizer, MESSAGES))
    client = client_of(dataclasses.replace(model, context_length=num_prompt + 3))
    made = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": None}).json()
    assert made["usage"]["completion_tokens"] == 3
    full = client_of(dataclasses.replace(model, context_length=num_prompt))
    assert full.post("/v1/chat/completions", json={**CHAT, "max_tokens": None}).status_code == 400


def test_limits_of_the_recipe_hold_to_the_token(client):
    def status(prompt_tokens: int, max_tokens: int) -> int:
        body = {"model": "tiny", "prompt": "x" * prompt_tokens, "temperature": 0, "max_tokens": max_tokens}
        return client.post("/v1/completions", json=body).status_code

    assert [status(300, 1), status(301, 1)] == [200, 400]
    assert [status(3, 64), status(3, 65)] == [200, 400]


def test_seed_repeats_and_max_completion_tokens_wins(client):
    body = {**CHAT, "temperature": 1.3, "top_p": 0.9, "seed": 5, "max_completion_tokens": 20}
    first, again, other = (
        client.post("/v1/chat/completions", json={**body, "seed": seed}).json() for seed in (5, 5, 6)
    )
    assert first["choices"] == again["choices"]
    assert first["choices"] != other["choices"]
    assert first["usage"]["completion_tokens"] == 20


def test_unknown_fields_are_ignored(client):
    extra = {"tools": [], "user": "me", "presence_penalty": 0, "metadata": {"a": 1}, "response_format": None}
    assert client.post("/v1/chat/completions", json={**CHAT, **extra}).status_code == 200


def test_completion_with_echo_scores_the_prompt(client, engine, model):
    ids = model.tokenizer("def f(x):")["input_ids"]
    with torch.no_grad():
        log_probs = torch.log_softmax(plain_model(engine)(torch.tensor([ids])).logits[0], dim=-1)
    expected = [log_probs[place, token_id].item() for place, token_id in enumerate(ids[1:])]
    body = {"model": "tiny", "echo": True, "logprobs": 2, "max_tokens": 0}
    for prompt in ("def f(x):", ids):
        made = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
        choice = made["choices"][0]
        assert choice["text"] == "def f(x):"
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
        assert choice["logprobs"]["tokens"] == list("def f(x):")
        assert choice["logprobs"]["text_offset"] == list(range(9))
        assert (made["usage"]["prompt_tokens"], made["usage"]["completion_tokens"]) == (9, 0)


def test_completion_with_echo_and_new_tokens(client, engine, model):
    ids = model.tokenizer("abc")["input_ids"]
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    plain = client.post("/v1/completions", json={**body, "echo": False}).json()["choices"][0]
    assert choice["text"] == "abc" + plain["text"]
    assert choice["logprobs"]["token_logprobs"][3:] == plain["logprobs"]["token_logprobs"]
    assert len(plain["logprobs"]["tokens"]) == 4
    best = [max(top.values()) for top in plain["logprobs"]["top_logprobs"]]
    assert best == plain["logprobs"]["token_logprobs"]  # greedy takes the likeliest
    assert len(ids) == 3


def test_several_prompts_give_several_choices(client):
    body = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    made = client.post("/v1/completions", json={**body, "prompt": ["ab", "xyz"]}).json()
    alone = [client.post("/v1/completions", json={**body, "prompt": prompt}).json() for prompt in ("ab", "xyz")]
    assert [choice["text"] for choice in made["choices"]] == [each["choices"][0]["text"] for each in alone]
    assert [choice["index"] for choice in made["choices"]] == [0, 1]
    assert made["usage"]["prompt_tokens"] == 5
    assert made["usage"]["completion_tokens"] == 6


def test_streamed_completion(client):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 5, "temperature": 0}
    chunks = events_of(client.post("/v1/completions", json={**body, "stream": True}))
    assert (
        "".join(chunk["choices"][0]["text"] for chunk in chunks)
        == (client.post("/v1/completions", json=body).json()["choices"][0]["text"])
    )


def test_models_and_health(client, model):
    listed = client.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    assert client.get("/health").status_code == 200
    starting = client_of(model, ready=False).get("/health")
    assert (starting.status_code, starting.json()["status"]) == (503, "starting")


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "words"),
    [
        ("chat/completions", {"model": "gpt"}, 404, "model", "served: tiny"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"messages": "hi"}, 400, "messages", "list"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content", "string"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 400}]}, 400, "messages", "is 300"),
        ("chat/completions", {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("chat/completions", {"temperature": "hot"}, 400, "temperature", "number"),
        ("chat/completions", {"top_p": 0}, 400, "top_p", "greater than 0"),
        ("chat/completions", {"max_tokens": -5}, 400, "max_tokens", "greater than or equal to 1"),
        ("chat/completions", {"max_tokens": 65}, 400, "max_tokens", "64"),
        ("chat/completions", {"n": 0}, 400, "n", "greater than or equal to 1"),
        ("chat/completions", {"n": 7}, 400, "n", "serve.max_choices is 6"),
        ("completions", {"n": 4, "prompt": ["a", "b"]}, 400, "n", "ask for 8 choices"),
        ("chat/completions", {"seed": 2**70}, 400, "seed", ""),
        ("chat/completions", {"stop": [""]}, 400, "stop.0", "at least 1"),
        ("chat/completions", {"logprobs": 7}, 400, "logprobs", "boolean"),
        ("chat/completions", {"top_logprobs": 2}, 400, None, "set logprobs=true"),
        ("chat/completions", {"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "20"),
        ("tokenize", {"prompt": "a"}, 400, None, "either prompt or messages"),
        ("tokenize", {"prompt": None, "model": "x"}, 404, "model", "served: tiny"),
        ("detokenize", {"tokens": [1, 259]}, 400, None, "ids end at 258"),
        ("completions", {"prompt": ""}, 400, "prompt", "no tokens"),
        ("completions", {"prompt": [1, 259]}, 400, None, "ids end at 258"),
        ("completions", {"prompt": [-1]}, 400, "prompt.0", "greater than or equal to 0"),
        ("completions", {"prompt": []}, 400, None, "0 prompts"),
        ("completions", {"max_tokens": 0}, 400, None, "echo"),
        ("completions", {"stream": True, "echo": True}, 400, None, "stream=false"),
    ],
)
def test_wrong_requests_are_refused_in_openai_shape(client, path, change, status, param, words):
    body = {**CHAT, "prompt": "ab", **change}
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model": ', "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"", "must be a JSON object"),
        (b"\xff\xfe", ""),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "finite"),
        (b'{"a":' * 100_000, ""),
    ],
)
def test_broken_bodies_are_refused(client, content, words):
    response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_body_without_json_header_is_told_so(client):
    response = client.post("/v1/chat/completions", content=json.dumps(CHAT))
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_same_shape(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 405


def test_template_that_refuses_the_messages(client, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


def test_full_queue_is_429_with_retry_after(model):
    client = broken_client(model, OverloadedError("tiny: 256 requests wait already"))
    for path, stream in (("chat/completions", False), ("chat/completions", True), ("completions", False)):
        response = client.post(f"/v1/{path}", json={**CHAT, "prompt": ["a", "b"], "stream": stream})
        if path == "completions" or not stream:
            assert response.json()["error"]["type"] == "rate_limit_error"
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0


def test_engine_failure_is_500_with_its_message(model):
    response = broken_client(model, ServingError("generation failed: out of memory")).post(
        "/v1/chat/completions", json=CHAT
    )
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "generation failed: out of memory"


def test_unexpected_failure_shows_no_trace(model):
    response = broken_client(model, ZeroDivisionError("secret detail")).post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert "ZeroDivisionError" in response.json()["error"]["message"]
    assert "secret detail" not in response.text


def test_failure_in_mid_stream_is_an_error_event(model):
    client = broken_client(model, ServingError("the replica was lost"), after_tokens=2)
    *_, last = events_of(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert last["error"]["message"] == "the replica was lost"
    assert last["error"]["type"] == "server_error"


def test_disconnect_in_mid_stream_cancels_the_request(model, engine, monkeypatch):
    """The ASGI application driven by hand: after the first chunk the client is gone."""
    advance = engine._advance

    def slow_advance(*arguments: Any) -> None:  # or the tiny model might be done before the client is seen to be gone
        time.sleep(0.02)
        advance(*arguments)

    monkeypatch.setattr(engine, "_advance", slow_advance)

    async def scenario() -> None:
        before = (await engine.stats()).cancelled
        gone = asyncio.Event()
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 64, "temperature": 2.0, "seed": 1}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                gone.set()
                await asyncio.sleep(0)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        app: Any = client_of(model).app
        await app(scope, receive, send)
        for _ in range(500):
            if (await engine.stats()).cancelled == before + 1:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the request was not cancelled")

    asyncio.run(scenario())


def test_stop_tokens_are_those_that_training_marks(model):
    from longalign_ray.serve.answer import stop_token_ids

    tokenizer = model.tokenizer
    assert stop_token_ids(tokenizer) == (258,)
    eos = tokenizer.eos_token
    try:
        tokenizer.eos_token = "<|endoftext|>"  # as in base models, whose template closes turns with another token
        assert stop_token_ids(tokenizer) == (256, 258)
    finally:
        tokenizer.eos_token = eos

"""API keys, the limit on a body, the limit on time."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.api_keys import digests, is_known, read_keys
from longalign_ray.config import ServeConfig
from longalign_ray.config_load import load_config
from longalign_ray.errors import ConfigError, ServingError
from longalign_ray.serve.engine import GenerationEvent, Sampling, Token
from tests.unit.serve.test_api import CHAT, CONFIG, client_of, events_of

KEYS = ("first-key-0123456789", "second-key-0123456789")


@pytest.mark.parametrize("place", ["file", "env"])
def test_keys_come_from_the_named_place(place, tmp_path: Path, monkeypatch):
    text = f"{KEYS[0]}\n\n  {KEYS[1]}\n"
    if place == "file":
        (tmp_path / "keys").write_text(text)
        assert read_keys(f"file:{tmp_path}/keys") == KEYS
    else:
        monkeypatch.setenv("THE_KEYS", text)
        assert read_keys("env:THE_KEYS") == KEYS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read .FileNotFoundError.: make the file"),
        ("", "holds no API key"),
        (f"{KEYS[0]} short-secret", "key 2 of 2 .* has 12 characters"),
    ],
)
def test_wrong_keys_are_refused_and_not_shown(text, words, tmp_path: Path):
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(ServingError, match=words) as refused:
        read_keys(f"file:{tmp_path}/keys")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["serve.api_keys", "evaluate.api_key", "evaluate.judge.api_key"])
def test_key_in_the_recipe_is_refused_and_not_shown(name, tmp_path: Path):
    (tmp_path / "r.yaml").write_text("{run_dir: runs/x, evaluate: {judge: {endpoint: http://x/v1, model: m}}}")
    with pytest.raises(ConfigError, match=f"{name} takes a place, env:NAME or file:PATH") as refused:
        load_config(tmp_path / "r.yaml", [f"{name}=sk-secret"])
    assert "sk-secret" not in str(refused.value)
    load_config(tmp_path / "r.yaml", [f"{name}=env:KEYS"])


def test_digest_of_every_key_is_known():
    known = digests(KEYS)
    assert [is_known(key.encode(), known) for key in (*KEYS, KEYS[0][:-1], "")] == [True, True, False, False]
    assert not any(key.encode() in digest for key in KEYS for digest in known)


def test_every_path_but_health_needs_a_key(model, caplog):
    caplog.set_level(logging.DEBUG)
    client = client_of(model, key_digests=digests(KEYS))
    for key in KEYS:
        assert client.post("/v1/chat/completions", json=CHAT, headers=auth(f"Bearer {key}")).status_code == 200
    wrong = [{}, auth("Bearer "), auth(f"Bearer {KEYS[0]}x"), auth(f"Basic {KEYS[0]}"), auth(KEYS[0])]
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing"):
        for headers in wrong:
            response = client.get(path, headers=headers)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert client.get("/health").status_code == 200
    assert not any(key in caplog.text for key in KEYS)
    assert KEYS[0] not in client.get("/metrics", headers=auth(f"bearer {KEYS[0]}")).text


class SlowEngine:
    """Gives one token, and no other for a minute."""

    def __init__(self) -> None:
        self.open = 0

    async def submit(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[GenerationEvent, None]:
        self.open += 1
        try:
            yield GenerationEvent((Token(40, -1.0),), 1)
            await asyncio.sleep(60)
        finally:
            self.open -= 1

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0) -> Any:
        await asyncio.sleep(60)

    async def stats(self) -> Any:
        await asyncio.sleep(60)


def auth(value: str) -> dict[str, str]:
    return {"Authorization": value}


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_413(model, chunked):
    client = client_of(model, ServeConfig(max_body_bytes=500))
    at_limit = json.dumps(CHAT).encode().ljust(500)
    for body, status in ((at_limit, 200), (at_limit + b" ", 413)):
        content = iter([body[:300], body[300:]]) if chunked else body
        response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
    assert "serve.max_body_bytes is 500" in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_answer_that_takes_too_long_is_504_or_an_error_event(model):
    slow = dataclasses.replace(model, engine=SlowEngine())
    client = client_of(slow, CONFIG.model_copy(update={"request_timeout_seconds": 0.3}))
    response = client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert "serve.request_timeout_seconds" in response.json()["error"]["message"]
    score = {"model": "tiny", "prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}
    assert client.post("/v1/completions", json=score).status_code == 504
    *_, last = events_of(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert last["error"]["code"] == "timeout"
    assert slow.engine.open == 0  # what was under way is cancelled

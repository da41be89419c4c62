"""Ten thousand wrong and half-wrong bodies: never a 500, never an answer in another shape, never a hang."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from longalign_ray.config import ServeConfig
from longalign_ray.serve.api import build_api
from longalign_ray.serve.engine import EngineStats, GenerationEvent, PromptScore, Token

NUM_BODIES = 10_000
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/v1/detokenize")
VALID: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "prompt": "ab", "tokens": [65, 66],
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 1, "stop": ["x"], "stream": False,
    "stream_options": {"include_usage": True}, "logprobs": None, "top_logprobs": None, "echo": False,
}  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1e308, -1e308, 2**63, -(2**70), 0.5, "", "x", "\ufffd", "\u0000", "x" * 3_000,
    [], [[]], [0], [-1], [258], [2**40], [[65], [66]], ["a", "b"], [None], {}, {"a": 1}, [{}], "tiny", "1", [True],
    [{"role": "user"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "system", "content": "a"}] * 3,
]  # fmt: skip


class InstantEngine:
    """Answers any prompt with as many tokens as it is asked for, at once."""

    async def submit(self, token_ids: Any, sampling: Any) -> AsyncGenerator[GenerationEvent, None]:
        top = tuple((token_id, -1.0) for token_id in range(sampling.num_top))
        for number in range(1, sampling.max_tokens + 1):
            ended = "length" if number == sampling.max_tokens else None
            yield GenerationEvent((Token(200 + number % 50, -1.0, top),), number, ended)

    async def score(self, token_ids: Any, *, num_top: int = 0) -> PromptScore:
        top = tuple((token_id, -1.0) for token_id in range(num_top))
        return PromptScore((-1.0,) * (len(token_ids) - 1), (top,) * (len(token_ids) - 1))

    async def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0)


def body_of(draw: random.Random) -> bytes:
    """A valid body with some fields replaced, left out or moved, and sometimes with its bytes damaged."""
    body = {name: value for name, value in VALID.items() if draw.random() < 0.9 or name == "model"}
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        body[draw.choice(list(VALID))] = draw.choice(JUNK)
    content = json.dumps(body).encode()
    damage = draw.random()
    if damage < 0.05:
        content = content[: draw.randrange(len(content))]
    elif damage < 0.12:
        at = draw.randrange(len(content))
        content = content[:at] + draw.randbytes(draw.randint(1, 4)) + content[at + draw.randint(0, 4) :]
    elif damage < 0.14:
        content = b"[" * draw.randint(1, 3_000) + content
    elif damage < 0.20:
        half_pair, no_number, long_number = (b'"Hi"', b'"\\ud800"'), (b"0.5", b"NaN"), (b"3", b"1" * 5_000)
        content = content.replace(*draw.choice((half_pair, no_number, long_number)))
    return content


async def answered(app: Any, path: str, content: bytes) -> tuple[int, bytes]:
    """Status and body of one request to the ASGI application, without a server between."""
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    never = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await asyncio.wait_for(app(scope, receive, send), timeout=30)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_every_body_is_answered_or_refused_in_openai_shape(model):
    async def ready() -> dict[str, bool]:
        return {"tiny": True}

    config = ServeConfig(max_prompt_tokens=2_000, max_output_tokens=64, max_choices=8)
    app = build_api({"tiny": dataclasses.replace(model, engine=InstantEngine())}, config, health=ready)

    async def ask_all() -> Counter[tuple[str, int]]:
        draw, statuses = random.Random(0), Counter()
        for _ in range(NUM_BODIES):
            path, content = draw.choice(PATHS), body_of(draw)
            status, answer = await answered(app, path, content)
            statuses[path, status] += 1
            if status != 200:
                error = json.loads(answer)["error"]
                assert set(error) == {"message", "type", "param", "code"}, content
                assert status in (400, 404), (content, error)
            elif answer.startswith(b"data: "):
                assert answer.endswith(b"data: [DONE]\n\n"), content
                assert b'"error"' not in answer, content
            else:
                json.loads(answer)
        return statuses

    statuses = asyncio.run(ask_all())
    for path in PATHS:  # or most bodies would test nothing
        assert min(statuses[path, 200], statuses[path, 400]) > 200, statuses

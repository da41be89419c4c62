"""Replicas behind the endpoint: their number follows the load, questions on a document meet the cache of one of them,
and one that is stuck or killed is replaced.

The tests go on from each other in this order: each begins with the one replica that the one before has left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from longalign_ray.config import ServeConfig
from longalign_ray.serve.engine import EngineStats
from longalign_ray.serve.replica import EngineReplica

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

MAX_ONGOING = 5
SETTINGS: dict[str, Any] = {
    "num_replicas": (1, 2),
    "target_ongoing_requests": 2,
    "busy_seconds": 1,
    "idle_seconds": 1,
    "max_ongoing_requests": MAX_ONGOING,
    "affinity_tokens": 32,
    "prefill_chunk": 64,
    "stuck_seconds": 3,
    "drain_seconds": 1,
}
LOST = r"tiny: the replica was lost .* send the request again"


class PacedReplica(EngineReplica):
    """The real replica, which says what process it is; its forward passes can be slowed down, to a halt too."""

    def __init__(self, *arguments: Any, **more: Any):
        from longalign_ray.serve import batch_forward

        super().__init__(*arguments, **more)
        self._seconds = 0.0
        forward = batch_forward.forward

        def slowed(*arguments: Any) -> Any:
            time.sleep(self._seconds)
            return forward(*arguments)

        batch_forward.forward = slowed

    async def slow_down(self, seconds: float) -> None:
        self._seconds = seconds

    async def look(self) -> tuple[int, EngineStats]:
        return os.getpid(), await self.stats()


@pytest.fixture(scope="module")
def base_url(tiny_model_dir: Path, local_ray: None) -> Iterator[str]:
    from longalign_ray.serve import app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "EngineReplica", PacedReplica)
        config = ServeConfig(port=port, **SETTINGS)
        with app.running_app({"tiny": tiny_model_dir}, config, chat_template=None, dtype="float32") as url:
            yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def handle(base_url: str) -> Any:
    from ray import serve

    return serve.get_deployment_handle("tiny", "longalign")


def looks(handle: Any) -> dict[int, EngineStats]:
    """What each replica does, by its process id."""
    return dict(handle.broadcast("look").results(timeout_s=60))


def is_full(handle: Any) -> bool:
    """Whether a replica computes as many calls as it accepts: one more is not answered then."""
    try:
        handle.broadcast("look").results(timeout_s=2)
    except TimeoutError:
        return True
    return False


def slow_down(handle: Any, *, seconds: float) -> None:
    handle.broadcast("slow_down", seconds).results(timeout_s=60)


def replica_states() -> dict[str, int]:
    from ray import serve

    states = serve.status().applications["longalign"].deployments["tiny"].replica_states
    return {str(getattr(state, "value", state)): number for state, number in states.items() if number}


def wait_for(condition: Callable[[], bool], *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, replica_states()
        time.sleep(0.1)


def document_of(number: int) -> str:
    return f"{number:02} is the number of this document. " * 5


def ask(client: openai.OpenAI, number: int, question: str, *, max_tokens: int = 1, **more: Any) -> Any:
    """About a document: `affinity_tokens` bytes of it hold its number."""
    prompt = document_of(number) + question
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0, **more)


def cached_tokens(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


@contextmanager
def under_way(client: openai.OpenAI, numbers: list[int]) -> Iterator[None]:
    """A stream about each of these documents, which goes on until the end."""
    with ExitStack() as opened:
        for number in numbers:
            stream = opened.enter_context(ask(client, number, "And so on?", max_tokens=3_000, stream=True))
            next(iter(stream))
        yield


def test_replicas_follow_the_load_and_documents_stay_with_one(client: openai.OpenAI, handle: Any):
    (first,) = looks(handle)
    slow_down(handle, seconds=0.03)  # 3,000 tokens take a minute and a half, with the CPU left to others
    with under_way(client, [90, 91, 92]):
        wait_for(lambda: replica_states() == {"RUNNING": 2})
        wait_for(lambda: len(looks(handle)) == 2)

        of_replica: dict[int, list[int]] = {pid: [] for pid in looks(handle)}
        for number in range(40):
            before = looks(handle)
            assert cached_tokens(ask(client, number, "Who?")) == 0
            assert cached_tokens(ask(client, number, "Why?")) == len(document_of(number)) + len("Wh")
            finished = {pid: stats.finished - before[pid].finished for pid, stats in looks(handle).items()}
            (owner,) = [pid for pid, number_here in finished.items() if number_here == 2]
            of_replica[owner].append(number)
            if len(of_replica[first]) >= 3 and all(of_replica.values()):
                break

        one, two, other = of_replica[first][:3]
        with under_way(client, [one, two]):  # with the first three, as many as the replica accepts
            assert is_full(handle)
            assert cached_tokens(ask(client, other, "Where?")) == 0  # from the other replica
        back = len(document_of(other)) + len("Wh")  # the other replica would know `Whe`
        wait_for(lambda: cached_tokens(ask(client, other, "When?")) == back)
    wait_for(lambda: replica_states() == {"RUNNING": 1})


def test_stuck_engine_is_replaced_and_one_with_a_long_prompt_is_not(client: openai.OpenAI, handle: Any):
    (first,) = looks(handle)
    slow_down(handle, seconds=0.6)
    prompt = list(range(64, 128)) * 12  # a chunk takes 0.6 s, all of them twice `stuck_seconds`
    made: Any = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert cached_tokens(made) == 0
    assert list(looks(handle)) == [first]

    slow_down(handle, seconds=3_600)
    with pytest.raises(openai.InternalServerError, match=LOST) as lost:
        ask(client, 0, "Is anybody there?")
    assert lost.value.status_code == 503
    assert ask(client.with_options(max_retries=10), 0, "Is anybody there?").usage.completion_tokens == 1
    wait_for(lambda: replica_states() == {"RUNNING": 1})
    assert first not in looks(handle)


def lost_answers(base_url: str) -> float:
    lines = httpx.get(base_url.removesuffix("/v1") + "/metrics").text.splitlines()
    return float(dict(line.rsplit(" ", 1) for line in lines).get('longalign_lost_answers_total{model="tiny"}', 0))


def test_replica_killed_under_load(client: openai.OpenAI, base_url: str, handle: Any):
    """What it computed ends with a clear error, or is asked again by the client; the next one answers what waited."""
    (first,) = looks(handle)
    slow_down(handle, seconds=0.1)
    lost_before = lost_answers(base_url)
    settings: dict[str, Any] = {"model": "tiny", "prompt": "Go on: ", "max_tokens": 300, "temperature": 0}

    async def outcome(asking: openai.AsyncOpenAI, *, stream: bool = False) -> str:
        try:
            made: Any = await asking.completions.create(**settings, stream=stream)
            if stream:
                async for _ in made:
                    pass
        except openai.InternalServerError as error:
            return f"{error.status_code} {error.code}, again after {error.response.headers['retry-after']} s"
        except openai.APIError as error:  # within a stream, whose status was 200
            return f"in a stream: {error.code}"
        return "answered"

    async def ask_all() -> tuple[list[str], list[str]]:
        common: dict[str, Any] = {"base_url": base_url, "api_key": "none", "timeout": 120}
        async with openai.AsyncOpenAI(**common, max_retries=0) as once, openai.AsyncOpenAI(**common) as usual:
            calls = [outcome(once, stream=True), outcome(once, stream=True), outcome(once), outcome(once)]
            computed = [asyncio.ensure_future(call) for call in (*calls, outcome(usual))]
            while not await asyncio.to_thread(is_full, handle):
                await asyncio.sleep(0.05)
            waiting = [asyncio.ensure_future(outcome(once)) for _ in range(4)]
            await asyncio.sleep(0.3)
            os.kill(first, signal.SIGKILL)
            return await asyncio.gather(*computed), await asyncio.gather(*waiting)

    computed, waited = asyncio.run(ask_all())
    assert computed == [*["in a stream: replica_lost"] * 2, *["503 replica_lost, again after 2 s"] * 2, "answered"]
    assert waited == ["answered"] * 4
    assert lost_answers(base_url) == lost_before + MAX_ONGOING  # the one that was asked again too
    assert ask(client, 0, "Still there?").usage.completion_tokens == 1

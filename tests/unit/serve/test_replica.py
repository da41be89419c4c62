"""When an engine counts as stuck, and which tokens leave it together."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest

from longalign_ray.errors import ServingError
from longalign_ray.serve import replica
from longalign_ray.serve.engine import EngineStats, GenerationEvent, Token
from longalign_ray.serve.replica import Progress, gathered


def stats(active: int) -> EngineStats:
    return EngineStats(active, 0, 0, 0, 0, 0, 0)


def test_engine_with_requests_that_does_nothing_is_stuck():
    progress = Progress(stuck_seconds=60)
    progress.check(stats(2), now=100)
    progress.check(stats(2), now=160)
    with pytest.raises(ServingError, match=r"nothing for 61 s with 2 requests active .*serve.stuck_seconds = 60"):
        progress.check(stats(2), now=161)


@pytest.mark.parametrize("change", [{"computed_tokens": 16}, {"finished": 1}, {"active": 0}])
def test_any_sign_of_life_starts_the_time_anew(change: dict[str, int]):
    progress = Progress(stuck_seconds=60)
    before, after = stats(2), dataclasses.replace(stats(2), **change)
    progress.check(before, now=100)
    progress.check(after, now=190)
    progress.check(before if "active" in change else after, now=250)


@pytest.mark.parametrize(
    ("seconds", "together"),
    [
        (0.0, [[1], [2], [3], [4], [5]]),
        (0.05, [[1], [2, 3], [4, 5]]),  # the times are 0, 0.03, 0.06, ...
        (9.0, [[1], [2, 3, 4, 5]]),
    ],
)
def test_tokens_of_a_short_time_leave_together(
    seconds: float, together: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    now = 100.0
    monkeypatch.setattr(replica, "time", SimpleNamespace(monotonic=lambda: now))
    closed = []

    async def events() -> AsyncGenerator[GenerationEvent, None]:
        nonlocal now
        try:
            for number in range(1, 6):
                yield GenerationEvent((Token(number, -1.0),), number, num_cached=7)
                now += 0.03
            yield GenerationEvent((), 6, "stop", num_cached=7)
        finally:
            closed.append(True)

    async def read() -> list[GenerationEvent]:
        return [event async for event in gathered(events(), seconds=seconds)]

    made = asyncio.run(read())
    assert [[token.token_id for token in event.tokens] for event in made if event.tokens] == together
    assert [event.num_generated for event in made] == sorted({event.num_generated for event in made})
    assert (made[-1].num_generated, made[-1].finish_reason) == (6, "stop")
    assert all(event.num_cached == 7 for event in made)
    assert closed == [True]


def test_a_token_is_not_held_until_the_next_one():
    async def events() -> AsyncGenerator[GenerationEvent, None]:
        yield GenerationEvent((Token(1, -1.0),), 1)
        yield GenerationEvent((Token(2, -1.0),), 2)
        await asyncio.Event().wait()

    async def read() -> list[int]:
        stream = gathered(events(), seconds=0.01)
        seen = [(await asyncio.wait_for(anext(stream), 10)).num_generated for _ in range(2)]
        await stream.aclose()  # although its source is waiting
        return seen

    assert asyncio.run(read()) == [1, 2]


def test_what_the_engine_raises_comes_through():
    async def events() -> AsyncGenerator[GenerationEvent, None]:
        yield GenerationEvent((Token(1, -1.0),), 1)
        raise ServingError("gone")

    async def read() -> None:
        async for _ in gathered(events(), seconds=0.0):
            pass

    with pytest.raises(ServingError, match="gone"):
        asyncio.run(read())

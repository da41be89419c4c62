"""When an engine counts as stuck."""

from __future__ import annotations

import dataclasses

import pytest

from longalign_ray.errors import ServingError
from longalign_ray.serve.engine import EngineStats
from longalign_ray.serve.replica import Progress


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

"""When an engine counts as stuck."""

from __future__ import annotations

import pytest

from longalign_ray.errors import ServingError
from longalign_ray.serve.engine import EngineStats
from longalign_ray.serve.replica import Progress


def stats(active: int, *, finished: int = 0) -> EngineStats:
    return EngineStats(active, 0, finished, 0, 0, 0, 0)


def test_engine_with_requests_that_does_nothing_is_stuck():
    progress = Progress(stuck_seconds=60)
    progress.check(stats(2), now=100)
    progress.check(stats(2), now=160)
    with pytest.raises(ServingError, match=r"nothing for 61 s with 2 requests active .*serve.stuck_seconds = 60"):
        progress.check(stats(2), now=161)


@pytest.mark.parametrize("what", ["event", "count", "idle"])
def test_any_sign_of_life_starts_the_time_anew(what: str):
    progress = Progress(stuck_seconds=60)
    progress.check(stats(2), now=100)
    progress.num_events += what == "event"
    progress.check(stats(0 if what == "idle" else 2, finished=int(what == "count")), now=190)
    progress.check(stats(2, finished=int(what == "count")), now=250)

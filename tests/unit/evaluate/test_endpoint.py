from __future__ import annotations

import email.utils
import time

import pytest

from longalign_ray.evaluate.endpoint import Endpoint, _retry_after


def test_retry_after_holds_seconds_or_a_date():
    assert _retry_after("2.5") == 2.5
    assert _retry_after("-3") == 0.0
    assert _retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("soon") is None
    assert _retry_after(None) is None


def test_pauses_double_and_end_at_the_limit_of_an_answer():
    endpoint = Endpoint("http://127.0.0.1:9/v1", timeout_seconds=20, max_attempts=9, concurrency=1, backoff_seconds=1.0)
    for attempt, full in [(1, 1.0), (2, 2.0), (4, 8.0), (9, 30.0)]:
        assert all(full / 2 <= endpoint._pause(None, attempt) <= full for _ in range(20))
    assert endpoint._pause(7.0, 1) == 7.0
    assert endpoint._pause(1e9, 1) == 20

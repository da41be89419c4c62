"""Who gets how many tokens of a step."""

from __future__ import annotations

import itertools

import pytest

from longalign_ray.serve.schedule import Demand, share_tokens


def shares(*demands: tuple[str, int], prefill_chunk: int = 100, score_chunk: int = 30) -> list[int]:
    made = [Demand(num_tokens, kind) for kind, num_tokens in demands]  # pyright: ignore[reportArgumentType]
    return share_tokens(made, prefill_chunk=prefill_chunk, score_chunk=score_chunk)


def test_shares_worked_by_hand():
    assert shares(("decode", 1), ("decode", 1)) == [1, 1]
    assert shares(("prompt", 500), ("decode", 1)) == [100, 1]  # those that decode come on top
    assert shares(("prompt", 500), ("prompt", 20), ("prompt", 40)) == [50, 20, 30]  # half for the oldest
    assert shares(("prompt", 500), ("prompt", 20)) == [80, 20]  # and what the others leave
    assert shares(("prompt", 10), ("prompt", 500)) == [10, 90]
    assert shares(("score", 500), ("score", 20)) == [30, 0]
    assert shares(("score", 500), ("prompt", 90)) == [30, 70]
    assert shares(("prompt", 5), prefill_chunk=1) == [1]


@pytest.mark.parametrize("prefill_chunk", [1, 2, 7, 100])
def test_no_share_is_too_large_and_the_oldest_moves(prefill_chunk):
    kinds = [("decode", 1), ("prompt", 3), ("prompt", 80), ("score", 9), ("score", 90)]
    for demands in itertools.product(kinds, repeat=4):
        given = shares(*demands, prefill_chunk=prefill_chunk, score_chunk=8)
        assert all(0 <= share <= num_tokens for share, (_, num_tokens) in zip(given, demands, strict=True))
        prompts = [number for number, (kind, _) in enumerate(demands) if kind != "decode"]
        scored = sum(given[number] for number in prompts if demands[number][0] == "score")
        assert sum(given[number] for number in prompts) <= prefill_chunk
        assert scored <= 8
        assert not prompts or given[prompts[0]] > 0
        assert sum(given) == sum(given[number] for number in prompts) + len(demands) - len(prompts)

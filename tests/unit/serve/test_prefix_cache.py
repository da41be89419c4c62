"""Who takes over whose cache, who waits, and who is forgotten first."""

from __future__ import annotations

import random

import pytest
import torch

from longalign_ray.serve import kv_cache
from longalign_ray.serve.kv_cache import KVCache
from longalign_ray.serve.prefix_cache import PrefixCache

BYTES_A_TOKEN = 2 * 4  # keys and values of one head of width 1 in one layer
ROOM = 64  # tokens of room to spare in a segment


def compute(cache: KVCache, num_tokens: int | None = None) -> None:
    """What the model would do: the keys of a token are its id."""
    end = len(cache.token_ids) if num_tokens is None else cache.length + num_tokens
    ids = torch.tensor(cache.token_ids[cache.length : end], dtype=torch.float32)[None, :, None]
    cache.own.write(0, ids, ids)
    cache.own.length += ids.shape[1]


def opened(prefixes: PrefixCache, prompt: list[int]) -> KVCache:
    cache = prefixes.open(prompt)
    assert cache is not None
    return cache


def run(prefixes: PrefixCache, prompt: list[int]) -> int:
    """Tokens taken over by a request that is computed and done."""
    cache = opened(prefixes, prompt)
    cached = cache.length
    compute(cache)
    prefixes.retain(cache, prompt)
    return cached


def text(seed: int, length: int = 300) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def test_longest_common_beginning_is_taken():
    prefixes = PrefixCache(2**20)
    assert run(prefixes, text(1)) == 0
    assert run(prefixes, text(2)) == 0
    assert run(prefixes, text(1)[:200] + text(3)) == 200
    assert run(prefixes, text(1)[:150]) == 149  # one token is left, for its logits
    assert run(prefixes, text(1)[:200] + text(3) + text(4)) == 500
    assert run(prefixes, text(1)[:10] + text(5)) == 0  # not worth it


def test_what_is_taken_is_what_would_be_computed(monkeypatch):
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 50)
    prefixes, chooser = PrefixCache(8_000), random.Random(0)
    taken = 0
    for _ in range(120):
        prompt = [token for _ in range(chooser.randint(1, 4)) for token in text(chooser.randint(1, 4), 60)]
        cache = opened(prefixes, prompt[: chooser.randint(1, len(prompt))])
        taken += cache.length
        compute(cache)
        spans = [*cache.shared, kv_cache.Span(cache.own, cache.own.length)]
        held = torch.cat([span.segment.read(0, 0, span.length)[0][0, :, 0] for span in spans])
        assert held.tolist() == cache.token_ids.tolist()
        prefixes.retain(cache, cache.token_ids.tolist())
        assert prefixes.retained_bytes <= 8_000
    assert taken > 1_000


def test_the_least_recently_used_goes_first():
    prefixes = PrefixCache(3 * BYTES_A_TOKEN * (300 + ROOM))
    for seed in (1, 2, 3):
        assert run(prefixes, text(seed)) == 0
    assert run(prefixes, text(1)) == 299  # used, and retained a second time: 2 has to go
    assert run(prefixes, text(3)) == 299
    assert run(prefixes, text(2)) == 0


def test_what_refers_to_a_forgotten_cache_is_forgotten_too(monkeypatch):
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 100)
    prefixes = PrefixCache(2**20)
    document, question = opened(prefixes, text(1)), text(1) + text(2)
    compute(document)
    assert run(prefixes, question) == 300
    assert prefixes.retained_bytes == BYTES_A_TOKEN * (300 + ROOM)  # the question's own tokens
    prefixes.drop(document)
    assert prefixes.retained_bytes == 0
    assert run(prefixes, question) == 0


def test_nothing_stays_that_refers_to_uncounted_memory(monkeypatch):
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 100)
    prefixes = PrefixCache(2**20)
    run(prefixes, text(1))
    cache = opened(prefixes, text(1) + text(2))
    prefixes.clear()
    compute(cache)
    prefixes.retain(cache, text(1) + text(2))
    assert prefixes.retained_bytes == 0


def test_others_wait_for_a_document_that_is_being_computed():
    prefixes = PrefixCache(2**20)
    first = opened(prefixes, text(1))
    assert prefixes.open([*text(1), 1]) is None
    assert opened(prefixes, text(2)).length == 0  # another document need not wait
    compute(first, 200)
    assert prefixes.open([*text(1), 1]) is None
    compute(first)
    assert opened(prefixes, [*text(1), 1]).length == 300
    second = opened(prefixes, text(3))
    assert prefixes.open([*text(3), 1]) is None
    prefixes.drop(second)  # it fails; the next one does the work
    assert opened(prefixes, [*text(3), 1]).length == 0


def test_what_a_cancelled_request_computed_is_of_use():
    prefixes = PrefixCache(2**20)
    cache = opened(prefixes, text(1))
    compute(cache, 120)
    prefixes.retain(cache, text(1))
    assert run(prefixes, text(1)) == 120


@pytest.mark.parametrize("max_bytes", [0, 1])
def test_no_room_no_reuse(max_bytes):
    prefixes = PrefixCache(max_bytes)
    assert run(prefixes, text(1)) == 0
    assert run(prefixes, text(1)) == 0
    assert prefixes.retained_bytes == 0

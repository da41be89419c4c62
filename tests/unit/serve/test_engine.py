"""The embedded engine on the tiny model, against transformers' own generate() and full logits."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from longalign_ray.errors import ModelError, ServingError
from longalign_ray.serve import generate
from longalign_ray.serve.engine import Sampling
from longalign_ray.serve.transformers_engine import TransformersEngine, load_model

PROMPT = tuple(range(40, 90))
GREEDY = Sampling(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=16, max_sequences=3)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path):
    return load_model(tiny_model_dir, dtype="float32", device="cpu")


async def tokens_of(engine: TransformersEngine, prompt=PROMPT, sampling: Sampling = GREEDY) -> tuple[list[int], str]:
    ids, reason = [], ""
    async for event in engine.submit(prompt, sampling):
        ids += [token.token_id for token in event.tokens]
        reason = event.finish_reason
    return ids, str(reason)


def reference(model, prompt=PROMPT, **settings) -> list[int]:
    inputs = torch.tensor([prompt])
    out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0, **settings)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 200])
def test_greedy_equals_generate(engine, model, length):
    prompt = [(7 * place + length) % 250 for place in range(length)]
    ids, reason = asyncio.run(tokens_of(engine, prompt))
    expected = reference(model, prompt, max_new_tokens=24)
    ended = expected[-1] == 258  # generate() gives the end token too
    assert (ids, reason) == ((expected[:-1], "stop") if ended else (expected, "length"))


def test_prompt_in_chunks_equals_prompt_at_once(model):
    chunked: Any = generate.new_cache(model)
    whole: Any = generate.new_cache(model)
    for start in range(0, 50, 7):
        last = generate._forward(model, PROMPT[start : start + 7], chunked, last_only=True)
    expected = generate._forward(model, PROMPT, whole, last_only=True)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(chunked.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-5, atol=1e-6)
        assert ours.keys.shape[-2] == 50


def test_a_sliding_window_model_equals_generate():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8, eos_token_id=None)
    model = MistralForCausalLM(config).eval()
    prompt = [place % 60 for place in range(30)]
    steps = generate.generate(model, prompt, GREEDY, end_ids=frozenset(), prefill_chunk=5)
    ids = [token.token_id for event in steps if event is not None for token in event.tokens]
    assert ids == reference(model, prompt, max_new_tokens=24)


def test_end_tokens_stop_and_are_not_reported(engine, model):
    expected = reference(model, max_new_tokens=24)
    place = next(place for place in range(3, 24) if expected[place] not in expected[:place])
    sampling = dataclasses.replace(GREEDY, stop_token_ids=(expected[place],))
    ids, reason = asyncio.run(tokens_of(engine, sampling=sampling))
    assert (ids, reason) == (expected[:place], "stop")
    steps = generate.generate(model, PROMPT, GREEDY, end_ids=frozenset({expected[place]}), prefill_chunk=16)
    *_, last = steps
    assert last is not None
    assert (last.tokens, last.finish_reason, last.num_generated) == ((), "stop", place + 1)


def test_end_tokens_come_from_the_generation_config(tiny_model_dir, model):
    from longalign_ray.serve.transformers_engine import end_token_ids

    assert end_token_ids(model) == {258}
    model.generation_config.eos_token_id = [3, 258]
    assert end_token_ids(model) == {3, 258}
    model.generation_config.eos_token_id = 258


def test_a_seed_gives_the_same_tokens_beside_other_requests(engine):
    sampling = Sampling(max_tokens=20, temperature=1.5, top_p=0.9, seed=11)

    async def together() -> list[list[int]]:
        others = [dataclasses.replace(sampling, seed=None), dataclasses.replace(sampling, seed=12)]
        made = await asyncio.gather(*(tokens_of(engine, sampling=each) for each in (sampling, *others, sampling)))
        return [ids for ids, _ in made]

    alone, _ = asyncio.run(tokens_of(engine, sampling=sampling))
    first, unseeded, other_seed, again = asyncio.run(together())
    assert first == again == alone
    assert first != unseeded
    assert first != other_seed


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities 0.644, 0.237, 0.087, 0.032
    generator = torch.Generator().manual_seed(0)

    def shares(**settings: float) -> list[float]:
        drawn = Counter(generate.sample(logits, generator=generator, **settings) for _ in range(2000))
        return [drawn[token_id] / 2000 for token_id in range(4)]

    assert shares(temperature=1.0, top_p=1.0) == pytest.approx([0.644, 0.237, 0.087, 0.032], abs=0.05)
    assert shares(temperature=2.0, top_p=1.0) == pytest.approx([0.455, 0.276, 0.167, 0.102], abs=0.05)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.731, 0.269, 0, 0], abs=0.05)  # 0.644 < 0.7
    assert shares(temperature=1.0, top_p=0.6) == [1, 0, 0, 0]
    assert shares(temperature=0.0, top_p=1.0) == [1, 0, 0, 0]
    assert shares(temperature=1e-4, top_p=1.0) == [1, 0, 0, 0]


@pytest.mark.parametrize("chunk", [7, 49, 512])
def test_score_equals_log_softmax_of_the_full_logits(engine, model, monkeypatch, chunk):
    monkeypatch.setattr(generate, "SCORE_CHUNK", chunk)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)
    expected = [log_probs[place, token_id].item() for place, token_id in enumerate(PROMPT[1:])]
    score = asyncio.run(engine.score(PROMPT, num_top=3))
    assert score.log_probs == pytest.approx(expected, abs=1e-5)
    best = log_probs[:-1].topk(3, dim=-1)
    assert [[token_id for token_id, _ in top] for top in score.top] == best.indices.tolist()
    assert [top[0][1] for top in score.top] == pytest.approx(best.values[:, 0].tolist(), abs=1e-5)


def test_score_of_one_token_is_empty(engine):
    assert asyncio.run(engine.score([5])).log_probs == ()


def test_full_logits_never_exist_at_once(engine, monkeypatch):
    seen = []
    forward = generate._forward
    monkeypatch.setattr(generate, "SCORE_CHUNK", 16)
    monkeypatch.setattr(generate, "_forward", lambda *args, **kw: seen.append(forward(*args, **kw)) or seen[-1])
    asyncio.run(engine.score(range(200)))
    assert len(seen) == 13
    assert max(logits.shape[0] for logits in seen) == 16
    seen.clear()
    asyncio.run(tokens_of(engine))
    assert {logits.shape[0] for logits in seen} == {1}


def test_log_probs_of_generated_tokens_equal_their_score(engine):
    async def both() -> tuple[list[float], tuple[float, ...]]:
        events = [event async for event in engine.submit(PROMPT, GREEDY)]
        tokens = [token for event in events for token in event.tokens]
        score = await engine.score([*PROMPT, *(token.token_id for token in tokens)])
        return [token.log_prob for token in tokens], score.log_probs[len(PROMPT) - 1 :]

    generated, scored = asyncio.run(both())
    assert generated == pytest.approx(scored, abs=1e-5)


def test_requests_take_turns(engine):
    async def order() -> list[str]:
        done = []

        async def ask(name: str, num_tokens: int) -> None:
            await tokens_of(engine, sampling=dataclasses.replace(GREEDY, max_tokens=num_tokens))
            done.append(name)

        await asyncio.gather(ask("long", 300), ask("short", 3))
        return done

    assert asyncio.run(order()) == ["short", "long"]


def test_closing_the_stream_frees_the_worker(engine, monkeypatch):
    monkeypatch.setattr(engine, "_end_ids", frozenset())
    endless = Sampling(max_tokens=100_000, temperature=1.0)

    async def scenario() -> None:
        before = await engine.stats()
        async with aclosing(engine.submit(PROMPT, endless)) as events:
            await anext(events)
            assert (await engine.stats()).active == 1
        waiting = [asyncio.ensure_future(tokens_of(engine, sampling=endless)) for _ in range(5)]
        while (await engine.stats()).waiting != 2:  # max_sequences = 3
            await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        deadline = time.monotonic() + 10
        while (stats := await engine.stats()).active + stats.waiting:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert stats.cancelled - before.cancelled == 6
        assert len((await tokens_of(engine))[0]) == 24

    asyncio.run(scenario())


def test_a_failing_request_fails_alone(engine, monkeypatch):
    forward = generate._forward

    def fails_on_one_prompt(model, token_ids, cache, **settings):
        if tuple(token_ids)[:1] == (1,):
            raise RuntimeError("out of memory\nwith a long story")
        return forward(model, token_ids, cache, **settings)

    monkeypatch.setattr(generate, "_forward", fails_on_one_prompt)

    async def both():
        return await asyncio.gather(tokens_of(engine), tokens_of(engine, [1, 2, 3]), return_exceptions=True)

    good, bad = asyncio.run(both())
    assert not isinstance(good, BaseException)
    assert len(good[0]) == 24
    assert isinstance(bad, ServingError)
    assert str(bad) == "generation failed: RuntimeError: out of memory"
    assert engine.is_alive


def test_closing_the_engine_fails_what_is_under_way(tiny_model_dir):
    engine = TransformersEngine(tiny_model_dir, dtype="float32")

    async def scenario() -> None:
        events = engine.submit(PROMPT, Sampling(max_tokens=100_000))
        await anext(events)
        await asyncio.to_thread(engine.close)
        with pytest.raises(ServingError, match="has stopped before"):
            async for _ in events:
                pass
        with pytest.raises(ServingError, match="has stopped; restart"):
            await tokens_of(engine)

    asyncio.run(scenario())
    assert not engine.is_alive


def test_empty_prompt_is_refused(engine):
    with pytest.raises(ServingError, match="no tokens"):
        asyncio.run(tokens_of(engine, []))


def test_only_safetensors_are_loaded(tiny_model_dir, tmp_path):
    import shutil

    from safetensors.torch import load_file

    with pytest.raises(ModelError, match="cannot be loaded for serving"):
        load_model(tmp_path, dtype="float32", device="cpu")
    copy = shutil.copytree(tiny_model_dir, tmp_path / "pickled")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_model(copy, dtype="float32", device="cpu")

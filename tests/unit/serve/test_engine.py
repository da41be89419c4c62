"""The embedded engine on the tiny model, against transformers' own generate() and full logits."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from longalign_ray.errors import ModelError, ServingError
from longalign_ray.serve import batch_forward, requests
from longalign_ray.serve.batch_forward import load_model
from longalign_ray.serve.engine import Sampling
from longalign_ray.serve.transformers_engine import TransformersEngine

PROMPT = tuple(range(40, 90))
GREEDY = Sampling(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=16, max_sequences=3)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path):
    """The same weights with transformers' own attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa")


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


def prompt_of(length: int) -> list[int]:
    return [(7 * place + length) % 250 for place in range(length)]


def expected_of(model, prompt, *, max_tokens: int) -> tuple[list[int], str]:
    expected = reference(model, prompt, max_new_tokens=max_tokens)
    ended = expected[-1] == 258  # generate() gives the end token too
    return (expected[:-1], "stop") if ended else (expected, "length")


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 200])
def test_greedy_equals_generate(engine, model, length):
    prompt = prompt_of(length)
    assert asyncio.run(tokens_of(engine, prompt)) == expected_of(model, prompt, max_tokens=24)


@pytest.mark.parametrize(("chunk", "prefix_cache_bytes"), [(2, 0), (7, 2**20), (64, 2**20)])
def test_a_crowd_equals_generate(tiny_model_dir, model, chunk, prefix_cache_bytes):
    """Prompts of mixed lengths, alike and not, that come and go while others are computed."""
    prompts = [prompt_of(length) for length in (3, 90, 1, 40, 17)]
    prompts += [[*prompt_of(120), *prompt_of(length)] for length in (5, 30)] + [prompt_of(120)]
    engine = TransformersEngine(
        tiny_model_dir, dtype="float32", prefill_chunk=chunk, max_sequences=4, prefix_cache_bytes=prefix_cache_bytes
    )

    async def ask(number: int, prompt: list[int]) -> tuple[list[int], str]:
        await asyncio.sleep(0.005 * (number * 5 % 8))
        if number == 3:  # leaves after two tokens
            async with aclosing(engine.submit(prompt, GREEDY)) as events:
                return [(await anext(events)).tokens[0].token_id for _ in range(2)], "left"
        return await tokens_of(engine, prompt, dataclasses.replace(GREEDY, max_tokens=4 + 2 * number))

    async def crowd():
        answers = await asyncio.gather(*(ask(*each) for each in enumerate(prompts)))
        while (stats := await engine.stats()).active:
            await asyncio.sleep(0.01)
        return answers, stats

    answers, stats = asyncio.run(crowd())
    engine.close()
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected, reason = expected_of(model, prompt, max_tokens=4 + 2 * number)
        assert answer == ((expected[:2], "left") if number == 3 else (expected, reason))
    assert (stats.finished, stats.cancelled, stats.failed) == (7, 1, 0)
    assert stats.prompt_tokens == sum(map(len, prompts)) - len(prompts[3])
    assert (stats.cached_tokens > 0) == (prefix_cache_bytes > 0)


def test_a_long_prompt_is_seen_to_move(tiny_model_dir, monkeypatch):
    """By what the health check of a replica reads, a chunk at a time, before there is any answer."""
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=64)
    seen = []
    forward = batch_forward.forward

    def watching(*arguments):  # on the engine's thread, which has no event loop
        seen.append(asyncio.run(engine.stats()).computed_tokens)
        return forward(*arguments)

    monkeypatch.setattr(batch_forward, "forward", watching)
    asyncio.run(engine.score(prompt_of(150)))
    asyncio.run(tokens_of(engine, prompt_of(150), dataclasses.replace(GREEDY, max_tokens=2)))
    engine.close()
    assert seen == [0, 64, 128, 149, 213, 277, 299]
    assert asyncio.run(engine.stats()).computed_tokens == 300


def test_questions_on_one_document_compute_it_once(tiny_model_dir, model, monkeypatch):
    from longalign_ray.serve import kv_cache

    monkeypatch.setattr(kv_cache, "MIN_SHARED", 100)
    computed = []
    forward = batch_forward.forward

    def counting(model, pieces):
        computed.append(sum(len(piece.token_ids) for piece in pieces if len(piece.token_ids) > 1))
        return forward(model, pieces)

    document = prompt_of(200)
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=64, max_sequences=8)
    monkeypatch.setattr(batch_forward, "forward", counting)
    prompts = [[*document, number, *prompt_of(10)] for number in range(8)]

    async def ask_all():
        events = [[event async for event in engine.submit(prompt, GREEDY)] for prompt in prompts[:2]]
        together = await asyncio.gather(*(tokens_of(engine, prompt) for prompt in prompts[2:]))
        return events, together, await engine.stats()

    events, together, stats = asyncio.run(ask_all())
    engine.close()
    assert [each[0].num_cached for each in events] == [0, 200]
    assert [each[-1].num_cached for each in events] == [0, 200]
    assert stats.cached_tokens == 7 * 200
    assert sum(computed) == 200 + 8 * 11
    for prompt, answer in zip(prompts[2:], together, strict=True):
        assert answer == expected_of(model, prompt, max_tokens=24)


def test_questions_that_come_together_wait_for_the_document(tiny_model_dir):
    document = prompt_of(200)
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=100, max_sequences=8)

    async def ask_all():
        await asyncio.gather(*(tokens_of(engine, [*document, number, 7]) for number in range(5)))
        return await engine.stats()

    assert asyncio.run(ask_all()).cached_tokens == 4 * 200
    engine.close()


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "eos_token_id": None,
}


@pytest.mark.parametrize("family", ["mistral window", "qwen2 mixed windows", "gemma2 softcap"])
def test_other_attention_equals_generate(family, tmp_path, monkeypatch):
    import transformers

    from longalign_ray.serve import kv_cache

    monkeypatch.setattr(kv_cache, "MIN_SHARED", 12)
    torch.manual_seed(0)
    kind, settings = {
        "mistral window": ("Mistral", {"sliding_window": 8}),
        "qwen2 mixed windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        "gemma2 softcap": ("Gemma2", {"sliding_window": 8, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}),
    }[family]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    engine = TransformersEngine(tmp_path, dtype="float32", prefill_chunk=9, max_sequences=4)
    document = [place * place % 61 for place in range(30)]
    prompts = [[*document, 5], [*document, 9, 8, 7, 6], [1, 2, 3], document[:20]]

    async def ask_all():
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in prompts))

    answers = asyncio.run(ask_all())
    engine.close()
    assert [ids for ids, _ in answers] == [reference(model, prompt, max_new_tokens=24) for prompt in prompts]


def test_models_that_cannot_be_computed_so_are_refused_by_name(tmp_path):
    import transformers

    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    cases = [
        (transformers.FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8), "FalconH1"),
        (transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), "sinks"),
        (
            transformers.LlamaConfig(**sizes, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}),
            "rotary embeddings of type dynamic",
        ),
    ]
    for number, (config, message) in enumerate(cases):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / str(number), dtype="float32", device="cpu")


def test_end_tokens_stop_and_are_not_reported(engine, model, monkeypatch):
    expected = reference(model, max_new_tokens=24)
    place = next(place for place in range(3, 24) if expected[place] not in expected[:place])
    sampling = dataclasses.replace(GREEDY, stop_token_ids=(expected[place],))
    ids, reason = asyncio.run(tokens_of(engine, sampling=sampling))
    assert (ids, reason) == (expected[:place], "stop")
    monkeypatch.setattr(engine, "_end_ids", frozenset({expected[place]}))

    async def last_event():
        return [event async for event in engine.submit(PROMPT, GREEDY)][-1]

    last = asyncio.run(last_event())
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


@pytest.mark.parametrize("chunk", [7, 49, 512])
def test_score_equals_log_softmax_of_the_full_logits(engine, model, monkeypatch, chunk):
    monkeypatch.setattr(requests, "SCORE_CHUNK", chunk)
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
    forward = batch_forward.forward

    def spying(*args):
        logits = forward(*args)
        seen.append(sum(map(len, logits)))
        return logits

    monkeypatch.setattr(requests, "SCORE_CHUNK", 10)
    monkeypatch.setattr(batch_forward, "forward", spying)

    async def two_scores():
        await asyncio.gather(engine.score(range(100)), engine.score(range(50)))

    asyncio.run(two_scores())
    assert sum(seen) == 99 + 49
    assert max(seen) == 10
    seen.clear()
    asyncio.run(tokens_of(engine, prompt_of(60)))
    assert max(seen) == 1


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


def test_a_failing_request_fails_alone(engine, model, monkeypatch):
    forward = batch_forward.forward

    def fails_with_one_prompt(model, pieces):
        if any(tuple(piece.token_ids)[:1] == (1,) for piece in pieces):
            raise RuntimeError("out of memory\nwith a long story")
        return forward(model, pieces)

    monkeypatch.setattr(batch_forward, "forward", fails_with_one_prompt)

    async def both():
        before = await engine.stats()
        prompts = (PROMPT, [1, 2, 3], prompt_of(30))
        made = await asyncio.gather(*(tokens_of(engine, each) for each in prompts), return_exceptions=True)
        return before, made, await engine.stats()

    before, (good, bad, also_good), after = asyncio.run(both())
    assert good == expected_of(model, PROMPT, max_tokens=24)
    assert also_good == expected_of(model, prompt_of(30), max_tokens=24)
    assert isinstance(bad, ServingError)
    assert str(bad) == "generation failed: RuntimeError: out of memory"
    assert after.failed - before.failed == 1
    assert engine.is_alive


def test_overflow_fails_the_request_that_has_it(engine, model, monkeypatch):
    forward = batch_forward.forward

    def overflows(model, pieces):
        logits = forward(model, pieces)
        return [
            rows * float("nan") if piece.token_ids[-1] == 3 else rows
            for piece, rows in zip(pieces, logits, strict=True)
        ]

    monkeypatch.setattr(batch_forward, "forward", overflows)

    async def both():
        return await asyncio.gather(tokens_of(engine), tokens_of(engine, [1, 2, 3]), return_exceptions=True)

    good, bad = asyncio.run(both())
    assert good == expected_of(model, PROMPT, max_tokens=24)
    assert "weights or dtype overflow" in str(bad)


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

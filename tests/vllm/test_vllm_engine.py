"""The vLLM engine against transformers' own generate() and full logits; `make test-vllm` has an environment for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from longalign_ray.errors import ModelError, ServingError
from longalign_ray.serve.engine import GenerationEvent, PromptScore, Sampling
from longalign_ray.serve.vllm_engine import VllmEngine

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
GREEDY = Sampling(max_tokens=16, temperature=0.0)
DOCUMENT = [(37 * place + place // 5) % 250 for place in range(700)]


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """Runs a coroutine on the one event loop that the engine lives on."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def adapted(model_dir: Path) -> Any:
    """The model under a random adapter."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=12, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(LlamaForCausalLM.from_pretrained(str(model_dir)), config).eval()


@pytest.fixture(scope="module")
def engine(model_dir: Path, adapted: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    directory = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(directory)

    async def make() -> VllmEngine:
        settings: dict[str, Any] = {"adapters": {"adapted": directory}, "engine_args": {"enforce_eager": True}}
        return VllmEngine(model_dir, dtype="float32", max_tokens=1_024, **settings)

    engine = run(make())
    yield engine
    engine.close()


async def events_of(
    engine: VllmEngine, prompt: Sequence[int], sampling: Sampling, *, adapter: str | None = None
) -> list[GenerationEvent]:
    return [event async for event in engine.submit(prompt, sampling, adapter=adapter)]


def ids_of(events: Sequence[GenerationEvent]) -> list[int]:
    return [token.token_id for event in events for token in event.tokens]


def generated(model: Any, prompt: Sequence[int], number: int) -> list[int]:
    inputs = torch.tensor([prompt])
    out = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0, max_new_tokens=number
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_requests_side_by_side_equal_generate(engine: VllmEngine, model: Any, run: Any) -> None:
    prompts = [[(7 * place + length) % 250 for place in range(length)] for length in (1, 15, 64, 300)]

    async def ask_all() -> list[list[GenerationEvent]]:
        return await asyncio.gather(*(events_of(engine, prompt, GREEDY) for prompt in prompts))

    for prompt, events in zip(prompts, run(ask_all()), strict=True):
        assert ids_of(events) == [token for token in generated(model, prompt, 16) if token != 258]
        assert events[-1].finish_reason == "length"
        assert events[-1].num_generated == 16
        assert all(event.finish_reason is None for event in events[:-1])


def test_stop_tokens_end_and_are_not_reported(engine: VllmEngine, model: Any, run: Any) -> None:
    prompt = list(range(40, 90))
    expected = generated(model, prompt, 6)
    stop = expected[4]
    events = run(events_of(engine, prompt, Sampling(max_tokens=16, temperature=0.0, stop_token_ids=(stop,))))
    first = expected.index(stop)
    assert (ids_of(events), events[-1].finish_reason) == (expected[:first], "stop")
    assert events[-1].num_generated == first + 1


def test_log_probs_are_the_models_own(engine: VllmEngine, model: Any, run: Any) -> None:
    """Of a prompt and of drawn tokens, whatever the temperature."""
    prompt = DOCUMENT[:50]
    scored: PromptScore = run(engine.score(prompt, num_top=3))
    with torch.no_grad():
        logs_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = logs_TV[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.log_probs), expected, rtol=1e-4, atol=1e-4)
    assert [[token for token, _ in top] for top in scored.top] == logs_TV[:-1].topk(3).indices.tolist()

    sampling = Sampling(max_tokens=8, temperature=0.7, top_p=0.9, seed=5, num_top=2)
    drawn = [token for event in run(events_of(engine, prompt, sampling)) for token in event.tokens]
    ids = [token.token_id for token in drawn]
    again: PromptScore = run(engine.score([*prompt, *ids]))
    torch.testing.assert_close(
        torch.tensor([token.log_prob for token in drawn]),
        torch.tensor(again.log_probs[-len(ids) :]),
        rtol=1e-4,
        atol=1e-4,
    )
    assert all(len(token.top) == 2 and token.top[0][1] >= token.top[1][1] for token in drawn)
    assert ids == ids_of(run(events_of(engine, prompt, sampling))), "a seed repeats"


def test_questions_on_one_document_share_its_cache(engine: VllmEngine, model: Any, run: Any) -> None:
    first, second = (run(events_of(engine, [*DOCUMENT, *question], GREEDY)) for question in ([1, 2], [3, 4, 5]))
    assert first[-1].num_cached == 0
    assert second[-1].num_cached > 600
    assert ids_of(second) == [token for token in generated(model, [*DOCUMENT, 3, 4, 5], 16) if token != 258]


def test_an_adapter_beside_its_base_equals_peft(engine: VllmEngine, model: Any, adapted: Any, run: Any) -> None:
    """On one prompt, so that a cache shared by both would show."""
    prompt = [*DOCUMENT[::-1], 1]

    async def ask_both() -> list[list[GenerationEvent]]:
        return await asyncio.gather(
            *(events_of(engine, prompt, GREEDY, adapter=adapter) for adapter in (None, "adapted", "adapted"))
        )

    base, first, again = (ids_of(events) for events in run(ask_both()))
    assert base == [token for token in generated(model, prompt, 16) if token != 258]
    assert first == again == [token for token in generated(adapted, prompt, 16) if token != 258] != base


def test_closing_the_stream_aborts_the_request(engine: VllmEngine, run: Any) -> None:
    async def leave() -> None:
        async with aclosing(engine.submit(DOCUMENT[:100], Sampling(max_tokens=500, temperature=1.0))) as events:
            async for _ in events:
                break

    before = run(engine.stats())
    run(leave())
    after = run(engine.stats())
    assert (after.active, after.cancelled - before.cancelled, after.failed) == (0, 1, before.failed)
    assert engine.is_alive


def test_what_cannot_be_served_is_named(engine: VllmEngine, run: Any, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="no tokens"):
        run(events_of(engine, [], GREEDY))
    with pytest.raises(ServingError, match="generation failed"):
        run(events_of(engine, [1] * 2_000, GREEDY))  # beyond the context
    assert ids_of(run(events_of(engine, [1, 2, 3], GREEDY)))
    with pytest.raises(ModelError, match="cannot be loaded by vLLM"):
        VllmEngine(tmp_path / "none", dtype="float32", max_tokens=64)

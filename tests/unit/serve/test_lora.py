"""LoRA adapters in the embedded engine, against peft's own model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from longalign_ray.errors import ModelError, ServingError
from longalign_ray.serve import kv_cache
from longalign_ray.serve.batch_forward import Piece, forward, load_model
from longalign_ray.serve.engine import Sampling
from longalign_ray.serve.kv_cache import KVCache
from longalign_ray.serve.lora import StepRows, group_rows
from longalign_ray.serve.prefix_cache import PrefixCache
from longalign_ray.serve.transformers_engine import TransformersEngine
from longalign_ray.serve.vllm_engine import adapter_args

peft = pytest.importorskip("peft")

GREEDY = Sampling(max_tokens=12, temperature=0.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
    "two": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "three": {"r": 2, "lora_alpha": 6, "target_modules": ["v_proj", "o_proj"], "rank_pattern": {"v_proj": 6}},
}


def peft_model(model_dir: Path, settings: dict[str, Any]) -> Any:
    """The tiny model under a random adapter."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(len(str(settings)))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def references(tiny_model_dir: Path) -> dict[str | None, Any]:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    return {None: plain} | {name: peft_model(tiny_model_dir, settings) for name, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def adapters(references: dict[str | None, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    for name in SETTINGS:
        references[name].save_pretrained(directory / name)
    return {name: directory / name for name in SETTINGS}


def prompt_of(length: int) -> list[int]:
    return [(7 * place + length) % 250 for place in range(length)]


def full_logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0]


def test_rows_of_neighbours_are_one_group() -> None:
    pieces = [(None, 3), ("a", 1), ("a", 5), ("b", 2), (None, 1)]
    assert group_rows(pieces) == StepRows(12, [("a", slice(3, 9)), ("b", slice(9, 11))])
    assert group_rows([("a", 1), (None, 1), ("a", 2)]).of_adapter == [("a", slice(0, 1)), ("a", slice(2, 4))]
    assert group_rows([(None, 2)]) == StepRows(2, [])


def test_a_mixed_batch_gives_each_the_logits_of_peft(
    tiny_model_dir: Path, adapters: dict[str, Path], references: dict[str | None, Any]
) -> None:
    """Prompts and then tokens, in an order in which adapters are no neighbours."""
    model = load_model(tiny_model_dir, dtype="float32", device="cpu", adapters=adapters)
    names = ["two", None, "one", "two", None, "three", "one"]
    prompts = [prompt_of(5 + 3 * number) for number in range(len(names))]
    caches = [KVCache(prompt, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
    first = forward(model, [Piece(cache, prompt[:-2], 3) for cache, prompt in zip(caches, prompts, strict=True)])
    then = [
        forward(model, [Piece(c, [p[place]], 1) for c, p in zip(caches, prompts, strict=True)]) for place in (-2, -1)
    ]
    for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        expected = full_logits(references[name], prompt)[-5:]
        found = torch.cat([first[number], *(step[number] for step in then)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        if name is not None:
            assert (expected - full_logits(references[None], prompt)[-5:]).abs().max() > 0.1


def test_a_prefix_is_not_taken_over_by_another_adapter(
    tiny_model_dir: Path, adapters: dict[str, Path], references: dict[str | None, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document under base and two adapters, one after another and all at once; each reuses its own alone."""
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 50)
    engine = TransformersEngine(tiny_model_dir, dtype="float32", prefill_chunk=64, adapters=adapters)
    document = prompt_of(100)

    async def ask(name: str | None, question: int) -> tuple[list[int], int]:
        events = [event async for event in engine.submit([*document, question], GREEDY, adapter=name)]
        return [token.token_id for event in events for token in event.tokens], events[-1].num_cached

    async def ask_all() -> tuple[list[tuple[list[int], int]], list[tuple[list[int], int]]]:
        alone = [await ask(name, 1) for name in (None, "one", "two")]
        return alone, await asyncio.gather(
            *(ask(name, question) for question in (2, 3) for name in (None, "one", "two"))
        )

    alone, together = asyncio.run(ask_all())
    score = asyncio.run(engine.score(document, adapter="two"))
    with pytest.raises(ServingError, match=r"no adapter 'four' here; served: .*'one'"):
        asyncio.run(engine.score(document, adapter="four"))
    engine.close()
    assert [cached for _, cached in alone] == [0, 0, 0]
    assert [cached for _, cached in together] == [100] * 6
    asked = [(name, question) for question in (1, 2, 3) for name in (None, "one", "two")]
    for (name, question), (ids, _) in zip(asked, [*alone, *together], strict=True):
        inputs = torch.tensor([[*document, question]])
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        made = references[name].generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings)
        assert ids == [token for token in made[0, 101:].tolist() if token != 258]
    expected = full_logits(references["two"], document).log_softmax(-1)[:-1]
    found = expected.gather(1, torch.tensor(document[1:])[:, None])[:, 0]
    assert score.log_probs == pytest.approx(found.tolist(), abs=1e-5)


def test_the_prefix_cache_asks_whose_it_is() -> None:
    prefixes, prompt = PrefixCache(2**20), prompt_of(100)
    cache = prefixes.open(prompt, adapter="a")
    assert cache is not None
    assert prefixes.open(prompt, adapter="a") is None, "it waits for what is under way"
    assert prefixes.open(prompt, adapter="b") is not None
    cache.own.write(0, torch.zeros(1, 100, 1), torch.zeros(1, 100, 1))
    cache.own.length = 100
    prefixes.retain(cache, prompt)
    again, plain = prefixes.open(prompt, adapter="a"), prefixes.open(prompt)
    assert again is not None
    assert plain is not None
    assert (again.length, again.adapter, plain.length, plain.adapter) == (99, "a", 0, None)


def refused(tiny_model_dir: Path, adapter: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(tiny_model_dir, dtype="float32", device="cpu", adapters={"it": adapter})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, r"use_dora = True, .*merge it into its base model"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias = lora_only"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_modules": ["lm_head"]}, r"an adapter for lm_head, .*merge it"),
        ({"target_modules": ["embed_tokens"]}, r"weights such as .*embed_tokens.*merge it"),
    ],
)
def test_what_is_more_than_low_rank_products_is_refused(
    tiny_model_dir: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    peft_model(tiny_model_dir, {"r": 4} | settings).save_pretrained(tmp_path)
    refused(tiny_model_dir, tmp_path, message)


def test_an_adapter_of_another_model_is_refused(
    tiny_model_dir: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    refused(tiny_model_dir, tmp_path, "holds no adapter .*adapter_config.json")
    (tmp_path / "adapter_config.json").write_bytes((adapters["two"] / "adapter_config.json").read_bytes())
    refused(tiny_model_dir, tmp_path, "holds no readable adapter_model.safetensors")
    weights = load_file(adapters["two"] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    changes: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({f"{name}.lora_A.weight": torch.zeros(8, 32)}, r"q_proj has A \[8, 32\] and B \[64, 8\] for .* 64 inputs"),
        ({f"{name}.lora_A.weight": torch.zeros(4, 64)}, r"A \[4, 64\] and B \[64, 8\]"),
        ({f"{name}.lora_B.weight": None}, r"A \[8, 64\] and B None"),
        ({f"{name}.lora_A.weight": None}, r"weights such as .*q_proj\.lora_B"),
        (
            {f"{name.replace('1', '7')}.lora_A.weight": torch.zeros(8, 64)},
            r"no layer model\.layers\.7\.self_attn\.q_proj",
        ),
    ]
    for change, message in changes:
        kept = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        refused(tiny_model_dir, tmp_path, message)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["k_proj"]}))
    refused(tiny_model_dir, tmp_path, "peft_type = IA3")


def test_vllm_gets_room_for_the_largest_rank(adapters: dict[str, Path], tmp_path: Path) -> None:
    assert adapter_args({}) == {}
    assert adapter_args({"one": adapters["one"]}) == {
        "enable_lora": True, "max_lora_rank": 8, "max_loras": 2,
    }  # fmt: skip
    settings = json.loads((adapters["one"] / "adapter_config.json").read_text())
    for rank, room in ((9, 16), (257, 320)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": rank}))
        made = adapter_args({**adapters, "it": tmp_path})
        assert (made["max_lora_rank"], made["max_loras"]) == (room, 5)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"q_proj": 513}}))
    with pytest.raises(ModelError, match="has rank 513, and vLLM takes up to 512"):
        adapter_args({"it": tmp_path})

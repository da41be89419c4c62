from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from longalign_ray.config import AdapterConfig, TrainConfig
from longalign_ray.errors import CheckpointError, LongAlignError, ModelError
from longalign_ray.train.adapters import add_adapter, check_installed, load_adapter
from longalign_ray.train.batch import to_batch
from longalign_ray.train.model import PackedLM, load_for_training, prepare_model, verify_isolation
from tests.integration import adapter_ranks
from tests.integration.watched_ranks import build, write_training

pytest.importorskip("peft")


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_packed_gradient_equals_one_sequence_at_a_time(tmp_path: Path, targets: tuple[str, ...]) -> None:
    adapter = AdapterConfig(rank=4, alpha=12, target_modules=targets)
    packs = write_training(tmp_path, world_size=1)
    rows = [row for micro_step in range(2) for row in packs.plan.slot(0, micro_step, 0).tolist()]
    expected = adapter_ranks.one_at_a_time([packs.store.example(row) for row in rows], adapter)
    model = adapter_ranks.packed_model(torch.float64, adapter)
    for micro_step in range(2):
        pack = packs.pack(0, micro_step, 0)
        assert pack is not None
        (model(to_batch(pack, loss="sequence")) / float(packs.plan.num_sequences[0])).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)
    assert len(trained) == 2 * 2 * (len(targets) or 7)  # A and B of each layer's projections
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_isolation_holds_with_dropout_too() -> None:
    made = adapter_ranks.packed_model(torch.float64, AdapterConfig(dropout=0.5))
    verify_isolation(made, vocab_size=64, device="cpu")
    assert made.training


def test_a_new_adapter_leaves_the_model_itself(tmp_path: Path) -> None:
    pack = write_training(tmp_path, world_size=1).pack(0, 0, 0)
    assert pack is not None
    model = prepare_model(build(torch.float64, packed=True), gradient_checkpointing=False, head_chunk=8)
    before = model(to_batch(pack, loss="sequence"))
    add_adapter(model, AdapterConfig(), seed=0)
    assert model(to_batch(pack, loss="sequence")).item() == before.item()


def test_the_seed_alone_decides_how_it_begins() -> None:
    def first_a(other: int) -> torch.Tensor:
        model = prepare_model(build(torch.float32, packed=True), gradient_checkpointing=False, head_chunk=8)
        torch.manual_seed(other)
        add_adapter(model, AdapterConfig(), seed=1)
        assert torch.initial_seed() == other, "the random state of others moved"
        return model.model.get_submodule("model.layers.0.self_attn.q_proj").lora_A["default"].weight

    assert torch.equal(first_a(5), first_a(6))


@pytest.mark.parametrize(("targets", "message"), [(("q_prj",), "q_prj"), (("q_proj", "lm_head"), "leave lm_head out")])
def test_layers_that_cannot_have_one_are_refused(targets: tuple[str, ...], message: str) -> None:
    model = prepare_model(build(torch.float64, packed=True), gradient_checkpointing=False, head_chunk=8)
    with pytest.raises(ModelError, match=message):
        add_adapter(model, AdapterConfig(target_modules=targets), seed=0)


@pytest.mark.parametrize("other", [AdapterConfig(rank=8), AdapterConfig(rank=4, target_modules=("q_proj",))])
def test_another_adapter_than_the_trained_one_is_refused(other: AdapterConfig) -> None:
    weights = adapter_ranks.packed_model(torch.float64).model.state_dict()
    with pytest.raises(CheckpointError, match=r"train\.adapter"):
        load_adapter(build(torch.float64, packed=False), weights, other, form="merged")


def test_the_sum_is_rounded_once() -> None:
    """bf16 weights near 1 take a change of 0.003 only if it is added before rounding."""
    trained = adapter_ranks.packed_model(torch.float32)
    base = build(torch.bfloat16, packed=False)
    weights = trained.model.state_dict()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (weights[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
    expected = (base.get_submodule(name).weight.float() + 12 / 4 * b @ a).bfloat16()
    merged = load_adapter(base, weights, adapter_ranks.ADAPTER, form="merged")
    assert torch.equal(merged.get_submodule(name).weight, expected)


def test_peft_missing_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LongAlignError, match="pip install peft"):
        check_installed(AdapterConfig())


def test_without_bitsandbytes_4_bits_are_refused_and_plain_weights_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    check_installed(AdapterConfig())
    with pytest.raises(LongAlignError, match=r"train\.adapter\.quantize = 4bit needs bitsandbytes"):
        check_installed(AdapterConfig(quantize="4bit"))


def test_gradient_over_4_bit_weights_is_that_over_the_same_in_full(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    build(torch.float32, packed=False).save_pretrained(tmp_path / "model")
    pack = write_training(tmp_path, world_size=1).pack(0, 0, 0)
    assert pack is not None

    def trained(quantize: Literal["none", "4bit"]) -> PackedLM:
        config = TrainConfig(adapter=AdapterConfig(rank=4, quantize=quantize))
        model = load_for_training(tmp_path / "model", dtype="float32", config=config)
        assert config.adapter is not None
        add_adapter(model, config.adapter, seed=0)
        return model

    quantized, full = trained("4bit"), trained("none")
    weights = dict(full.named_parameters())
    layers: list[tuple[str, Any]] = [
        (n, m) for n, m in quantized.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    ]
    assert len(layers) == 2 * 7
    with torch.no_grad():
        for name, layer in layers:
            read = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            rounded = weights[f"{name.removesuffix('.base_layer')}.base_layer.weight"]
            assert 0.01 < (rounded - read).norm() / read.norm() < 0.2
            rounded.copy_(read)
    for model in (quantized, full):
        model(to_batch(pack, loss="sequence")).backward()
    compared = 0
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-5, msg=name)
            compared += 1
    assert compared == 2 * len(layers)

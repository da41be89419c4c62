"""Packed training equals training on one sequence at a time, and packed sequences do not see one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longalign_ray.config import DataConfig, RopeConfig, TrainConfig
from longalign_ray.data.conversation import parse_record
from longalign_ray.data.store import Example, Pack
from longalign_ray.data.template import load_tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer
from longalign_ray.errors import ModelError
from longalign_ray.train import attention
from longalign_ray.train import model as model_module
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.loss import LossKind, backward_scale, step_totals
from longalign_ray.train.model import (
    PackedLM,
    load_for_training,
    model_digest,
    prepare_model,
    verify_isolation,
    verify_loss,
)
from longalign_ray.train.rope import check_window
from longalign_ray.train.tiled_mlp import tile_mlps
from tests.unit.train.test_loss import index_of, plan_of

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPE, **changes})


def qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**SHAPE, head_dim=16)


def mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**SHAPE, sliding_window=5)


def glm4() -> Any:
    from transformers import Glm4Config

    return Glm4Config(**SHAPE, head_dim=8)


def qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)


def gemma2() -> Any:
    """Capped scores and logits, which weights of this size reach; one layer of two slides."""
    from transformers import Gemma2Config

    caps: dict[str, Any] = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
    return Gemma2Config(**SHAPE, **caps, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, initializer_range=0.3)


def gemma3() -> Any:
    from transformers import Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=5, query_pre_attn_scalar=16, layer_types=layers)


def phi3() -> Any:
    from transformers import Phi3Config

    return Phi3Config(**SHAPE, eos_token_id=0, sliding_window=5)


def glm() -> Any:
    from transformers import GlmConfig

    return GlmConfig(**SHAPE, head_dim=8)


def olmo2() -> Any:
    from transformers import Olmo2Config

    return Olmo2Config(**SHAPE, eos_token_id=0)


def cohere() -> Any:
    from transformers import CohereConfig

    return CohereConfig(**SHAPE, logit_scale=0.2, initializer_range=0.3, eos_token_id=0)


def granite() -> Any:
    from transformers import GraniteConfig

    return GraniteConfig(**SHAPE, logits_scaling=4.0, attention_multiplier=0.3, initializer_range=0.3)


FAMILIES = {
    family.__name__: family
    for family in (llama, qwen2, qwen3, mistral, glm, glm4, gemma2, gemma3, phi3, olmo2, cohere, granite)
}
ROUNDING = {"gemma2": 1e-6, "gemma3": 1e-7, "cohere": 1e-7}
"""Families whose layers compute in fp32 in a model of fp64, Gemma 2 its softmax too; 1e-10 for the others."""


def build(config: Any, *, packed: bool, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import AutoModelForCausalLM

    capped = getattr(config, "attn_logit_softcapping", None) is not None  # which only the eager function of theirs does
    name = attention.register() if packed else "eager" if capped else "sdpa"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=name).to(dtype)


WEIGHTS = np.array([100, 100, 30, 1])  # answers, a message with its own weight, a prompt loss weight of 0.01


def random_example(length: int, *, share: float, seed: int) -> Example:
    random = np.random.default_rng(seed)
    weight = np.where(random.random(length) < share, random.choice(WEIGHTS, length), 0).astype(np.uint8)
    weight[-1] = 100 if share > 0 else 0
    return Example(f"e{seed}", random.integers(1, 64, length, dtype=np.int32), weight)


EXAMPLES = [
    random_example(n, share=share, seed=n) for n, share in [(9, 0.5), (23, 0.1), (2, 1.0), (17, 0.9), (12, 0.0)]
]
PACKS = [EXAMPLES[:3], EXAMPLES[3:4], EXAMPLES[4:], []]  # of one step; the third has no target, the fourth is idle
PLAN = plan_of([[0, 1, 2], [3], [4], []], micro_steps=2, groups=2, sums=np.array([e.sum_weights for e in EXAMPLES]))


def one_at_a_time(model: Any, *, kind: LossKind = "sequence") -> tuple[float, dict[str, torch.Tensor]]:
    """The losses by their definition, by the model's own forward pass.

    Eq. 2: the mean over sequences of the weighted mean over targets; the weighted mean over all targets; Eq. 3: the
    mean over packs of that over their targets; the mean over sequences, weighted by the roots of their targets.
    """
    packs = []
    for examples in PACKS[:2]:
        losses, sums = [], []
        for example in examples:
            ids = torch.tensor(example.input_ids, dtype=torch.int64)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            token_losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            weights = torch.tensor(example.loss_weight[1:], dtype=torch.float64) / 100
            losses.append((weights * token_losses).sum())
            sums.append(weights.sum())
        packs.append((torch.stack(losses), torch.stack(sums)))
    sum_S, weight_S = (torch.cat(parts) for parts in zip(*packs, strict=True))
    loss = {
        "sequence": lambda: (sum_S / weight_S).mean(),
        "token": lambda: sum_S.sum() / weight_S.sum(),
        "pack": lambda: torch.stack([losses.sum() / weights.sum() for losses, weights in packs]).mean(),
        "sqrt": lambda: (weight_S.sqrt() * (sum_S / weight_S)).sum() / weight_S.sqrt().sum(),
    }[kind]()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def packed(model: PackedLM, *, world_size: int = 1, kind: LossKind = "sequence") -> tuple[float, dict[str, Any]]:
    """The same by packs: every rank's backward, then the average over ranks that data parallelism makes."""
    total = 0.0
    step_total = step_totals(PLAN, index_of(np.array([e.sum_weights for e in EXAMPLES])), kind)[0]
    for examples in PACKS:
        batch = to_batch(Pack.of(examples) if examples else dummy_pack(), loss=kind)
        weighted = model(batch)
        (weighted * backward_scale(world_size, step_total) / world_size).backward()
        total += weighted.item() / step_total
    return total, {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"),
    [
        *((family, "sequence", True) for family in FAMILIES),
        ("llama", "sequence", False),
        ("llama", "token", True),
        ("llama", "pack", True),
        ("qwen2", "sqrt", True),
    ],
)
def test_packed_gradient_equals_one_sequence_at_a_time(family: str, kind: LossKind, checkpointing: bool) -> None:
    config = FAMILIES[family]()
    reference_loss, reference = one_at_a_time(build(config, packed=False), kind=kind)
    model = prepare_model(build(config, packed=True), gradient_checkpointing=checkpointing, head_chunk=3)
    loss, gradients = packed(model, world_size=2, kind=kind)
    assert loss == pytest.approx(reference_loss, abs=ROUNDING.get(family, 1e-12))
    assert gradients.keys() == reference.keys()
    scale = max(gradient.abs().max().item() for gradient in reference.values())
    for name, gradient in gradients.items():
        atol = ROUNDING.get(family, 1e-10) * scale
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_levers_of_memory_change_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiled MLPs, and checkpoints that go elsewhere and come back: the input of each layer."""
    config = FAMILIES[family]()
    reference_loss, reference = packed(
        prepare_model(build(config, packed=True), gradient_checkpointing=True, head_chunk=3), world_size=1
    )
    away: list[torch.Tensor] = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        away.append(tensor.clone())
        return away[-1]

    def elsewhere(*, pin_memory: bool) -> Any:
        assert not pin_memory
        return torch.autograd.graph.saved_tensors_hooks(to_host, lambda tensor: tensor)

    monkeypatch.setattr(model_module, "save_on_cpu", elsewhere)
    built = build(config, packed=True)
    tile_mlps(built, tile=5)
    model = prepare_model(built, gradient_checkpointing=True, head_chunk=3, offload_checkpoints=True)
    tiles: list[int] = []
    inputs: list[torch.Tensor] = []
    for layer in built.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: tiles.append(output.shape[1]))
    loss, gradients = packed(model, world_size=1)
    assert loss == pytest.approx(reference_loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=1e-12, msg=name)
    assert max(tiles) == 5
    assert len(inputs) == len(PACKS) * config.num_hidden_layers
    assert all(any(torch.equal(one, sent) for sent in away) for one in inputs)


def test_experts_are_not_tiled() -> None:
    from transformers import Qwen3MoeConfig

    shape = {**SHAPE, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ModelError, match=r"tiled_mlp = true needs.*one of experts"):
        tile_mlps(build(Qwen3MoeConfig(**shape), packed=True), tile=4)
    with pytest.raises(ModelError, match="none of that name"):
        tile_mlps(torch.nn.Linear(2, 2), tile=4)


def test_plain_text_trains_with_document_masking(tiny_model_dir: Path) -> None:
    """Continual pre-training: documents, one of them in pieces, in one pack; every token but the first is a target."""
    maker = ConversationTokenizer(load_tokenizer(tiny_model_dir), DataConfig(train_on="all", max_length=20))
    texts = ["A document in three pieces, of 20 tokens at most.", "Short.", "One more text."]
    records = [parse_record({"text": text}, source="corpus", line_number=n) for n, text in enumerate(texts)]
    examples = [example for record in records for example in maker.one(record).examples]
    assert [example.length for example in examples] == [20, 20, 10, 7, 15]
    config = llama(vocab_size=259)
    plain, losses = build(config, packed=False), []
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        losses.append(F.cross_entropy(plain(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:]))
    model = prepare_model(build(config, packed=True), gradient_checkpointing=True, head_chunk=16)
    batch = to_batch(Pack.of(examples), loss="token")
    assert batch.weights_N.tolist() == [1.0] * (20 + 20 + 10 + 7 + 15 - 5)
    expected = sum(loss * (example.length - 1) for loss, example in zip(losses, examples, strict=True))
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_changed_token_moves_no_other_sequence(family: str) -> None:
    model = prepare_model(build(FAMILIES[family](), packed=True), gradient_checkpointing=False, head_chunk=8)
    with torch.no_grad():
        before = model.hidden_states(to_batch(Pack.of(EXAMPLES), loss="sequence"))
        changed = Example("x", EXAMPLES[1].input_ids.copy(), EXAMPLES[1].loss_weight)
        changed.input_ids[0] = (changed.input_ids[0] + 1) % 64
        after = model.hidden_states(to_batch(Pack.of([EXAMPLES[0], changed, *EXAMPLES[2:]]), loss="sequence"))
    moved = (before != after).any(dim=-1).nonzero().ravel().tolist()
    assert moved  # the change is seen where it was made
    assert min(moved) == 9
    assert max(moved) < 9 + 23
    verify_isolation(model, vocab_size=64, device="cpu")
    verify_loss(model, vocab_size=64, device="cpu")


def test_transformers_own_attention_is_refused() -> None:
    """The same model without our attention mixes packed sequences: the probe must see it."""
    model = prepare_model(build(llama(), packed=False), gradient_checkpointing=False, head_chunk=8)
    model.model.config.use_cache = True
    original = model.model.model.forward

    def forward_with_mask(**inputs: Any) -> Any:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # what a collator hands out
        return original(**inputs)

    model.model.model.forward = forward_with_mask
    with pytest.raises(ModelError, match="another"):
        verify_isolation(model, vocab_size=64, device="cpu")


def test_tied_embeddings_stay_tied() -> None:
    model = prepare_model(
        build(llama(tie_word_embeddings=True), packed=True), gradient_checkpointing=False, head_chunk=4
    )
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_the_digest_tells_models_apart_but_not_weights_or_settings_of_memory() -> None:
    def digest(config: Any, **settings: Any) -> str:
        model = build(config, packed=True, dtype=torch.float32)
        return model_digest(prepare_model(model, **{"gradient_checkpointing": False, "head_chunk": 4, **settings}))

    other_weights = build(llama(), packed=True, dtype=torch.bfloat16)
    with torch.no_grad():
        other_weights.lm_head.weight.add_(1)
    same = model_digest(prepare_model(other_weights, gradient_checkpointing=False, head_chunk=4))
    assert digest(llama()) == same == digest(llama(), gradient_checkpointing=True, head_chunk=8, tiled_mlp=True)
    others = [
        llama(num_attention_heads=2, head_dim=8),
        llama(intermediate_size=52),
        llama(rope_parameters={"rope_type": "default", "rope_theta": 9e5}),
        llama(vocab_size=65),
    ]
    assert len({digest(llama()), *map(digest, others)}) == 1 + len(others)


def test_models_that_cannot_be_served_exactly_are_refused(tmp_path: Path) -> None:
    """A head that is no linear layer, and one whose logits are changed afterwards in a way that we do not know."""
    headless = build(llama(), packed=True)
    headless.lm_head = torch.nn.Sequential(headless.lm_head)
    with pytest.raises(ModelError, match="no plain linear lm_head"):
        prepare_model(headless, gradient_checkpointing=False, head_chunk=8)
    model = prepare_model(build(granite(), packed=True), gradient_checkpointing=False, head_chunk=8)
    model.model.config.logits_scaling = 1.0  # read anew by its forward pass, but not by our head
    with pytest.raises(ModelError, match="GraniteForCausalLM: its own logits"):
        verify_loss(model, vocab_size=64, device="cpu")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_for_training(tmp_path, dtype="float32", config=TrainConfig())


def lfm2() -> Any:
    """Mixes neighbouring tokens by short convolutions, which know no sequence boundaries."""
    from transformers import Lfm2Config

    return Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"], block_multiple_of=16)


def mamba() -> Any:
    from transformers import MambaConfig

    return MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)


def jamba() -> Any:
    from transformers import JambaConfig

    mixers: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 4}
    return JambaConfig(**SHAPE, **mixers, num_experts=2, num_experts_per_tok=1)


def qwen3_next() -> Any:
    """Its gated delta rule keeps sequences apart with flash-linear-attention only, and transformers says so."""
    from transformers import Qwen3NextConfig

    linear: dict[str, Any] = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    linear |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    layers = ["linear_attention", "full_attention"]
    return Qwen3NextConfig(
        **SHAPE, **linear, **experts, head_dim=16, shared_expert_intermediate_size=8, layer_types=layers
    )


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    rope = {"rope_type": "default", "rope_theta": 1e4}
    return GptOssConfig(**SHAPE, head_dim=16, num_local_experts=2, num_experts_per_tok=1, rope_parameters=rope)


def doge() -> Any:
    """Adds a bias, made of its values, to the mask."""
    from transformers import DogeConfig

    return DogeConfig(**SHAPE)


def qwen2_moe() -> Any:
    """Its sliding window is in the mask of transformers alone; so is that of PhiMoE."""
    from transformers import Qwen2MoeConfig

    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    return Qwen2MoeConfig(**SHAPE, **experts, **window, shared_expert_intermediate_size=8)


def phimoe() -> Any:
    from transformers import PhimoeConfig

    return PhimoeConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1, sliding_window=5)


def llama4() -> Any:
    from transformers import Llama4TextConfig

    layers: dict[str, Any] = {"moe_layers": [], "layer_types": ["full_attention", "chunked_attention"]}
    return Llama4TextConfig(**SHAPE, **layers, num_local_experts=2, head_dim=8, intermediate_size_mlp=48)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lfm2, "Lfm2ForCausalLM: .*recurrent"),
        (mamba, "MambaForCausalLM: .*recurrent"),
        (jamba, "JambaForCausalLM: .*recurrent"),
        (qwen3_next, "Qwen3NextForCausalLM cannot be trained packed"),
        (gpt_oss, "GptOssAttention asks for attention sinks"),
        (doge, "DogeAttention asks for a mask of its own"),
        (qwen2_moe, "Qwen2MoeAttention asks for a sliding window by a mask alone"),
        (phimoe, "PhimoeAttention asks for a sliding window by a mask alone"),
        (llama4, "Llama4TextAttention asks for a layer of type chunked_attention"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_by_name(config: Callable[[], Any], message: str) -> None:
    built = build(config(), packed=True, dtype=torch.float32)  # experts have no fp64
    model = prepare_model(built, gradient_checkpointing=False, head_chunk=8)
    with pytest.raises(ModelError, match=message):
        verify_isolation(model, vocab_size=64, device="cpu")


def mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**SHAPE, num_local_experts=2)


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**SHAPE, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)


@pytest.mark.parametrize("config", [mixtral, qwen3_moe])
def test_models_of_experts_are_refused_before_any_weight_is_read(config: Callable[[], Any], tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    message = rf"a {config.__name__} model of experts \(num.*experts = 2\).*choose a dense model"
    with pytest.raises(ModelError, match=message):
        load_for_training(tmp_path, dtype="float32", config=TrainConfig())
    with pytest.raises(ModelError, match=message):  # by which the stages begin, so no worker is started
        check_window(tmp_path, RopeConfig(), max_length=64, one_per_pack=False)


def test_a_family_that_knows_no_other_attention_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be loaded for packed training.*longalign_varlen"):
        load_for_training(tmp_path, dtype="float32", config=TrainConfig())


def test_gpt2_with_learned_positions_is_exact_too() -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    _, reference = one_at_a_time(build(config, packed=False))
    model = prepare_model(build(config, packed=True), gradient_checkpointing=False, head_chunk=8)
    verify_isolation(model, vocab_size=64, device="cpu")
    _, gradients = packed(model)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=1e-10, msg=name)

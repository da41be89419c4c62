"""Packed training equals training on one sequence at a time, and packed sequences do not see one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longalign_ray.data.store import Example, Pack
from longalign_ray.errors import ModelError
from longalign_ray.train import attention
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.loss import LossKind, backward_scale
from longalign_ray.train.model import PackedLM, load_for_training, prepare_model, verify_isolation

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


FAMILIES = {"llama": llama, "qwen3": qwen3, "mistral": mistral, "glm4": glm4}


def build(config: Any, *, packed: bool, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import AutoModelForCausalLM

    name = attention.register() if packed else "sdpa"
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
PACKS = [EXAMPLES[:3], EXAMPLES[3:], []]  # three packs of one step: 3, 2 and no sequences; one has no target


def one_at_a_time(model: Any, *, kind: LossKind = "sequence") -> tuple[float, dict[str, torch.Tensor]]:
    """The losses by their definition, by the model's own forward pass.

    Eq. 2: the mean over sequences of the weighted mean over targets; or the weighted mean over all targets.
    """
    losses, sums = [], []
    for example in EXAMPLES:
        if example.num_targets == 0:
            continue
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        token_losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        weights = torch.tensor(example.loss_weight[1:], dtype=torch.float64) / 100
        losses.append((weights * token_losses).sum())
        sums.append(weights.sum())
    sum_S, weight_S = torch.stack(losses), torch.stack(sums)
    loss = (sum_S / weight_S).mean() if kind == "sequence" else sum_S.sum() / weight_S.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def packed(model: PackedLM, *, world_size: int = 1, kind: LossKind = "sequence") -> tuple[float, dict[str, Any]]:
    """The same by packs: every rank's backward, then the average over ranks that data parallelism makes."""
    total = 0.0
    step_total = 4 if kind == "sequence" else sum(example.sum_weights for example in EXAMPLES)
    for examples in PACKS:
        batch = to_batch(Pack.of(examples) if examples else dummy_pack(), loss=kind)
        weighted = model(batch)
        (weighted * backward_scale(world_size, step_total) / world_size).backward()
        total += weighted.item() / step_total
    return total, {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("kind", "checkpointing"), [("sequence", False), ("sequence", True), ("token", True)])
def test_packed_gradient_equals_one_sequence_at_a_time(family: str, kind: LossKind, checkpointing: bool) -> None:
    config = FAMILIES[family]()
    reference_loss, reference = one_at_a_time(build(config, packed=False), kind=kind)
    model = prepare_model(build(config, packed=True), gradient_checkpointing=checkpointing, head_chunk=3)
    loss, gradients = packed(model, world_size=3, kind=kind)
    assert loss == pytest.approx(reference_loss, abs=1e-12)
    assert gradients.keys() == reference.keys()
    scale = max(gradient.abs().max().item() for gradient in reference.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=1e-10 * scale, msg=name)


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


def test_head_chunks_and_tied_embeddings() -> None:
    model = prepare_model(
        build(llama(tie_word_embeddings=True), packed=True), gradient_checkpointing=False, head_chunk=4
    )
    head: Any = model.model.lm_head
    hidden = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 64, (11,))
    losses = head(hidden, labels)
    expected = F.cross_entropy(hidden @ head.weight.T, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    assert head.weight is model.model.model.embed_tokens.weight
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)


def test_models_that_cannot_be_served_exactly_are_refused(tmp_path: Path) -> None:
    scaled = llama()
    scaled.logit_scale = 0.5
    with pytest.raises(ModelError, match="logit_scale"):
        prepare_model(build(scaled, packed=True), gradient_checkpointing=False, head_chunk=8)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_for_training(tmp_path, dtype="float32")


def test_convolutions_across_sequences_are_refused() -> None:
    """LFM2 mixes neighbouring tokens by short convolutions, which know no sequence boundaries."""
    from transformers import Lfm2Config

    config = Lfm2Config(**{**SHAPE, "layer_types": ["conv", "full_attention"]}, block_multiple_of=16)
    model = prepare_model(build(config, packed=True), gradient_checkpointing=False, head_chunk=8)
    with pytest.raises(ModelError, match="recurrent"):
        verify_isolation(model, vocab_size=64, device="cpu")


def test_gpt2_with_learned_positions_is_exact_too() -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    _, reference = one_at_a_time(build(config, packed=False))
    model = prepare_model(build(config, packed=True), gradient_checkpointing=False, head_chunk=8)
    verify_isolation(model, vocab_size=64, device="cpu")
    _, gradients = packed(model)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=1e-10, msg=name)

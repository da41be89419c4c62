"""Run by test_deepspeed.py as each of two ranks: the gradient of one optimizer step under every ZeRO stage.

Prints a JSON object: stage -> relative L2 error of the whole gradient against one sequence at a time in fp64.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist

from longalign_ray.config import TrainConfig
from longalign_ray.data.store import Example, Pack
from longalign_ray.train import attention
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.engine import TrainEngine, all_reduce_sum
from longalign_ray.train.model import prepare_model

MICRO_STEPS = 2


def example(length: int, share: float) -> Example:
    random = np.random.default_rng(length)
    mask = random.random(length) < share
    mask[-1] = share > 0
    return Example(f"e{length}", random.integers(1, 64, length, dtype=np.int32), 100 * mask.astype(np.uint8))


# [rank][micro-step]: three, one and two sequences, one of them without a target, and an idle slot.
SLOTS = [
    [[example(9, 0.5), example(30, 0.1), example(2, 1.0)], [example(21, 0.9)]],
    [[example(12, 0.0), example(40, 0.3)], []],
]
NUM_SEQUENCES = 5  # those with a target


def build(dtype: torch.dtype, *, packed: bool) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    name = attention.register() if packed else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=name).to(dtype)


def reference() -> tuple[float, dict[str, torch.Tensor]]:
    model = build(torch.float64, packed=False)
    losses = []
    for one in (one for rank in SLOTS for slot in rank for one in slot if one.num_targets):
        ids = torch.tensor(one.input_ids, dtype=torch.int64)
        token_losses = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
        losses.append(token_losses[torch.tensor(one.loss_weight[1:] > 0)].mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def step_error(
    zero_stage: Literal[0, 1, 2, 3], expected_loss: float, expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    config = TrainConfig(zero_stage=zero_stage, head_chunk=4)
    model = prepare_model(build(torch.float32, packed=True), gradient_checkpointing=True, head_chunk=4)
    engine = TrainEngine(model, config, dtype="float32", micro_steps=MICRO_STEPS)
    loss = torch.zeros(())
    for number, slot in enumerate(SLOTS[dist.get_rank()]):
        batch = to_batch(Pack.of(slot) if slot else dummy_pack(), loss="sequence")
        loss += engine.forward_backward(batch, step_total=NUM_SEQUENCES, last=number == MICRO_STEPS - 1)
    squared_error = squared_norm = 0.0
    for name, parameter in engine.module.named_parameters():
        gradient = engine.full_gradient(parameter)
        assert gradient is not None, name
        wanted = expected[name.removeprefix("model.")]
        squared_error += (gradient.double() - wanted).square().sum().item()
        squared_norm += wanted.square().sum().item()
    grad_norm = engine.step(1e-3)
    return {
        "gradient": (squared_error / squared_norm) ** 0.5,
        "loss": abs(all_reduce_sum(loss).item() - expected_loss),
        "norm": abs(grad_norm - squared_norm**0.5) / squared_norm**0.5 if zero_stage else 0.0,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected_loss, expected = reference()
    errors = {stage: step_error(stage, expected_loss, expected) for stage in (0, 1, 2, 3)}
    if dist.get_rank() == 0:
        print(json.dumps(errors))
    dist.destroy_process_group()

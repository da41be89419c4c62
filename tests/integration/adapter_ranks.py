"""Run by test_adapters.py as each of two ranks: one step of a LoRA adapter under every ZeRO stage, and its checkpoint.

Prints a JSON object: stage, with `-shared` where the ranks share packs -> relative L2 error of the whole gradient
against one sequence at a time in fp64; and where bitsandbytes is installed, "stage in 4 bits" -> losses of an
undisturbed and of a resumed run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist

from longalign_ray.config import AdapterConfig, TrainConfig
from longalign_ray.data.store import Example, Pack
from longalign_ray.train.adapters import add_adapter, lora_config
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.model import PackedLM, load_for_training, prepare_model, verify_isolation, verify_loss
from tests.integration.watched_ranks import build, write_training

ADAPTER = AdapterConfig(rank=4, alpha=12)
PROBE = [5, 17, 33, 2, 60, 41, 8]


def packed_model(dtype: torch.dtype, adapter: AdapterConfig = ADAPTER) -> PackedLM:
    """The frozen model with an adapter whose B is not 0; the same numbers, rounded, in every precision."""
    model = prepare_model(build(torch.float32, packed=True), gradient_checkpointing=True, head_chunk=8)
    add_adapter(model, adapter, seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def one_at_a_time(examples: list[Example], adapter: AdapterConfig = ADAPTER) -> dict[str, torch.Tensor]:
    """Gradient of Eq. 2 by peft's own model around plain transformers, one sequence at a time, in fp64."""
    from peft import get_peft_model

    model = get_peft_model(build(torch.float64, packed=False), lora_config(adapter))
    own = {f"base_model.model.{name}": p for name, p in packed_model(torch.float64, adapter).model.named_parameters()}
    model.load_state_dict({name: own[name] for name, _ in model.named_parameters()}, strict=False)
    losses = []
    for one in examples:
        ids = torch.tensor(one.input_ids, dtype=torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        weights = torch.tensor(one.loss_weight[1:], dtype=torch.float64)
        losses.append((F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum() / weights.sum())
    torch.stack(losses).mean().backward()
    prefix = "base_model."
    return {name.removeprefix(prefix): p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_error(stage: Literal[0, 1, 2, 3], packs: Any, expected: dict[str, torch.Tensor], directory: Path) -> float:
    """Relative L2 error of the gradient; then one update, whose checkpoint and logits go to `directory`."""
    from longalign_ray.train.checkpoint import TrainState
    from longalign_ray.train.engine import TrainEngine

    plan = packs.plan
    config = TrainConfig(zero_stage=stage, adapter=ADAPTER, sp_degree=plan.sp_degree)
    engine = TrainEngine(packed_model(torch.float32), config, dtype="float32", micro_steps=plan.shape[1])
    group = engine.sequence_group
    verify_isolation(engine.module, vocab_size=64, device="cpu", sequence_group=group)
    for micro_step in range(plan.shape[1]):
        pack = packs.pack(0, micro_step, group.number) or dummy_pack()
        total, last = float(plan.num_sequences[0]), micro_step == plan.shape[1] - 1
        engine.forward_backward(to_batch(pack, loss="sequence", sequence_group=group), step_total=total, last=last)
    squared_error = squared_norm = 0.0
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)
    for name, parameter in trained.items():
        gradient = engine.full_gradient(parameter)
        assert gradient is not None, name
        squared_error += (gradient.double() - expected[name]).square().sum().item()
        squared_norm += expected[name].square().sum().item()
    engine.step(0.05)
    with torch.no_grad():
        probe = Example("probe", np.array(PROBE, np.int32), np.ones(len(PROBE), np.uint8))
        hidden = engine.module.hidden_states(to_batch(Pack.of([probe]), loss="sequence"))
        logits = engine.module.model.lm_head(hidden)
    engine.save(directory)
    if dist.get_rank() == 0:
        TrainState(step=1, tokens_seen=0, plan_digest="", world_size=2, zero_stage=stage).save(directory)
        torch.save(logits, directory / "logits.pt")
    return (squared_error / squared_norm) ** 0.5


def resumed_in_4_bits(stage: Literal[0, 1, 2, 3], packs: Any, directory: Path) -> list[list[float]]:
    """The losses of two steps, and those of the second one after the checkpoint of the first was loaded."""
    from longalign_ray.train.checkpoint import TrainState
    from longalign_ray.train.engine import TrainEngine, all_reduce_sum

    config = TrainConfig(zero_stage=stage, adapter=ADAPTER.model_copy(update={"quantize": "4bit"}))
    assert config.adapter is not None
    runs = []
    for first_step in (0, 1):
        model = load_for_training(directory.parent / "model", dtype="float32", config=config)
        add_adapter(model, config.adapter, seed=1)
        engine, losses = TrainEngine(model, config, dtype="float32", micro_steps=1), []
        for verify in (verify_isolation, verify_loss):
            verify(engine.module, vocab_size=64, device="cpu")
        if first_step:
            engine.load(directory)
        batch = to_batch(packs.pack(0, 0, dist.get_rank()) or dummy_pack(), loss="sequence")
        for step in range(first_step, 2):
            losses.append(all_reduce_sum(engine.forward_backward(batch, step_total=2, last=True)).item())
            engine.step(0.05)
            if step == 0:
                engine.save(directory)
        runs.append(losses)
    if dist.get_rank() == 0:
        TrainState(step=1, tokens_seen=0, plan_digest="", world_size=2, zero_stage=stage).save(directory)
    return runs


def main(directory: Path) -> dict[str, Any]:
    own = directory / f"rank-{dist.get_rank()}"
    own.mkdir()
    made: dict[str, Any] = {}
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    for degree, of_place in ((2, "-shared"), (1, "")):
        packs = write_training(own, world_size=2, sp_degree=degree)
        rows = packs.plan.example_rows[: packs.plan.offsets[math.prod(packs.plan.shape[1:])]].tolist()
        expected = one_at_a_time([packs.store.example(row) for row in rows])
        for stage in stages:
            name = f"{stage}{of_place}"
            made[name] = step_error(stage, packs, expected, directory / f"stage-{name}")
    if importlib.util.find_spec("bitsandbytes"):
        if dist.get_rank() == 0:
            build(torch.float32, packed=False).save_pretrained(directory / "model")
        dist.barrier()
        for stage in (0, 2, 3):
            made[f"{stage} in 4 bits"] = resumed_in_4_bits(stage, packs, directory / f"4bit-stage-{stage}")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = main(Path(sys.argv[1]))
    print(json.dumps(made))
    dist.destroy_process_group()

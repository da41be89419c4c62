"""Run by test_deepspeed.py: forks gloo worlds, in which the gradient of one optimizer step is taken case after case.

Arguments: cases by world size, as JSON, and a directory; writes WORLD_SIZE.json there: the errors against one sequence
at a time in fp64 by plain transformers, and whether the probe for leaks between sequences sees one.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist

from longalign_ray.config import AdapterConfig, RopeConfig, TrainConfig
from longalign_ray.data.store import Example, Pack
from longalign_ray.errors import ModelError
from longalign_ray.train import attention
from longalign_ray.train.adapters import add_adapter
from longalign_ray.train.batch import PackedBatch, dummy_pack, to_batch
from longalign_ray.train.engine import TrainEngine, all_reduce_sum, quiet_deepspeed
from longalign_ray.train.loss import LossKind, backward_scale, step_totals
from longalign_ray.train.model import (
    PackedLM,
    load_for_training,
    model_digest,
    prepare_model,
    verify_isolation,
    verify_loss,
)
from longalign_ray.train.schedule import learning_rate
from longalign_ray.train.sequence_parallel import ALONE, SequenceGroup, join_groups
from tests.unit.train.test_loss import index_of, plan_of

Stage = Literal[0, 1, 2, 3] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    zero_stage: Stage
    """None: without DeepSpeed, which refuses gradients in fp64."""
    family: str = "llama"
    sp_degree: int = 1
    micro_steps: int = 2
    loss: LossKind = "sequence"
    dtype: str = "float32"
    levers: bool = False
    """Those of memory: MLPs of 32 tokens at a time, checkpoints and, in ZeRO-3, weights on the host."""

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.asdict(self).values())


def example(length: int, *, first_target: int, share: float = 1.0) -> Example:
    """Targets from `first_target` on, some of them at 30 per cent; `share` of the others is left out."""
    random = np.random.default_rng(length)
    weight = np.where(random.random(length) < share, random.choice([100, 30], length), 0).astype(np.uint8)
    weight[:first_target] = 0
    weight[-1] = 100 if first_target < length else 0
    return Example(f"e{length}", random.integers(1, 64, length, dtype=np.int32), weight)


EXAMPLES = [
    example(9, first_target=2),
    example(30, first_target=1, share=0.3),
    example(2, first_target=1),
    example(21, first_target=19),  # a part of it has no targets
    example(12, first_target=12),  # nor has this
    example(43, first_target=20, share=0.6),
]
SUMS = [one.sum_weights for one in EXAMPLES]  # N_i
NUM_SEQUENCES = 5  # those with a target
CURVE_STEPS = 30


def slots(number: int) -> list[list[int]]:
    """Rows of EXAMPLES: three, one, one without a target, and one; the last slot of fewer takes the rest; more idle."""
    cuts = [0, 3, 4, 5][:number] + [6] * max(number - 4, 0)
    return [list(range(first, last)) for first, last in zip(cuts, [*cuts[1:], 6], strict=True)]


def batch_of(slot: list[int], loss: LossKind, group: SequenceGroup = ALONE) -> PackedBatch:
    pack = Pack.of([EXAMPLES[row] for row in slot]) if slot else dummy_pack()
    return to_batch(pack, loss=loss, sequence_group=group)


def build(family: str, dtype: torch.dtype, *, packed: bool) -> Any:
    from transformers import AutoModelForCausalLM, Glm4Config, LlamaConfig, MistralConfig, Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    three_heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}
    two_heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    configs = {
        "llama": lambda: LlamaConfig(**shape),
        "llama-3-heads": lambda: LlamaConfig(**{**shape, **three_heads}),
        "qwen3": lambda: Qwen3Config(**{**shape, "num_key_value_heads": 1}, head_dim=16),
        "mistral": lambda: MistralConfig(**shape, sliding_window=5),
        "mistral-2-heads": lambda: MistralConfig(**{**shape, **two_heads}, sliding_window=17),
        "mistral-3-heads": lambda: MistralConfig(**{**shape, **three_heads}, sliding_window=5),
        "glm4": lambda: Glm4Config(**shape, head_dim=8),
    }
    torch.manual_seed(0)
    name = attention.register() if packed else "sdpa"
    return AutoModelForCausalLM.from_config(configs[family](), attn_implementation=name).to(dtype)


@lru_cache
def reference(family: str, factors: tuple[float, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(family, torch.float64, packed=False)
    total = weighted_loss(model, factors)
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters()}


def weighted_loss(model: Any, factors: tuple[float, ...]) -> torch.Tensor:
    """Each example's weighted sum of token losses, one example after the other, times its factor."""
    total = torch.zeros((), dtype=torch.float64)
    for one, factor in zip(EXAMPLES, factors, strict=True):
        ids, weights = torch.tensor(one.input_ids, dtype=torch.int64), torch.tensor(one.loss_weight[1:] / 100)
        losses = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
        total = total + (losses * weights).sum() * factor
    return total


def shares(loss: LossKind, packs: list[list[int]]) -> tuple[float, tuple[float, ...]]:
    """What a step's weights sum to, and each example's factor in `weighted_loss`, by the definition of the loss."""
    targets = [sum(SUMS[row] for row in rows) for rows in packs]  # of each pack
    num_packs, num_sequences = sum(n > 0 for n in targets), sum(n > 0 for n in SUMS)
    total = {"sequence": num_sequences, "token": sum(SUMS), "pack": num_packs, "sqrt": sum(n**0.5 for n in SUMS)}[loss]
    own_pack = [n for rows, n in zip(packs, targets, strict=True) for _ in rows]
    divisors = {"sequence": SUMS, "token": [1.0] * len(SUMS), "pack": own_pack, "sqrt": [n**0.5 for n in SUMS]}[loss]
    return total, tuple(1 / divisor / total if divisor else 0.0 for divisor in divisors)


class AveragedEngine:
    """What TrainEngine does with the gradient, by autograd and an all-reduce: in any precision."""

    def __init__(self, model: PackedLM, sp_degree: int):
        self.module, self.sequence_group = (
            model,
            join_groups(sp_degree, num_heads=model.model.config.num_attention_heads),
        )

    def forward_backward(self, batch: PackedBatch, *, step_total: float, last: bool) -> torch.Tensor:
        weighted_sum = self.module(batch)
        (weighted_sum * backward_scale(dist.get_world_size(), step_total)).backward()
        return weighted_sum.detach() / step_total

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        return all_reduce_sum(parameter.grad) / dist.get_world_size()

    def step(self, learning_rate: float) -> float | None:
        raise NotImplementedError


def step_error(case: Case) -> dict[str, float]:
    model = prepare_model(
        build(case.family, getattr(torch, case.dtype), packed=True),
        gradient_checkpointing=True,
        head_chunk=4,
        offload_checkpoints=case.levers,
        tiled_mlp=case.levers,
    )
    config = TrainConfig(
        num_workers=dist.get_world_size(),
        sp_degree=case.sp_degree,
        zero_stage=case.zero_stage or 0,
        offload_parameters=case.levers and case.zero_stage == 3,
        tiled_mlp=case.levers,
    )
    engine: TrainEngine | AveragedEngine
    if case.zero_stage is None:
        engine = AveragedEngine(model, case.sp_degree)
    else:
        engine = TrainEngine(model, config, dtype=case.dtype, micro_steps=case.micro_steps)
    group = engine.sequence_group
    verify_isolation(engine.module, vocab_size=64, device="cpu", sequence_group=group)
    num_groups = dist.get_world_size() // case.sp_degree
    packs = slots(num_groups * case.micro_steps)
    sums = np.array(SUMS)
    plan = plan_of(packs, micro_steps=case.micro_steps, groups=num_groups, sums=sums)
    step_total = float(step_totals(plan, index_of(sums), case.loss)[0])
    loss, idle_parts = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for number, slot in enumerate(packs[group.number :: num_groups]):
        batch = batch_of(slot, case.loss, group)
        idle_parts += len(slot) > 0 and not batch.weights_N.any()
        loss += engine.forward_backward(batch, step_total=step_total, last=number == case.micro_steps - 1)
    wanted_total, factors = shares(case.loss, packs)
    expected_loss, expected = reference(case.family, factors)
    squared_error = squared_norm = 0.0
    for name, parameter in engine.module.named_parameters():
        gradient = engine.full_gradient(parameter)
        assert gradient is not None, name
        wanted = expected[name.removeprefix("model.")]
        squared_error += (gradient.double() - wanted).square().sum().item()
        squared_norm += wanted.square().sum().item()
    grad_norm = squared_norm**0.5 if case.zero_stage is None else engine.step(1e-3)
    assert grad_norm is not None
    return {
        "gradient": (squared_error / squared_norm) ** 0.5,
        "loss": abs(all_reduce_sum(loss).item() - expected_loss),
        "norm": abs(grad_norm - squared_norm**0.5) / squared_norm**0.5,
        "total": abs(step_total - wanted_total),
        "idle_parts": all_reduce_sum(idle_parts).item(),
    }


def master_weights(engine: TrainEngine) -> torch.Tensor:
    """All of the optimizer's in one vector."""
    from deepspeed.utils import safe_get_full_fp32_param

    if groups := getattr(engine._engine.optimizer, "fp32_groups", None):  # of ZeRO-0, which that function overlooks
        found: list[Any] = [weight for group in groups for weight in group]
    else:
        found = [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    return torch.cat([weight.detach().flatten() for weight in found])


def bfloat16_errors(stage: Literal[0, 1, 2, 3]) -> dict[str, float]:
    """Of 16 micro-steps of one pack against a single one, in the gradient; and of an update too small for bfloat16.

    A sixteenth of a gradient is exact in bfloat16, so the sums may differ by how they are added up alone.
    """
    config = TrainConfig(zero_stage=stage, learning_rate=1e-5, weight_decay=10.0, max_grad_norm=1e9)

    def taken(micro_steps: int) -> tuple[TrainEngine, torch.Tensor]:
        model = prepare_model(build("llama", torch.bfloat16, packed=True), gradient_checkpointing=True, head_chunk=4)
        engine = TrainEngine(model, config, dtype="bfloat16", micro_steps=micro_steps)
        batch, total = batch_of(slots(2)[dist.get_rank()], "sequence"), NUM_SEQUENCES * micro_steps
        for number in range(micro_steps):
            engine.forward_backward(batch, step_total=total, last=number == micro_steps - 1)
        gradients: list[Any] = [engine.full_gradient(parameter) for parameter in engine.module.parameters()]
        return engine, torch.cat([gradient.double().flatten() for gradient in gradients])

    _, once = taken(1)
    engine, added_up = taken(16)
    rounded = build("llama", torch.bfloat16, packed=True)
    before = torch.cat([weight.detach().flatten() for weight in rounded.parameters()]).float()
    engine.step(config.learning_rate)
    update = master_weights(engine) - before
    wanted = -config.learning_rate * (added_up / (added_up.abs() + 1e-8) + config.weight_decay * before)  # Adam's first
    return {
        "added_up": ((added_up - once).norm() / once.norm()).item(),
        "update": ((update - wanted).norm() / wanted.norm()).item(),
    }


def offload_errors() -> dict[str, float]:
    """Of what is kept on the host: how far the updates of three steps in ZeRO-3 are from those without, by setting.

    The optimizer is then DeepSpeed's own kernel, in place of torch's.
    """

    def updates(**settings: bool) -> torch.Tensor:
        config = TrainConfig(zero_stage=3, weight_decay=0.1, max_grad_norm=0.5).model_copy(update=settings)
        model = prepare_model(build("llama", torch.float32, packed=True), gradient_checkpointing=True, head_chunk=4)
        engine = TrainEngine(model, config, dtype="float32", micro_steps=2)
        before, mine = master_weights(engine), slots(4)[dist.get_rank() :: 2]
        for step in range(3):
            for number, slot in enumerate(mine):
                engine.forward_backward(batch_of(slot, "sequence"), step_total=NUM_SEQUENCES, last=number == 1)
            engine.step(1e-3 / (step + 1))
        return master_weights(engine) - before

    plain = updates()
    settings: list[dict[str, bool]] = [
        {"offload_optimizer": True},
        {"offload_parameters": True},
        {"offload_optimizer": True, "offload_parameters": True},
    ]
    return {"+".join(some): ((updates(**some) - plain).norm() / plain.norm()).item() for some in settings}


def builds_cpu_adam() -> bool:
    """Whether DeepSpeed's optimizer for the host has been compiled before, or is to be now by BUILD_CPU_ADAM=1."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return os.environ.get("BUILD_CPU_ADAM") == "1" or any(root.glob("**/cpu_adam.so"))


CURVE = TrainConfig(zero_stage=3, weight_decay=0.1, max_grad_norm=0.5, betas=(0.9, 0.95))


def curve_rate(step: int) -> float:
    return learning_rate(step, CURVE_STEPS, peak=3e-3, warmup_ratio=0.1, minimum=1e-4)


def loss_curve() -> list[float]:
    """The losses of optimizer steps in packs, all on the same examples."""
    model = prepare_model(build("llama", torch.float32, packed=True), gradient_checkpointing=True, head_chunk=4)
    engine, losses = TrainEngine(model, CURVE, dtype="float32", micro_steps=2), []
    for step in range(CURVE_STEPS):
        loss = torch.zeros(())
        for number, slot in enumerate(slots(2 * dist.get_world_size())[dist.get_rank() :: dist.get_world_size()]):
            batch = batch_of(slot, "sequence")
            loss += engine.forward_backward(batch, step_total=NUM_SEQUENCES, last=number == 1)
        engine.step(curve_rate(step))
        losses.append(all_reduce_sum(loss).item())
    return losses


def reference_curve() -> list[float]:
    """The same by plain transformers and torch, one sequence at a time."""
    model, losses = build("llama", torch.float64, packed=False), []
    _, factors = shares("sequence", slots(1))
    optimizer = torch.optim.AdamW(model.parameters(), betas=CURVE.betas, weight_decay=CURVE.weight_decay)
    for step in range(CURVE_STEPS):
        total = weighted_loss(model, factors)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CURVE.max_grad_norm)
        optimizer.param_groups[0]["lr"] = curve_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def load_two_ways(directory: Path) -> dict[str, Any]:
    """Of a model loaded whole and of one divided as it is read: the numbers a rank then holds, digest, three losses.

    The second goes on with the first one's checkpoint of the first step.
    """
    if dist.get_rank() == 0:
        build("llama", torch.bfloat16, packed=False).save_pretrained(directory / "model", max_shard_size="5KB")
    dist.barrier()
    config = TrainConfig(zero_stage=3, tiled_mlp=True, offload_parameters=True, adapter=AdapterConfig(rank=2))
    rope = RopeConfig(scaling="yarn", factor=4, window=8_192)
    made: dict[str, Any] = {}
    at_once = patch("longalign_ray.train.engine.sharded_loading", lambda *_, **__: nullcontext())
    for way in ("whole", "divided"):
        with at_once if way == "whole" else nullcontext():
            model = load_for_training(directory / "model", dtype="bfloat16", config=config, rope=rope)
        held = sum(parameter.numel() for parameter in model.parameters())
        assert config.adapter is not None
        add_adapter(model, config.adapter, seed=0)
        made[way] = {"held": held, "digest": model_digest(model)}
        engine, losses = TrainEngine(model, config, dtype="bfloat16", micro_steps=1), []
        for verify in (verify_isolation, verify_loss):
            verify(engine.module, vocab_size=64, device="cpu")
        if way == "divided":
            engine.load(directory / "checkpoint")
            losses = made["whole"]["losses"][:1]
        for step in range(len(losses), 3):
            batch = batch_of(slots(2)[dist.get_rank()], "sequence")
            losses.append(all_reduce_sum(engine.forward_backward(batch, step_total=NUM_SEQUENCES, last=True)).item())
            engine.step(1e-2)
            if step == 0 and way == "whole":
                engine.save(directory / "checkpoint")
        made[way]["losses"] = losses
    return made


def leaks_found() -> int:
    """Ranks on which verify_isolation complains of a kernel that takes a whole pack for one sequence."""

    whole = attention.sdpa_loop

    def leaky(*tensors: torch.Tensor, boundaries: tuple[int, ...], **spec: Any) -> torch.Tensor:
        return whole(*tensors, boundaries=(0, boundaries[-1]), **spec)

    model = prepare_model(build("llama", torch.float32, packed=True), gradient_checkpointing=False, head_chunk=4)
    group = join_groups(dist.get_world_size(), num_heads=4)
    found = torch.zeros(())
    with patch.object(attention, "_select_kernel", lambda device: leaky), suppress(ModelError):
        verify_isolation(model, vocab_size=64, device="cpu", sequence_group=group)
        found -= 1
    return int(all_reduce_sum(found + 1))


def run_rank(rank: int, world_size: int, port: int, cases: list[Case], results: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    made: dict[str, Any] = {"errors": [step_error(case) for case in cases], "leaks_found": leaks_found()}
    if world_size == 1:
        made["curve"] = reference_curve()
    if world_size == 2:
        made["curve"] = loss_curve()
        made["offload"] = offload_errors() if builds_cpu_adam() else None
        made["loaded"] = load_two_ways(results.parent)
        made["bfloat16"] = [bfloat16_errors(stage) for stage in (0, 1, 2, 3)]
    if rank == 0:
        results.write_text(json.dumps(made), encoding="utf-8")
    dist.destroy_process_group()


def run_world(world_size: int, cases: list[Case], results: Path) -> None:
    """Forks the ranks, which so share this process's imports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(r, world_size, port, cases, results)) for r in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(1)


def import_all(families: Iterable[str]) -> None:
    """What the ranks would each import: DeepSpeed with its optimizers, and transformers' models.

    ZeRO-3 collects garbage for each engine: a quarter of a second over what is imported, unless that is frozen.
    """
    quiet_deepspeed()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    for family in set(families):
        build(family, torch.float32, packed=True)
    gc.freeze()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = {int(number): [Case(**case) for case in cases] for number, cases in json.loads(sys.argv[1]).items()}
    import_all(case.family for case in chain.from_iterable(asked.values()))
    for number, cases in asked.items():
        run_world(number, cases, Path(sys.argv[2]) / f"{number}.json")

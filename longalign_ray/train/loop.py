"""The training loop: fetch, forward, loss, backward, step, report, save. Knows neither Ray nor DeepSpeed's settings."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from longalign_ray.config import TrainConfig
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import PackReader
from longalign_ray.errors import LongAlignError
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.engine import TrainEngine, all_reduce_sum
from longalign_ray.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One row of metrics.jsonl. Sums and the loss are over all ranks; `rank_imbalance` is the plan's, max/mean cost."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_targets: int
    num_sequences: int
    seconds: float
    tokens_per_second: float
    rank_imbalance: float
    max_memory_gb: float


def train_loop(
    engine: TrainEngine,
    plan: StepPlan,
    assignment: np.ndarray,
    packs: PackReader,
    config: TrainConfig,
    *,
    first_step: int = 0,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    on_checkpoint: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs steps first_step .. plan.num_steps - 1 of this rank.

    assignment: int64[steps, micro_steps, ranks] of pack ids, -1 for the dummy pack. `on_step` gets the metrics row,
    `on_checkpoint` the number of finished steps; both are called on every rank.
    """
    rank = dist.get_rank()
    for step in range(first_step, plan.num_steps):
        started = time.perf_counter()
        step_total = int((plan.num_sequences if config.loss == "sequence" else plan.num_targets)[step])
        micro_steps = assignment[step, :, rank].tolist()
        loss = torch.zeros((), device=engine.device)
        for number, pack_id in enumerate(micro_steps):
            batch = to_batch(
                packs.pack(pack_id) if pack_id >= 0 else dummy_pack(), loss=config.loss, device=engine.device
            )
            loss += engine.forward_backward(batch, step_total=step_total, last=number == len(micro_steps) - 1)
        step_loss = all_reduce_sum(loss).item()
        if not math.isfinite(step_loss):
            raise LongAlignError(_describe_bad_step(step, step_loss, assignment[step], packs))
        rate = learning_rate(
            step,
            plan.num_steps,
            peak=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            minimum=config.min_learning_rate,
        )
        grad_norm = engine.step(rate)
        on_step(_metrics(plan, assignment, step, step_loss, grad_norm, rate, time.perf_counter() - started))
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == plan.num_steps:
            on_checkpoint(step + 1)


def _metrics(
    plan: StepPlan, assignment: np.ndarray, step: int, loss: float, grad_norm: float, rate: float, seconds: float
) -> dict[str, Any]:
    ids = assignment[step]
    num_tokens = int(plan.num_tokens[ids[ids >= 0]].sum())
    cost = np.where(ids >= 0, plan.pack_cost[ids], 0.0)  # [micro_steps, ranks]
    return asdict(
        StepMetrics(
            step=step,
            epoch=int(plan.epoch[step]),
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            num_tokens=num_tokens,
            num_targets=int(plan.num_targets[step]),
            num_sequences=int(plan.num_sequences[step]),
            seconds=seconds,
            tokens_per_second=num_tokens / seconds,
            rank_imbalance=float(cost.max(axis=1).sum() / cost.mean(axis=1).sum()),
            max_memory_gb=_max_memory_bytes() / 1e9,
        )
    )


def _max_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe_bad_step(step: int, loss: float, packs_of_step: np.ndarray, packs: PackReader) -> str:
    examples = [
        f"rank {rank}, micro-step {micro_step}: {', '.join(packs.pack(pack_id).example_ids)}"
        for micro_step, row in enumerate(packs_of_step.tolist())
        for rank, pack_id in enumerate(row)
        if pack_id >= 0
    ]
    return (
        f"the loss of step {step} is {loss}; its examples were {'; '.join(examples)}. Lower train.learning_rate, or "
        "look at these examples; the last checkpoint is from before this step"
    )

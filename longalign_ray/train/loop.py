"""The training loop: fetch, forward, loss, backward, step, report, save. Knows neither Ray nor DeepSpeed's settings."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from longalign_ray.config import TrainConfig
from longalign_ray.data.packed import PackReader
from longalign_ray.errors import LongAlignError
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.engine import TrainEngine, all_reduce_sum
from longalign_ray.train.loss import step_totals
from longalign_ray.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One row of metrics.jsonl. Sums and the loss are over all ranks; `rank_imbalance` is what the plan predicts."""

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
    packs: PackReader,
    config: TrainConfig,
    *,
    first_step: int = 0,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    on_checkpoint: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs steps first_step .. plan.num_steps - 1 of this rank.

    `on_step` gets the metrics, `on_checkpoint` the number of finished steps; both are called on every rank.
    Raises LongAlignError, on every rank, where the loss is no longer a number.
    """
    plan = packs.plan
    group, (num_steps, micro_steps, _) = engine.sequence_group, plan.shape
    imbalance, totals = plan.step_imbalance(), step_totals(plan, packs.store.index, config.loss)
    num_tokens = plan.slot_tokens().sum(axis=(1, 2))
    for step in range(first_step, num_steps):
        started = time.perf_counter()
        step_total = float(totals[step])
        loss = torch.zeros((), device=engine.device)
        for micro_step in range(micro_steps):
            pack = packs.pack(step, micro_step, group.number) or dummy_pack()
            batch = to_batch(pack, loss=config.loss, device=engine.device, sequence_group=group)
            loss += engine.forward_backward(batch, step_total=step_total, last=micro_step == micro_steps - 1)
        step_loss = all_reduce_sum(loss).item()
        if not math.isfinite(step_loss):
            raise LongAlignError(_describe_bad_step(step, step_loss, packs))
        rate = learning_rate(
            step,
            num_steps,
            peak=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            minimum=config.min_learning_rate,
        )
        grad_norm = engine.step(rate)
        seconds = time.perf_counter() - started
        on_step(
            StepMetrics(
                step=step,
                epoch=int(plan.epoch[step]),
                loss=step_loss,
                grad_norm=grad_norm,
                learning_rate=rate,
                num_tokens=int(num_tokens[step]),
                num_targets=int(plan.num_targets[step]),
                num_sequences=int(plan.num_sequences[step]),
                seconds=seconds,
                tokens_per_second=float(num_tokens[step]) / seconds,
                rank_imbalance=float(imbalance[step]),
                max_memory_gb=_max_memory_bytes() / 1e9,
            )
        )
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == num_steps:
            on_checkpoint(step + 1)


def _max_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe_bad_step(step: int, loss: float, packs: PackReader) -> str:
    (_, micro_steps, groups), degree = packs.plan.shape, packs.plan.sp_degree
    of_group = [f"rank {g}" if degree == 1 else f"ranks {g * degree}-{(g + 1) * degree - 1}" for g in range(groups)]
    examples = [
        f"{of_group[group]}, micro-step {micro_step}: {', '.join(pack.example_ids)}"
        for micro_step in range(micro_steps)
        for group in range(groups)
        if (pack := packs.pack(step, micro_step, group)) is not None
    ]
    return (
        f"the loss of step {step} is {loss}; its examples were {'; '.join(examples)}. Lower train.learning_rate, or "
        "look at these examples; the last checkpoint is from before this step"
    )

"""The training loop: fetch, forward, loss, backward, step, report, save. Knows neither Ray nor DeepSpeed's settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from longalign_ray.config import TrainConfig
from longalign_ray.data.packed import PackReader
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.engine import TrainEngine
from longalign_ray.train.heldout import HeldoutLoss, heldout_loss, heldout_packs, is_due
from longalign_ray.train.loss import step_totals
from longalign_ray.train.loss_watch import LossWatch
from longalign_ray.train.profiler import StepProfiler
from longalign_ray.train.schedule import learning_rate
from longalign_ray.train.throughput import StepClock, mfu, peak_flops, step_flops


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One row of metrics.jsonl. Sums and the loss are over all ranks; seconds are those of the step alone.

    `rank_imbalance` is what the plan predicts, `seen_imbalance` the same by the clock. None: `seen_imbalance`
    where it cannot be seen, `grad_norm` where DeepSpeed does not tell it, `mfu` where the device's peak is not known.
    `data_seconds`: the longest that a rank waited for its packs.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    num_tokens: int
    num_targets: int
    num_sequences: int
    seconds: float
    tokens_per_second: float
    rank_imbalance: float
    max_memory_gb: float
    seen_imbalance: float | None = None
    mfu: float | None = None
    data_seconds: float = 0.0
    heldout: HeldoutLoss | None = None
    """Measured after the step, where it is due."""

    def row(self) -> dict[str, Any]:
        """The line of metrics.jsonl; the held-out loss only where it was measured."""
        names = [field.name for field in fields(self) if field.name != "heldout"]
        return {name: getattr(self, name) for name in names} | (self.heldout.row() if self.heldout else {})


def train_loop(
    engine: TrainEngine,
    packs: PackReader,
    config: TrainConfig,
    *,
    first_step: int = 0,
    recent_losses: Iterable[float] = (),
    profile_dir: Path = Path("profile"),
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    on_checkpoint: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs steps first_step .. plan.num_steps - 1 of this rank.

    `on_step` gets the metrics, `on_checkpoint` the number of finished steps; both are called on every rank.
    `recent_losses` are those of the steps before first_step; traces of `profile_steps` go to `profile_dir`.
    Raises LongAlignError, on every rank, where loss or gradient are no longer numbers, or the loss leaps by more
    than `max_loss_ratio`.
    """
    plan = packs.plan
    group, (num_steps, micro_steps, _) = engine.sequence_group, plan.shape
    imbalance, totals = plan.step_imbalance(), step_totals(plan, packs.store.index, config.loss)
    num_tokens = plan.slot_tokens().sum(axis=(1, 2))
    clock = StepClock(engine.module, engine.device, balance=plan.balance, zero_stage=config.zero_stage)
    watch = LossWatch(packs, max_ratio=config.max_loss_ratio, recent=recent_losses)
    shape = engine.module.model.config
    frozen = config.adapter is not None
    flops = step_flops(plan, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size, frozen=frozen)
    peak = peak_flops(engine.device)
    heldout = heldout_packs(packs) if config.heldout_every != 0 else None
    profiler = StepProfiler(config.profile_steps, profile_dir)
    for step in range(first_step, num_steps):
        profiler.start(step)
        started = time.perf_counter()
        clock.start_step()
        step_total = float(totals[step])
        loss = torch.zeros((), device=engine.device)
        for micro_step in range(micro_steps):
            with clock.data():
                pack = packs.pack(step, micro_step, group.number) or dummy_pack()
                batch = to_batch(pack, loss=config.loss, device=engine.device, sequence_group=group)
            with clock.compute():
                loss += engine.forward_backward(batch, step_total=step_total, last=micro_step == micro_steps - 1)
        ranks = clock.gather(loss)
        step_loss = watch.check(step, ranks.losses)
        rate = learning_rate(
            step,
            num_steps,
            peak=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            minimum=config.min_learning_rate,
        )
        grad_norm = engine.step(rate)
        watch.check_gradient(step, grad_norm)  # before a checkpoint holds what it did
        seconds = time.perf_counter() - started
        profiler.stop(step, is_last=step + 1 == num_steps)
        measured = None
        if heldout is not None and is_due(step + 1, num_steps, config.heldout_every):
            measured = heldout_loss(engine.module, heldout, device=engine.device, sequence_group=group)
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
                max_memory_gb=ranks.max_memory_gb,
                seen_imbalance=ranks.seen_imbalance,
                mfu=mfu(float(flops[step]), seconds, world_size=plan.world_size, peak=peak),
                data_seconds=ranks.data_seconds,
                heldout=measured,
            )
        )
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == num_steps:
            on_checkpoint(step + 1)

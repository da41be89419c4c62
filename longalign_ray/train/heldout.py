"""The loss of the held-out examples in the middle of training: Eq. 2 and the token mean, exact on any number of ranks.

Suffixes: H held-out examples with a target, N target positions of a pack.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.packed import PackReader
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.sequence_parallel import ALONE, SequenceGroup

SHORTEST_BUCKET = 4_096


@dataclass(frozen=True, slots=True)
class HeldoutLoss:
    """In nats a token."""

    loss: float
    """Mean over sequences of the weighted mean over their targets (Eq. 2)."""
    token_loss: float
    """Weighted mean over all targets."""
    by_length: dict[str, float]
    """`loss` of the sequences of up to 4,096 tokens (`0-4k`), up to 8,192 (`4-8k`), and on in doublings."""
    seconds: float

    def row(self) -> dict[str, object]:
        """What metrics.jsonl holds of it."""
        return {
            "heldout_loss": self.loss,
            "heldout_token_loss": self.token_loss,
            "heldout_by_length": self.by_length,
            "heldout_seconds": self.seconds,
        }


def is_due(num_done: int, num_steps: int, every: int | None) -> bool:
    """Whether the loss is measured after `num_done` steps: every `every` and at the end; None: at the end; 0: never."""
    return every != 0 and (num_done == num_steps or (every is not None and num_done % every == 0))


def length_bucket(length: int) -> str:
    """`0-4k` for up to 4,096 tokens, then `4-8k`, `8-16k`, ...: an upper end belongs to its bucket."""
    upper = SHORTEST_BUCKET
    while length > upper:
        upper *= 2
    lower = 0 if upper == SHORTEST_BUCKET else upper // 2
    return f"{lower // 1_024}-{upper // 1_024}k"


def heldout_packs(training: PackReader) -> PackReader | None:
    """The held-out examples of the store, dealt to the ranks of the training plan; None where none has a target.

    They are dealt by cost as for training, one pack a group at a time, so all ranks take equally many forward passes.
    """
    plan, index = training.plan, training.store.index
    rows = np.flatnonzero(index.heldout & (index.num_targets > 0))
    if len(rows) == 0:
        return None
    settings = PlanSettings(
        capacity=plan.capacity,
        packs_per_step=plan.world_size,
        world_size=plan.world_size,
        sp_degree=plan.sp_degree,
        seed=plan.seed,
    )
    dealt = make_plan(index, settings, cost=plan.cost, rows=rows)
    return PackReader(dealt, store_dir=training.store.directory, packed_dir=training.packed_dir)


@torch.no_grad()
def heldout_loss(
    module: nn.Module, packs: PackReader, *, device: torch.device | str = "cpu", sequence_group: SequenceGroup = ALONE
) -> HeldoutLoss:
    """The losses under the weights as they are, alike on every rank (collective).

    `module` is a PackedLM. Each rank adds what it computed of each example to float64[H], whose sum over the ranks is
    every example's weighted sum of token losses: so it does not matter which rank had it, or how many shared it.
    """
    started = time.perf_counter()
    plan, index = packs.plan, packs.store.index
    group = dist.get_rank() // plan.sp_degree
    sums_H = torch.zeros(len(plan.example_rows), dtype=torch.float64, device=device)
    was_training = module.training
    module.eval()
    for step in range(plan.num_steps):
        for micro_step in range(plan.shape[1]):
            pack = packs.pack(step, micro_step, group)
            batch = to_batch(pack or dummy_pack(), loss="token", device=device, sequence_group=sequence_group)
            losses_N = module(batch, reduce=False).double() * batch.weights_N
            if pack is not None:
                sequence_N = torch.bucketize(batch.pack_positions_N, batch.cu_seqlens[1:], right=True)
                sequence_N.clamp_(max=len(pack.example_ids) - 1)  # padding, whose weight is 0, is no example
                first = int(plan.offsets[(step * plan.shape[1] + micro_step) * plan.shape[2] + group])
                sums_H.index_add_(0, first + sequence_N, losses_N)
    module.train(was_training)
    dist.all_reduce(sums_H)
    sums, weights = sums_H.cpu().numpy(), index.sum_weights[plan.example_rows]
    means, buckets = sums / weights, np.array([length_bucket(length) for length in plan.lengths.tolist()])
    shortest_first = dict.fromkeys(buckets[np.argsort(plan.lengths, kind="stable")].tolist())
    return HeldoutLoss(
        loss=float(means.mean()),
        token_loss=float(sums.sum() / weights.sum()),
        by_length={bucket: float(means[buckets == bucket].mean()) for bucket in shortest_first},
        seconds=time.perf_counter() - started,
    )

"""The score of a plan: how full, how even, how long, and the CPU seconds of making it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from longalign_ray.data.best_fit import lower_bound_of_counts
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import CANDIDATES, PlanSettings, plan_lengths
from longalign_ray.data.plan_file import PlanWriter
from longalign_ray.data.plan_groups import GroupPlan, seeded_rows
from longalign_ray.errors import PlanMismatchError


@dataclass(frozen=True, slots=True)
class PlanScore:
    """How good a plan is; times count the cost model's FLOPs and nothing else."""

    strategy: str
    balance: str
    num_sequences: int
    """All that were given, those dropped too."""
    num_packs: int
    """Slots that hold sequences, of sp_degree * capacity tokens."""
    lower_bound_packs: int
    """Fewest packs of that size that can hold the sequences: bound L2 of Martello and Toth."""
    utilisation: float
    """Tokens over the token room of the packs."""
    cpu_seconds: float
    """Of planning, compiled before."""
    imbalance_mean: float
    """Cost of the slowest group over the mean group's, averaged over the steps."""
    imbalance_worst: float
    """The same of the worst step."""
    time_over_ideal: float
    """Time of all steps over their time if all ranks shared the work of each evenly: heavy steps count for more."""
    num_steps: int
    steps_per_epoch: int
    dropped: int
    """Sequences that no pack can hold: empty or longer than sp_degree * capacity; of a recipe, all that `prepare` left
    out, for whatever reason."""
    carried: int
    """Times that `deal` moved an example to the next step."""
    hours: float
    """Of forward and backward at the assumed rate of a rank."""


def warm_up(lengths: np.ndarray, settings: PlanSettings, cost: SequenceCost) -> None:
    """Compiles what planning calls, so that the CPU seconds are those of planning."""
    few = np.clip(np.asarray(lengths[:64]), 1, settings.capacity)
    for strategy in CANDIDATES if settings.strategy == "auto" else (settings.strategy,):
        plan_lengths(few, replace(settings, strategy=strategy), cost=cost)
    seeded_rows(0, 1, 2, 0)


def score(
    groups: Iterable[GroupPlan], settings: PlanSettings, tflops: float, writer: PlanWriter | None = None
) -> PlanScore:
    """The score of all groups together, of one epoch. Their plans are written as they come, then forgotten."""
    room = settings.capacity * settings.sp_degree
    counts = np.zeros(room + 1, np.int64)  # of the lengths
    num_packs = num_steps = dropped = carried = 0
    took = ideal = sum_imbalance = worst = cpu_seconds = 0.0
    strategy = settings.strategy
    started = time.process_time()
    for group in groups:
        cpu_seconds += time.process_time() - started
        plan, costs = group.plan, group.plan.slot_costs()
        imbalance = plan.step_imbalance()
        ideal_times = costs.sum(axis=(1, 2)) / plan.shape[2]
        counts += np.bincount(plan.lengths, minlength=room + 1)
        num_packs, num_steps = num_packs + plan.num_packs, num_steps + plan.num_steps
        dropped, carried = dropped + group.num_dropped, carried + plan.num_carried
        took, ideal = took + float((imbalance * ideal_times).sum()), ideal + float(ideal_times.sum())
        sum_imbalance += float(imbalance.sum())
        worst, strategy = max(worst, float(imbalance.max())), plan.strategy
        if writer is not None:
            writer.add(plan)
        del plan, costs, group
        started = time.process_time()
    if num_packs == 0:
        raise PlanMismatchError(f"no sequence can be planned: none has 1 to {room} tokens")
    if writer is not None:
        writer.close()
    return PlanScore(
        strategy=strategy,
        balance=settings.balance,
        num_sequences=int(counts.sum()) + dropped,
        num_packs=num_packs,
        lower_bound_packs=lower_bound_of_counts(counts),
        utilisation=float(counts @ np.arange(room + 1)) / (num_packs * room),
        cpu_seconds=cpu_seconds,
        imbalance_mean=sum_imbalance / num_steps,
        imbalance_worst=worst,
        time_over_ideal=took / ideal,
        num_steps=num_steps,
        steps_per_epoch=num_steps,
        dropped=dropped,
        carried=carried,
        hours=took / settings.sp_degree / (tflops * 1e12) / 3_600,
    )

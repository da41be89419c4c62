"""From lengths to a StepPlan, in seconds: order of the epoch -> packs or step sets -> slots of micro-steps and groups.

The examples of a step depend on the lengths, the seed and the packing settings alone. Where they run depends on the
number of ranks and on the sequence-parallel degree, so a plan can be cut at any step and continued on another world;
only where examples are longer than a rank's room must the degree suit the steps (`_degree_of_a_pack`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from longalign_ray.data.balance import place
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.deal import deal, step_sets
from longalign_ray.data.plan import StepPlan, weights_of_steps
from longalign_ray.data.planners import PLANNERS
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import PlanMismatchError

logger = logging.getLogger(__name__)

GROUP = 2**22
"""Examples that are planned at a time; planning takes some 120 bytes for each, the plan 12 and 8 a slot."""
CANDIDATES = ("deal", "best_fit")
"""What `auto` chooses from; the first wins a tie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """Everything that a plan depends on beside the lengths and the cost."""

    capacity: int
    """Tokens that a rank holds in one micro-step."""
    packs_per_step: int
    """Packs of `capacity` tokens in a step, over all ranks and micro-steps."""
    world_size: int = 1
    sp_degree: int = 1
    """Ranks that share a pack, which then has sp_degree * capacity tokens; divides world_size."""
    strategy: str = "deal"
    """`deal`, a name of PLANNERS, or `auto`."""
    balance: str = "lock_step"
    """`lock_step`, `sums` or `none`."""
    fill: float = 0.9
    """Share of the token room of a step that `deal` aims at."""
    group_size: int = 8
    """Sequences of like length that `sorted` keeps together; the paper's are one a GPU."""
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None

    @property
    def groups(self) -> int:
        return self.world_size // self.sp_degree

    @property
    def micro_steps(self) -> int:
        return -(-self.packs_per_step // self.world_size)


def make_plan(
    index: ExampleIndex,
    settings: PlanSettings,
    *,
    cost: SequenceCost,
    rows: np.ndarray | Callable[[int], np.ndarray] | None = None,
) -> StepPlan:
    """The plan of `settings.epochs` passes over `rows` of the index, which may depend on the epoch and repeat.

    Without `rows`: all examples that are not held out. Raises PlanMismatchError where an example is too long for a pack
    or none is left to train on.
    """
    return plan_lengths(
        index.length,
        settings,
        cost=cost,
        num_targets=index.num_targets,
        sum_weights=index.sum_weights,
        rows=np.flatnonzero(~index.heldout) if rows is None else rows,
    )


def plan_lengths(
    lengths: np.ndarray,
    settings: PlanSettings,
    *,
    cost: SequenceCost,
    num_targets: np.ndarray | None = None,
    sum_weights: np.ndarray | None = None,
    rows: np.ndarray | Callable[[int], np.ndarray] | None = None,
    group: int = GROUP,
) -> StepPlan:
    """`make_plan` from bare arrays, all int[n]. Without `num_targets` every token but the first is a target.

    Every epoch is shuffled and planned by (seed, epoch); steps run on across the border of epochs, and the last two
    share evenly what is left. Where an epoch has more than `group` examples, groups of them are planned alone instead.
    """

    def planned(settings: PlanSettings, rows: np.ndarray | Callable[[int], np.ndarray] | None) -> StepPlan:
        return plan_lengths(
            lengths, settings, cost=cost, num_targets=num_targets, sum_weights=sum_weights, rows=rows, group=group
        )

    if settings.strategy == "auto":
        return _best_of({name: planned(replace(settings, strategy=name), rows) for name in CANDIDATES})
    orders = [_shuffled(rows, len(lengths), settings.seed, epoch) for epoch in range(settings.epochs)]
    if max(map(len, orders)) > group:
        return StepPlan.joined(list(_in_groups(orders, group, settings, planned)))
    order = np.concatenate(orders)
    own = np.asarray(lengths)[order].astype(np.int64)
    unit = settings.capacity * _degree_of_a_pack(own, settings)
    if settings.strategy == "deal":
        members, slot, num_carried = _deal_all(own, settings, cost, unit)
    else:
        members, slot = _pack_all(own, np.cumsum([0, *map(len, orders)]), settings, cost, unit)
        num_carried = 0
    slots_a_step = settings.micro_steps * settings.groups
    num_steps = int(slot.max()) // slots_a_step + 1
    if settings.max_steps is not None and settings.max_steps < num_steps:
        num_steps = settings.max_steps
        members, slot = members[slot < num_steps * slots_a_step], slot[slot < num_steps * slots_a_step]
    members = members[np.argsort(slot, kind="stable")]
    sizes = np.bincount(slot, minlength=num_steps * slots_a_step)
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    starts = offsets[:-1:slots_a_step]
    example_rows = order[members]
    targets = own[members] - 1 if num_targets is None else num_targets[example_rows].astype(np.int64)
    weights = targets if sum_weights is None else sum_weights[example_rows]
    epoch = np.repeat(np.arange(settings.epochs), [len(rows) for rows in orders])
    return StepPlan(
        example_rows=example_rows,
        lengths=own[members].astype(np.int32),
        offsets=offsets,
        shape=(num_steps, settings.micro_steps, settings.groups),
        num_sequences=np.add.reduceat(targets > 0, starts, dtype=np.int64),
        num_targets=np.add.reduceat(targets, starts),
        sum_weights=weights_of_steps(weights, starts),
        epoch=np.minimum.reduceat(epoch[members], starts),
        capacity=settings.capacity,
        seed=settings.seed,
        cost=cost,
        sp_degree=settings.sp_degree,
        strategy=settings.strategy,
        balance=settings.balance,
        num_carried=num_carried,
    )


def _in_groups(
    orders: list[np.ndarray], group: int, settings: PlanSettings, plan: Callable[[PlanSettings, np.ndarray], StepPlan]
) -> Iterator[StepPlan]:
    """The plans of equal parts of every epoch's order, each at most `group` rows, so random sets as the whole is."""
    steps_left = settings.max_steps
    for epoch, order in enumerate(orders):
        for rows in np.array_split(order, -(-len(order) // group)):
            if steps_left == 0:
                return
            made = plan(replace(settings, epochs=1, max_steps=steps_left), rows)
            steps_left = None if steps_left is None else steps_left - made.num_steps
            yield replace(made, epoch=made.epoch + epoch)


def _shuffled(rows: np.ndarray | Callable[[int], np.ndarray] | None, n: int, seed: int, epoch: int) -> np.ndarray:
    chosen = rows(epoch) if callable(rows) else np.arange(n) if rows is None else rows
    if len(chosen) == 0:
        raise PlanMismatchError(
            "no example is left to train on: give a larger corpus or lower data.heldout_fraction or data.max_heldout"
        )
    return np.random.default_rng([seed, epoch]).permutation(chosen)


def _degree_of_a_pack(lengths: np.ndarray, settings: PlanSettings) -> int:
    """Ranks that the longest example needs: packs are planned for these, and a slot holds several of them.

    It is the least divisor of sp_degree that gives room enough. Degrees for which it is the same have the same steps:
    all of them where each example fits one rank; 2, 4 and 6 for one of twice the capacity, while 3 takes other steps.
    """
    capacity, degree, longest = settings.capacity, settings.sp_degree, int(lengths.max())
    if settings.world_size % degree:
        raise PlanMismatchError(
            f"{settings.world_size} ranks cannot form groups of sp_degree = {degree}: give a multiple of {degree} ranks"
        )
    if int(lengths.min()) < 1:
        raise PlanMismatchError("an example has no tokens: leave it out")
    if longest > capacity * degree:
        raise PlanMismatchError(
            f"the longest example has {longest} tokens and packing.capacity = {capacity}"
            f"{f' on {degree} ranks' if degree > 1 else ''}: raise packing.capacity or set data.max_length <= "
            f"{capacity * degree}"
        )
    needed = next(d for d in range(1, degree + 1) if degree % d == 0 and longest <= capacity * d)
    if rest := settings.packs_per_step % needed:
        fewer = settings.packs_per_step - rest
        raise PlanMismatchError(
            f"packing.packs_per_step = {settings.packs_per_step} is no multiple of {needed}, the ranks of "
            f"train.sp_degree = {degree} that the longest example of {longest} tokens needs: set it to "
            f"{f'{fewer} or ' if fewer else ''}{fewer + needed}, or to a multiple of {degree}"
        )
    return needed


def _deal_all(
    lengths: np.ndarray, settings: PlanSettings, cost: SequenceCost, unit: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(members, slot of each over all steps, number carried)."""
    ranks = unit // settings.capacity
    sets = step_sets(lengths, capacity=unit, packs=settings.packs_per_step // ranks, fill=settings.fill)
    own = lengths[sets.members]
    slot = deal(
        own,
        cost(own),
        sets,
        capacity=unit,
        micro_steps=settings.micro_steps,
        groups=settings.groups,
        packs_a_slot=settings.sp_degree // ranks,
        balance=settings.balance,
    )
    return sets.members, sets.step_of_member * (settings.micro_steps * settings.groups) + slot, sets.num_carried


def _pack_all(
    lengths: np.ndarray, epoch_starts: np.ndarray, settings: PlanSettings, cost: SequenceCost, unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """(members, slot of each over all steps): packs of every epoch, shuffled, the next packs_per_step a step."""
    group_size = settings.group_size if settings.strategy == "sorted" else 1
    members: list[np.ndarray] = []
    numbers: list[np.ndarray] = []  # of the packs, in the order of training
    num_packs = 0
    for epoch, (first, last) in enumerate(pairwise(epoch_starts)):
        packs = PLANNERS[settings.strategy](lengths[first:last], unit)
        places = _shuffled_places(len(packs), group_size, settings.seed, epoch)
        members.append(packs.members + first)
        numbers.append(num_packs + places[packs.pack_of_member])
        num_packs += len(packs)
    member, number = np.concatenate(members), np.concatenate(numbers)
    ranks = unit // settings.capacity
    packs_a_step = settings.packs_per_step // ranks
    num_steps = -(-num_packs // packs_a_step)
    step, turn = np.divmod(number, packs_a_step)
    if num_steps > 1:  # the last two share evenly what is left, so that none is a fraction of a step
        first = (num_steps - 2) * packs_a_step
        half = -(-(num_packs - first) // (2 * group_size)) * group_size
        middle = first + min(half, packs_a_step)
        in_last = number >= middle
        step, turn = np.where(in_last, num_steps - 1, step), np.where(in_last, number - middle, turn)
    keys = step * packs_a_step + turn
    costs = np.bincount(keys, weights=cost(lengths[member]), minlength=num_steps * packs_a_step)
    slot = place(
        costs.reshape(num_steps, packs_a_step),
        micro_steps=settings.micro_steps,
        groups=settings.groups,
        balance=settings.balance,
        packs_a_slot=settings.sp_degree // ranks,
    )
    slots_a_step = settings.micro_steps * settings.groups
    return member, (slot + np.arange(num_steps)[:, None] * slots_a_step).ravel()[keys]


def _shuffled_places(num_packs: int, group_size: int, seed: int, epoch: int) -> np.ndarray:
    """int64[packs]: place of every pack in the epoch. Groups of neighbours stay together, an incomplete one is last."""
    whole = num_packs // group_size
    place_of_group = np.random.default_rng([seed, epoch, 1]).permutation(whole)
    places = np.arange(num_packs)
    group, member = np.divmod(places[: whole * group_size], group_size)
    places[: whole * group_size] = place_of_group[group] * group_size + member
    return places


def _best_of(plans: dict[str, StepPlan]) -> StepPlan:
    """The plan that comes nearest to ideal time."""
    shares = {name: 1 / plan.time_over_ideal() for name, plan in plans.items()}
    best = max(shares, key=lambda name: shares[name])
    told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    logger.info("strategy auto: share of ideal time %s; %s it is", told, best)
    return plans[best]

"""StepPlan: which examples run where and when, for the whole of training. Made from lengths alone, in seconds.

The examples of a step depend on the lengths, the packing settings and the seed, never on the number of ranks; only how
a step is spread over micro-steps and groups does. So one store trains on any number of ranks with the same steps.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from longalign_ray.data.balance import bands, imbalance
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.planners import PLANNERS
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import PlanMismatchError


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """A slot is what one group computes in one micro-step: a pack, or nothing.

    Slot s = (step * micro_steps + micro_step) * groups + group holds the store rows
    example_rows[offsets[s]:offsets[s+1]].
    """

    example_rows: np.ndarray
    """int64[n]: rows of the store's index."""
    lengths: np.ndarray
    """int32[n]: tokens of each."""
    offsets: np.ndarray
    """int64[steps * micro_steps * groups + 1]."""
    shape: tuple[int, int, int]
    """(steps, micro_steps, groups)."""
    num_sequences: np.ndarray
    """int64[steps]: M of Eq. 4, the sequences with a target in the whole step."""
    num_targets: np.ndarray
    """int64[steps]: target tokens of the whole step."""
    sum_weights: np.ndarray
    """float64[steps]: sum of their weights, by which the `token` loss is divided."""
    epoch: np.ndarray
    """int64[steps]: epoch of the step's first pack."""
    capacity: int
    seed: int
    cost: SequenceCost
    sp_degree: int = 1
    """Ranks that share a pack; groups * sp_degree = ranks."""

    @property
    def num_steps(self) -> int:
        return self.shape[0]

    @property
    def world_size(self) -> int:
        return self.shape[2] * self.sp_degree

    def slot(self, step: int, micro_step: int, group: int) -> np.ndarray:
        """int64[S]: store rows of the slot, empty where the group idles."""
        number = (step * self.shape[1] + micro_step) * self.shape[2] + group
        return self.example_rows[self.offsets[number] : self.offsets[number + 1]]

    def slot_tokens(self) -> np.ndarray:
        """int64[steps, micro_steps, groups]."""
        return self._per_slot(self.lengths).astype(np.int64)

    def slot_costs(self) -> np.ndarray:
        """float64[steps, micro_steps, groups], in FLOPs."""
        return self._per_slot(self.cost(self.lengths))

    def _per_slot(self, values: np.ndarray) -> np.ndarray:
        totals = np.concatenate([[0], np.cumsum(values)])
        return (totals[self.offsets[1:]] - totals[self.offsets[:-1]]).reshape(self.shape)

    def fill(self) -> float:
        """Share of the capacity of all packs that holds tokens."""
        used = self.slot_tokens()
        return float(used.sum() / (np.count_nonzero(used) * self.capacity))

    def imbalance(self) -> float:
        """Time of all steps over the time with perfectly shared work, under lock-step micro-steps; at least 1."""
        costs = self.slot_costs()
        work = costs.sum(axis=(1, 2))
        return float(np.average(imbalance(costs), weights=work))

    @property
    def digest(self) -> str:
        """16 hex digits over the set of examples of each step: equal for any number of ranks."""
        step_starts = self.offsets[:: self.shape[1] * self.shape[2]]
        sets = [np.sort(self.example_rows[a:b]) for a, b in pairwise(step_starts)]
        return _hash(step_starts, *sets, self.num_sequences, self.num_targets)

    @property
    def layout_digest(self) -> str:
        """16 hex digits over the place of every example: what the packed blocks were sorted for."""
        return _hash(self.example_rows, self.offsets, np.asarray(self.shape))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                example_rows=self.example_rows,
                lengths=self.lengths,
                offsets=self.offsets,
                shape=self.shape,
                num_sequences=self.num_sequences,
                num_targets=self.num_targets,
                sum_weights=self.sum_weights,
                epoch=self.epoch,
                scalars=np.array([self.capacity, self.seed, self.sp_degree]),
                cost=np.array([self.cost.linear, self.cost.quadratic]),
                digest=np.array(self.digest),
            )
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> StepPlan:
        """Raises PlanMismatchError where the file is missing, no plan, or altered."""
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            capacity, seed, sp_degree = arrays.pop("scalars").tolist()
            cost, digest = SequenceCost(*arrays.pop("cost").tolist()), str(arrays.pop("digest"))
            steps, micro_steps, groups = arrays.pop("shape").tolist()
            plan = StepPlan(
                **arrays,
                shape=(steps, micro_steps, groups),
                capacity=capacity,
                seed=seed,
                cost=cost,
                sp_degree=sp_degree,
            )
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise PlanMismatchError(f"{path} is no step plan ({error}); run `longalign prepare`") from error
        if plan.digest != digest:
            raise PlanMismatchError(f"{path} was altered after it was written; run `longalign prepare` again")
        return plan


def make_plan(
    index: ExampleIndex,
    *,
    planner: str,
    capacity: int,
    packs_per_step: int,
    world_size: int,
    cost: SequenceCost,
    seed: int,
    epochs: int = 1,
    max_steps: int | None = None,
) -> StepPlan:
    """The plan of `epochs` passes over the examples that are not held out.

    Every epoch shuffles, packs, and shuffles the packs by (seed, epoch); a step takes the next packs_per_step packs,
    across the border of epochs too, and the last step takes what is left. Slots without a pack stay empty.
    Raises PlanMismatchError where an example is longer than `capacity` or none is left to train on.
    """
    training = np.flatnonzero(~index.heldout)
    if len(training) == 0:
        raise PlanMismatchError(
            "no example is left to train on: give a larger corpus or lower data.heldout_fraction or data.max_heldout"
        )
    longest = int(index.length[training].max())
    if longest > capacity:
        raise PlanMismatchError(
            f"the longest example has {longest} tokens and packing.capacity = {capacity}: raise packing.capacity or "
            f"set data.max_length <= {capacity}"
        )
    packs, epoch_of_pack = _packs_of_all_epochs(index, training, planner, capacity, seed, epochs)
    num_steps = -(-len(packs) // packs_per_step)
    num_steps = min(num_steps, max_steps) if max_steps is not None else num_steps
    micro_steps = -(-packs_per_step // world_size)
    slots: list[np.ndarray] = []
    for step in range(num_steps):
        chosen = packs[step * packs_per_step : (step + 1) * packs_per_step]
        costs = np.array([cost(index.length[rows]).sum() for rows in chosen])
        places = bands(costs, micro_steps=micro_steps, groups=world_size).ravel()
        slots += [chosen[number] if number >= 0 else np.empty(0, np.int64) for number in places.tolist()]
    rows = np.concatenate(slots)
    offsets = np.concatenate([[0], np.cumsum([len(slot) for slot in slots], dtype=np.int64)])
    step_starts = offsets[:: micro_steps * world_size][:-1]
    targets = index.num_targets[rows].astype(np.int64)
    return StepPlan(
        example_rows=rows,
        lengths=index.length[rows].astype(np.int32),
        offsets=offsets,
        shape=(num_steps, micro_steps, world_size),
        num_sequences=np.add.reduceat(targets > 0, step_starts, dtype=np.int64),
        num_targets=np.add.reduceat(targets, step_starts),
        sum_weights=np.add.reduceat(index.sum_weights[rows], step_starts),
        epoch=epoch_of_pack[: num_steps * packs_per_step : packs_per_step],
        capacity=capacity,
        seed=seed,
        cost=cost,
    )


def _packs_of_all_epochs(
    index: ExampleIndex, training: np.ndarray, planner: str, capacity: int, seed: int, epochs: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Store rows of every pack in training order, and the epoch of each."""
    packs: list[np.ndarray] = []
    epoch_of_pack: list[int] = []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        rows = random.permutation(training)
        made = PLANNERS[planner](index.length[rows], capacity)
        for number in random.permutation(len(made)).tolist():
            packs.append(rows[made.members[made.offsets[number] : made.offsets[number + 1]]])
            epoch_of_pack.append(epoch)
    return packs, np.array(epoch_of_pack, dtype=np.int64)


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]

"""StepPlan: which examples run where and when, for the whole of training; its file and its score.

The examples of a step never depend on the number of ranks; only how a step is spread over micro-steps and groups does.
So one store trains on any number of ranks with the same steps.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longalign_ray.data.balance import imbalance, step_times
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.store import FULL_WEIGHT
from longalign_ray.errors import PlanMismatchError
from longalign_ray.run_dir import whole_file

ARRAYS = ("example_rows", "lengths", "offsets", "shape", "num_sequences", "num_targets", "sum_weights", "epoch")
SCALARS = ("capacity", "seed", "sp_degree", "strategy", "balance", "num_carried")


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
    """int64[steps]: the earliest epoch of the examples of the step."""
    capacity: int
    """Tokens of a slot at most, for each rank that shares it."""
    seed: int
    cost: SequenceCost
    sp_degree: int = 1
    """Ranks that share a pack; groups * sp_degree = ranks."""
    strategy: str = "best_fit"
    balance: str = "lock_step"
    num_carried: int = 0
    """Times that `deal` moved an example to the next step for want of room."""

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

    @property
    def step_starts(self) -> np.ndarray:
        """int64[steps+1]: place in example_rows at which each step begins, and their number last."""
        return self.offsets[:: self.shape[1] * self.shape[2]]

    def slot_tokens(self) -> np.ndarray:
        """int64[steps, micro_steps, groups]."""
        return self._per_slot(self.lengths).astype(np.int64)

    def slot_costs(self) -> np.ndarray:
        """float64[steps, micro_steps, groups], in FLOPs."""
        return self._per_slot(self.cost(self.lengths))

    def _per_slot(self, values: np.ndarray) -> np.ndarray:
        totals = np.concatenate([[0], np.cumsum(values)])
        return (totals[self.offsets[1:]] - totals[self.offsets[:-1]]).reshape(self.shape)

    @property
    def num_packs(self) -> int:
        """Slots that are not empty."""
        return int(np.count_nonzero(np.diff(self.offsets)))

    def fill(self) -> float:
        """Share of the token room of all packs that holds tokens."""
        return float(self.lengths.sum(dtype=np.int64) / (self.num_packs * self.capacity * self.sp_degree))

    def step_imbalance(self) -> np.ndarray:
        """float64[steps]: time of a step over its time if all groups shared its work evenly, at least 1."""
        return imbalance(self.slot_costs(), self.balance)

    def time_over_ideal(self) -> float:
        """Time of all steps over their time if all groups shared the work of each evenly: heavy steps count more."""
        costs = self.slot_costs()
        return float(step_times(costs, self.balance).sum() / (costs.sum() / self.shape[2]))

    @property
    def digest(self) -> str:
        """16 hex digits over the set of examples of each step: equal for any number of ranks."""
        step_starts = self.step_starts
        step = np.repeat(np.arange(self.num_steps), np.diff(step_starts))
        rows = self.example_rows[np.lexsort((self.example_rows, step))]
        return _hash(step_starts, rows, self.num_sequences, self.num_targets)

    @property
    def layout_digest(self) -> str:
        """16 hex digits over the place of every example: what the packed blocks were sorted for."""
        return _hash(self.example_rows, self.offsets, np.asarray(self.shape))

    @staticmethod
    def joined(plans: Sequence[StepPlan]) -> StepPlan:
        """The steps of all plans, one after the other; they share everything but their examples."""

        def all_of(name: str) -> np.ndarray:
            return np.concatenate([getattr(plan, name) for plan in plans])

        starts = np.cumsum([0, *(len(plan.example_rows) for plan in plans)])
        ends = [plan.offsets[1:] + start for plan, start in zip(plans, starts[:-1], strict=True)]
        return replace(
            plans[0],
            **{name: all_of(name) for name in ARRAYS if name not in ("offsets", "shape")},
            offsets=np.concatenate([[0], *ends]),
            shape=(sum(plan.num_steps for plan in plans), *plans[0].shape[1:]),
            num_carried=sum(plan.num_carried for plan in plans),
        )

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in (*ARRAYS, *SCALARS)}
        arrays["cost"] = np.array([self.cost.linear, self.cost.quadratic])
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, checksum=np.array(_checksum(arrays)), **arrays)

    @staticmethod
    def load(path: Path) -> StepPlan:
        """Raises PlanMismatchError where the file is missing, no plan, or altered in any of its arrays."""
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            if str(arrays.pop("checksum")) != _checksum(arrays):
                raise PlanMismatchError(
                    f"{path} was altered after it was written: delete it and run `longalign prepare` again"
                )
            cost = SequenceCost(*arrays.pop("cost").tolist())
            scalars = {name: arrays.pop(name).item() for name in SCALARS}
            steps, micro_steps, groups = arrays.pop("shape").tolist()
            return StepPlan(**arrays, **scalars, shape=(steps, micro_steps, groups), cost=cost)
        except FileNotFoundError as error:
            raise PlanMismatchError(f"{path} does not exist: run `longalign prepare`") from error
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise PlanMismatchError(
                f"{path} is no step plan ({error}): delete it and run `longalign prepare` again"
            ) from error


def weights_of_steps(sum_weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """float64[steps]: sums of the examples' weights, float64[n] in the order of the plan, from each start to the next.

    They are summed in whole per cent, so that the order within a step does not matter.
    """
    per_cent = np.rint(sum_weights * FULL_WEIGHT).astype(np.int64)
    return np.add.reduceat(per_cent, starts) / FULL_WEIGHT


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """16 hex digits over names, types, shapes and every byte."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]

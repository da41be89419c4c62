"""A plan file written group by group, so that a plan of any size needs the memory of one group."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from longalign_ray.data.plan import StepPlan


class PlanWriter:
    """Writes the arrays by which anyone can score a plan: example_rows, offsets, shape, sp_degree, capacity, cost.

    A plan of one group is written as `StepPlan.save` does, with all that training needs.
    """

    def __init__(self, path: Path):
        self._path = path
        self._rows = path.with_suffix(f".{os.getpid()}.rows")
        self._first: StepPlan | None = None
        self._groups = 0
        self._num_rows = 0
        self._num_steps = 0
        self._shared: dict[str, np.ndarray] = {}
        self._offsets = [np.zeros(1, np.int64)]

    def add(self, plan: StepPlan) -> None:
        self._groups += 1
        self._shared = {
            "sp_degree": np.array(plan.sp_degree),
            "capacity": np.array(plan.capacity),
            "cost": np.array([plan.cost.linear, plan.cost.quadratic]),
        }
        micro_steps, groups = plan.shape[1:]
        if self._groups == 1:
            self._first = plan
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._rows.open("ab") as file:
            for part in (self._first, plan):
                if part is not None:
                    part.example_rows.astype("<i8").tofile(file)
                    self._offsets.append(part.offsets[1:] + self._num_rows)
                    self._num_rows += len(part.example_rows)
                    self._num_steps += part.num_steps
        self._first = None
        self._shared["shape"] = np.array([self._num_steps, micro_steps, groups])

    def close(self) -> None:
        """Puts the file together."""
        if self._first is not None:
            self._first.save(self._path)
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("example_rows.npy", "w", force_zip64=True) as target, self._rows.open("rb") as source:
                header = {"descr": "<i8", "fortran_order": False, "shape": (self._num_rows,)}
                np.lib.format.write_array_header_1_0(target, header)
                shutil.copyfileobj(source, target, 2**24)
            for name, array in {"offsets": np.concatenate(self._offsets), **self._shared}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as target:
                    np.lib.format.write_array(target, array)
        temporary.replace(self._path)
        self._rows.unlink()

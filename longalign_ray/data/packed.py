"""Packed blocks: the store sorted into the order of a plan, a record batch a slot; and the reader of a plan's packs."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import BYTES_PER_TOKEN, BatchFile, Pack, TokenStore, part_name, write_batches
from longalign_ray.errors import PlanMismatchError
from longalign_ray.run_dir import write_json

LAYOUT_FILE = "layout.json"
BLOCK_BYTES = 16 << 20


def steps_for_block(plan: StepPlan) -> int:
    """Steps whose packs fill a file of BLOCK_BYTES: fewer make many small files, more make long tasks."""
    bytes_per_step = BYTES_PER_TOKEN * int(plan.lengths.sum()) / plan.num_steps
    return math.ceil(BLOCK_BYTES / bytes_per_step)


def num_packed_files(plan: StepPlan, steps_per_file: int) -> int:
    return -(-plan.num_steps // steps_per_file)


def write_packed_file(store: TokenStore, plan: StepPlan, number: int, *, steps_per_file: int, directory: Path) -> None:
    """Writes the slots of steps number * steps_per_file and on, an empty slot as an empty batch."""
    steps, micro_steps, groups = plan.shape
    first = number * steps_per_file
    slots = [
        plan.slot(step, micro_step, group)
        for step in range(first, min(first + steps_per_file, steps))
        for micro_step in range(micro_steps)
        for group in range(groups)
    ]
    batches = ([store.example(row) for row in rows.tolist()] for rows in slots)
    write_batches(directory / part_name(number), batches)


def write_layout(directory: Path, plan: StepPlan, *, steps_per_file: int) -> None:
    """Written last: says that the blocks are whole and for which plan."""
    write_json(directory / LAYOUT_FILE, {"layout_digest": plan.layout_digest, "steps_per_file": steps_per_file})


class PackReader:
    """The packs of a plan: out of packed blocks that were sorted for it, else gathered from the store row by row."""

    def __init__(self, plan: StepPlan, *, store_dir: Path, packed_dir: Path):
        """Raises PlanMismatchError where the plan names rows that the store does not have."""
        self.plan = plan
        self.packed_dir = packed_dir
        self.steps_per_file = _steps_per_file(packed_dir, plan)
        self.store = TokenStore(store_dir)
        if int(plan.example_rows.max()) >= len(self.store):
            raise PlanMismatchError(f"the plan does not belong to the store {store_dir}; run `longalign prepare` again")
        self._file = lru_cache(maxsize=4)(lambda number: BatchFile(packed_dir / part_name(number)))

    @property
    def is_sequential(self) -> bool:
        return self.steps_per_file is not None

    def pack(self, step: int, micro_step: int, group: int) -> Pack | None:
        """What the group computes, or None where it idles."""
        rows = self.plan.slot(step, micro_step, group)
        if len(rows) == 0:
            return None
        if self.steps_per_file is None:
            return Pack.of([self.store.example(row) for row in rows.tolist()])
        _, micro_steps, groups = self.plan.shape
        batch = ((step % self.steps_per_file) * micro_steps + micro_step) * groups + group
        return Pack.of(self._file(step // self.steps_per_file).examples(batch))


def _steps_per_file(packed_dir: Path, plan: StepPlan) -> int | None:
    try:
        layout = json.loads((packed_dir / LAYOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layout["steps_per_file"] if layout["layout_digest"] == plan.layout_digest else None

"""Packed blocks: the store sorted into the order of a plan, a record batch a slot; and the reader of a plan's packs."""

from __future__ import annotations

import json
import math
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from longalign_ray.data.plan import StepPlan, weights_of_steps
from longalign_ray.data.store import (
    BYTES_PER_TOKEN,
    BatchFile,
    ExampleIndex,
    Pack,
    TokenStore,
    part_name,
    write_batches,
)
from longalign_ray.errors import LongAlignError, PlanMismatchError
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


def keep_if_same(directory: Path, fingerprint: str) -> None:
    """Empties a directory that holds the work of another fingerprint, else removes what killed writers left there."""
    mark = directory / "fingerprint"
    if not mark.exists() or mark.read_text(encoding="utf-8") != fingerprint:
        if directory.exists():
            remove_blocks(directory)
        directory.mkdir(parents=True)
        mark.write_text(fingerprint, encoding="utf-8")
    for leftover in directory.glob("*.tmp"):
        leftover.unlink()


def remove_blocks(directory: Path) -> None:
    """Its mark and its layout go first, so that nothing takes a directory half emptied for whole."""
    for name in ("fingerprint", LAYOUT_FILE):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory)


def write_packed_slice(item: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Writes a file of packs, the work of one task of `prepare`; what stops it is in the result as `problem`."""
    number, directory = item["number"], Path(settings["packed"])
    try:
        if not (directory / part_name(number)).exists():
            store, plan = _cached_inputs(settings["store"], settings["plan"], settings["layout"])
            write_packed_file(store, plan, number, steps_per_file=settings["steps_per_file"], directory=directory)
    except LongAlignError as error:
        return {"number": number, "problem": str(error)}
    return {"number": number, "problem": ""}


@lru_cache(maxsize=1)
def _cached_inputs(store: str, plan: str, layout: str) -> tuple[TokenStore, StepPlan]:
    """Read once by a process for all its tasks of one `layout`, the fingerprint of the packed blocks."""
    return TokenStore(Path(store)), StepPlan.load(Path(plan))


class PackReader:
    """The packs of a plan: out of packed blocks that were sorted for it, else gathered from the store row by row."""

    def __init__(self, plan: StepPlan, *, store_dir: Path, packed_dir: Path):
        """Raises PlanMismatchError where the store's examples have other lengths or weights than the plan says."""
        self.plan = plan
        self.packed_dir = packed_dir
        self.steps_per_file = _steps_per_file(packed_dir, plan)
        self.store = TokenStore(store_dir)
        if not _belongs(plan, self.store.index):
            raise PlanMismatchError(
                f"the plan does not belong to the store {store_dir}: delete plan.npz beside it and run `longalign "
                "prepare` again"
            )
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


def _belongs(plan: StepPlan, index: ExampleIndex) -> bool:
    """Whether the rows that the plan names have its lengths, and their weights its sums."""
    rows = plan.example_rows
    if int(rows.min()) < 0 or int(rows.max()) >= len(index) or not np.array_equal(plan.lengths, index.length[rows]):
        return False
    return np.array_equal(plan.sum_weights, weights_of_steps(index.sum_weights[rows], plan.step_starts[:-1]))


def _steps_per_file(packed_dir: Path, plan: StepPlan) -> int | None:
    try:
        layout = json.loads((packed_dir / LAYOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layout["steps_per_file"] if layout["layout_digest"] == plan.layout_digest else None

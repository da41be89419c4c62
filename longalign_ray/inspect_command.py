"""`longalign inspect`: shows a prepared example with its targets, or a pack of the plan with its boundaries."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longalign_ray.config_load import load_config
from longalign_ray.data.inspect import Decode, show_example, show_pack
from longalign_ray.data.store import TokenStore
from longalign_ray.errors import ConfigError, LongAlignError
from longalign_ray.run_dir import RunDir

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_CHARS = 1_200
"""Longer texts of equal weight are shown by head and tail, unless --full."""


def inspect(arguments: argparse.Namespace, *, colour: bool) -> Text:
    """The text to show. Raises LongAlignError where nothing is prepared or the example or pack does not exist."""
    from longalign_ray.data.template import load_tokenizer
    from longalign_ray.model_source import local_model_dir

    config = load_config(arguments.recipe, arguments.overrides)
    run_dir = RunDir(Path(config.run_dir))
    if not (run_dir.store / "index.parquet").is_file():
        raise LongAlignError(
            f"{run_dir.store} holds no token store yet: run `longalign prepare {arguments.recipe}` first"
        )
    tokenizer = load_tokenizer(local_model_dir(config.model.path), chat_template=config.model.chat_template)

    def decode(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    max_chars = None if arguments.full else SHOWN_CHARS
    if arguments.pack is not None:
        return _pack(run_dir, arguments.pack, decode, colour=colour, max_chars=max_chars)
    store = TokenStore(run_dir.store)
    row = arguments.example if arguments.id is None else _row_of(store.index.example_id, arguments.id)
    if not 0 <= row < len(store.index):
        raise LongAlignError(f"--example {row}: the store has {len(store.index):,} examples, numbered from 0")
    note = f"example {row:,} of {len(store.index):,}, {'held out, ' if store.index.heldout[row] else ''}"
    return show_example(store.example(row), decode, note=note, colour=colour, max_chars=max_chars)


def _row_of(names: np.ndarray, name: str) -> int:
    rows = np.flatnonzero(names == name)
    if len(rows) == 0:
        near = difflib.get_close_matches(name, names[:10_000].tolist(), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise LongAlignError(f"--id {name}: no example of the store has this id{hint}")
    return int(rows[0])


def _pack(run_dir: RunDir, place: str, decode: Decode, *, colour: bool, max_chars: int | None) -> Text:
    from longalign_ray.data.packed import PackReader
    from longalign_ray.data.plan import StepPlan

    packs = PackReader(StepPlan.load(run_dir.plan), store_dir=run_dir.store, packed_dir=run_dir.packed)
    shape = packs.plan.shape
    numbers = place.split(",")
    if len(numbers) != 3 or not all(number.strip().isdigit() for number in numbers):
        raise ConfigError(f"--pack {place}: give three numbers, STEP,MICRO,GROUP, such as 0,0,0")
    step, micro_step, group = map(int, numbers)
    if not all(number < limit for number, limit in zip((step, micro_step, group), shape, strict=True)):
        raise LongAlignError(
            f"--pack {place}: the plan has {shape[0]} steps, {shape[1]} micro-steps and {shape[2]} groups, from 0"
        )
    pack = packs.pack(step, micro_step, group)
    if pack is None:
        raise LongAlignError(f"--pack {place}: the group idles in this micro-step")
    where = f"step {step}, micro-step {micro_step}, group {group}"
    return show_pack(pack, decode, place=where, colour=colour, max_chars=max_chars)

"""`longalign plan`: what a plan would cost, before anything is trained; from a recipe or from bare lengths."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longalign_ray.config_load import load_config
from longalign_ray.data.cost import LLAMA_2_7B, sequence_cost
from longalign_ray.data.make_plan import GROUP, PlanSettings
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.plan_file import PlanWriter
from longalign_ray.data.plan_groups import GroupPlan, plan_groups, seeded_rows
from longalign_ray.data.plan_score import PlanScore, score, warm_up
from longalign_ray.errors import ConfigError, LongAlignError
from longalign_ray.plan_memory import Forecast, Times, as_json, as_text, forecast, levers_of_recipe, times
from longalign_ray.run_dir import Manifest, RunDir
from longalign_ray.train.memory import Levers
from longalign_ray.train.model_shape import LLAMA_2_7B as LLAMA_2_7B_SHAPE
from longalign_ray.train.model_shape import ModelShape

logger = logging.getLogger(__name__)

BESIDE = (("next_fit", "none", "the paper's packing"), ("naive", "none", "one sequence a rank"))
"""Strategies that are always shown for comparison: packs and sequences in the order of the epoch."""


def describe_plan(arguments: argparse.Namespace) -> str:
    """The text that the command prints."""
    if arguments.lengths is not None:
        if arguments.recipe is not None:
            raise ConfigError(f"--lengths and the recipe {arguments.recipe} are both given: name one of them")
        return _from_lengths(arguments)
    if arguments.recipe is None:
        raise ConfigError("neither a recipe nor --lengths is given: longalign plan RECIPE.yaml, or --lengths FILE.npy")
    return _from_recipe(arguments)


def _from_lengths(arguments: argparse.Namespace) -> str:
    if arguments.capacity is None:
        raise ConfigError("--lengths needs --capacity, the tokens that a rank holds in a micro-step")
    lengths = _read_lengths(Path(arguments.lengths))
    world_size = 8 if arguments.world_size is None else arguments.world_size
    settings = _changed(
        PlanSettings(
            capacity=arguments.capacity,
            packs_per_step=world_size,
            world_size=world_size,
            group_size=max(world_size // max(arguments.sp or 1, 1), 1),
        ),
        arguments,
    )
    model = None if arguments.model is None else _read_config(arguments.model)
    cost = LLAMA_2_7B if model is None else sequence_cost(model)
    shape = LLAMA_2_7B_SHAPE if model is None else _shape(model)
    made = shape and forecast(shape, Levers(async_checkpoint=True), settings, arguments)
    others = [replace(settings, strategy=strategy, balance=balance) for strategy, balance, _ in BESIDE]
    for each in (settings, *others):
        warm_up(lengths, each, cost)
    writer = PlanWriter(Path(arguments.out)) if arguments.out else None
    asked = score(plan_groups(lengths, settings, cost=cost), settings, arguments.tflops, writer)
    sample = lengths if len(lengths) <= GROUP else lengths[seeded_rows(0, GROUP, len(lengths), settings.seed)]
    beside = [score(plan_groups(sample, other, cost=cost), other, arguments.tflops) for other in others]
    room = settings.capacity * settings.sp_degree
    longest = int(np.max(lengths, where=lengths <= room, initial=0))
    took = made and times(made, asked, settings, cost=cost, longest=longest, tflops=arguments.tflops)
    if arguments.json:
        return _json(asked, beside, made, took)
    if asked.dropped:
        logger.warning(
            "%d of %d lengths are left out: below 1 or above %d tokens",
            asked.dropped, len(lengths), room,
        )  # fmt: skip
    note = "" if sample is lengths else f"The last two rows: of {GROUP:,} sequences, drawn by seed."
    table = _table(asked, beside, settings, arguments.tflops, note)
    return "\n\n".join([table, *([as_text(made, took, arguments.tflops)] if made else [])])


def _from_recipe(arguments: argparse.Namespace) -> str:
    from longalign_ray.data.pipeline import model_shape, plan_for, plan_settings
    from longalign_ray.data.store import ExampleIndex
    from longalign_ray.model_source import local_model_dir

    if arguments.model is not None:
        raise ConfigError("--model goes with --lengths; a recipe names its model: model.path=...")
    config = load_config(arguments.recipe, arguments.overrides)
    run_dir = RunDir(Path(config.run_dir))  # neither made nor written to: the question may be a what-if
    if config.before is not None:
        logger.warning("the run that comes first (`before`) is not counted, neither its memory nor its hours")
    model_dir = local_model_dir(config.model.path, config_only=True)
    settings = _changed(plan_settings(config, world_size=config.train.max_workers), arguments)
    model = model_shape(model_dir)
    shape = _shape(model)
    made = shape and forecast(shape, levers_of_recipe(config), settings, arguments)
    if not (run_dir.store / "index.parquet").exists():
        if made is None:
            raise LongAlignError(f"{run_dir.store} does not exist: run `longalign prepare` first, or give --lengths")
        logger.warning(
            "%s does not exist, so the lengths are not known and only the memory of full packs is told: run `longalign "
            "prepare` first, or give --lengths", run_dir.store,
        )  # fmt: skip
        return json.dumps({"memory": as_json(made, None)}, indent=2) if arguments.json else as_text(made, None, 0)
    index = ExampleIndex.load(run_dir.store / "index.parquet")
    prepared = Manifest.load(run_dir.manifest("prepare"))
    if prepared is None:
        logger.warning("`longalign prepare` has not come to its end in %s: what it left out is not known", run_dir.root)
    dropped = 0 if prepared is None else sum(prepared.dropped_by_reason.values())

    def scored(settings: PlanSettings) -> tuple[PlanScore, StepPlan]:
        plans: list[StepPlan] = []

        def groups() -> Iterator[GroupPlan]:
            plans.append(plan_for(config, index, model_dir, settings))
            yield GroupPlan(plans[0], dropped)

        told = score(groups(), settings, arguments.tflops)
        if settings.epochs > 1 or settings.max_steps is not None:
            epoch = plan_for(config, index, model_dir, replace(settings, epochs=1, max_steps=None))
            told = replace(told, steps_per_epoch=epoch.num_steps)
        return told, plans[0]

    scored(settings)  # compiles
    asked, plan = scored(settings)
    settings = replace(settings, strategy=plan.strategy)  # what `auto` chose, here and for other ranks
    if arguments.out:
        plan.save(Path(arguments.out))
    beside = [scored(replace(settings, strategy=s, balance=b))[0] for s, b, _ in BESIDE]
    longest = int(plan.lengths.max())
    took = made and times(made, asked, settings, cost=sequence_cost(model), longest=longest, tflops=arguments.tflops)
    if arguments.json:
        return _json(asked, beside, made, took)
    sizes = sorted({settings.world_size, *(settings.sp_degree * 2**power for power in range(4))})
    lines = [f"{'ranks':>6} {'steps':>6} {'micro-steps':>12} {'packs':>7} {'fill':>7} {'time / ideal':>13}"]
    for world_size in sizes:
        if world_size > max(settings.packs_per_step, settings.world_size):
            continue
        other = plan_for(config, index, model_dir, replace(settings, world_size=world_size))
        mark = " <- recipe" if world_size == config.train.max_workers else ""
        lines.append(
            f"{world_size:>6} {other.num_steps:>6} {other.shape[1]:>12} {other.num_packs:>7} {other.fill():>7.1%} "
            f"{other.time_over_ideal():>13.3f}{mark}"
        )
    table = _table(asked, beside, settings, arguments.tflops, "")
    memory = [as_text(made, took, arguments.tflops)] if made else []
    return "\n\n".join([table, *memory, "\n".join(lines)])


def _changed(settings: PlanSettings, arguments: argparse.Namespace) -> PlanSettings:
    """The settings with what the command line says. Raises ConfigError with all that is wrong with them."""
    named = {
        "capacity": arguments.capacity,
        "world_size": arguments.world_size,
        "sp_degree": arguments.sp,
        "seed": arguments.seed,
        "strategy": arguments.strategy,
        "balance": arguments.balance,
        "fill": arguments.fill,
    }
    settings = replace(settings, **{name: value for name, value in named.items() if value is not None})
    positive = {"--capacity": settings.capacity, "--world-size": settings.world_size, "--sp": settings.sp_degree}
    positive |= {} if arguments.micro_steps is None else {"--micro-steps": arguments.micro_steps}
    wrong = [f"{option} = {value}: give 1 or more" for option, value in positive.items() if value < 1]
    if not 0 < settings.fill <= 1:
        wrong.append(f"--fill = {settings.fill}: give a share above 0 and up to 1")
    if settings.seed < 0:
        wrong.append(f"--seed = {settings.seed}: give 0 or more")
    if not wrong and settings.world_size % settings.sp_degree:
        wrong.append(
            f"--sp = {settings.sp_degree} does not divide --world-size = {settings.world_size}: give a divisor"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    if arguments.micro_steps is not None:
        settings = replace(settings, packs_per_step=arguments.micro_steps * settings.world_size)
    return settings


def _read_lengths(path: Path) -> np.ndarray:
    """int[n], memory-mapped."""
    try:
        lengths = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--lengths {path} is no NumPy array ({error}); write it with numpy.save") from error
    if not isinstance(lengths, np.ndarray) or lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        found = f"{lengths.dtype}{list(lengths.shape)}" if isinstance(lengths, np.ndarray) else "an archive"
        raise ConfigError(f"--lengths {path} holds {found}: give a one-dimensional array of whole numbers, not empty")
    return lengths


def _read_config(model: str) -> dict[str, Any]:
    """The config.json that is, or lies in, `model`. Raises ConfigError where it is none of a decoder."""
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        sequence_cost(read)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"--model {path} does not describe a decoder ({error}); give its config.json") from error
    return read


def _shape(model: Mapping[str, Any]) -> ModelShape | None:
    """None, with a warning, for a model whose balance can be told but whose memory cannot, such as one of experts."""
    try:
        return ModelShape.of(model)
    except ConfigError as error:
        logger.warning("no forecast of memory: %s", error)
        return None


def _json(asked: PlanScore, beside: list[PlanScore], made: Forecast | None, took: Times | None) -> str:
    memory = as_json(made, took) if made else None
    others: list[dict[str, Any]] = [dataclasses.asdict(other) for other in beside]
    return json.dumps({**dataclasses.asdict(asked), "beside": others, "memory": memory}, indent=2)


def _table(asked: PlanScore, beside: list[PlanScore], settings: PlanSettings, tflops: float, note: str) -> str:
    rows = [
        (asked, asked.strategy, "<- asked"),
        *((s, s.strategy, why) for s, (*_, why) in zip(beside, BESIDE, strict=True)),
    ]
    columns: list[tuple[str, Callable[[PlanScore], str]]] = [
        ("balance", lambda s: s.balance),
        ("steps", lambda s: f"{s.num_steps:,}"),
        ("packs", lambda s: f"{s.num_packs:,}"),
        ("at least", lambda s: f"{s.lower_bound_packs:,}"),
        ("fill", lambda s: f"{s.utilisation:.2%}"),
        ("time / ideal", lambda s: f"{s.time_over_ideal:.4f}"),
        ("mean step", lambda s: f"{s.imbalance_mean:.4f}"),
        ("worst step", lambda s: f"{s.imbalance_worst:.3f}"),
        ("time", lambda s: f"{s.time_over_ideal / asked.time_over_ideal:.2f}x"),
        ("CPU s", lambda s: f"{s.cpu_seconds:.2f}"),
    ]
    cells = [
        ["strategy", *(name for name, _ in columns)],
        *([name, *(f(s) for _, f in columns)] for s, name, _ in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    notes = ["", *(why for *_, why in rows)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + f"  {why}".rstrip()
        for line, why in zip(cells, notes, strict=True)
    ]
    head = (
        f"{asked.num_sequences:,} sequences, {settings.world_size} ranks in groups of {settings.sp_degree}, "
        f"{settings.micro_steps} micro-steps, {settings.capacity:,} tokens a rank"
    )
    tail = f"{asked.hours:.2f} h of forward and backward at {tflops:g} TFLOP/s a rank (assumed). {note}".rstrip()
    tail = f"{asked.steps_per_epoch:,} steps an epoch; {tail}"
    lost = f"\n{asked.carried:,} times an example waited for the next step." if asked.carried else ""
    return f"{head}\n\n" + "\n".join(lines) + f"\n\n{tail}{lost}"

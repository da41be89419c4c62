"""The numbers of a run, gathered from whatever artefacts its directory holds; report.json is this and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longalign_ray.data.balance import imbalance
from longalign_ray.data.make_plan import PlanSettings, plan_lengths
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import EvaluationError, LongAlignError
from longalign_ray.evaluate.comparison import compare
from longalign_ray.evaluate.score_files import BENCHMARK_TITLES, model_scores
from longalign_ray.logs import read_metrics
from longalign_ray.run_dir import STAGES, Manifest, RunDir

Summary = dict[str, Any]

FILL_BINS = 20
SERIES = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds")


def summarize(run_dir: RunDir) -> Summary:
    """Sections `examples`, `packs`, `training`, `needle`, `heldout`, `comparison`, `benchmarks`, `stages`, `versions`.

    A section is null where its artefact does not exist or cannot be read; `missing` then says why, by section.
    `benchmarks` has the scores of the other tasks, by task and model; none is asked for unless a recipe names it.
    """
    manifests = [manifest for stage in STAGES if (manifest := Manifest.load(run_dir.manifest(stage)))]
    missing: dict[str, str] = {}
    sections: dict[str, tuple[str, Callable[[RunDir], dict[str, Any] | None]]] = {
        "examples": ("prepare", _examples),
        "packs": ("prepare", _packs),
        "training": ("train", _training),
        "needle": ("evaluate", lambda run: _scores(run, "needle")),
        "heldout": ("evaluate", lambda run: _scores(run, "heldout")),
    }
    summary: dict[str, Any] = {"run": run_dir.root.resolve().name}
    for name, (stage, read) in sections.items():
        try:
            summary[name] = read(run_dir)
        except (LongAlignError, OSError, ValueError, KeyError) as error:
            summary[name] = None
            missing[name] = f"cannot be read ({error}); `longalign {stage}` makes it anew"
        if summary[name] is None and name not in missing:
            missing[name] = f"not there yet; `longalign {stage}` makes it"
    summary["benchmarks"] = _benchmarks(run_dir, missing)
    try:
        summary["comparison"] = compare([run_dir]) or None
    except EvaluationError:  # of a score file that its own section tells of
        summary["comparison"] = None
    summary["stages"] = {
        manifest.stage: {
            "seconds": manifest.seconds,
            "counts": manifest.counts,
            "dropped_by_reason": manifest.dropped_by_reason,
        }
        for manifest in manifests
    }
    versions = {name: version for manifest in manifests for name, version in manifest.versions.items()}
    return summary | {"versions": versions, "missing": missing}


def _examples(run_dir: RunDir) -> dict[str, Any] | None:
    """Number and lengths of the examples, and a histogram with two bins an octave."""
    path = run_dir.store / "index.parquet"
    if not path.exists():
        return None
    index = ExampleIndex.load(path)
    length = index.length.astype(np.int64)
    edges = _octave_edges(length)
    train = ~index.heldout
    return {
        "num_examples": len(index),
        "num_heldout": int(index.heldout.sum()),
        "num_tokens": int(length.sum()),
        "num_targets": int(index.num_targets.sum()),
        "shortest": int(length.min()),
        "median": float(np.median(length)),
        "longest": int(length.max()),
        "histogram": {
            "edges": edges.tolist(),
            "train": np.histogram(length[train], edges)[0].tolist(),
            "heldout": np.histogram(length[~train], edges)[0].tolist(),
            "tokens": np.histogram(length, edges, weights=length)[0].astype(int).tolist(),
        },
    }


def _octave_edges(lengths: np.ndarray) -> np.ndarray:
    """Bin edges 2^(k/2), rounded, that hold all lengths; a length equal to the last edge is inside."""
    low = 2 * np.floor(np.log2(max(int(lengths.min()), 1)))  # even, so that every other edge is a power of two
    high = max(np.ceil(2 * np.log2(max(int(lengths.max()), 2))), low + 1)
    return np.unique(np.round(2 ** (np.arange(low, high + 1) / 2)).astype(np.int64))


def _packs(run_dir: RunDir) -> dict[str, Any] | None:
    """How full the packs are and how evenly the work is spread, over the steps of the plan."""
    if not run_dir.plan.exists():
        return None
    plan = StepPlan.load(run_dir.plan)
    tokens, costs = plan.slot_tokens(), plan.slot_costs()
    fill = tokens[tokens > 0] / (plan.capacity * plan.sp_degree)
    of_rank = costs.sum(axis=1)  # float64[steps, groups]
    mean = np.maximum(of_rank.mean(axis=1), np.finfo(np.float64).tiny)
    return {
        "num_packs": len(fill),
        "capacity": plan.capacity,
        "num_steps": plan.num_steps,
        "micro_steps": plan.shape[1],
        "num_ranks": plan.world_size,
        "sequences_per_pack": len(plan.example_rows) / max(len(fill), 1),
        "fill": plan.fill(),
        "fill_histogram": np.histogram(fill, np.linspace(0, 1, FILL_BINS + 1))[0].tolist(),
        "imbalance": plan.time_over_ideal(),
        "busiest_rank": (of_rank.max(axis=1) / mean).tolist(),
        "idlest_rank": (of_rank.min(axis=1) / mean).tolist(),
        "lock_step": plan.step_imbalance().tolist(),
        "balance": plan.balance,
        "one_step": _one_step(plan),
    }


def _one_step(plan: StepPlan) -> dict[str, Any]:
    """Cost of every slot of a typical step, over the mean: as planned, and of full packs in random order.

    Both are the steps of median imbalance, of those of the first 64 steps.
    """
    _, micro_steps, groups = plan.shape
    some = plan.lengths[: plan.offsets[min(plan.num_steps, 64) * micro_steps * groups]]
    settings = PlanSettings(
        strategy="best_fit",
        balance="none",
        capacity=plan.capacity,
        packs_per_step=micro_steps * plan.world_size,
        world_size=plan.world_size,
        sp_degree=plan.sp_degree,
        seed=plan.seed,
    )
    shuffled = plan_lengths(some, settings, cost=plan.cost)
    made: dict[str, Any] = {}
    for name, other, imbalances in (
        ("shuffled", shuffled, imbalance(shuffled.slot_costs(), plan.balance)),
        ("planned", plan, plan.step_imbalance()[:64]),
    ):
        step = int(np.argsort(imbalances, kind="stable")[len(imbalances) // 2])
        costs = other.slot_costs()[step]
        made[name] = {
            "step": step,
            "imbalance": float(imbalances[step]),
            "costs": (costs / costs.mean()).tolist(),  # [micro-step][group]
        }
    return made


def _training(run_dir: RunDir) -> dict[str, Any] | None:
    """Totals over the steps, and the series of each column."""
    rows = read_metrics(run_dir.metrics)
    if not rows:
        return None
    seconds = sum(row["seconds"] for row in rows)
    tokens = sum(row["num_tokens"] for row in rows)
    return {
        "num_steps": len(rows),
        "num_tokens": tokens,
        "num_sequences": sum(row["num_sequences"] for row in rows),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "max_memory_gb": max(row["max_memory_gb"] for row in rows),
        "series": {name: [row[name] for row in rows] for name in SERIES},
        "imbalance": _imbalance_series([row for row in rows if row.get("seen_imbalance") is not None]),
        "heldout": _heldout_series([row for row in rows if "heldout_loss" in row]),
    }


def _imbalance_series(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The imbalance of the steps in which it could be seen, as planned and by the clock."""
    series = {"step": "step", "planned": "rank_imbalance", "seen": "seen_imbalance"}
    return {name: [row[column] for row in rows] for name, column in series.items()} if rows else None


def _heldout_series(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The held-out loss by step, whole and by length bucket, where it was measured more than once."""
    if len(rows) < 2:
        return None
    return {
        "step": [row["step"] for row in rows],
        "loss": [row["heldout_loss"] for row in rows],
        "by_length": {name: [row["heldout_by_length"][name] for row in rows] for name in rows[0]["heldout_by_length"]},
    }


def _benchmarks(run_dir: RunDir, missing: dict[str, str]) -> dict[str, Any]:
    """Scores of each task of BENCHMARK_TITLES that there are; one that cannot be read is told in `missing`."""
    found: dict[str, Any] = {}
    for task in BENCHMARK_TITLES:
        try:
            if scores := _scores(run_dir, task):
                found[task] = scores
        except (OSError, ValueError, KeyError) as error:
            missing[task] = f"cannot be read ({error}); `longalign evaluate` makes it anew"
    return found


def _scores(run_dir: RunDir, task: str) -> dict[str, Any] | None:
    """Scores of each model, the one before training first, less those of single cases."""
    scores = model_scores(run_dir, task)
    return {
        model: {name: part for name, part in score.items() if name != "by_case"} for model, score in scores.items()
    } or None

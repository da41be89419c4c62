"""The score files of a run, and how the score of each task is called and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from longalign_ray.run_dir import RunDir

# Tasks that are shown as tables; the name of a task's score files begins with it, and none begins with another's.
BENCHMARK_TITLES = {
    "ruler": "RULER",
    "longbench": "LongBench",
    "longbench_v2": "LongBench v2",
    "longeval": "LongEval",
    "longbench_chat": "LongBench-Chat",
    "mt_bench": "MT-Bench",
    "lm_eval": "Short tasks",
}
TITLES = {"needle": "Needle accuracy", "heldout": "Held-out loss", **BENCHMARK_TITLES}
UNITS = {"heldout": "nats", "longbench_chat": "1 to 10", "mt_bench": "1 to 10"}  # the others: per cent


def unit(task: str) -> str:
    return UNITS.get(task, "%")


def shown(task: str, value: float) -> str:
    """The value of a score as it is shown: per cent, or in the task's own unit."""
    return f"{100 * value:.1f}" if unit(task) == "%" else f"{value:.3f}"


def model_scores(run_dir: RunDir, task: str) -> dict[str, Any]:
    """The score files of a task by model, the one before training first. OSError, ValueError or KeyError where one
    cannot be read."""
    paths = sorted(run_dir.scores.glob(f"{task}-*.json"))
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    order = _model_order(run_dir)
    scores.sort(key=lambda score: order.index(score["model"]) if score["model"] in order else len(order))
    return {score["model"]: score for score in scores}


def _model_order(run_dir: RunDir) -> Sequence[str]:
    try:
        return yaml.safe_load(run_dir.config.read_text(encoding="utf-8"))["evaluate"]["models"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ("base", "aligned")

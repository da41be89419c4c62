"""A file imports its own layer and those below, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "longalign_ray"

# A package's own entry covers those of its files that have none.
LAYERS = {
    "longalign_ray": 0,
    "errors": 1,
    "config": 2,
    "run_dir": 2,
    "logs": 2,
    "api_keys": 2,
    "data": 3,
    "construct": 3,
    "evaluate.scoring": 3,
    "serve.schema": 3,
    "train.batch": 4,
    "train.positions": 4,
    "train.loss": 4,
    "train.attention": 4,
    "train.schedule": 4,
    "train.sequence_parallel": 4,
    "train.ring_attention": 4,
    "train.block_attention": 4,
    "train.throughput": 4,
    "train.model_shape": 3,
    "train.memory": 4,
    "train.step_time": 4,
    "evaluate": 4,
    "train": 5,
    "serve": 5,
    "evaluate.judge": 5,
    "model_source": 5,
    "precision": 4,
    "construct.pipeline": 6,
    "data.pipeline": 6,
    "train.ray_train": 6,
    "train.ray_checkpoints": 6,
    "serve.app": 6,
    "serve.deploy": 6,
    "serve.remote_engine": 6,
    "serve.generate": 6,
    "evaluate.runner": 6,
    "evaluate.report": 6,
    "config_load": 7,
    "stage_state": 6,
    "stages": 7,
    "plan_command": 7,
    "plan_memory": 7,
    "inspect_command": 7,
    "score_command": 7,
    "estimate_command": 7,
    "cli": 7,
    "doctor": 7,
}
GLUE = (
    "construct.pipeline",
    "data.pipeline",
    "train.ray_train",
    "train.ray_checkpoints",
    "serve.app",
    "serve.deploy",
    "serve.remote_engine",
    "serve.generate",
    "evaluate.runner",
    "evaluate.report",
)
EMBEDDED = (  # the engine on a transformers model
    "serve.batch_forward",
    "serve.kv_cache",
    "serve.lora",
    "serve.product_attention",
    "serve.ragged_attention",
    "serve.requests",
    "serve.sampling",
    "serve.transformers_engine",
)
ALLOWED = {  # heavy package -> the only modules that may import it, even inside a function
    "ray": (*GLUE, "cli", "doctor", "stages"),
    "torch": ("train", "model_source", "precision", "serve.engine", *EMBEDDED),
    "deepspeed": ("train",),
    "vllm": ("serve",),
}


def layer(module: str) -> int:
    """Layer of a dotted name below longalign_ray; a file without an entry has that of its package."""
    for name in (module, module.split(".")[0]):
        if name in LAYERS:
            return LAYERS[name]
    raise AssertionError(f"{module} has no layer yet: give it one in LAYERS")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "longalign_ray"


def imported(source: str) -> list[tuple[str, int]]:
    """(dotted name, line) of every import, inside functions and under `if TYPE_CHECKING` too; relative ones as `.`."""
    names: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return names


def own_module(name: str) -> str | None:
    """`longalign_ray.data.plan.StepPlan` -> `data.plan`: the longest part that is a file or a package."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:end])
        if path.with_suffix(".py").exists() or path.is_dir():
            return ".".join(parts[:end])
    return "longalign_ray" if name.startswith("longalign_ray") else None


def violations(module: str, source: str) -> list[str]:
    """What `source`, as the file of `module`, imports against the rules."""
    found = []
    for name, line in imported(source):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{module}:{line} imports {name}: write the whole name")
        elif top == "longalign_ray":
            target = own_module(name) or "longalign_ray"
            if layer(target) > layer(module):
                found.append(f"{module}:{line} (layer {layer(module)}) imports {target} (layer {layer(target)})")
        elif top in ALLOWED and not any(module == home or module.startswith(f"{home}.") for home in ALLOWED[top]):
            found.append(f"{module}:{line} imports {top}, which only {', '.join(ALLOWED[top])} may")
    return found


def test_every_file_keeps_to_its_layer() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20  # else the walk looks in the wrong place
    found = [problem for path in files for problem in violations(module_name(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from longalign_ray.config import RunConfig"),
        ("data.planners", "def plan():\n    from longalign_ray import cli"),
        ("data.planners", "import longalign_ray.train.loop"),
        ("train.loop", "from longalign_ray.train.ray_train import train"),
        ("data.plan", "from . import pipeline"),
        ("data.planners", "def plan():\n    import torch"),
        ("train.loop", "import ray.train"),
        ("serve.engine", "from deepspeed import zero"),
        ("evaluate.needle", "import torch.nn as nn"),
        ("model_source", "import ray"),
    ],
)
def test_checker_sees_a_planted_violation(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.pipeline", "import ray.data\nfrom longalign_ray.data.planners import best_fit"),
        ("train.engine", "import deepspeed, torch\nfrom longalign_ray.train import loss"),
        ("stages", "def f():\n    import ray\n    from longalign_ray.serve.app import running_app"),
        ("data.planners", "import numba\nimport raylike, torchlike"),
    ],
)
def test_checker_lets_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(module, source) == []

"""Small recipes for the integration tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml


def write_corpus(path: Path, number: int, *, seed: int = 0) -> Path:
    """Conversations of one to three turns with long-tailed lengths."""
    source = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            messages = []
            for turn in range(source.choice([1, 1, 2, 3])):
                question = f"question {turn} " + "word " * source.choice([1, 3, 10, 40])
                messages += [{"role": "user", "content": question}]
                messages += [{"role": "assistant", "content": "answer " * source.randint(1, 8)}]
            file.write(json.dumps({"id": f"talk-{i}", "messages": messages}) + "\n")
    return path


def write_recipe(directory: Path, model_dir: Path, **sections: dict[str, Any]) -> Path:
    """A recipe for the tiny model whose run directory is `directory`/run; `sections` are merged into it."""
    recipe: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "model": {"path": str(model_dir), "dtype": "float32"},
        "data": {"max_length": 1024, "heldout_fraction": 0.05, "max_heldout": 4},
        "packing": {"capacity": 1024, "packs_per_step": 4, "steps_per_file": 2},
        "train": {"num_workers": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "max_failures": 0},
        "ray": {"num_cpus": 4},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path

"""The recipes for GPUs fit their machine of eight cards with 80 GB, by what `longalign plan` tells before `prepare`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from longalign_ray.cli import main
from longalign_ray.config_load import load_config
from longalign_ray.data.store import ExampleIndex
from longalign_ray.run_dir import RunDir
from longalign_ray.train.memory import LADDER
from longalign_ray.train.rope import check_window

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


def llama(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, window: int) -> dict:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocabulary,
        "max_position_embeddings": window,
    }  # fmt: skip


MODELS = {  # public shapes; those of the paper's own bases are Llama-2's with a longer window
    "llama2-7b-64k-packed": llama(32, 4_096, 32, 32, 11_008, 32_000, 65_536),
    "llama2-7b-64k-sorted": llama(32, 4_096, 32, 32, 11_008, 32_000, 65_536),
    "llama2-13b-64k-packed": llama(40, 5_120, 40, 40, 13_824, 32_000, 65_536),
    "glm4-9b-64k-packed": llama(40, 4_096, 32, 2, 13_696, 151_552, 8_192),
    "llama3.1-8b-128k-sp8": llama(32, 4_096, 32, 8, 14_336, 128_256, 131_072),
}


def test_every_recipe_for_gpus_is_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml") if load_config(path).train.use_gpu} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_fits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
    settings = [f"model.path={model_dir}", f"run_dir={tmp_path / 'run'}"]
    assert main(["plan", str(RECIPES / f"{name}.yaml"), *settings, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["fits"], memory
    set_levers = [name for name in LADDER if memory["levers"][name]]
    assert set_levers == memory["cheapest_levers"]
    assert memory["levers"]["sp_degree"] == memory["cheapest_sp_degree"]
    assert 20e9 < memory["rank_bytes"] < 80e9
    config = load_config(RECIPES / f"{name}.yaml", settings)
    longest = config.data.max_length
    assert memory["longest_context"] >= longest
    first = config.first or config
    check_window(model_dir, first.model.rope, max_length=longest, one_per_pack=False)  # raises where it is too short
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llama2-7b-64k-sorted", "llama2-13b-64k-packed", "glm4-9b-64k-packed"])
def test_sorted_batching_by_the_settings_that_a_recipe_names(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One conversation on the ranks of a pack and 96 a step, as in the recipe that is sorted by itself."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
    recipe, store, number = RECIPES / f"{name}.yaml", RunDir(tmp_path / "run").store, 960
    named = re.findall(r"packing\.\S+=\S+", recipe.read_text(encoding="utf-8"))
    assert len(named) == (0 if "sorted" in name else 4)
    store.mkdir(parents=True)
    ExampleIndex(
        example_id=np.array([f"e{row}" for row in range(number)], dtype=object),
        length=np.random.default_rng(0).integers(1_000, 65_537, number, dtype=np.int32),
        num_targets=np.full(number, 100, np.int32),
        sum_weights=np.full(number, 100.0),
        file=np.zeros(number, np.int32),
        row=np.arange(number, dtype=np.int32),
        source=np.full(number, "corpus", object),
        heldout=np.zeros(number, bool),
    ).save(store / "index.parquet")
    settings = [f"model.path={tmp_path}", f"run_dir={tmp_path / 'run'}", "train.epochs=1", *named]
    assert main(["plan", str(recipe), *settings, "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert (score["strategy"], score["num_packs"], score["num_steps"]) == ("sorted", number, number / 96)
    assert score["imbalance_mean"] < 1.1

"""What `longalign plan` tells about memory and time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign_ray.cli import main
from longalign_ray.config import RunConfig, TrainConfig
from longalign_ray.plan_memory import SETTINGS, levers_of_recipe
from longalign_ray.train.memory import LADDER, Levers, longest_context, memory_terms
from longalign_ray.train.model_shape import LLAMA_2_7B, ModelShape

LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8_192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28_672,
    "vocab_size": 128_256,
}


def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str, longest: int = 65_536) -> str:
    np.save(tmp_path / "lengths.npy", np.array([longest, *[4_096] * 127]))
    assert main(["plan", "--lengths", str(tmp_path / "lengths.npy"), "--capacity", "65536", *options]) == 0
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str, **what: int) -> dict[str, Any]:
    return json.loads(plan(capsys, tmp_path, "--json", *options, **what))


def test_numbers_are_those_of_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = told(capsys, tmp_path)["memory"]
    terms = memory_terms(LLAMA_2_7B, tokens_per_rank=65_536, levers=Levers())
    assert memory["rank_bytes"] == terms.rank
    assert memory["terms"]["checkpoints"] == terms.checkpoints
    assert (memory["fits"], memory["cheapest_levers"]) == (True, [])
    assert memory["longest_context"] == longest_context(LLAMA_2_7B, Levers(), gpu_bytes=80e9, host_bytes=1_800e9)
    assert memory["model"]["parameters"] == LLAMA_2_7B.parameters
    assert memory["zero_1"]["fits"] is True  # 27 GB of weights and gradients beside 10 GB of optimizer and the rest
    assert told(capsys, tmp_path, "--gpu-memory", "79")["memory"]["zero_1"]["fits"] is False


def test_options_change_the_levers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = ["--world-size", "16", "--sp", "2", "--zero", "2", "--gpus-per-node", "4"]
    on_host = ["--on-host", "optimizer", "--on-host", "checkpoints"]
    memory = told(capsys, tmp_path, *world, *on_host, "--gpu-memory", "30", "--host-memory", "100")["memory"]
    expected = Levers(
        ranks=16,
        sp_degree=2,
        zero_stage=2,
        ranks_per_node=4,
        optimizer_on_host=True,
        checkpoints_on_host=True,
        async_checkpoint=True,
    )
    terms = memory_terms(LLAMA_2_7B, tokens_per_rank=65_536, levers=expected)
    assert (memory["rank_bytes"], memory["node_bytes"]) == (terms.rank, terms.node)
    n = LLAMA_2_7B.parameters
    assert memory["node_bytes"] == pytest.approx(4 * (n + 2 * 4_096 * 32 * 65_536) + 2 * n + 4 * 12 * n / 16)
    assert memory["fits"] is False


def test_a_host_without_room_for_the_copy_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 8 GPUs the copy takes 81 GB."""
    note = "With train.async_checkpoint=false"
    for host_gb, fits in ((82, True), (80, False)):
        made = told(capsys, tmp_path, "--host-memory", str(host_gb))["memory"]
        assert (made["fits"], made["cheapest_levers"]) == (fits, [] if fits else None)
        assert (note in plan(capsys, tmp_path, "--host-memory", str(host_gb))) is not fits


def test_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = told(capsys, tmp_path, "--tflops", "400", "--world-size", "4")
    memory = score["memory"]
    step = memory["step_seconds"]
    assert step["compute"] == pytest.approx(3_600 * score["hours"] / score["num_steps"] * 8 / 6)
    assert (step["all_to_all"], step["overhead"]) == (0, pytest.approx(0.13))
    assert memory["gpu_hours"] == pytest.approx(step["total"] * score["num_steps"] * 4 / 3_600)


def test_a_sequence_that_outweighs_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128k tokens on two of four ranks, beside short ones: the other two wait, whatever the plan."""
    options = ["--sp", "2", "--world-size", "4"]
    score = told(capsys, tmp_path, *options, longest=131_072)
    costs = [6 * 6.738e9 * n + 6 * 32 * 4_096 * n**2 for n in (131_072, *[4_096] * 127)]
    assert score["memory"]["longest_sequence"] == 131_072
    assert score["memory"]["longest_over_step"] == pytest.approx(costs[0] / (sum(costs) / 2 / score["num_steps"]))
    assert "The longest sequence (131,072 tokens) alone takes" in plan(capsys, tmp_path, *options, longest=131_072)
    assert "The longest sequence" not in plan(capsys, tmp_path, "--micro-steps", "4", longest=4_096)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    text = plan(capsys, tmp_path, "--model", str(tmp_path), "--world-size", "32", "--sp", "32")
    assert "70.55 billion parameters, ZeRO-3, 32 ranks, 8 a node" in text
    rungs = text[text.index("\nlevers ") :].splitlines()[2:]
    named = ("no lever", "+ tiled MLP", "+ checkpoints on host", "+ optimizer on host", "+ parameters on host")
    for line, name in zip(rungs, (*named, ""), strict=False):
        assert line.startswith(name) if name else not line
    assert "DOES NOT FIT" in text
    assert "Cheapest that holds packs of 2,097,152 tokens: tiled MLP, checkpoints on host." in text
    assert "ZeRO-1 does not fit" in text
    assert "80 heads" not in text
    assert " ring, " not in text
    ring = plan(capsys, tmp_path, "--model", str(tmp_path), "--world-size", "3", "--sp", "3")
    assert "64 heads: that needs a ring" in ring
    assert " 0.00 all-to-all, " in ring
    assert " ring, " in ring


def test_the_degree_of_sequence_parallelism_is_a_lever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """65,536 tokens on 4 of 32 ranks are too many for a card; on 8 each has half of them."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    options = ["--model", str(tmp_path), "--world-size", "32", "--sp", "4", "--capacity", "16384"]
    memory = told(capsys, tmp_path, *options)["memory"]
    assert (memory["fits"], memory["cheapest_levers"], memory["cheapest_sp_degree"]) == (False, [], 8)
    text = plan(capsys, tmp_path, *options)
    rungs = text[text.index("\nlevers ") :].splitlines()[2:]
    alone = memory_terms(ModelShape.of(LLAMA_70B), tokens_per_rank=8_192, levers=Levers(ranks=32, sp_degree=8))
    assert rungs[5].split()[:5] == ["sp", "degree", "8", "alone", f"{alone.rank / 1e9:.2f}"]
    assert "Cheapest that holds packs of 65,536 tokens: sp degree 8, no lever." in text


@pytest.mark.parametrize("lever", LADDER)
def test_every_lever_is_a_setting_of_the_recipe(lever: str) -> None:
    train = TrainConfig.model_validate({SETTINGS[lever]: True, "use_gpu": True})
    levers = levers_of_recipe(RunConfig(run_dir="run", train=train))
    assert [name for name in LADDER if getattr(levers, name)] == [lever]


def test_a_model_whose_memory_cannot_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "num_experts": 8}), encoding="utf-8")
    np.save(tmp_path / "lengths.npy", np.array([5, 6]))
    options = ["--lengths", str(tmp_path / "lengths.npy"), "--capacity", "16", "--model", str(tmp_path)]
    assert main(["plan", *options, "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["memory"] is None
    assert "no forecast of memory" in output.err
    assert main(["plan", *options]) == 0
    assert "Memory" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpu-memory 0 --host-memory nan", "--gpu-memory = 0: give a size above 0\n--host-memory = nan: give"),
        ("--gpus-per-node 0", "--gpus-per-node = 0: give 1 or more"),
        ("--zero 1 --on-host parameters", "parameters on the host need ZeRO stage 3"),
    ],
)
def test_wrong_options(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "lengths.npy", np.array([5]))
    code = main(["plan", "--lengths", str(tmp_path / "lengths.npy"), "--capacity", "16", *options.split()])
    assert code == 2
    assert message in capsys.readouterr().err

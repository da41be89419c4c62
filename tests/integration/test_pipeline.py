"""The whole pipeline on a tiny random model, from corpus to report, with one command."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from longalign_ray import cli
from longalign_ray.logs import read_metrics
from longalign_ray.run_dir import STAGES, Manifest, RunDir
from tests.integration.recipes import write_recipe

pytestmark = pytest.mark.usefixtures("local_ray")


def test_texts_and_then_constructed_conversations(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Continual pre-training on plain text, whose model the conversations' run starts from, with a rate of its own."""
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": "".join(chr(97 + (n * k) % 26) for k in range(900))}) for n in range(9)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    recipe = write_recipe(
        tmp_path,
        tiny_model_dir,
        construct={"num_long": 8, "num_short": 6, "min_chars": 1_000, "max_chars": 1_500},
        data={"max_length": 3_000},
        packing={"capacity": 3_000, "write_blocks": False},
        train={"max_steps": 3},
        before={"corpus": {"paths": [str(texts)]}, "train": {"num_workers": 1, "max_steps": 2, "learning_rate": 1e-4}},
        serve={"port": port},
        evaluate={
            "needle": {"lengths": [600], "depths": [0, 100], "max_new_tokens": 4},
            "ruler": {"lengths": [1_000], "tasks": ["niah_single_1"], "samples": 1},
        },
    )
    assert cli.main(["run", str(recipe)]) == 0
    assert "needle accuracy" in capsys.readouterr().out
    run_dir = RunDir(tmp_path / "run")
    manifests = {stage: Manifest.load(run_dir.manifest(stage)) for stage in STAGES[:-1]}
    assert all(manifests.values())
    report = json.loads(run_dir.report_json.read_text(encoding="utf-8"))
    assert report["examples"]["num_examples"] == 14
    assert 0 <= report["needle"]["aligned"]["value"] <= 1
    assert report["benchmarks"]["ruler"]["aligned"]["num_tasks"] == 1
    (answer,) = (run_dir.predictions / "ruler-aligned.jsonl").read_text(encoding="utf-8").splitlines()
    room = 1_000 - 128  # for the prompt; a line more of noise, of 97 tokens, would not fit
    assert room - 97 < json.loads(answer)["values"]["prompt_tokens"] <= room

    before = RunDir(run_dir.root / "before")
    assert not before.packed.exists()
    assert not run_dir.packed.exists()
    text_steps, steps = read_metrics(before.metrics), read_metrics(run_dir.metrics)
    assert sum(row["num_tokens"] for row in text_steps) == 9 * 901
    assert all(row["num_targets"] == row["num_tokens"] - row["num_sequences"] for row in text_steps)
    assert text_steps[0]["learning_rate"] == 1e-4
    assert steps[0]["learning_rate"] == 1e-3  # each run has a schedule of its own
    (_, first), (_, middle), (_, last) = (load_weights(path) for path in (tiny_model_dir, before.model, run_dir.model))
    assert 0 < (middle - first).abs().max() < 3e-4 < (last - middle).abs().max()

    stamps = {stage: run_dir.manifest(stage).stat().st_mtime_ns for stage in STAGES[:-1]}
    assert cli.main(["run", str(recipe)]) == 0
    assert {stage: run_dir.manifest(stage).stat().st_mtime_ns for stage in STAGES[:-1]} == stamps  # all skipped


def load_weights(model_dir: Path) -> tuple[str, Any]:
    from safetensors.torch import load_file

    return next((name, tensor.float()) for name, tensor in sorted(load_file(model_dir / "model.safetensors").items()))

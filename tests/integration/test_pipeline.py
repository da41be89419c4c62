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

REAL_FILES = ("chat/self_instruct.jsonl", "long_sft/qmsum.jsonl")


def run(directory: Path, model_dir: Path, **sections: dict) -> tuple[int, RunDir, Path]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    recipe = write_recipe(
        directory,
        model_dir,
        train={"max_steps": 3},
        serve={"port": port},
        evaluate={"needle": {"lengths": [600], "depths": [0, 100], "max_new_tokens": 4}},
        **sections,
    )
    return cli.main(["run", str(recipe)]), RunDir(directory / "run"), recipe


def check_report(run_dir: RunDir) -> dict:
    text = run_dir.report_html.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    return json.loads(run_dir.report_json.read_text(encoding="utf-8"))


def test_real_conversations(
    tiny_model_dir: Path, tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [str(shared_data / name) for name in REAL_FILES]
    data = {"max_length": 2_048, "too_long": "cut_right", "heldout_fraction": 0.02, "max_heldout": 3}
    code, run_dir, recipe = run(
        tmp_path, tiny_model_dir, corpus={"paths": paths}, data=data, packing={"capacity": 2_048}
    )
    assert code == 0
    prepared = Manifest.load(run_dir.manifest("prepare"))
    assert prepared is not None
    records = sum(len(Path(path).read_text(encoding="utf-8").splitlines()) for path in paths)
    counts, dropped = prepared.counts, dict(prepared.dropped_by_reason)
    beyond_max_steps = dropped.pop("beyond_max_steps")
    assert counts["records"] == records == 466
    assert counts["examples"] + sum(dropped.values()) == records
    assert counts["planned"] + counts["heldout"] + beyond_max_steps == counts["examples"]
    assert dropped["no_target_left"] >= 70  # meetings whose first answer lies beyond 2,048 bytes
    assert len(read_metrics(run_dir.metrics)) == 3
    report = check_report(run_dir)
    assert report["heldout"].keys() == {"base", "aligned"}
    assert "needle accuracy" in capsys.readouterr().out

    stamps = {stage: run_dir.manifest(stage).stat().st_mtime_ns for stage in STAGES[1:-1]}
    assert cli.main(["run", str(recipe)]) == 0
    assert {stage: run_dir.manifest(stage).stat().st_mtime_ns for stage in STAGES[1:-1]} == stamps  # all skipped


def test_texts_and_then_constructed_conversations(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Continual pre-training on plain text, whose model the conversations' run starts from, with a rate of its own."""
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": "".join(chr(97 + (n * k) % 26) for k in range(900))}) for n in range(9)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    code, run_dir, _ = run(
        tmp_path,
        tiny_model_dir,
        construct={"num_long": 8, "num_short": 6, "min_chars": 1_000, "max_chars": 1_500},
        data={"max_length": 3_000},
        packing={"capacity": 3_000, "write_blocks": False},
        before={"corpus": {"paths": [str(texts)]}, "train": {"max_steps": 2, "learning_rate": 1e-4}},
    )
    assert code == 0
    manifests = {stage: Manifest.load(run_dir.manifest(stage)) for stage in STAGES[:-1]}
    assert all(manifests.values())
    report = check_report(run_dir)
    assert report["examples"]["num_examples"] == 14
    assert 0 <= report["needle"]["aligned"]["value"] <= 1

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


def load_weights(model_dir: Path) -> tuple[str, Any]:
    from safetensors.torch import load_file

    return next((name, tensor.float()) for name, tensor in sorted(load_file(model_dir / "model.safetensors").items()))

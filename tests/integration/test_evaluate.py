"""Needle grid, held-out loss and report against the real Serve application with two tiny models."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from longalign_ray.config import EvaluateConfig, NeedleConfig, ServeConfig
from longalign_ray.data.store import Example
from longalign_ray.data.template import load_tokenizer
from longalign_ray.evaluate.haystack import default_haystack
from longalign_ray.evaluate.needle import needle_cases
from longalign_ray.evaluate.report import write_report
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.run_dir import RunDir
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")

NEEDLES = NeedleConfig(lengths=(400, 900), depths=(0, 50), max_new_tokens=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def base_url(models: dict[str, Path], local_ray: None) -> Iterator[str]:
    from longalign_ray.serve.app import running_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running_app(models, ServeConfig(port=port), chat_template=None, dtype="float32") as url:
        yield url


def heldout_examples() -> list[Example]:
    random = np.random.default_rng(0)
    masks = [np.arange(60) >= 50, np.arange(25) % 3 == 0, np.arange(300) >= 10]
    return [
        Example(f"e{len(mask)}", random.integers(0, 256, len(mask), np.int32), 100 * mask.astype(np.uint8))
        for mask in masks
    ]


def loss_by_transformers(model_dir: Path, examples: list[Example]) -> tuple[float, float]:
    """Mean over sequences of their mean loss (Eq. 2), and mean over all targets."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    losses = []
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        of_token = -logprobs[:-1].gather(1, ids[1:, None])[:, 0]
        losses.append(of_token[torch.from_numpy(example.loss_weight[1:] > 0)])
    return float(torch.stack([loss.mean() for loss in losses]).mean()), float(torch.cat(losses).mean())


def test_evaluate_against_the_served_models(models: dict[str, Path], base_url: str, tmp_path: Path):
    examples = heldout_examples()
    config = EvaluateConfig(models=("a", "b"), concurrency=4, needle=NEEDLES, max_attempts=2)
    tokenizer = load_tokenizer(models["a"])
    run_dir = RunDir(tmp_path)
    haystack = default_haystack(0, min_chars=20_000)
    arguments: dict[str, Any] = {
        "base_url": base_url, "heldout": examples, "haystack": haystack, "tokenizer": tokenizer, "seed": 0
    }  # fmt: skip
    counts, failed = evaluate(config, run_dir, **arguments)
    assert failed == {}
    assert (counts["cases"], counts["answered"]) == (14, 14)
    for name, model_dir in models.items():
        sequence_mean, token_mean = loss_by_transformers(model_dir, examples)
        assert counts[f"{name}_heldout_loss"] == pytest.approx(sequence_mean, abs=1e-4)
        assert counts[f"{name}_heldout_token_loss"] == pytest.approx(token_mean, abs=1e-4)
        assert counts[f"{name}_needle_accuracy"] == 0.0  # random weights find nothing
        grid = json.loads((run_dir.scores / f"needle-{name}.json").read_text(encoding="utf-8"))["grid"]
        assert grid == [[0.0, 0.0], [0.0, 0.0]]
    assert counts["a_heldout_loss"] != pytest.approx(counts["b_heldout_loss"], abs=1e-3)

    again, _ = evaluate(config, run_dir, **arguments)
    assert again == counts | {"resumed": 14}

    summary = write_report(run_dir)
    assert summary["heldout"]["a"]["value"] == counts["a_heldout_loss"]
    assert f"{counts['b_heldout_loss']:.3f}" in run_dir.report_html.read_text(encoding="utf-8")


def test_the_server_counts_the_prompt_as_the_grid_does(models: dict[str, Path], base_url: str):
    tokenizer = load_tokenizer(models["a"])
    haystack = default_haystack(0, min_chars=20_000)
    for case in needle_cases(NEEDLES, haystack=haystack, tokenizer=tokenizer, seed=0):
        body = {"model": "a", **case.request}
        answer = httpx.post(base_url + case.path, json=body, timeout=60, trust_env=False).json()
        assert answer["usage"]["prompt_tokens"] == case.num_tokens <= case.attributes["length"]

"""A LoRA adapter under every ZeRO stage on two ranks: its gradient is exact, and its exports give its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from longalign_ray.train.checkpoint import export_model
from tests.integration.ranks import run_two

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("adapters")
    return directory, run_two("tests.integration.adapter_ranks", directory)[0]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.integration.watched_ranks import build
    from tests.tiny_model import write_tiny_tokenizer

    directory = tmp_path_factory.mktemp("base")
    write_tiny_tokenizer(directory)
    build(torch.float32, packed=False).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("place", ["", "-shared"])
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_gradient_is_that_of_one_sequence_at_a_time(
    trained: tuple[Path, dict[str, Any]], stage: str, place: str
) -> None:
    assert trained[1][stage + place] < 1e-5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_over_4_bit_weights_it_resumes_bitwise_and_merges_into_the_model_as_it_was(
    trained: tuple[Path, dict[str, Any]], base_dir: Path, tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    from tests.integration.adapter_ranks import ADAPTER

    (first, second), resumed = trained[1][f"{stage} in 4 bits"]
    assert second < first
    assert resumed == [second]
    checkpoint = trained[0] / f"4bit-stage-{stage}"
    adapter = ADAPTER.model_copy(update={"quantize": "4bit"})
    for form in ("merged", "adapter"):
        export_model(checkpoint, base_dir, tmp_path / form, dtype="float32", adapter=adapter, form=form)
    base, merged = (load_file(path / "model.safetensors") for path in (base_dir, tmp_path / "merged"))
    added = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (added[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    change = merged[f"{name}.weight"] - base[f"{name}.weight"]
    torch.testing.assert_close(change, 3 * b @ a, rtol=1e-4, atol=1e-5)  # alpha 12 over rank 4
    assert change.any()


def logits_of(model: Any) -> torch.Tensor:
    from tests.integration.adapter_ranks import PROBE

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROBE])).logits[0]


@pytest.mark.parametrize("stage", ["0", "3", "3-shared"])
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_plain_transformers_or_peft_gives_the_trained_logits(
    trained: tuple[Path, dict[str, Any]], base_dir: Path, tmp_path: Path, stage: str, form: Literal["merged", "adapter"]
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from tests.integration.adapter_ranks import ADAPTER

    checkpoint = trained[0] / f"stage-{stage}"
    export_model(checkpoint, base_dir, tmp_path, dtype="float32", adapter=ADAPTER, form=form)
    assert (tmp_path / "config.json").exists() == (form == "merged")
    loader = AutoModelForCausalLM if form == "merged" else AutoPeftModelForCausalLM
    model = loader.from_pretrained(str(tmp_path))
    assert type(model).__name__ == ("LlamaForCausalLM" if form == "merged" else "PeftModelForCausalLM")
    expected = torch.load(checkpoint / "logits.pt")
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=2e-5)
    before = logits_of(AutoModelForCausalLM.from_pretrained(str(base_dir)))
    assert (expected - before).abs().max() > 0.1, "the adapter changes nothing"

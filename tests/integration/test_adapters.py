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
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
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
    trained: tuple[Path, dict[str, float]], stage: str, place: str
) -> None:
    assert trained[1][stage + place] < 1e-5


def logits_of(model: Any) -> torch.Tensor:
    from tests.integration.adapter_ranks import PROBE

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([PROBE])).logits[0]


@pytest.mark.parametrize("stage", ["0", "3", "3-shared"])
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_plain_transformers_or_peft_gives_the_trained_logits(
    trained: tuple[Path, dict[str, float]],
    base_dir: Path,
    tmp_path: Path,
    stage: str,
    form: Literal["merged", "adapter"],
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

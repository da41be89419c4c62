"""Context extension: what stands in the configuration, what is refused, and the logits of the exported model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from longalign_ray.config import RopeConfig, TrainConfig
from longalign_ray.errors import ConfigError, ModelError
from longalign_ray.train.checkpoint import TrainState, export_model
from longalign_ray.train.model import load_for_training
from longalign_ray.train.rope import check_window, extended, model_config, ntk_factor
from tests.tiny_model import write_tiny_model

LLAMA_2 = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama for 4,096 tokens, with 16 rotary dimensions."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_dynamic_ntk_by_hand() -> None:
    """ProLong's step from 8k to 64k: 5e5 to 4.13e6."""
    assert 5e5 * ntk_factor(8, 128) == pytest.approx(4.134e6, rel=1e-3)
    assert ntk_factor(4, 4) == pytest.approx(16)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"scaling": "base", "factor": 200}, {"rope_type": "default", "rope_theta": 2e6}),
        ({"scaling": "base"}, {"rope_type": "default", "rope_theta": 1e4 * 16 ** (128 / 126)}),
        ({"scaling": "linear"}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 16}),
        ({"scaling": "linear", "factor": 20}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 20}),
        (
            {"scaling": "yarn"},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16, "original_max_position_embeddings": 4_096},
        ),
    ],
)
def test_parameters_by_hand(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    found = extended(LLAMA_2, RopeConfig(**rope, window=65_536), own_window=4_096, rotary_dims=128)
    assert found == pytest.approx(expected)
    assert LLAMA_2 == {"rope_type": "default", "rope_theta": 10_000.0}


def test_what_is_scaled_already() -> None:
    """Llama 3.1's own scaling stays under a larger base, and nothing else is put on top of it."""
    own = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    base = RopeConfig(scaling="base", factor=4, window=262_144)
    assert extended(own, base, own_window=131_072, rotary_dims=128) == {**own, "rope_theta": 2e6}
    with pytest.raises(ModelError, match=r"llama3.*model\.rope\.scaling=base"):
        extended(own, RopeConfig(scaling="yarn", window=262_144), own_window=131_072, rotary_dims=128)
    with pytest.raises(ModelError, match=r"longrope.*another model"):
        extended({**own, "rope_type": "longrope"}, base, own_window=131_072, rotary_dims=128)
    with pytest.raises(ConfigError, match=r"window = 4096 is not above"):
        extended(LLAMA_2, RopeConfig(scaling="linear", window=4_096), own_window=4_096, rotary_dims=128)


def test_sliding_layers_keep_their_embedding(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    Gemma3TextConfig(
        head_dim=8, layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2
    ).save_pretrained(tmp_path)
    before = model_config(tmp_path, None)
    after = model_config(tmp_path, RopeConfig(scaling="base", factor=10, window=2**20))
    sliding, full = "sliding_attention", "full_attention"
    assert after.rope_parameters[sliding] == before.rope_parameters[sliding]
    assert after.rope_parameters[full]["rope_theta"] == 10 * before.rope_parameters[full]["rope_theta"]
    assert after.max_position_embeddings == 2**20


def test_a_model_without_rope_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_positions=256).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no rotary embedding"):
        model_config(tmp_path, RopeConfig(scaling="base", window=512))
    with pytest.raises(ConfigError, match=r"above the 256 tokens.*: set data\.max_length <= 256$"):
        check_window(tmp_path, RopeConfig(), max_length=512, one_per_pack=False)
    with pytest.raises(ModelError, match="cannot be loaded"):
        model_config(tmp_path / "nowhere", None)


def test_examples_longer_than_the_window_need_a_setting(model_dir: Path) -> None:
    check_window(model_dir, RopeConfig(), max_length=4_096, one_per_pack=False)
    message = (
        r"max_length = 16384 is above the 4096 .*scaling=base model\.rope\.window=16384 .*multiplies the base by 4\.88"
    )
    with pytest.raises(ConfigError, match=message):
        check_window(model_dir, RopeConfig(), max_length=16_384, one_per_pack=False)
    check_window(model_dir, RopeConfig(scaling="base", window=16_384), max_length=16_384, one_per_pack=False)
    with pytest.raises(ConfigError, match="not above the model's own"):
        check_window(model_dir, RopeConfig(scaling="yarn", window=4_096), max_length=4_096, one_per_pack=False)


def test_an_unknown_window_is_not_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig

    BloomConfig(hidden_size=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    check_window(tmp_path, RopeConfig(), max_length=10**6, one_per_pack=False)


def test_yarn_of_the_model_itself_counts(tmp_path: Path) -> None:
    """Qwen2.5 with YaRN states the window it was trained for, and a factor."""
    from transformers import Qwen2Config

    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}
    Qwen2Config(max_position_embeddings=32_768, rope_parameters=yarn).save_pretrained(tmp_path)
    check_window(tmp_path, RopeConfig(), max_length=131_072, one_per_pack=False)
    with pytest.raises(ConfigError, match="above the 131072"):
        check_window(tmp_path, RopeConfig(), max_length=131_073, one_per_pack=False)


def test_frequencies_by_the_longest_of_a_pack_are_refused(tmp_path: Path) -> None:
    """Phi-3's longrope takes other frequencies for the whole pack once one sequence is longer than 4,096."""
    from transformers import Phi3Config

    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    Phi3Config(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4_096,
        rope_parameters=longrope,
    ).save_pretrained(tmp_path)
    check_window(tmp_path, RopeConfig(), max_length=4_096, one_per_pack=False)
    check_window(tmp_path, RopeConfig(), max_length=65_536, one_per_pack=True)
    with pytest.raises(ConfigError, match=r"above 4096 tokens.*longrope.*packing\.strategy=sorted"):
        check_window(tmp_path, RopeConfig(), max_length=65_536, one_per_pack=False)


@pytest.mark.parametrize(("factor", "level"), [(200, logging.INFO), (4, logging.WARNING)])
def test_a_base_below_dynamic_ntk_is_a_warning(
    model_dir: Path, caplog: pytest.LogCaptureFixture, factor: float, level: int
) -> None:
    rope = RopeConfig(scaling="base", factor=factor, window=16_384)
    with caplog.at_level(logging.INFO):
        check_window(model_dir, rope, max_length=16_384, one_per_pack=False)
    [record] = caplog.records
    assert record.levelno == level
    assert "window 4,096 -> 16,384 tokens" in record.getMessage()
    assert "dynamic NTK suggests at least x 4.88" in record.getMessage()


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(scaling="base", factor=200, window=16_384),
        RopeConfig(scaling="linear", window=16_384),
        RopeConfig(scaling="yarn", window=16_384),
    ],
    ids=lambda rope: rope.scaling,
)
def test_plain_transformers_loads_the_export_with_the_same_logits(
    model_dir: Path, tmp_path: Path, rope: RopeConfig
) -> None:
    from transformers import AutoModelForCausalLM

    trained = load_for_training(model_dir, dtype="float32", config=TrainConfig(), rope=rope).eval()
    (tmp_path / "deepspeed").mkdir()
    torch.save({"module": trained.state_dict()}, tmp_path / "deepspeed" / "mp_rank_00_model_states.pt")
    TrainState(step=1, tokens_seen=0, plan_digest="", world_size=1, zero_stage=0).save(tmp_path)
    export_model(tmp_path, model_dir, tmp_path / "model", dtype="float32", rope=rope)

    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["max_position_embeddings"] == 16_384
    assert written["rope_parameters"]["rope_type"] == ("default" if rope.scaling == "base" else rope.scaling)
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    inputs = {"cu_seq_lens_q": torch.tensor([0, 300]), "max_length_q": 300, "boundaries": (0, 300)}
    plain, before = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "model", model_dir))
    with torch.no_grad():
        expected = trained.model(input_ids=ids, use_cache=False, **inputs).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        assert (before(input_ids=ids).logits - expected).abs().max() > 1e-3  # the setting changes something

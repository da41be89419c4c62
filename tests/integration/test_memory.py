"""The forecast of memory against the measured peak of a process on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from longalign_ray.train.memory import CPU_FIXED
from tests.benchmarks.memory_by_tokens import forecast, measure

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process is read as Linux tells it"
)


WIDE_MLPS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 6_144,
    "vocab_size": 512,
}
WIDE_HEAD = {**WIDE_MLPS, "intermediate_size": 64, "vocab_size": 90_112}


@pytest.mark.parametrize(
    ("config", "tokens", "checkpointing"),
    [(WIDE_MLPS, 4_096, True), (WIDE_MLPS, 8_192, True), (WIDE_MLPS, 4_096, False), (WIDE_HEAD, 2_048, True)],
    ids=["4k", "8k", "4k without checkpointing", "head"],
)
def test_measured_peak_of_a_process(config: dict[str, int], tokens: int, checkpointing: bool) -> None:
    """AdamW steps of a model whose activations outweigh the process: narrow, with wide MLPs or many words.

    Two with many words, as the head needs most before the first one has made the moments.
    """
    measured = measure(config, tokens, steps=2 if config is WIDE_HEAD else 1, checkpointing=checkpointing)
    expected = forecast(config, tokens, fixed=measured.fixed, checkpointing=checkpointing)
    assert expected.checkpoints + expected.working > 0.7 * measured.fixed
    assert (expected.working == expected.head) == (config is WIDE_HEAD)
    assert expected.rank == pytest.approx(measured.peak, rel=0.2)
    assert measured.fixed == pytest.approx(CPU_FIXED, rel=0.35)  # it has neither Ray nor DeepSpeed

"""The forecast of memory against the measured peak of a process on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.memory_by_tokens import forecast, measure

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process is read as Linux tells it"
)


@pytest.mark.parametrize(("tokens", "checkpointing"), [(4_096, True), (8_192, True), (4_096, False)])
def test_measured_peak_of_a_process(tokens: int, checkpointing: bool) -> None:
    """An AdamW step of a model whose activations outweigh the process: narrow, with wide MLPs."""
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 6_144,
        "vocab_size": 512,
    }
    measured = measure(config, tokens, steps=1, checkpointing=checkpointing)
    expected = forecast(config, tokens, fixed=measured.fixed, checkpointing=checkpointing)
    assert expected.checkpoints + expected.working > 0.7 * measured.fixed
    assert expected.rank == pytest.approx(measured.peak, rel=0.2)

"""Two ranks, two micro-steps, uneven packs, an idle slot: the gradient is that of one sequence at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-m", "tests.integration.deepspeed_ranks"]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-3_000:] for _, error in outputs)
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize("zero_stage", ["0", "1", "2", "3"])
def test_gradient_loss_and_norm_are_exact(errors: dict[str, dict[str, float]], zero_stage: str) -> None:
    assert errors[zero_stage]["gradient"] < 1e-5
    assert errors[zero_stage]["loss"] < 1e-5
    assert errors[zero_stage]["norm"] < 1e-5

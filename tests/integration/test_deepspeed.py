"""One optimizer step over ranks, micro-steps and parts of packs: its gradient is that of one sequence at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from itertools import product

import pytest

from tests.integration.deepspeed_ranks import Case

FAMILIES = ("llama", "qwen3", "mistral", "glm4")
GRID = [
    Case(zero_stage=z, sp_degree=sp, micro_steps=k, loss=loss, family=family)
    for z, sp, k, loss, family in product((0, 1, 2, 3), (1, 2), (1, 3), ("sequence", "token"), FAMILIES)
]
DOUBLE = [Case(zero_stage=None, sp_degree=sp, family=family, dtype="float64") for sp in (1, 2) for family in FAMILIES]


def run_ranks(world_size: int, cases: list[Case]) -> dict[Case, dict[str, float]]:
    """What the ranks print, by case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-m", "tests.integration.deepspeed_ranks"]
        command += [json.dumps([dataclasses.asdict(case) for case in cases])]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(error[-3_000:] for _, error in outputs)
    return dict(zip(cases, json.loads(outputs[0][0].splitlines()[-1]), strict=True))

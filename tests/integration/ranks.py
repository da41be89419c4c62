"""Runs a module as two ranks of a gloo world, each its own process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_two(module: str, directory: Path) -> list[Any]:
    """The JSON that each rank printed last. `directory` is the module's argument."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
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
        command = [sys.executable, "-m", module, str(directory)]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [rank.communicate(timeout=300) for rank in started]
    assert [rank.returncode for rank in started] == [0, 0], "\n".join(error[-3_000:] for _, error in outputs)
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]

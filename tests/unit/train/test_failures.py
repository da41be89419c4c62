"""One rank's error explains the others, and where memory ran out the message says what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longalign_ray.config import RunConfig
from longalign_ray.errors import CheckpointError, StorageError
from longalign_ray.train.failures import Kind, explain, kind_of, less_memory

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
GONE = (
    "The actor died unexpectedly before finishing this task. Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer "
    "due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV"
)
GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:5634")


def ray_error(name: str, text: str) -> Exception:
    """As Ray gives it: its own error inside that of a health check."""
    outer = RuntimeError(f"A worker health check failed.\n{text}")
    outer.health_check_failure = type(name, (Exception,), {})(text)  # type: ignore[attr-defined]
    return outer


def config_of(**train: Any) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "x", "train": train})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckpointError("gone: out of memory"), Kind.REFUSED),
        (StorageError("runs/mine in s3 cannot be read: connection timed out"), Kind.OTHER),  # it may be back
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Kind.MEMORY),
        (MemoryError("Unable to allocate 7.11 PiB"), Kind.MEMORY),
        (RuntimeError(CPU_ALLOCATOR), Kind.MEMORY),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), Kind.MEMORY),
        (OSError(12, "Cannot allocate memory"), Kind.MEMORY),
        (ray_error("OutOfMemoryError", "1 worker(s) were killed due to the node running low on memory."), Kind.MEMORY),
        (ray_error("ActorDiedError", GONE), Kind.KILLED),
        (ValueError("weights"), Kind.OTHER),
        (GLOO, Kind.PEER),
        (ConnectionResetError(104, "reset"), Kind.PEER),
        (torch.distributed.DistBackendError("remote process exited"), Kind.PEER),
    ],
)
def test_the_kind_of_an_error(error: Exception, kind: Kind) -> None:
    assert kind_of(error) is kind


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (CheckpointError("made for another plan"), "CheckpointError: made for another plan"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "OutOfMemoryError: CUDA out of memory\nMemory ran out. Not in use",
        ),
        (ray_error("ActorDiedError", GONE), "want of memory, as `dmesg` on its machine says: Not in use yet"),
        (ValueError("weights"), "ValueError: weights"),
    ],
)
def test_a_rank_that_lost_its_peer_does_not_hide_the_cause(cause: Exception, told: str, first: int) -> None:
    message = explain({first: cause, 1 - first: GLOO}, config_of())
    assert message.startswith(f"rank {first}: ")
    assert told in message
    assert "Connection closed" not in message


def test_a_lost_peer_alone_is_told_as_that() -> None:
    assert "Another rank was gone" in explain({1: GLOO}, config_of())
    assert explain({0: ValueError("x"), 1: ValueError("y")}, config_of()) == "rank 0: ValueError: x"


def test_what_to_change_is_what_is_not_in_use() -> None:
    on_gpu = {"use_gpu": True, "num_workers": 8, "sp_degree": 2}
    assert less_memory(config_of(**on_gpu)) == (
        "Not in use yet, the cheapest first: train.tiled_mlp=true, train.offload_checkpoints=true, "
        "train.offload_optimizer=true, train.offload_parameters=true. Or lower packing.capacity (now 4096 tokens a "
        "rank) or raise train.sp_degree (now 2), so that more ranks share a pack; `longalign plan` forecasts the "
        "memory of each"
    )
    on_host = {f"offload_{name}": True for name in ("checkpoints", "optimizer", "parameters")}
    assert less_memory(config_of(**on_gpu, **on_host, tiled_mlp=True)).startswith(
        "All levers are in use: lower packing"
    )
    on_cpu = less_memory(config_of(zero_stage=1, gradient_checkpointing=False))
    assert "offload" not in on_cpu  # which moves nothing there
    assert "train.gradient_checkpointing=true, train.tiled_mlp=true, train.zero_stage=2, " in on_cpu

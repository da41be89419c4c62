"""Why ranks failed: one cause is chosen among the errors of all, and where memory ran out it says what to change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum

from longalign_ray.config import RunConfig
from longalign_ray.errors import LongAlignError, StorageError

NO_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|running low on memory", re.IGNORECASE)
"""In the words of CUDA, cuDNN and NCCL, of torch's CPU allocator, of the kernel, of Ray's memory monitor."""
KILLED = re.compile(r"OOM killer|SIGKILL")
"""Ray's account of a process that is gone, of whatever cause."""
PEER = re.compile(
    r"connection (closed|reset|refused|was reset|error)|closed by peer|broken pipe|gloo|nccl|processgroup|c10d|"
    r"collective|socket|timed out|store->get",
    re.IGNORECASE,
)
"""What a rank meets when another one is gone."""


class Kind(IntEnum):
    """Of a rank's error: the first one of several explains the others."""

    REFUSED = 0
    """A LongAlignError but for a StorageError: it would come again."""
    MEMORY = 1
    KILLED = 2
    """The process is gone, which most often is the kernel's answer to too little memory."""
    OTHER = 3
    PEER = 4


def own_error(error: BaseException) -> BaseException:
    """The error that Ray has wrapped."""
    for name in ("cause", "health_check_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return own_error(inner)
    return error


def kind_of(error: BaseException) -> Kind:
    """By type, and where there is no type of its own by the words."""
    error = own_error(error)
    text = str(error)
    if isinstance(error, LongAlignError):
        return Kind.OTHER if isinstance(error, StorageError) else Kind.REFUSED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch and of Ray
        return Kind.MEMORY
    if KILLED.search(text):  # before the next, as Ray lists a lack of memory among all that may have been
        return Kind.KILLED
    if NO_MEMORY.search(text):
        return Kind.MEMORY
    if isinstance(error, ConnectionError) or type(error).__name__.startswith("Dist") or PEER.search(text):
        return Kind.PEER
    return Kind.OTHER


def explain(failures: Mapping[int, BaseException], config: RunConfig) -> str:
    """The error of the rank that explains those of the others, by rank, with what to change if memory ran out."""
    rank = min(failures, key=lambda number: (kind_of(failures[number]), number))
    error, kind = own_error(failures[rank]), kind_of(failures[rank])
    told = f"rank {rank}: {type(error).__name__}: {error}"
    if kind is Kind.MEMORY:
        return f"{told}\nMemory ran out. {less_memory(config)}"
    if kind is Kind.KILLED:
        return (
            f"{told}\nIf the kernel ended it for want of memory, as `dmesg` on its machine says: {less_memory(config)}"
        )
    if kind is Kind.PEER:
        return f"{told}\nAnother rank was gone before Ray knew why. If its memory ran out: {less_memory(config)}"
    return told


def less_memory(config: RunConfig) -> str:
    """What a recipe may change to need less: the levers that it does not use, then the size of a rank's part."""
    own, on_gpu = config.train, config.train.use_gpu
    levers = {
        "train.gradient_checkpointing=true": not own.gradient_checkpointing,
        "train.tiled_mlp=true": not own.tiled_mlp,
        "train.offload_checkpoints=true": on_gpu and not own.offload_checkpoints,
        "train.zero_stage=2": own.zero_stage == 1 and own.max_workers > 1,
        "train.offload_optimizer=true": on_gpu and own.zero_stage > 0 and not own.offload_optimizer,
        "train.offload_parameters=true": on_gpu and own.zero_stage == 3 and not own.offload_parameters,
        "train.zero_stage=3 in another run_dir": own.zero_stage < 3 and own.max_workers > 1,
    }
    unused = ", ".join(name for name, helps in levers.items() if helps)
    return (
        (f"Not in use yet, the cheapest first: {unused}. Or " if unused else "All levers are in use: ")
        + f"lower packing.capacity (now {config.packing.capacity} tokens a rank) or raise train.sp_degree (now "
        f"{own.sp_degree}), so that more ranks share a pack; `longalign plan` forecasts the memory of each"
    )

"""Whether the disks have room for the checkpoints of a run, told before it starts."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from longalign_ray.config import AdapterConfig, RunConfig
from longalign_ray.errors import LongAlignError, ModelError
from longalign_ray.run_dir import RunDir
from longalign_ray.train.checkpoint_store import CheckpointStore

TRAINED_BYTES = 16
"""Of a trained weight, at most: itself in fp32, its fp32 master copy and two moments."""


def check_disk(config: RunConfig, run_dir: RunDir, *, model_dir: Path, ranks_are_here: bool) -> None:
    """Raises LongAlignError where the checkpoints that are kept, and one that is being written, have no room.

    Those that are there count as room. Where the ranks run on this machine, so must the temporary directory hold one:
    each rank writes its part there first.
    """
    own = config.train
    finished = [] if own.checkpoint_storage else CheckpointStore.at(run_dir.checkpoints).finished()[0]
    sizes = [sum(size for size, _ in stored.files.values()) for stored in finished]
    one = max(sizes) if sizes else checkpoint_bytes(config, tensor_shapes(model_dir))
    number, temporary = own.keep_checkpoints + int(own.keep_best), Path(tempfile.gettempdir())
    staged = one if ranks_are_here else 0
    _check_room(
        f"The temporary directory {temporary}",
        temporary,
        staged,
        "a checkpoint, whose parts the ranks write there first, needs up to",
        "free space, or set TMPDIR to a directory of a larger disk",
    )
    if own.checkpoint_storage is None:
        _check_room(
            f"run_dir = {config.run_dir}",
            run_dir.root,
            max(one, one * (number + 1) - sum(sizes)) + (staged if _share_a_disk(temporary, run_dir.root) else 0),
            f"{number} checkpoints and one that is being written need up to",
            "free space, choose another run_dir, or lower train.keep_checkpoints",
        )


def _share_a_disk(one: Path, other: Path) -> bool:
    return os.stat(one).st_dev == os.stat(other).st_dev


def _check_room(place: str, directory: Path, needed: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise LongAlignError(f"{place} has {free / 1e9:.1f} GB free, and {what} {needed / 1e9:.1f} GB more: {remedy}")


def checkpoint_bytes(config: RunConfig, shapes: Mapping[str, list[int]]) -> int:
    """Most that a checkpoint takes. Frozen weights are stored as they are, by ZeRO-2 in two places."""
    own, weights = config.train, sum(map(math.prod, shapes.values()))
    if own.adapter is None:
        return TRAINED_BYTES * weights
    is_half = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and own.use_gpu)
    frozen_bytes = (2 if is_half else 4) * (2 if own.zero_stage == 2 else 1)
    return TRAINED_BYTES * adapter_weights(own.adapter, shapes) + frozen_bytes * weights


def adapter_weights(adapter: AdapterConfig, shapes: Mapping[str, list[int]]) -> int:
    """Of two matrices of `rank` columns and rows beside each linear layer that gets one."""
    layers = [
        (name.split(".")[-2], shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed" not in name and not name.startswith("lm_head")
    ]
    wanted = adapter.target_modules or {layer for layer, _ in layers}
    return sum(adapter.rank * sum(shape) for layer, shape in layers if layer in wanted)


def tensor_shapes(model_dir: Path) -> dict[str, list[int]]:
    """Of all weights of a model, from the heads of its safetensors files: a length of 8 bytes, then JSON.

    Raises ModelError where one is no such file.
    """
    shapes: dict[str, list[int]] = {}
    for path in model_dir.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                head = json.loads(file.read(min(length, path.stat().st_size)))
            except ValueError as error:
                raise ModelError(f"{path} is no safetensors file, or half of one: get the model anew") from error
        shapes |= {name: tensor["shape"] for name, tensor in head.items() if name != "__metadata__"}
    return shapes

"""Checkpoints that are copied in memory first and become files beside training. Import after `quiet_deepspeed`."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class CopyThenWrite(TorchCheckpointEngine):
    """DeepSpeed's writer in two steps: `save` copies a file's content to the host, `write` makes the files.

    The memory of the copy is kept for the next one, which therefore must not begin before `write` has ended. On GPUs it
    is pinned, so that the copy runs at the speed of the bus.
    """

    def __init__(self, config_params: Any):
        super().__init__(config_params)
        gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
        )
        self._copies: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self._copies[path] = self._stager.stage(state_dict)

    def write(self) -> None:
        copies, self._copies = self._copies, {}
        for path, copy in copies.items():
            super().save(copy, path)

"""PackedBatch: a pack as tensors, with shifted labels, loss weights and positions.

Suffixes: T tokens of the pack, S sequences, N target positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from longalign_ray.data.store import Pack
from longalign_ray.train.loss import LossKind, shift_labels, target_weights
from longalign_ray.train.positions import reset_position_ids


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """What one rank computes in one micro-step. Only the N positions with a target reach the loss head."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    """int32[S+1], first 0, last T."""
    boundaries: tuple[int, ...]
    """The same as Python integers, so that no layer has to copy them from the device."""
    max_seqlen: int
    target_positions_N: torch.Tensor
    """int64[N], N >= 1: a pack without targets scores its first position with weight 0."""
    labels_N: torch.Tensor
    weights_N: torch.Tensor
    """float64[N]; the model rounds them to the precision of its losses."""


def to_batch(pack: Pack, *, loss: LossKind, device: torch.device | str = "cpu") -> PackedBatch:
    """The tensors of a pack on `device`."""
    labels_T = shift_labels(pack.input_ids, pack.loss_weight, pack.cu_seqlens)
    weights_T = target_weights(pack.loss_weight, pack.cu_seqlens, loss)
    positions_N = np.flatnonzero(labels_T != -100)
    if len(positions_N) == 0:
        positions_N = np.zeros(1, dtype=np.int64)

    def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(array, dtype=dtype, device=device)

    return PackedBatch(
        input_ids_T=tensor(pack.input_ids, torch.int64),
        position_ids_T=tensor(reset_position_ids(pack.cu_seqlens), torch.int64),
        cu_seqlens=tensor(pack.cu_seqlens, torch.int32),
        boundaries=tuple(pack.cu_seqlens.tolist()),
        max_seqlen=int(np.diff(pack.cu_seqlens).max()),
        target_positions_N=tensor(positions_N, torch.int64),
        labels_N=tensor(np.maximum(labels_T[positions_N], 0), torch.int64),
        weights_N=tensor(weights_T[positions_N], torch.float64),
    )


def dummy_pack() -> Pack:
    """Two tokens without a target: keeps a rank's collectives in step where the plan has no pack for it."""
    return Pack(
        input_ids=np.zeros(2, dtype=np.int32),
        loss_weight=np.zeros(2, dtype=np.uint8),
        cu_seqlens=np.array([0, 2], dtype=np.int32),
        example_ids=("dummy",),
    )

"""PackedBatch: a pack, or a rank's part of one, as tensors, with shifted labels, loss weights and positions.

Suffixes: T tokens of the pack, t of the part (t = T without sequence parallelism), S sequences of the pack, N target
positions of the part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from longalign_ray.data.store import Pack
from longalign_ray.train.loss import LossKind, shift_labels, target_weights
from longalign_ray.train.positions import reset_position_ids
from longalign_ray.train.sequence_parallel import ALONE, SequenceGroup


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """What one rank computes in one micro-step. Only the N positions with a target reach the loss head."""

    input_ids_t: torch.Tensor
    position_ids_t: torch.Tensor
    cu_seqlens: torch.Tensor
    """int32[S+1], first 0, last T."""
    boundaries: tuple[int, ...]
    """The same as Python integers, so that no layer has to copy them from the device."""
    max_seqlen: int
    target_positions_N: torch.Tensor
    """int64[N] below t, N >= 1: a part without targets scores its first position with weight 0."""
    pack_positions_N: torch.Tensor
    """int64[N] below T: the same positions, in the whole pack."""
    labels_N: torch.Tensor
    weights_N: torch.Tensor
    """float64[N]; the model rounds them to the precision of its losses."""
    sequence_group: SequenceGroup = ALONE
    """The ranks that have the other parts."""


def to_batch(
    pack: Pack, *, loss: LossKind, device: torch.device | str = "cpu", sequence_group: SequenceGroup = ALONE
) -> PackedBatch:
    """The tensors of a pack, or of this rank's part of it, on `device`.

    Labels and weights are those of the whole pack: a part's last token predicts the next part's first.
    """
    pack = _padded(pack, sequence_group.multiple)
    own = sequence_group.own_tokens(len(pack.input_ids))
    labels_T = shift_labels(pack.input_ids, pack.loss_weight, pack.cu_seqlens)
    weights_T = target_weights(pack.loss_weight, pack.cu_seqlens, loss)
    labels_t, weights_t = labels_T[own], weights_T[own]
    positions_N = np.flatnonzero(labels_t != -100)
    if len(positions_N) == 0:
        positions_N = np.zeros(1, dtype=np.int64)

    def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(array, dtype=dtype, device=device)

    return PackedBatch(
        input_ids_t=tensor(pack.input_ids[own], torch.int64),
        position_ids_t=tensor(reset_position_ids(pack.cu_seqlens)[own], torch.int64),
        cu_seqlens=tensor(pack.cu_seqlens, torch.int32),
        boundaries=tuple(pack.cu_seqlens.tolist()),
        max_seqlen=int(np.diff(pack.cu_seqlens).max()),
        target_positions_N=tensor(positions_N, torch.int64),
        pack_positions_N=tensor(own[positions_N], torch.int64),
        labels_N=tensor(np.maximum(labels_t[positions_N], 0), torch.int64),
        weights_N=tensor(weights_t[positions_N], torch.float64),
        sequence_group=sequence_group,
    )


def _padded(pack: Pack, multiple: int) -> Pack:
    """The pack with a last sequence without targets that makes its length a multiple of `multiple`."""
    missing = -len(pack.input_ids) % multiple
    if missing == 0:
        return pack
    return Pack(
        input_ids=np.append(pack.input_ids, np.zeros(missing, pack.input_ids.dtype)),
        loss_weight=np.append(pack.loss_weight, np.zeros(missing, pack.loss_weight.dtype)),
        cu_seqlens=np.append(pack.cu_seqlens, np.int32(len(pack.input_ids) + missing)),
        example_ids=(*pack.example_ids, "padding"),
    )


def dummy_pack() -> Pack:
    """Two tokens without a target: keeps a rank's collectives in step where the plan has no pack for it."""
    return Pack(
        input_ids=np.zeros(2, dtype=np.int32),
        loss_weight=np.zeros(2, dtype=np.uint8),
        cu_seqlens=np.array([0, 2], dtype=np.int32),
        example_ids=("dummy",),
    )

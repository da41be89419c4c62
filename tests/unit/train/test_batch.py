from __future__ import annotations

import numpy as np
import torch

from longalign_ray.data.store import Pack
from longalign_ray.train.batch import dummy_pack, to_batch


def test_batch_by_hand() -> None:
    pack = Pack(
        input_ids=np.array([5, 6, 7, 8, 9], np.int32),
        loss_weight=np.array([0, 100, 100, 100, 50], np.uint8),
        cu_seqlens=np.array([0, 3, 5], np.int32),
        example_ids=("a", "b"),
    )
    batch = to_batch(pack, loss="sequence")
    assert batch.position_ids_t.tolist() == [0, 1, 2, 0, 1]
    assert batch.boundaries == (0, 3, 5)
    assert batch.max_seqlen == 3
    assert batch.target_positions_N.tolist() == [0, 1, 3]
    assert batch.labels_N.tolist() == [6, 7, 9]
    assert batch.weights_N.tolist() == [0.5, 0.5, 1.0]  # one target counts whole, whatever it weighs
    assert to_batch(pack, loss="token").weights_N.tolist() == [1.0, 1.0, 0.5]
    assert batch.cu_seqlens.dtype == torch.int32


def test_dummy_pack_scores_one_position_with_weight_zero() -> None:
    batch = to_batch(dummy_pack(), loss="sequence")
    assert batch.target_positions_N.tolist() == [0]
    assert batch.weights_N.tolist() == [0.0]
    assert batch.labels_N.tolist() == [0]

"""The number format of weights and activations, by name."""

from __future__ import annotations

from typing import Literal

import torch

DtypeName = Literal["auto", "bfloat16", "float32", "float64"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def resolve_dtype(name: str, *, use_gpu: bool) -> str:
    """`name`, or for `auto` what this machine computes fast: bfloat16 on a GPU or a CPU with bf16 instructions.

    A CPU without them (no AVX512-BF16, no AMX) multiplies bf16 matrices about nine times slower than fp32 ones.
    """
    if name != "auto":
        return name
    if use_gpu:
        return "bfloat16"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"

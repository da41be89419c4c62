"""Variable-length causal attention that keeps packed sequences apart, registered with transformers as one function.

The kernel is flash-attn where it is installed, else torch's varlen kernel on a GPU, else a loop of SDPA over sequences.
No mask function is registered under the name, so transformers makes no T x T mask. Suffixes: H query heads, K key/value
heads, T tokens of the pack, D head width. Under sequence parallelism a layer has t < T of the tokens; the kernels see
all T for a share of the heads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from longalign_ray.errors import ModelError
from longalign_ray.train.ring_attention import ring_attention
from longalign_ray.train.sequence_parallel import ALONE, SequenceGroup, attend

NAME = "longalign_varlen"
QUERY_CHUNK = 1_024  # queries that share a mask where a sliding window is shorter than the sequence

Kernel = Callable[..., torch.Tensor]


def register() -> str:
    """Makes `attn_implementation="longalign_varlen"` known to transformers; returns the name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)
    return NAME


def varlen_attention(
    module: nn.Module,
    query_1HtD: torch.Tensor,
    key_1KtD: torch.Tensor,
    value_1KtD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    boundaries: tuple[int, ...] | None = None,
    sequence_group: SequenceGroup = ALONE,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output [1, t, H, D] in which a token sees the tokens before it in its own sequence only.

    Boundaries are those of the whole pack, of which `sequence_group` holds t tokens on each rank.
    Raises ModelError where the boundaries did not reach this layer, or where the model asks for something that the
    kernels do not compute (attention dropout, softcap, sinks): better than a contaminated or different result.
    """
    if boundaries is None or cu_seq_lens_q is None or max_length_q is None:
        raise ModelError(
            f"{type(module).__name__} did not pass the sequence boundaries on to attention; "
            "packed sequences would see one another, so this model cannot be trained packed"
        )
    unsupported = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if dropout or unsupported:
        raise ModelError(
            f"{type(module).__name__} asks for {', '.join(unsupported) or 'attention dropout'}, which "
            "variable-length attention does not offer here; choose a model without it"
        )
    in_ring = sequence_group.ring_degree > 1
    kernel = partial(
        partial(ring_attention, group=sequence_group) if in_ring else _select_kernel(query_1HtD.device),
        cu_seqlens=cu_seq_lens_q,
        boundaries=boundaries,
        max_seqlen=max_length_q,
        scaling=scaling if scaling is not None else query_1HtD.shape[-1] ** -0.5,
        sliding_window=sliding_window,
    )
    return attend(kernel, query_1HtD[0], key_1KtD[0], value_1KtD[0], sequence_group)[None], None


def _select_kernel(device: torch.device) -> Kernel:
    if device.type != "cuda":
        return sdpa_loop
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return partial(flash_attn_kernel, function=flash_attn_varlen_func)
    from torch.nn.attention.varlen import varlen_attn

    return partial(torch_varlen_kernel, function=varlen_attn)


def sdpa_loop(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    *,
    boundaries: tuple[int, ...],
    scaling: float,
    sliding_window: int | None,
    **_: Any,
) -> torch.Tensor:
    """[T, H, D]: SDPA over one sequence after another, on any device."""
    pieces = []
    for start, end in pairwise(boundaries):
        segment = slice(start, end)
        q, k, v = query_HTD[:, segment], key_KTD[:, segment], value_KTD[:, segment]
        if sliding_window is None or sliding_window >= end - start:
            pieces.append(_causal(q, k, v, scaling))
        else:
            pieces.append(_windowed(q, k, v, scaling, sliding_window))
    return torch.cat(pieces, dim=1).transpose(0, 1)


def _causal(q_HTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, scaling: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q_HTD[None], k_KTD[None], v_KTD[None], is_causal=True, scale=scaling, enable_gqa=len(q_HTD) != len(k_KTD)
    )[0]


def _windowed(
    q_HTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    """Causal attention to the last `window` tokens, self included; a mask is QUERY_CHUNK x (QUERY_CHUNK + window)."""
    pieces = []
    length = q_HTD.shape[1]
    for first in range(0, length, QUERY_CHUNK):
        last, lowest = min(first + QUERY_CHUNK, length), max(0, first - window + 1)
        distance = torch.arange(first, last, device=q_HTD.device)[:, None] - torch.arange(
            lowest, last, device=q_HTD.device
        )
        visible = (distance >= 0) & (distance < window)
        pieces.append(
            F.scaled_dot_product_attention(
                q_HTD[None, :, first:last],
                k_KTD[None, :, lowest:last],
                v_KTD[None, :, lowest:last],
                attn_mask=visible,
                scale=scaling,
                enable_gqa=len(q_HTD) != len(k_KTD),
            )[0]
        )
    return torch.cat(pieces, dim=1)


def flash_attn_kernel(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    *,
    function: Callable[..., Any],
    **spec: Any,
) -> torch.Tensor:
    """[T, H, D] by `flash_attn_varlen_func`, which is `function`; tests give a stand-in."""
    window = spec["sliding_window"]
    return function(
        query_HTD.transpose(0, 1),
        key_KTD.transpose(0, 1),
        value_KTD.transpose(0, 1),
        spec["cu_seqlens"],
        spec["cu_seqlens"],
        spec["max_seqlen"],
        spec["max_seqlen"],
        softmax_scale=spec["scaling"],
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


def torch_varlen_kernel(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    *,
    function: Callable[..., Any],
    **spec: Any,
) -> torch.Tensor:
    """[T, H, D] by torch's `varlen_attn`, which is `function`; its causal flag is a right window of 0."""
    window = spec["sliding_window"]
    return function(
        query_HTD.transpose(0, 1),
        key_KTD.transpose(0, 1),
        value_KTD.transpose(0, 1),
        spec["cu_seqlens"],
        spec["cu_seqlens"],
        spec["max_seqlen"],
        spec["max_seqlen"],
        scale=spec["scaling"],
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=len(query_HTD) != len(key_KTD),
    )

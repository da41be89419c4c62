"""Variable-length causal attention that keeps packed sequences apart, registered with transformers as one function.

The kernel is flash-attn where it is installed (3 on Hopper, else 2), else torch's varlen kernel on a GPU, else a loop
of SDPA over sequences.
No mask function is registered under the name, so transformers makes no T x T mask. Suffixes: H query heads, K key/value
heads, T tokens of the pack, D head width. Under sequence parallelism a layer has t < T of the tokens; the kernels see
all T for a share of the heads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from longalign_ray.errors import ModelError
from longalign_ray.train.ring_attention import ring_attention
from longalign_ray.train.sequence_parallel import ALONE, SequenceGroup, attend

NAME = "longalign_varlen"
QUERY_CHUNK = 1_024  # queries that share a mask where a sliding window is shorter than the sequence, or scores capped
UNSUPPORTED = {  # what some families pass to attention, and no kernel here computes
    "s_aux": "attention sinks (s_aux)",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "indices": "sparse attention (indices)",
    "block_indices": "sparse attention (block_indices)",
}
LAYER_TYPES = ("full_attention", "sliding_attention")  # those of transformers that the kernels compute

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
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    boundaries: tuple[int, ...] | None = None,
    sequence_group: SequenceGroup = ALONE,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output [1, t, H, D] in which a token sees the tokens before it in its own sequence only.

    Boundaries are those of the whole pack, of which `sequence_group` holds t tokens on each rank.
    Raises ModelError where the boundaries did not reach this layer, or where the model asks for something that the
    kernels do not compute (attention dropout, sinks, a mask of its own, chunks, a window that is in the mask alone):
    better than a contaminated or different result.
    """
    if boundaries is None or cu_seq_lens_q is None or max_length_q is None:
        raise ModelError(
            f"{type(module).__name__} did not pass the sequence boundaries on to attention; "
            "packed sequences would see one another, so this model cannot be trained packed"
        )
    refuse_unsupported(module, attention_mask, dropout=dropout, sliding_window=sliding_window, settings=kwargs)
    in_ring = sequence_group.ring_degree > 1
    kernel = partial(
        partial(ring_attention, group=sequence_group) if in_ring else _select_kernel(query_1HtD.device),
        cu_seqlens=cu_seq_lens_q,
        boundaries=boundaries,
        max_seqlen=max_length_q,
        scaling=scaling if scaling is not None else query_1HtD.shape[-1] ** -0.5,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return attend(kernel, query_1HtD[0], key_1KtD[0], value_1KtD[0], sequence_group)[None], None


def refuse_unsupported(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float,
    sliding_window: int | None,
    settings: dict[str, Any],
) -> None:
    """Raises ModelError where a layer asks for what no kernel here computes; `settings` is what else it passed."""
    unsupported = [text for name, text in UNSUPPORTED.items() if settings.get(name) is not None]
    if dropout:
        unsupported.append("attention dropout")
    if attention_mask is not None:  # transformers makes none for us
        unsupported.append("a mask of its own")
    layer_type = _layer_type(module)
    if layer_type not in LAYER_TYPES:
        unsupported.append(f"a layer of type {layer_type}")
    elif layer_type == "sliding_attention" and sliding_window is None:
        unsupported.append("a sliding window by a mask alone")
    if unsupported:
        raise ModelError(
            f"{type(module).__name__} asks for {', '.join(unsupported)}, which variable-length attention does not "
            "offer here; choose a model without it"
        )


def _layer_type(module: nn.Module) -> str:
    """By which of its masks transformers' own attention would compute the layer; a config may name a type a layer."""
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types and number is not None:
        return types[number]
    return "full_attention" if types or not getattr(config, "sliding_window", None) else "sliding_attention"


@cache
def _select_kernel(device: torch.device) -> Kernel:
    if device.type != "cuda":
        return sdpa_loop
    if importlib.util.find_spec("flash_attn_interface") and torch.cuda.get_device_capability(device)[0] == 9:
        from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return partial(flash_attn_kernel, function=flash_attn_varlen_func)
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
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """[T, H, D]: SDPA over one sequence after another, on any device; plain products where scores are capped."""
    pieces = []
    for start, end in pairwise(boundaries):
        segment = slice(start, end)
        q, k, v = query_HTD[:, segment], key_KTD[:, segment], value_KTD[:, segment]
        if softcap is not None:
            pieces.append(_capped(q, k, v, scaling, sliding_window or end - start, softcap))
        elif sliding_window is None or sliding_window >= end - start:
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
        visible = _visible(first, lowest, last, window, q_HTD.device)
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


def _visible(first: int, lowest: int, last: int, window: int, device: torch.device) -> torch.Tensor:
    """bool[last - first, last - lowest]: which of the keys lowest.. the queries first.. see."""
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(lowest, last, device=device)
    return (distance >= 0) & (distance < window)


def _capped(
    q_HTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, scaling: float, window: int, softcap: float
) -> torch.Tensor:
    """The same with scores softcap * tanh(score / softcap), as in Gemma 2; backward recomputes a chunk's scores."""

    def chunk(q_HCD: torch.Tensor, k_KSD: torch.Tensor, v_KSD: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        q_KGCD = q_HCD.unflatten(0, (len(k_KSD), -1))  # G query heads share a key head
        scores_KGCS = softcap * torch.tanh(q_KGCD @ k_KSD[:, None].mT * scaling / softcap)
        scores_KGCS = scores_KGCS.masked_fill(~visible, float("-inf"))
        shares_KGCS = scores_KGCS.softmax(-1, dtype=torch.promote_types(q_HCD.dtype, torch.float32))
        return (shares_KGCS.to(q_HCD.dtype) @ v_KSD[:, None]).flatten(0, 1)

    pieces = []
    length = q_HTD.shape[1]
    for first in range(0, length, QUERY_CHUNK):
        last, lowest = min(first + QUERY_CHUNK, length), max(0, first - window + 1)
        visible = _visible(first, lowest, last, window, q_HTD.device)
        keys = slice(lowest, last)
        pieces.append(
            checkpoint(chunk, q_HTD[:, first:last], k_KTD[:, keys], v_KTD[:, keys], visible, use_reentrant=False)
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
    """[T, H, D] by `flash_attn_varlen_func` of either version, which is `function`; tests give a stand-in."""
    window = spec["sliding_window"]
    capped = {} if spec["softcap"] is None else {"softcap": spec["softcap"]}  # known to flash-attn from 2.6 on
    out = function(
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
        **capped,
    )
    return out[0] if isinstance(out, tuple) else out  # the first releases of flash-attn 3 add the log-sum-exp


def torch_varlen_kernel(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    *,
    function: Callable[..., Any],
    **spec: Any,
) -> torch.Tensor:
    """[T, H, D] by torch's `varlen_attn`, which is `function`; its causal flag is a right window of 0.

    Raises ModelError where scores are to be capped, which it cannot.
    """
    if spec["softcap"] is not None:
        raise ModelError(
            f"the model caps its attention scores (softcap {spec['softcap']:g}), which torch's variable-length kernel "
            "does not offer; install flash-attn >= 2.6"
        )
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

"""One forward pass of a transformers model over tokens of many requests, and which models can be computed so.

Suffixes: T tokens of the step, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longalign_ray.errors import ModelError
from longalign_ray.serve.kv_cache import KVCache, Segment
from longalign_ray.serve.lora import add_adapters, group_rows, step_rows
from longalign_ray.serve.ragged_attention import RaggedStep, register
from longalign_ray.train.attention import LAYER_TYPES

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that transformers chooses by the longest text of the batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens of one request that follow those in its cache; logits are wanted of the last `num_rows`."""

    cache: KVCache
    token_ids: Sequence[int]
    num_rows: int


@torch.inference_mode()
def forward(model: Any, pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """fp32 logits [num_rows, V] of each piece; the caches then hold the pieces' tokens too.

    Where it raises, the caches are as before.
    """
    # Neighbours that share a document read it together, and an adapter's rows are multiplied together.
    order = sorted(range(len(pieces)), key=lambda number: _group_key(pieces[number].cache))
    ordered = [pieces[number] for number in order]
    ids = [token_id for piece in ordered for token_id in piece.token_ids]
    positions = [torch.arange(piece.cache.length, piece.cache.length + len(piece.token_ids)) for piece in ordered]
    step = RaggedStep([(piece.cache, len(piece.token_ids)) for piece in ordered])
    step_rows.set(group_rows([(piece.cache.adapter, len(piece.token_ids)) for piece in ordered]))
    logits_RV = model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.cat(positions)[None].to(model.device),
        use_cache=False,
        logits_to_keep=_wanted_rows(ordered).to(model.device),
        ragged_step=step,
    ).logits[0]
    if sorted(step.layers_seen) != list(range(model.config.get_text_config().num_hidden_layers)):
        raise ModelError(f"{type(model).__name__} has layers without attention, whose state this engine does not keep")
    for piece in ordered:
        piece.cache.own.length += len(piece.token_ids)
    logits = logits_RV.float().split([piece.num_rows for piece in ordered])
    return [logits[order.index(number)] for number in range(len(pieces))]


def _group_key(cache: KVCache) -> tuple[str, int, int]:
    if not cache.shared:
        return cache.adapter or "", 0, 0
    return cache.adapter or "", id(cache.shared[0].segment), cache.shared[0].length


def _wanted_rows(pieces: Sequence[Piece]) -> torch.Tensor:
    """int64[R]: the last rows of each piece, counted through the step."""
    rows, end = [torch.empty(0, dtype=torch.int64)], 0
    for piece in pieces:
        end += len(piece.token_ids)
        rows.append(torch.arange(end - piece.num_rows, end))
    return torch.cat(rows)


def load_model(
    model_dir: str | Path, *, dtype: str, device: str, adapters: Mapping[str, str | Path] | None = None
) -> Any:
    """A causal language model in eval mode, with ragged attention and LoRA adapters by name.

    Raises ModelError where the directory does not hold one, its attention is not one that the kernels compute, or an
    adapter does not fit it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from longalign_ray.precision import DTYPES

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=DTYPES[dtype],
            attn_implementation=register(),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{model_dir} cannot be loaded for serving ({error}); give a directory with config.json and safetensors"
        ) from error
    model = model.to(device).eval()
    add_adapters(model, adapters or {})
    check_model(model, adapters or {})
    return model


def check_model(model: Any, adapters: Iterable[str] = ()) -> None:
    """Raises ModelError where the model cannot be computed in ragged steps; tries a short prompt and a token."""
    config = model.config.get_text_config()
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if other:
        raise ModelError(
            f"{type(model).__name__} has layers of type {', '.join(other)}, which this engine does not serve"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(each.get("rope_type") for each in rope.values() if isinstance(each, dict))}
    if found := sorted(kinds & set(BATCH_DEPENDENT_ROPE)):
        raise ModelError(
            f"{type(model).__name__} has rotary embeddings of type {found[0]}, which depend on the longest text "
            "computed beside a request; serve it with vLLM, or set another rope_type in its config.json"
        )
    for adapter in (None, *adapters):
        cache = KVCache([0, 0, 0], own=Segment(), adapter=adapter)
        forward(model, [Piece(cache, [0, 0], 0)])
        forward(model, [Piece(cache, [0], 1)])

"""Context extension: a model's rotary embedding (RoPE) for longer sequences than it was made for.

Pair j of d rotary dimensions turns by the angle position * base^(-2j/d). Three ways to slow it down, all kept in the
model's own configuration, so that the exported model runs anywhere: a larger base (LongAlign section 4.1: x 200 for
64k; ABF, arXiv 2309.16039), positions divided by a factor (arXiv 2306.15595), and YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longalign_ray.config import RopeConfig
from longalign_ray.errors import ConfigError, ModelError
from longalign_ray.train.model_shape import check_dense

logger = logging.getLogger(__name__)

BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose frequencies change with the longest sequence of a forward pass, and so of a pack."""


def ntk_factor(ratio: float, rotary_dims: int) -> float:
    """Factor of the base by the dynamic NTK rule, ratio^(d / (d - 2)), for a window `ratio` times as long.

    8k to 64k with 128 dimensions: 8.27, so a base of 5e5 becomes 4.13e6.
    """
    return ratio ** (rotary_dims / (rotary_dims - 2))


def extended(parameters: Mapping[str, Any], rope: RopeConfig, *, own_window: int, rotary_dims: int) -> dict[str, Any]:
    """The `rope_parameters` of a model (of one kind of its layers) under `rope`, which must not be `none`.

    Raises ConfigError where a factor must be derived and the window is no longer than the model's own, and ModelError
    where the embedding is scaled already in a way that cannot be combined.
    """
    assert rope.window is not None
    ratio = rope.window / own_window
    if rope.factor is None and ratio <= 1:
        raise ConfigError(
            f"model.rope.window = {rope.window} is not above the model's own {own_window}: raise it, give "
            "model.rope.factor, or leave model.rope out"
        )
    kind = parameters.get("rope_type", "default")
    if kind in BY_LENGTH or (rope.scaling != "base" and kind != "default"):
        raise ModelError(
            f"the model's rotary embedding is scaled already (rope_type {kind}), which model.rope.scaling = "
            f"{rope.scaling} cannot be combined with: "
            + ("choose another model" if kind in BY_LENGTH else "set model.rope.scaling=base")
        )
    if rope.scaling == "base":
        factor = rope.factor or ntk_factor(ratio, rotary_dims)
        return {**parameters, "rope_theta": float(parameters["rope_theta"]) * factor}
    scaled = {**parameters, "rope_type": rope.scaling, "factor": rope.factor or ratio}
    return scaled | ({"original_max_position_embeddings": own_window} if rope.scaling == "yarn" else {})


def model_config(model_dir: str | Path, rope: RopeConfig | None) -> Any:
    """The Hugging Face configuration of a model directory with `rope` applied: its RoPE parameters and its window.

    Layers with a sliding window keep their embedding, as none of their distances grows. Raises ModelError where the
    directory holds no configuration that transformers knows, or that of a model of experts, or `rope` is given and the
    model has no RoPE.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir} cannot be loaded: {error}") from error
    check_dense(config.get_text_config().to_dict())
    if rope is None or rope.scaling == "none":
        return config
    text = config.get_text_config()
    parameters, own_window = getattr(text, "rope_parameters", None), _window(text)
    if not parameters or own_window is None:
        raise ModelError(
            f"{model_dir} has no rotary embedding in its configuration (rope_parameters, max_position_embeddings), so "
            "model.rope cannot extend it: leave it out or choose another model"
        )
    by_layer = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if by_layer:
        text.rope_parameters = {
            name: value
            if "sliding" in name or not value
            else extended(value, rope, own_window=own_window, rotary_dims=_rotary_dims(text, value))
            for name, value in parameters.items()
        }
    else:
        dims = _rotary_dims(text, parameters)
        text.rope_parameters = extended(parameters, rope, own_window=own_window, rotary_dims=dims)
    text.max_position_embeddings = max(own_window, rope.window or 0)
    return config


def check_window(model_dir: Path, rope: RopeConfig, *, max_length: int, one_per_pack: bool) -> None:
    """Raises ConfigError where examples of `max_length` tokens do not fit the model, naming what to set.

    A model that states no window fits. So does one whose embedding changes with the length of the pack, as long as a
    pack holds one example. Logs what the dynamic NTK rule says about a base that is given.
    """
    text = model_config(model_dir, None).get_text_config()
    window, parameters = _window(text), getattr(text, "rope_parameters", None) or {}
    if window is None:
        return
    if rope.scaling == "none":
        trained = parameters.get("original_max_position_embeddings", window)
        if parameters.get("rope_type") in BY_LENGTH and max_length > trained and not one_per_pack:
            raise ConfigError(
                f"data.max_length = {max_length}: above {trained} tokens this model's rotary embedding (rope_type "
                f"{parameters['rope_type']}) changes with the longest sequence of a pack, so that the others would be "
                f"trained wrongly: set data.max_length <= {trained}, or packing.strategy=sorted"
            )
        if max_length > window:
            remedy = f"set data.max_length <= {window}"
            if parameters:
                factor = ntk_factor(max_length / window, _rotary_dims(text, parameters))
                remedy = (
                    f"set model.rope.scaling=base model.rope.window={max_length} (dynamic NTK then multiplies the base "
                    f"by {factor:.3g}; model.rope.factor=200 is the paper's), or {remedy}"
                )
            raise ConfigError(
                f"data.max_length = {max_length} is above the {window} tokens that the model {model_dir} was made for "
                f"(max_position_embeddings): {remedy}"
            )
        return
    model_config(model_dir, rope)  # raises where it cannot be applied
    told = f"model.rope: {rope.scaling}, window {window:,} -> {max(window, rope.window or 0):,} tokens"
    if rope.scaling == "base" and rope.factor is not None and rope.window is not None:
        suggested = ntk_factor(max(rope.window / window, 1.0), _rotary_dims(text, parameters))
        level = logging.WARNING if rope.factor < suggested else logging.INFO
        logger.log(level, "%s; base x %g, dynamic NTK suggests at least x %.3g", told, rope.factor, suggested)
    else:
        logger.info("%s", told)


def _window(text: Any) -> int | None:
    """Tokens that a model was made for; with a scaled embedding, those that its scaling gives."""
    window = getattr(text, "max_position_embeddings", None)
    if not isinstance(window, int) or window < 1:
        return None
    parameters = getattr(text, "rope_parameters", None) or {}
    factor, trained = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    return max(window, int(factor * trained)) if factor and trained else window


def _rotary_dims(text: Any, parameters: Mapping[str, Any]) -> int:
    """Rotary dimensions of a head; for a model with several kinds of layers, of the first kind that has some."""
    inner = next((value for value in parameters.values() if isinstance(value, dict) and value), parameters)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head_dim * inner.get("partial_rotary_factor", 1.0))

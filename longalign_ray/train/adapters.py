"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: frozen weights W and trained B A beside them, of low rank.

The layers are put into the model in place, so that packing, attention, loss head and ZeRO see the model they know.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import torch

from longalign_ray.config import AdapterConfig
from longalign_ray.errors import CheckpointError, LongAlignError, ModelError
from longalign_ray.train.model import PackedLM, TokenLossHead

NAME = "default"  # peft's name of the one adapter


def check_installed(config: AdapterConfig) -> None:
    """Raises LongAlignError, before any rank starts, where peft, or bitsandbytes for 4 bits, is missing."""
    if importlib.util.find_spec("peft") is None:
        raise LongAlignError("train.adapter needs peft, which is not installed: pip install peft, or leave it out")
    if config.quantize == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise LongAlignError(
            "train.adapter.quantize = 4bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or "
            "set it to none"
        )


def lora_config(config: AdapterConfig) -> Any:
    """peft's LoraConfig."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or "all-linear",  # all but the head
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PackedLM, config: AdapterConfig, *, seed: int) -> None:
    """Freezes the weights and puts an adapter beside those of the linear layers; B is 0, so the model is still itself.

    Raises ModelError where `target_modules` names no layer of the model, or its head.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same A on every rank
        try:
            inject_adapter_in_model(lora_config(config), model.model, adapter_name=NAME)
        except ValueError as error:
            raise ModelError(
                f"train.adapter.target_modules does not fit {type(model.model).__name__}: {error}"
            ) from error
    if not isinstance(model.model.lm_head, TokenLossHead):
        raise ModelError(
            "train.adapter.target_modules names the head, whose loss is computed in chunks from its plain weight: "
            "leave lm_head out"
        )


def load_adapter(
    model: Any, weights: Mapping[str, torch.Tensor], config: AdapterConfig, *, form: Literal["merged", "adapter"]
) -> Any:
    """The base model with the adapter of a checkpoint: `merged` into its weights, or as a peft model.

    weights: by the names of the trained model, frozen ones among them. W + B A is added in fp32 and rounded once.
    Raises CheckpointError where the adapter is missing or of another shape.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    adapted = get_peft_model(model, lora_config(config), adapter_name=NAME, autocast_adapter_dtype=False)
    prefix = "base_model.model."
    wanted = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    trained = {prefix + name: weight.float() for name, weight in weights.items() if ".lora_" in name}
    shapes = {name: parameter.shape for name, parameter in adapted.named_parameters()}
    if set(trained) != wanted or any(shapes[name] != weight.shape for name, weight in trained.items()):
        raise CheckpointError(
            f"the checkpoint holds {len(trained)} adapter weights, and train.adapter asks for {len(wanted)} of rank "
            f"{config.rank}: export with the train.adapter that was trained"
        )
    for name, parameter in adapted.named_parameters():
        if name in trained:
            parameter.data = trained[name]
    if form == "adapter":
        return adapted
    with torch.no_grad():
        layers: list[Any] = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
        for layer in layers:
            weight = layer.get_base_layer().weight
            weight.copy_((weight.float() + layer.get_delta_weight(NAME)).to(weight.dtype))
    return adapted.unload()

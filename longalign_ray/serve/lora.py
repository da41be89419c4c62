"""LoRA adapters beside one copy of a model's weights, each for the rows of a step that ask for it.

Rows of an adapter lie together in a step, so that its two small products in a layer are computed once for all of them
(S-LoRA, arXiv 2311.03285, groups them alike):

    rows      [ base | base | adapter a | adapter a | adapter b ]
    products  [    x W       over all rows, once                ]
            +               [  x A_a B_a            ][ x A_b B_b ]

Suffixes: T tokens of the step, I and O inputs and outputs of a layer, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longalign_ray.errors import ModelError

PREFIX = "base_model.model."  # of peft's names of weights
NOT_SERVED = (
    "use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "alpha_pattern", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings of peft by which a layer computes something else than x W + x A B alpha / r."""
REMEDY = "merge it into its base model (peft's merge_and_unload, or export.adapter=merged) and serve that"


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What peft's adapter_config.json says."""

    rank: int
    """The largest of its layers."""
    alpha: float
    rank_stabilised: bool
    """Scaled by alpha / sqrt(r) (arXiv 2312.03732)."""

    def scale(self, rank: int) -> float:
        return self.alpha / (rank**0.5 if self.rank_stabilised else rank)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """An adapter's two matrices of a layer, the scale in the second."""

    a_rI: torch.Tensor
    b_Or: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which adapter's rows stand where in a step of `num_tokens`; the other rows are the base model's."""

    num_tokens: int
    of_adapter: Sequence[tuple[str, slice]]


step_rows: ContextVar[StepRows] = ContextVar("step_rows")
"""Of the forward pass under way: layers get tokens alone, and not whose they are."""


def group_rows(pieces: Sequence[tuple[str | None, int]]) -> StepRows:
    """Rows of each adapter, of pieces (adapter, number of tokens) in the order of the step."""
    groups: list[tuple[str, slice]] = []
    row = 0
    for name, num_tokens in pieces:
        if name is not None and groups and groups[-1][0] == name and groups[-1][1].stop == row:
            groups[-1] = name, slice(groups[-1][1].start, row + num_tokens)
        elif name is not None:
            groups.append((name, slice(row, row + num_tokens)))
        row += num_tokens
    return StepRows(row, groups)


def read_settings(directory: str | Path) -> AdapterSettings:
    """Raises ModelError where the directory holds no LoRA adapter in peft's layout, or one that is not served."""
    file = Path(directory) / "adapter_config.json"
    try:
        read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _check_served(read, file)
        largest = max([int(read["r"]), *(read.get("rank_pattern") or {}).values()])
        return AdapterSettings(largest, float(read["lora_alpha"]), bool(read.get("use_rslora")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{directory} holds no adapter ({type(error).__name__}: {error}); give a directory with peft's "
            "adapter_config.json and adapter_model.safetensors"
        ) from error


def _check_served(read: Mapping[str, Any], file: Path) -> None:
    found = [] if read["peft_type"] == "LORA" else [f"peft_type = {read['peft_type']}"]
    found += [] if read.get("bias", "none") == "none" else [f"bias = {read['bias']}"]
    found += [f"{name} = {read[name]}" for name in NOT_SERVED if read.get(name)]
    if found:
        raise ModelError(f"{file} has {', '.join(found)}, which is not served beside a model: {REMEDY}")


def add_adapters(model: Any, directories: Mapping[str, str | Path]) -> None:
    """Makes the model's linear layers add, to the rows of each adapter, its low-rank products.

    Raises ModelError where an adapter does not fit the model, or asks for more than such products.
    """
    of_layer: dict[str, dict[str, LowRank]] = {}
    for name, directory in directories.items():
        for layer, matrices in _load(model, directory).items():
            of_layer.setdefault(layer, {})[name] = matrices
    for layer, adapters in of_layer.items():
        model.get_submodule(layer).register_forward_hook(partial(_add_products, adapters))


def _add_products(
    adapters: Mapping[str, LowRank], layer: nn.Module, inputs: tuple[torch.Tensor], out_1TO: torch.Tensor
) -> torch.Tensor:
    rows = step_rows.get()
    if not rows.of_adapter:
        return out_1TO
    (x_1TI,) = inputs
    if x_1TI.shape[-2] != rows.num_tokens:
        raise ModelError(f"an adapter's layer {layer} computes other rows than the step's: {REMEDY}")
    for name, own in rows.of_adapter:
        if name in adapters:
            matrices = adapters[name]
            out_1TO[..., own, :] += x_1TI[..., own, :] @ matrices.a_rI.mT @ matrices.b_Or.mT
    return out_1TO


def _load(model: Any, directory: str | Path) -> dict[str, LowRank]:
    """The matrices by layer, in the model's dtype and on its device."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = read_settings(directory)
    try:
        weights = load_file(Path(directory) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory} holds no readable adapter_model.safetensors ({error}): save it anew") from error
    loaded: dict[str, LowRank] = {}
    for a_name in [name for name in weights if name.endswith(".lora_A.weight")]:
        name = a_name.removesuffix(".lora_A.weight")
        a_rI, b_Or = weights.pop(a_name), weights.pop(f"{name}.lora_B.weight", None)
        layer = _layer(model, name.removeprefix(PREFIX), directory)
        shape = None if b_Or is None else (b_Or.shape[0], a_rI.shape[1])
        if b_Or is None or shape != (layer.out_features, layer.in_features) or a_rI.shape[0] != b_Or.shape[1]:
            raise ModelError(
                f"{directory} does not fit {type(model).__name__}: {name} has A {list(a_rI.shape)} and B "
                f"{None if b_Or is None else list(b_Or.shape)} for a layer of {layer.in_features} inputs and "
                f"{layer.out_features} outputs; serve it over the model that it was trained on"
            )
        like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        scaled = b_Or.float() * settings.scale(len(a_rI))
        loaded[name.removeprefix(PREFIX)] = LowRank(a_rI.to(**like), scaled.to(**like))
    if weights or not loaded:
        found = f"weights such as {min(weights)}" if weights else "no weights"
        raise ModelError(f"{directory} holds {found}, and pairs of lora_A and lora_B alone are served: {REMEDY}")
    return loaded


def _layer(model: Any, name: str, directory: str | Path) -> nn.Linear:
    """The linear layer of an adapter; the head is none, as it computes but a few rows of a step."""
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"{directory} does not fit {type(model).__name__}, which has no layer {name}; serve it over the model that "
            "it was trained on"
        ) from error
    if not isinstance(layer, nn.Linear) or layer is model.get_output_embeddings():
        raise ModelError(
            f"{directory} has an adapter for {name}, and those of linear layers but the head are served beside a "
            f"model: {REMEDY}"
        )
    return layer

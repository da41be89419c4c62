"""The numbers of a decoder that its memory and time depend on, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longalign_ray.errors import ConfigError, ModelError

NORMED_QUERIES = ("qwen3", "olmo2", "olmo3", "gemma3", "gemma3_text")
"""Values of `model_type` whose attention normalises queries and keys, in fp32."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder with gated MLPs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Width between the projections of the MLP."""
    vocabulary: int
    tied: bool = False
    """The head uses the weights of the embedding."""
    qk_norm: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape of a model with this config.json. Raises ConfigError with all that is missing or makes no sense.

        A config that does not say whether the embedding is tied counts as untied, which needs more memory.
        """
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        wrong = [f"{name} is missing" for name in names if config.get(name) is None]
        wrong += [
            f"{name} = {config[name]!r} is no whole number above 0"
            for name in (*names, "num_key_value_heads", "head_dim")
            if config.get(name) is not None and not _is_count(config[name])
        ]
        wrong += [f"{name} = {config[name]}: experts are not counted" for name in EXPERTS if config.get(name)]
        if not wrong:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            kv_heads = config.get("num_key_value_heads") or heads
            head_dim = config.get("head_dim") or hidden // heads
            if heads % kv_heads:
                wrong.append(f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
            elif head_dim == 0:
                wrong.append(f"hidden_size = {hidden} is below num_attention_heads = {heads}")
            else:
                return cls(
                    layers=config["num_hidden_layers"],
                    hidden=hidden,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    mlp=config["intermediate_size"],
                    vocabulary=config["vocab_size"],
                    tied=bool(config.get("tie_word_embeddings")),
                    qk_norm=config.get("model_type") in NORMED_QUERIES,
                )
        raise ConfigError(
            f"the config does not describe a decoder ({'; '.join(wrong)}); give the config.json of a dense one"
        )

    @property
    def width(self) -> int:
        """Of the queries: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of the projections of one layer, without biases and norms."""
        return self.hidden * (2 * self.width + 2 * self.kv_width + 3 * self.mlp)

    @property
    def parameters(self) -> int:
        """N: all layers, the embedding, and the head unless it is tied."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocabulary * self.hidden


LLAMA_2_7B = ModelShape(layers=32, hidden=4_096, heads=32, kv_heads=32, head_dim=128, mlp=11_008, vocabulary=32_000)


def check_dense(config: Mapping[str, Any]) -> None:
    """Raises ModelError for a model of experts, which would be trained another way than asked, or not at all.

    Ranks gather weights in step under ZeRO-3, and a router's choice differs between them; the rows of a matrix product
    go by that choice too, so a probe of two packs cannot tell a leak between sequences from rounding.
    """
    found = {name: config[name] for name in EXPERTS if config.get(name)}
    if found:
        settings = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise ModelError(
            f"a {config.get('model_type')} model of experts ({settings}) cannot be trained: the loss that balances its "
            "router is not computed, ZeRO-3 would hang where ranks use different experts, and packed sequences cannot "
            "be shown to stay apart; choose a dense model"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

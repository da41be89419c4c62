"""The model under training: a Hugging Face decoder whose forward pass returns the weighted loss of a pack.

Suffixes: t tokens of the rank's part of the pack, N target positions, D hidden width.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu

from longalign_ray.config import RopeConfig, TrainConfig
from longalign_ray.data.store import FULL_WEIGHT, Pack
from longalign_ray.errors import ModelError
from longalign_ray.precision import DTYPES
from longalign_ray.run_dir import digest
from longalign_ray.train import attention
from longalign_ray.train.batch import PackedBatch, to_batch
from longalign_ray.train.loss_head import LogitRule, TokenLossHead
from longalign_ray.train.rope import model_config
from longalign_ray.train.sequence_parallel import ALONE, SequenceGroup
from longalign_ray.train.tiled_mlp import tile_mlps


class PackedLM(nn.Module):
    """Loss of a pack: sum over its targets of weight x cross entropy. Divide by the step's M for Eq. 2."""

    model: Any

    def __init__(self, model: nn.Module, *, offload_checkpoints: bool = False):
        super().__init__()
        self.model, self.offload_checkpoints = model, offload_checkpoints

    def forward(self, batch: PackedBatch, *, reduce: bool = True) -> torch.Tensor:
        """0-d tensor; the whole forward pass runs in here, so that ZeRO-3 gathers what it needs.

        Without `reduce`: [N], the loss of each target, unweighted and without a gradient.
        """
        hidden_tD = self.hidden_states(batch)
        weights_N = batch.weights_N if reduce else None
        return self.model.lm_head(hidden_tD[batch.target_positions_N], batch.labels_N, weights_N)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """[t, D] of the last layer after its norm."""
        on_gpu = batch.input_ids_t.is_cuda
        with save_on_cpu(pin_memory=on_gpu) if self.offload_checkpoints else nullcontext():
            return self.model.base_model(**self.inputs(batch)).last_hidden_state[0]

    @staticmethod
    def inputs(batch: PackedBatch) -> dict[str, Any]:
        """What the Hugging Face model is called with."""
        return {
            "input_ids": batch.input_ids_t[None],
            "position_ids": batch.position_ids_t[None],
            "use_cache": False,  # a cache would turn transformers' own packed detection off and mix the sequences
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
            "boundaries": batch.boundaries,
            "sequence_group": batch.sequence_group,
        }


def load_for_training(
    model_dir: str | Path, *, dtype: str, config: TrainConfig, rope: RopeConfig | None = None
) -> PackedLM:
    """The model of a local directory with variable-length attention, the chunked loss head, and `rope` applied.

    Divided over the ranks as it is read, where they are to divide it (collective). Raises ModelError where the
    directory is no causal language model, or one of whose parts cannot be replaced.
    """
    from transformers import AutoModelForCausalLM

    from longalign_ray.train.engine import sharded_loading

    try:
        with sharded_loading(config, dtype=dtype):
            model = AutoModelForCausalLM.from_pretrained(
                str(model_dir),
                config=model_config(model_dir, rope),
                dtype=DTYPES[dtype],
                attn_implementation=attention.register(),
                use_safetensors=True,
                trust_remote_code=False,
                **(_in_4_bits(config, dtype=DTYPES[dtype]) if config.quantized else {}),
            )
    except (OSError, ValueError, KeyError) as error:  # KeyError: attention looked up in a dict of its own
        raise ModelError(f"{model_dir} cannot be loaded for packed training: {error}") from error
    return prepare_model(
        model,
        gradient_checkpointing=config.gradient_checkpointing,
        offload_checkpoints=config.offload_checkpoints,
        head_chunk=config.head_chunk,
        tiled_mlp=config.tiled_mlp,
    )


def _in_4_bits(config: TrainConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """How transformers loads the weights for bitsandbytes: as in QLoRA, on the device that will compute with them."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # DeepSpeed wants all parameters in one format, and converts others
    )
    device = f"cuda:{os.environ['LOCAL_RANK']}" if config.use_gpu else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def prepare_model(
    model: Any,
    *,
    gradient_checkpointing: bool,
    head_chunk: int,
    offload_checkpoints: bool = False,
    tiled_mlp: bool = False,
) -> PackedLM:
    """Wraps a causal LM that was made with `attn_implementation="longalign_varlen"`.

    Raises ModelError where the model's LM head is no plain linear layer, or an MLP is to be tiled and cannot.
    """
    head = getattr(model, "lm_head", None)
    if type(head) is not nn.Linear:
        raise ModelError(
            f"{type(model).__name__} has no plain linear lm_head, so its loss cannot be computed in chunks; choose a "
            "model with a plain head"
        )
    head.__class__ = TokenLossHead  # keeps the parameter, its name and its tie to the embedding
    loss_head = cast(TokenLossHead, head)
    loss_head.chunk, loss_head.rule = head_chunk, LogitRule.of(model.config)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if tiled_mlp:
        tile_mlps(model, tile=model.config.hidden_size)
    return PackedLM(model, offload_checkpoints=offload_checkpoints).train()


ATTENTION_SETTINGS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rope_parameters",
    "rms_norm_eps", "hidden_act",
)  # fmt: skip
"""Of config.json, which change what a model computes though not the shapes of its parameters."""


def model_digest(model: PackedLM) -> str:
    """Digest of the names and whole shapes of all parameters, parted among ranks or not, and of ATTENTION_SETTINGS.

    Not of the weights: those of a checkpoint replace them.
    """
    # ds_shape: what DeepSpeed says of a parameter that it has parted, whose own shape is [0]
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    return digest(shapes, [getattr(model.model.config, name, None) for name in ATTENTION_SETTINGS])


@torch.no_grad()
def verify_isolation(
    model: PackedLM, *, vocab_size: int, device: torch.device | str, sequence_group: SequenceGroup = ALONE
) -> None:
    """Two short sequences, the first one changed: the second one's hidden states must not move by a bit.

    The second begins inside the first rank's part and goes on in those of the others. Every rank calls it, as a forward
    pass is collective. Raises ModelError, on the ranks that find it, where one sequence sees the other.
    """

    num_tokens = 16 * sequence_group.degree
    own = np.arange(num_tokens)[sequence_group.own_tokens(num_tokens)]

    def second_sequence(first_token: int) -> torch.Tensor:
        batch = _probe(vocab_size, device, first_token, sequence_group)
        return model.hidden_states(batch)[torch.from_numpy(own >= 8)]

    model.eval()  # dropout would differ between the two passes
    try:
        apart = torch.equal(second_sequence(1), second_sequence(2))
    except ValueError as error:  # transformers' own refusal, where it knows that a mixer needs a kernel
        raise ModelError(f"{type(model.model).__name__} cannot be trained packed: {error}") from error
    model.train()
    if not apart:
        raise ModelError(
            f"{type(model.model).__name__}: a token of one packed sequence changes the states of another, so packed "
            "training would be wrong; choose a model whose every layer is attention, with no recurrent mixer"
        )


@torch.no_grad()
def verify_loss(
    model: PackedLM, *, vocab_size: int, device: torch.device | str, sequence_group: SequenceGroup = ALONE
) -> None:
    """The loss of two short sequences must be that of the model's own logits, whatever it does to them after the head.

    Every rank calls it. Raises ModelError where the two differ by more than rounding.
    """
    batch = _probe(vocab_size, device, 1, sequence_group)
    logits_ND = model.model(**model.inputs(batch)).logits[0, batch.target_positions_N]
    expected = (F.cross_entropy(logits_ND.float(), batch.labels_N, reduction="none") * batch.weights_N).sum().item()
    found = model(batch).item()
    if abs(found - expected) > 0.02 * abs(expected):  # logits of two digits, in bf16, carry 0.4 %
        raise ModelError(
            f"{type(model.model).__name__}: its own logits have a loss of {expected:.4g} on a probe and our head of "
            f"{found:.4g}, so it changes them in a way that is not known here; choose another model"
        )


def _probe(vocab_size: int, device: torch.device | str, first_token: int, sequence_group: SequenceGroup) -> PackedBatch:
    """Two sequences, the first one of 8 tokens, all `first_token`; 16 tokens for each rank that shares them."""
    num_tokens = 16 * sequence_group.degree
    ids = np.arange(num_tokens, dtype=np.int32) % vocab_size
    ids[:8] = first_token
    weights, starts = np.full(num_tokens, FULL_WEIGHT, np.uint8), np.array([0, 8, num_tokens], np.int32)
    pack = Pack(ids, weights, starts, ("first", "second"))
    return to_batch(pack, loss="sequence", device=device, sequence_group=sequence_group)

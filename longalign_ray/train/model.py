"""The model under training: a Hugging Face decoder whose forward pass returns the weighted loss of a pack.

Suffixes: T tokens of the pack, N target positions, D hidden width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from longalign_ray.errors import ModelError
from longalign_ray.precision import DTYPES
from longalign_ray.train import attention
from longalign_ray.train.batch import PackedBatch

LOGIT_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # applied after lm_head by some families


class TokenLossHead(nn.Linear):
    """An LM head that gives the loss of each token, `chunk` positions at a time: full logits never exist.

    It takes the place of `lm_head` under the same parameter name, so that state dicts, tied embeddings and the ZeRO-3
    gathering of a module's parameters stay as they are.
    """

    chunk: int

    def forward(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor | None = None) -> torch.Tensor:
        """float[N]: cross entropy in nats, softmax in fp32 or better. Without labels: plain logits."""
        if labels_N is None:
            return super().forward(hidden_ND)
        chunks = zip(hidden_ND.split(self.chunk), labels_N.split(self.chunk), strict=True)
        losses = [checkpoint(self._chunk_loss, h, y, use_reentrant=False) for h, y in chunks]
        return torch.cat(losses)  # pyright: ignore[reportArgumentType]

    def _chunk_loss(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden_ND, self.weight, self.bias)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels_N, reduction="none")


class PackedLM(nn.Module):
    """Loss of a pack: sum over its targets of weight x cross entropy. Divide by the step's M for Eq. 2."""

    model: Any

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, *, reduce: bool = True) -> torch.Tensor:
        """0-d tensor; the whole forward pass runs in here, so that ZeRO-3 gathers what it needs.

        Without `reduce`: [N], the loss of each target, unweighted.
        """
        hidden_TD = self.hidden_states(batch)
        losses_N = self.model.lm_head(hidden_TD[batch.target_positions_N], batch.labels_N)
        if not reduce:
            return losses_N
        return (losses_N * batch.weights_N.to(losses_N.dtype)).sum()

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """[T, D] of the last layer after its norm."""
        out = self.model.base_model(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,  # a cache would turn transformers' own packed detection off and mix the sequences
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            boundaries=batch.boundaries,
        )
        return out.last_hidden_state[0]


def load_for_training(
    model_dir: str | Path, *, dtype: str, gradient_checkpointing: bool = True, head_chunk: int = 1_024
) -> PackedLM:
    """The model of a local directory with variable-length attention and the chunked loss head.

    Raises ModelError where the directory is no causal language model or its attention cannot be replaced.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=DTYPES[dtype],
            attn_implementation=attention.register(),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir} cannot be loaded for packed training: {error}") from error
    return prepare_model(model, gradient_checkpointing=gradient_checkpointing, head_chunk=head_chunk)


def prepare_model(model: Any, *, gradient_checkpointing: bool, head_chunk: int) -> PackedLM:
    """Wraps a causal LM that was made with `attn_implementation="longalign_varlen"`.

    Raises ModelError where the model's LM head is no plain linear layer or scales its logits.
    """
    head = getattr(model, "lm_head", None)
    scaled = [name for name in LOGIT_SCALES if getattr(model.config, name, None) not in (None, 1, 1.0)]
    if type(head) is not nn.Linear or scaled:
        raise ModelError(
            f"{type(model).__name__} has {' and '.join(scaled) or 'no plain linear lm_head'}, so its loss cannot be "
            "computed in chunks; choose a model with a plain head"
        )
    head.__class__ = TokenLossHead  # keeps the parameter, its name and its tie to the embedding
    cast(TokenLossHead, head).chunk = head_chunk
    model.config.use_cache = False
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return PackedLM(model).train()


@torch.no_grad()
def verify_isolation(model: PackedLM, *, vocab_size: int, device: torch.device | str) -> None:
    """Two short sequences, the first one changed: the second one's hidden states must not move by a bit.

    Every rank calls it, as under ZeRO-3 a forward pass is collective. Raises ModelError where one sees the other.
    """
    import numpy as np

    from longalign_ray.data.store import Pack
    from longalign_ray.train.batch import to_batch

    def second_sequence(first_token: int) -> torch.Tensor:
        ids = np.arange(16, dtype=np.int32) % vocab_size
        ids[:8] = first_token
        pack = Pack(ids, np.ones(16, np.bool_), np.array([0, 8, 16], np.int32), ("first", "second"))
        return model.hidden_states(to_batch(pack, loss="sequence", device=device))[8:]

    model.eval()  # dropout would differ between the two passes
    is_isolated = torch.equal(second_sequence(1), second_sequence(2))
    model.train()
    if not is_isolated:
        raise ModelError(
            f"{type(model.model).__name__}: a token of one packed sequence changes the states of another, so packed "
            "training would be wrong; choose a model whose every layer is attention, with no recurrent mixer"
        )

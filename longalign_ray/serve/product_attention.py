"""Attention by plain products, for scores that flash attention does not compute: those that a model caps.

Suffixes: H query heads, K key/value heads, G query heads of a key head, q queries and k keys of a block, c queries of a
chunk, D head width.
"""

from __future__ import annotations

import torch

from longalign_ray.train.block_attention import Block

MAX_SCORES = 2**22
"""Scores of a head that exist at a time."""


class ProductKernel:
    """Attention of a block with scores softcap * tanh(score / softcap), as in Gemma 2; None: as they are."""

    def __init__(self, softcap: float | None):
        self._softcap = softcap

    def forward(
        self, q_HqD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [H, q, D] and log-sum-exp [H, q]; of several sequences in one block it knows nothing."""
        num_queries, num_keys = q_HqD.shape[1], k_KkD.shape[1]
        chunk = max(1, MAX_SCORES // num_keys)
        parts = [
            self._chunk(q_HqD[:, first : first + chunk], k_KkD, v_KkD, block, first, scaling)
            for first in range(0, num_queries, chunk)
        ]
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)

    def _chunk(
        self, q_HcD: torch.Tensor, k_KkD: torch.Tensor, v_KkD: torch.Tensor, block: Block, first: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(q_HcD.dtype, torch.float32)
        q_KGcD = q_HcD.unflatten(0, (len(k_KkD), -1))
        scores_KGck = (q_KGcD @ k_KkD[:, None].mT).to(exact) * scaling
        if self._softcap is not None:
            scores_KGck = self._softcap * torch.tanh(scores_KGck / self._softcap)
        if block.boundaries or block.window is not None:
            queries = torch.arange(first, first + q_HcD.shape[1], device=q_HcD.device)[:, None] + block.distance
            ago = queries - torch.arange(k_KkD.shape[1], device=q_HcD.device)
            hidden = (ago < 0) if block.window is None else (ago < 0) | (ago >= block.window)
            scores_KGck = scores_KGck.masked_fill(hidden, -torch.inf)
        lse_KGc = scores_KGck.logsumexp(-1)
        shares_KGck = (scores_KGck - lse_KGc[..., None]).exp().to(v_KkD.dtype)
        return (shares_KGck @ v_KkD[:, None]).flatten(0, 1), lse_KGc.flatten(0, 1)

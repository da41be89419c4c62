"""The LM head as a loss: weighted cross entropy of target positions, a chunk at a time: full logits never exist.

Value and gradient of a chunk come out of one computation of its logits, as the weights are known beforehand: three
matrix products a chunk. Recomputing the logits in the backward pass takes four, which is what checkpointed chunks and
torch's linear_cross_entropy do; the latter also rounds losses and weights to bf16 in a bf16 model.
Suffixes: N target positions, C positions of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a family does to its logits after the head: logits * factor, then softcap * tanh(logits / softcap)."""

    factor: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitRule:
        """By the names that transformers' model configurations use."""
        factor = 1.0
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            factor *= config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            factor /= config.logits_scaling
        return LogitRule(factor, getattr(config, "final_logit_softcapping", None))  # Gemma

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TokenLossHead(nn.Linear):
    """An LM head that gives the loss of a pack, `chunk` positions at a time.

    It takes the place of `lm_head` under the same parameter name, so that state dicts, tied embeddings and the ZeRO-3
    gathering of a module's parameters stay as they are.
    """

    chunk: int
    rule: LogitRule

    def forward(
        self, hidden_ND: torch.Tensor, labels_N: torch.Tensor | None = None, weights_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """0-d, fp32 or better: sum of weight * cross entropy in nats.

        Without weights: [N], each cross entropy, and no gradient. Without labels: logits before the rule.
        """
        if labels_N is None:
            return super().forward(hidden_ND)
        if weights_N is None:
            return self._losses(hidden_ND, labels_N)
        loss = _WeightedCrossEntropy.apply(
            hidden_ND, self.weight, self.bias, labels_N, weights_N, self.chunk, self.rule, torch.is_grad_enabled()
        )
        assert isinstance(loss, torch.Tensor)
        return loss

    @torch.no_grad()
    def _losses(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        chunks = zip(hidden_ND.split(self.chunk), labels_N.split(self.chunk), strict=True)
        logits = ((self.rule(super(TokenLossHead, self).forward(hidden_CD).to(exact)), y) for hidden_CD, y in chunks)
        return torch.cat([F.cross_entropy(logits_CV, labels_C, reduction="none") for logits_CV, labels_C in logits])


class _WeightedCrossEntropy(torch.autograd.Function):
    """The loss in forward, with the gradients for an upstream gradient of 1, which backward multiplies once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        chunk: int,
        rule: LogitRule,
        with_gradient: bool,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        # In fp32: a bf16 sum over the 64 chunks of 64k targets is off by 0.9 %, one rounding by 0.2 %.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wanted[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=exact) if bias_V is not None and wanted[2] else None
        loss = torch.zeros((), dtype=exact, device=hidden_ND.device)
        for first in range(0, len(hidden_ND), chunk):
            part = slice(first, first + chunk)
            hidden_CD, weights_C1 = hidden_ND[part], weights_N[part, None].to(exact)
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V).to(exact)
            value, grad_logits_CV = _chunk_loss(logits_CV, labels_N[part, None], weights_C1, rule)
            loss += value
            grad_logits_CV = grad_logits_CV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(grad_logits_CV, weight_VD, out=grad_hidden_ND[part])
            if grad_weight_VD is not None and grad_weight_VD.dtype == weight_VD.dtype:
                grad_weight_VD.addmm_(grad_logits_CV.T, hidden_CD)
            elif grad_weight_VD is not None:
                grad_weight_VD += grad_logits_CV.T @ hidden_CD
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(0)
            del logits_CV, grad_logits_CV  # else they would lie beside those of the next chunk
        ctx.gradients = grad_hidden_ND, grad_weight_VD, grad_bias_V
        ctx.dtype = hidden_ND.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # freed as they are handed on; there is no second backward
        scaled = [None if gradient is None else gradient.mul_(upstream[0]).to(ctx.dtype) for gradient in gradients]
        return (*scaled, None, None, None, None, None)


def _chunk_loss(
    logits_CV: torch.Tensor, labels_C1: torch.Tensor, weights_C1: torch.Tensor, rule: LogitRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weight * cross entropy, its gradient by the logits [C, V]); overwrites the logits.

    The gradient is weight * (softmax - one at the label), times the slope of the rule.
    """
    if rule.factor != 1.0:
        logits_CV.mul_(rule.factor)
    slope_CV = None
    if rule.softcap is not None:
        tanh_CV = logits_CV.div_(rule.softcap).tanh_()
        slope_CV = 1 - tanh_CV.square()
        logits_CV = tanh_CV.mul_(rule.softcap)
    label_C1 = logits_CV.gather(1, labels_C1)
    highest_C1 = logits_CV.amax(1, keepdim=True)
    logits_CV.sub_(highest_C1).exp_()
    sum_C1 = logits_CV.sum(1, keepdim=True)
    loss = (weights_C1 * (sum_C1.log() + highest_C1 - label_C1)).sum()
    grad_CV = logits_CV.mul_(weights_C1 / sum_C1).scatter_add_(1, labels_C1, -weights_C1)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return loss, grad_CV.mul_(rule.factor) if rule.factor != 1.0 else grad_CV

"""The next token from logits. Suffixes: V vocabulary, R rows."""

from __future__ import annotations

import math

import torch

from longalign_ray.serve.engine import Sampling, Token, TopTokens


def new_generator(seed: int | None) -> torch.Generator:
    """A request's own source of randomness, which no other request moves on."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> Token:
    """A token with its log-probability. Raises FloatingPointError where that is not finite."""
    log_probs_V = torch.log_softmax(logits_V, dim=-1)
    token_id = sample(logits_V, temperature=sampling.temperature, top_p=sampling.top_p, generator=generator)
    log_prob = log_probs_V[token_id].item()
    if not math.isfinite(log_prob):
        raise FloatingPointError(f"the model gives the log-probability {log_prob}; its weights or dtype overflow")
    return Token(token_id, log_prob, top_tokens(log_probs_V[None], sampling.num_top)[0])


def sample(logits_V: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id: the likeliest for temperature 0, else drawn from the smallest set with probability >= top_p.

    Drawn on the CPU, so that a seed gives the same token on every device that gives the same logits.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V.double().cpu() / temperature, dim=-1)
    if top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        outside_V = sorted_V.cumsum(0) - sorted_V >= top_p  # those before a token have top_p already
        probs_V = probs_V.index_fill(0, order_V[outside_V], 0.0)
    return int(torch.multinomial(probs_V, 1, generator=generator))


def top_tokens(log_probs_RV: torch.Tensor, num_top: int) -> list[TopTokens]:
    """The likeliest tokens of each row, best first."""
    if num_top == 0:
        return [()] * len(log_probs_RV)
    values, ids = log_probs_RV.topk(min(num_top, log_probs_RV.shape[-1]), dim=-1)
    return [tuple(zip(row_ids, row, strict=True)) for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)]

"""Sequence parallelism: the ranks of a group share a pack, each with a part of its tokens.

Outside attention a rank computes its own t = T / P tokens. Around attention an all-to-all trades tokens for heads: a
rank then sees all T tokens of H / P heads (Ulysses, arXiv 2309.14509), so any kernel for packed sequences serves, with
the boundaries of the whole pack.

    rank = group number * P + part        P = 2, T = 6:  part 0 has tokens 0-2, part 1 tokens 3-5

DeepSpeed sees a flat data-parallel world. Each part holds a partial sum of its pack's loss; data-parallel averaging
divides by all ranks, and the factor R / M of the backward pass takes that back, as without sequence parallelism.
Suffixes: T tokens of the pack, t of the part, H query heads, K key/value heads, D head width, P ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from longalign_ray.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class SequenceGroup:
    """A rank's place in the group that shares its packs."""

    number: int = 0
    """Of the group: it computes the slots (step, micro-step, number) of the plan."""
    part: int = 0
    """The rank's part of each pack, 0 .. degree - 1."""
    degree: int = 1
    process_group: Any = None
    """torch's group of these ranks; none where a rank is alone."""

    def own_tokens(self, num_tokens: int) -> slice:
        """The part's tokens of a pack whose length the degree divides."""
        size = num_tokens // self.degree
        return slice(self.part * size, (self.part + 1) * size)


ALONE = SequenceGroup()


def join_groups(degree: int) -> SequenceGroup:
    """This rank's group; every rank of the world calls it (collective). `degree` divides the world size."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if degree == 1:
        return SequenceGroup(number=rank)
    groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, world_size, degree)]
    return SequenceGroup(rank // degree, rank % degree, degree, groups[rank // degree])


def check_heads(model_config: Any, degree: int) -> None:
    """Raises ModelError where the ranks of a group cannot share the model's attention heads or disagree on positions.

    model_config: Hugging Face config object or the mapping of a config.json.
    """
    if degree == 1:
        return
    settings: dict[str, Any] = model_config if isinstance(model_config, dict) else model_config.to_dict()
    heads = settings["num_attention_heads"]
    if heads % degree:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise ModelError(
            f"train.sp_degree = {degree} does not divide the model's {heads} attention heads: set it to one of "
            f"{divisors}"
        )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind in ("dynamic", "longrope"):
        raise ModelError(
            f"the model's RoPE of type {kind} goes by the longest position that a rank sees, and the "
            f"train.sp_degree = {degree} ranks of a pack see different ones: set train.sp_degree=1 or a RoPE of fixed "
            "frequencies (yarn, linear, llama3)"
        )


def attend(
    kernel: Callable[..., torch.Tensor],
    query_HtD: torch.Tensor,
    key_KtD: torch.Tensor,
    value_KtD: torch.Tensor,
    group: SequenceGroup,
) -> torch.Tensor:
    """[t, H, D]: `kernel`, which maps [H, T, D], [K, T, D], [K, T, D] to [T, H, D], over the tokens of all parts."""
    if group.degree == 1:
        return kernel(query_HtD, key_KtD, value_KtD)
    # A part needs whole key/value heads: lcm(K, P) copies, each beside its original, keep every query head's own.
    kv_heads = len(key_KtD)
    copies = math.lcm(kv_heads, group.degree) // kv_heads
    key_KtD, value_KtD = (x.repeat_interleave(copies, dim=0) if copies > 1 else x for x in (key_KtD, value_KtD))
    out_ThD = kernel(*(tokens_of_all_parts(x, group) for x in (query_HtD, key_KtD, value_KtD)))
    return heads_of_all_parts(out_ThD, group)


def tokens_of_all_parts(x_HtD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[H / P, T, D]: every token of this part's share of the heads, from every head of its own tokens."""
    heads, tokens, width = x_HtD.shape
    x_PhtD = AllToAll.apply(x_HtD.reshape(group.degree, heads // group.degree, tokens, width), group.process_group)
    # Dimension 0 was the receiving part with its heads; now it is the sending part with its tokens.
    return x_PhtD.transpose(0, 1).reshape(heads // group.degree, group.degree * tokens, width)


def heads_of_all_parts(x_ThD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[t, H, D]: every head of this part's tokens, from every token of its share h = H / P of the heads."""
    tokens, heads, width = x_ThD.shape
    x_PthD = AllToAll.apply(x_ThD.reshape(group.degree, tokens // group.degree, heads, width), group.process_group)
    return x_PthD.transpose(0, 1).reshape(tokens // group.degree, group.degree * heads, width)


class AllToAll(torch.autograd.Function):
    """x[P, ...] -> y[P, ...] where y[p] is what part p had as x[own part]. Its own inverse, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, process_group: Any) -> torch.Tensor:
        ctx.process_group = process_group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=process_group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return AllToAll.apply(grads[0], ctx.process_group), None  # pyright: ignore[reportReturnType]

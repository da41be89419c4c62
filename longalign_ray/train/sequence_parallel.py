"""Sequence parallelism: the ranks of a group share a pack, each with a part of its tokens.

Outside attention a rank computes its own t = T / P tokens. Around attention an all-to-all trades tokens for heads: a
rank then sees all T tokens of H / P heads (Ulysses, arXiv 2309.14509), so any kernel for packed sequences serves, with
the boundaries of the whole pack.

    rank = group number * P + part        P = 2, T = 6:  part 0 has tokens 0-2, part 1 tokens 3-5

Where P does not divide the heads, P = U * R: U parts in a row trade heads, which U divides, and R such rows form a ring
(see ring_attention.py), in which row r has the chunks r and 2 R - 1 - r of 2 R.

    part = r * U + u                      U = 1, R = 2, T = 8:  part 0 has tokens 0-1, 6-7, part 1 tokens 2-5

DeepSpeed sees a flat data-parallel world. Each part holds a partial sum of its pack's loss; data-parallel averaging
divides by all ranks, and the factor R / M of the backward pass takes that back, as without sequence parallelism.
Suffixes: T tokens of the pack, t of the part, H query heads, K key/value heads, D head width, U as above.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from longalign_ray.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SequenceGroup:
    """A rank's place in the group that shares its packs."""

    number: int = 0
    """Of the group: it computes the slots (step, micro-step, number) of the plan."""
    part: int = 0
    """The rank's part of each pack, 0 .. degree - 1."""
    heads_degree: int = 1
    """U: parts that trade tokens for heads."""
    ring_degree: int = 1
    """R: ranks that pass keys and values round."""
    heads_group: Any = None
    """torch's process group of the U ranks; none where a rank is alone."""
    ring_group: Any = None
    """torch's process group of the R ranks, in the order of the ring."""

    @property
    def degree(self) -> int:
        return self.heads_degree * self.ring_degree

    @property
    def ring_rank(self) -> int:
        return self.part // self.heads_degree

    @property
    def multiple(self) -> int:
        """What divides the length of a pack that the group can share: packs are padded to it."""
        return self.degree if self.ring_degree == 1 else 2 * self.degree

    def own_tokens(self, num_tokens: int) -> np.ndarray:
        """int64[t]: places of the part's tokens in a pack whose length is a multiple of `multiple`."""
        order_T = np.arange(num_tokens)
        if self.ring_degree > 1:
            chunks = order_T.reshape(2 * self.ring_degree, -1)
            order_T = np.concatenate(
                [chunks[list(chunks_of_ring(self.ring_degree, r))] for r in range(self.ring_degree)]
            )
        return order_T.reshape(self.degree, -1)[self.part]


ALONE = SequenceGroup()


def chunks_of_ring(ring_degree: int, rank: int) -> tuple[int, int]:
    """The two of 2 * ring_degree chunks that a rank of the ring holds: causal work is then the same on every rank."""
    return rank, 2 * ring_degree - 1 - rank


def join_groups(degree: int, *, num_heads: int) -> SequenceGroup:
    """This rank's group; every rank of the world calls it (collective). `degree` divides the world size."""
    heads_degree = math.gcd(degree, num_heads)
    ring_degree = degree // heads_degree
    number, part = divmod(dist.get_rank(), degree)
    # ranks[group, row of the ring, part in the row]
    ranks = np.arange(dist.get_world_size()).reshape(-1, ring_degree, heads_degree)
    heads_group = _own_group(ranks.reshape(-1, heads_degree))
    ring_group = _own_group(ranks.swapaxes(1, 2).reshape(-1, ring_degree))
    return SequenceGroup(
        number=number,
        part=part,
        heads_degree=heads_degree,
        ring_degree=ring_degree,
        heads_group=heads_group,
        ring_group=ring_group,
    )


def _own_group(groups: np.ndarray) -> Any:
    """torch's process group for the row of `groups` that has this rank; all ranks make all of them."""
    if groups.shape[1] == 1:
        return None
    made = [(row, dist.new_group(row)) for row in groups.tolist()]
    return next(group for row, group in made if dist.get_rank() in row)


def check_model(model_config: Any, degree: int) -> None:
    """Raises ModelError where the ranks of a group would disagree on position embeddings; warns where they form a ring.

    model_config: Hugging Face config object or the mapping of a config.json.
    """
    if degree == 1:
        return
    settings: dict[str, Any] = model_config if isinstance(model_config, dict) else model_config.to_dict()
    heads = settings["num_attention_heads"]
    if heads % degree:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        logger.warning(
            "train.sp_degree = %d does not divide the model's %d attention heads, so %d ranks pass keys and values "
            "round in a ring, and more bytes move; with one of %s none has to",
            degree, heads, degree // math.gcd(degree, heads), divisors,
        )  # fmt: skip
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
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
    """[t, H, D]: `kernel`, which maps [H, n, D], [K, n, D], [K, n, D] to [n, H, D], over n = U t tokens."""
    if group.heads_degree == 1:
        return kernel(query_HtD, key_KtD, value_KtD)
    # A part needs whole key/value heads: lcm(K, U) of them, copies beside their original, keep every query head's own.
    kv_heads = len(key_KtD)
    copies = math.lcm(kv_heads, group.heads_degree) // kv_heads
    key_KtD, value_KtD = (x.repeat_interleave(copies, dim=0) if copies > 1 else x for x in (key_KtD, value_KtD))
    out_nhD = kernel(*(tokens_of_all_parts(x, group) for x in (query_HtD, key_KtD, value_KtD)))
    return heads_of_all_parts(out_nhD, group)


def tokens_of_all_parts(x_HtD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[H / U, U t, D]: the tokens of U parts in this part's share h of the heads, from every head of its own t."""
    x_UhtD = AllToAll.apply(x_HtD.unflatten(0, (group.heads_degree, -1)), group.heads_group)
    # Dimension 0 was the receiving part with its heads; now it is the sending part with its tokens.
    return x_UhtD.transpose(0, 1).flatten(1, 2)  # pyright: ignore[reportOptionalMemberAccess]


def heads_of_all_parts(x_nhD: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[t, H, D]: every head of this part's own tokens, from its share h of the heads of n = U t tokens."""
    x_UthD = AllToAll.apply(x_nhD.unflatten(0, (group.heads_degree, -1)), group.heads_group)
    return x_UthD.transpose(0, 1).flatten(1, 2)  # pyright: ignore[reportOptionalMemberAccess]


class AllToAll(torch.autograd.Function):
    """x[U, ...] -> y[U, ...] where y[u] is what part u had as x[own part]. Its own inverse, and its own transpose."""

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

"""MLPs computed a tile of tokens at a time, so that their memory does not grow with the context.

An MLP of inner width f holds about 5 f numbers a token in its backward pass, more than attention does; tiles of
`hidden_size` tokens bound that (as in Arctic Long Sequence Training, arXiv 2506.13996), for one more forward pass of
the MLP. Weights are used through the module's own forward pass, so ZeRO, adapters and parameter names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longalign_ray.errors import ModelError


def tile_mlps(model: nn.Module, *, tile: int) -> None:
    """Makes every `mlp` of a layer of `model` compute `tile` tokens at a time. Raises as `plain_mlps`."""
    for mlp in plain_mlps(model):
        mlp.forward = _tiled(mlp.forward, tile)


def plain_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs of the layers.

    Raises ModelError where there is none, or one whose experts see all tokens together.
    """
    named = [getattr(layer, "mlp", None) for layer in model.modules()]
    mlps = [mlp for mlp in named if isinstance(mlp, nn.Module)]
    if not mlps or any(hasattr(mlp, "experts") for mlp in mlps):
        found = "one of experts" if mlps else "none of that name"
        raise ModelError(
            f"train.tiled_mlp = true needs layers with a plain `mlp`, and {type(model).__name__} has {found}: set it "
            "to false"
        )
    return mlps


def _tiled(whole: Callable[[torch.Tensor], torch.Tensor], tile: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """`whole`, [..., t, D] -> [..., t, D], over tiles of t, each computed again in the backward pass."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        tiles = hidden.split(tile, dim=-2)
        if len(tiles) == 1:
            return whole(hidden)
        if not torch.is_grad_enabled():
            return torch.cat([whole(part) for part in tiles], dim=-2)
        # a closure's result is untyped in torch's hints
        parts: list[Any] = [checkpoint(whole, part, use_reentrant=False) for part in tiles]
        return torch.cat(parts, dim=-2)

    return forward

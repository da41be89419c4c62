from __future__ import annotations

import pytest
import torch
from torch import nn

from longalign_ray.serve.packed_linear import pack_linear_layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (1, 129), (8,), (1, 0)])
def test_packed_layers_compute_the_same(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 33, bias=bias), torch.randn(*shape, 96)
    expected = layer(x)
    model = nn.Sequential(layer)
    with torch.inference_mode():
        pack_linear_layers(model)
        torch.testing.assert_close(model(x), expected.detach(), rtol=1e-5, atol=1e-5)
    assert layer.weight.numel() == 0, "not packed"


def test_a_tied_weight_stays_with_the_embedding_and_other_dtypes_as_they_are() -> None:
    embedding, head, half = nn.Embedding(40, 8), nn.Linear(8, 40, bias=False), nn.Linear(8, 8).bfloat16()
    head.weight = embedding.weight
    expected = head(torch.ones(3, 8)).detach()
    pack_linear_layers(nn.ModuleList([embedding, head, half]))
    assert embedding.weight.shape == (40, 8)
    assert half.weight.shape == (8, 8)
    torch.testing.assert_close(head(torch.ones(3, 8)), expected)

"""torch's flash attention in the blocks of a ring against the CPU in fp64; runs where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from longalign_ray.train.block_attention import CpuKernel, FlashKernel
from longalign_ray.train.ring_attention import blocks_of_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUNDARIES = (0, 700, 701, 1_000, 2_048)
SCALING = 0.125


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 128, 600])
@pytest.mark.parametrize(("rank", "source"), [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_blocks_equal_the_cpu(rank: int, source: int, window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(h, 1_024, 64, dtype=torch.bfloat16) for h in (8, kv_heads, kv_heads, 8))
    for block in blocks_of_step(BOUNDARIES, 2, rank, source, window):
        queries, keys = slice(*block.queries), slice(*block.keys)
        tensors = q[:, queries], k[:, keys], v[:, keys]
        exact = [x.double() for x in tensors]
        out, lse = CpuKernel().forward(*exact, block, SCALING)  # pyright: ignore[reportCallIssue]
        found, found_lse = FlashKernel().forward(*(x.cuda() for x in tensors), block, SCALING)  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(found.cpu().double(), out, rtol=0, atol=2e-2)
        torch.testing.assert_close(found_lse.cpu().double(), lse, rtol=0, atol=1e-3)
        wanted = CpuKernel().backward(grad[:, queries].double(), *exact, out, lse, block, SCALING)  # pyright: ignore[reportCallIssue]
        on_gpu = [x.cuda() for x in (grad[:, queries], *tensors, found.cpu(), found_lse.cpu())]
        gradients = FlashKernel().backward(*on_gpu, block, SCALING)  # pyright: ignore[reportCallIssue]
        for gradient, expected in zip(gradients, wanted, strict=True):
            assert (gradient.cpu().double() - expected).norm() / expected.norm() < 2e-2

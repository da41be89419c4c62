"""Steps of mixed requests on a GPU against the CPU in fp32; runs where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longalign_ray.serve import kv_cache
from longalign_ray.serve.batch_forward import Piece, forward, load_model
from longalign_ray.serve.kv_cache import KVCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = ((40, 0, 7), (1, 60, 0), (1, 1, 30), (20, 1, 1))  # tokens of each request in each step


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_logits_equal_the_cpu(dtype, tolerance, tiny_model_dir: Path, monkeypatch):
    monkeypatch.setattr(kv_cache, "MIN_SHARED", 16)
    found = []
    for kind, device in (("float32", "cpu"), (dtype, "cuda")):
        model = load_model(tiny_model_dir, dtype=kind, device=device)
        document = KVCache(range(90))
        forward(model, [Piece(document, range(50), 0)])
        caches = [document.branch(range(150), 50), document.branch(range(150), 30), KVCache(range(150))]
        rows = []
        for sizes in STEPS:
            starts = [cache.length for cache in caches]
            pieces = [
                Piece(cache, range(start, start + size), size)
                for cache, start, size in zip(caches, starts, sizes, strict=True)
                if size
            ]
            rows += [logits.cpu() for logits in forward(model, pieces)]
        found.append(torch.cat(rows))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)

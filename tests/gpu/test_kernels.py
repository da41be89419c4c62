"""The GPU kernels against the loop over sequences, forward and backward; runs where there is a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from longalign_ray.data.store import Example, Pack
from longalign_ray.train import attention
from longalign_ray.train.batch import to_batch
from longalign_ray.train.model import prepare_model, verify_isolation, verify_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUNDARIES = (0, 700, 701, 1_000, 2_048)


def kernel(name: str) -> attention.Kernel:
    if name == "torch":
        from torch.nn.attention.varlen import varlen_attn

        return lambda *tensors, **spec: attention.torch_varlen_kernel(*tensors, function=varlen_attn, **spec)
    module_name = {"flash": "flash_attn", "flash3": "flash_attn_interface"}[name]
    if importlib.util.find_spec(module_name) is None:
        pytest.skip(f"{module_name} is not installed")
    function = importlib.import_module(module_name).flash_attn_varlen_func
    return lambda *tensors, **spec: attention.flash_attn_kernel(*tensors, function=function, **spec)


@pytest.mark.parametrize(
    ("name", "softcap"), [("torch", None), ("flash", None), ("flash", 2.0), ("flash3", None), ("flash3", 2.0)]
)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_kernel_equals_the_loop(
    name: str, softcap: float | None, kv_heads: int, window: int | None, width: int
) -> None:
    if name == "flash3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("flash-attn 3 is made for Hopper")
    torch.manual_seed(0)
    shapes = [(8, 2_048, width), (kv_heads, 2_048, width), (kv_heads, 2_048, width)]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    spec: dict[str, Any] = {
        "cu_seqlens": torch.tensor(BOUNDARIES, device="cuda", dtype=torch.int32),
        "boundaries": BOUNDARIES,
        "max_seqlen": 1_048,
        "scaling": 0.125,
        "sliding_window": window,
        "softcap": softcap,
    }
    out, expected = kernel(name)(*tensors, **spec), attention.sdpa_loop(*exact, **spec)
    gradient = torch.randn_like(expected)
    out.backward(gradient.to(out.dtype))
    expected.backward(gradient)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
    for tensor, other in zip(tensors, exact, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        error = (tensor.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 2e-2


def test_packed_loss_and_gradient_on_the_gpu_equal_the_cpu() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    random = np.random.default_rng(0)
    examples = [
        Example(f"e{n}", random.integers(1, 64, n, dtype=np.int32), 100 * (random.random(n) < 0.5))
        for n in (300, 2, 45, 170)
    ]
    results = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).to(device, dtype)
        packed = prepare_model(model, gradient_checkpointing=True, head_chunk=64)
        if device == "cuda":
            verify_isolation(packed, vocab_size=64, device=device)
            verify_loss(packed, vocab_size=64, device=device)
        loss = packed(to_batch(Pack.of(examples), loss="sequence", device=device))
        loss.backward()
        gradients = [p.grad for p in packed.parameters() if p.grad is not None]
        results[device] = (loss.item(), torch.cat([gradient.double().cpu().ravel() for gradient in gradients]))
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], rel=2e-2)
    error = (results["cuda"][1] - results["cpu"][1]).norm() / results["cpu"][1].norm()
    assert error < 5e-2

"""The loop over sequences against a dense block-causal mask, and the arguments that GPU kernels get."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longalign_ray.errors import ModelError
from longalign_ray.train import attention

BOUNDARIES = (0, 5, 6, 20)


def qkv(heads: int, kv_heads: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(h, 20, 8, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))  # pyright: ignore


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """[T, H, D] with the whole T x T mask."""
    position = torch.arange(20)
    sequence = torch.bucketize(position, torch.tensor(BOUNDARIES[1:]), right=True)
    distance = position[:, None] - position[None]
    visible = (sequence[:, None] == sequence[None]) & (distance >= 0) & (distance < (window or 10**9))
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    if softcap is not None:
        scores = softcap * torch.tanh(scaling / softcap * torch.einsum("hqd,hkd->hqk", q, k))
        return torch.einsum("hqk,hkd->qhd", torch.where(visible, scores, -torch.inf).softmax(-1), v)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=scaling)[0].transpose(
        0, 1
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 14, 100])
@pytest.mark.parametrize("chunk", [2, 1_024])
def test_loop_equals_the_dense_mask(
    heads: tuple[int, int], window: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    q, k, v = qkv(*heads)
    out = attention.sdpa_loop(q, k, v, boundaries=BOUNDARIES, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(out, dense(q, k, v, scaling=0.3, window=window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("window", "chunk"), [(None, 1_024), (None, 4), (3, 4), (14, 1_024)])
def test_capped_scores_and_their_gradient_equal_the_dense_mask(
    heads: tuple[int, int], window: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    tensors = [tensor.requires_grad_() for tensor in qkv(*heads)]
    out = attention.sdpa_loop(*tensors, boundaries=BOUNDARIES, scaling=0.9, sliding_window=window, softcap=1.5)
    expected = dense(*tensors, scaling=0.9, window=window, softcap=1.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert (out - dense(*tensors, scaling=0.9, window=window)).abs().max() > 0.01  # the cap is felt
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for found, wanted in zip(
        torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


class RecordingKernel:
    """Stands in for a GPU kernel: keeps what it was called with, and returns what the test says or the queries."""

    def __init__(self, *more: Any):
        self.more = more

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        return (args[0], *self.more) if self.more else args[0]


SPEC = {"cu_seqlens": torch.tensor(BOUNDARIES, dtype=torch.int32), "boundaries": BOUNDARIES, "max_seqlen": 14}


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, -1)), (5, (4, 0))])
@pytest.mark.parametrize(("softcap", "capped"), [(None, {}), (50.0, {"softcap": 50.0})])
@pytest.mark.parametrize("more", [(), (torch.zeros(4, 20),)])  # the first releases of flash-attn 3 return a tuple
def test_flash_attn_arguments(
    window: int | None, expected: tuple[int, int], softcap: float | None, capped: dict[str, float], more: tuple[Any]
) -> None:
    kernel = RecordingKernel(*more)
    q, k, v = qkv(4, 2)
    spec = {**SPEC, "scaling": 0.3, "sliding_window": window, "softcap": softcap}
    out = attention.flash_attn_kernel(q, k, v, function=kernel, **spec)
    assert out is kernel.args[0]
    assert [tuple(x.shape) for x in kernel.args[:3]] == [(20, 4, 8), (20, 2, 8), (20, 2, 8)]
    assert kernel.args[3] is kernel.args[4] is SPEC["cu_seqlens"]
    assert kernel.args[5:] == (14, 14)
    assert kernel.kwargs == {"softmax_scale": 0.3, "causal": True, "window_size": expected, **capped}


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (5, (4, 0))])
@pytest.mark.parametrize(("kv_heads", "gqa"), [(4, False), (2, True)])
def test_torch_varlen_arguments(window: int | None, expected: tuple[int, int], kv_heads: int, gqa: bool) -> None:
    kernel = RecordingKernel()
    q, k, v = qkv(4, kv_heads)
    spec = {**SPEC, "scaling": 0.3, "sliding_window": window, "softcap": None}
    attention.torch_varlen_kernel(q, k, v, function=kernel, **spec)
    assert tuple(kernel.args[1].shape) == (20, kv_heads, 8)
    assert kernel.args[5:] == (14, 14)
    assert kernel.kwargs == {"scale": 0.3, "window_size": expected, "enable_gqa": gqa}


def test_torch_varlen_refuses_capped_scores() -> None:
    spec = {**SPEC, "scaling": 0.3, "sliding_window": None, "softcap": 50.0}
    with pytest.raises(ModelError, match=r"softcap 50.*flash-attn"):
        attention.torch_varlen_kernel(*qkv(4, 2), function=RecordingKernel(), **spec)


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        (("flash_attn", "flash_attn_interface"), 9, "three"),
        (("flash_attn", "flash_attn_interface"), 8, "two"),
        (("flash_attn_interface",), 10, "torch"),
        (("flash_attn",), 9, "two"),
        ((), 9, "torch"),
    ],
)
def test_the_kernel_of_a_gpu(
    installed: tuple[str, ...], capability: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn 3 is made for Hopper alone."""
    kernels = {"flash_attn": "two", "flash_attn_interface": "three"}
    for name in installed:
        module: Any = ModuleType(name)
        module.flash_attn_varlen_func = kernels[name]
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    attention._select_kernel.cache_clear()
    kernel: Any = attention._select_kernel(torch.device("cuda:0"))
    attention._select_kernel.cache_clear()
    found = kernel.keywords["function"]
    assert (found if isinstance(found, str) else "torch") == expected
    assert kernel.func is (attention.torch_varlen_kernel if expected == "torch" else attention.flash_attn_kernel)


def test_torch_varlen_takes_these_arguments() -> None:
    """The installed function has every parameter that we name."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    parameters = list(inspect.signature(varlen_attn).parameters)
    assert parameters[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(parameters)


def call(**changes: Any) -> None:
    q, k, v = (x[None] for x in qkv(4, 2))
    arguments = {"cu_seq_lens_q": SPEC["cu_seqlens"], "max_length_q": 14, "boundaries": BOUNDARIES, **changes}
    attention.varlen_attention(torch.nn.Identity(), q, k, v, None, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": None}, "did not pass the sequence boundaries"),
        ({"cu_seq_lens_q": None}, "did not pass the sequence boundaries"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(4)}, "bias by position"),
    ],
)
def test_refuses_rather_than_contaminates(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call(**changes)


def test_accepts_what_it_computes() -> None:
    call(softcap=None)
    call(softcap=50.0)

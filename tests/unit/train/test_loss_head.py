"""Loss and gradients of the chunked head against plain autograd over full logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longalign_ray.train.loss_head import LogitRule, TokenLossHead

N, D, V = 11, 6, 13


def head_of(rule: LogitRule, *, chunk: int, bias: bool = False, dtype: torch.dtype = torch.float64) -> TokenLossHead:
    torch.manual_seed(0)
    head = TokenLossHead(D, V, bias=bias, dtype=dtype)
    nn.init.normal_(head.weight)
    head.chunk, head.rule = chunk, rule
    return head


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, labels, and fp64 weights, some of them 0."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[3] = 0
    return hidden, torch.randint(0, V, (N,), generator=generator), weights


def full(hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The definition, with logits as Gemma, Cohere and Granite make them."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    rule = head.rule if isinstance(head, TokenLossHead) else LogitRule()
    logits = logits * rule.factor
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.3), LogitRule(softcap=2.0), LogitRule(1.7, 1.5)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_full_logits(rule: LogitRule, chunk: int, bias: bool) -> None:
    head, (hidden, labels, weights) = head_of(rule, chunk=chunk, bias=bias), problem()
    inputs = [hidden, *head.parameters()]
    loss, expected = head(hidden, labels, weights), full(hidden, head, labels, weights)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for found, wanted in zip(
        torch.autograd.grad(loss * 2.5, inputs), torch.autograd.grad(expected * 2.5, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    alone = head(hidden, labels)
    assert (alone.shape, alone.requires_grad) == ((N,), False)
    assert (alone * weights).sum().item() == pytest.approx(expected.item(), abs=1e-12)


def test_large_logits_do_not_overflow() -> None:
    head, (hidden, labels, weights) = head_of(LogitRule(1e4), chunk=4), problem()
    loss = head(hidden, labels, weights)
    assert loss.item() == pytest.approx(full(hidden, head, labels, weights).item(), rel=1e-12)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_what_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, labels, weights) = head_of(LogitRule(), chunk=4), problem()
    expected = full(hidden, head, labels, weights).item()
    with torch.no_grad(), monkeypatch.context() as without:
        without.delattr(torch, "mm")  # which only the gradient takes
        loss = head(hidden, labels, weights)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert not loss.requires_grad
    head.weight.requires_grad_(False)  # as under LoRA
    head(hidden, labels, weights).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_without_labels_it_is_the_linear_layer() -> None:
    head, (hidden, *_) = head_of(LogitRule(0.5, 1.0), chunk=4), problem()
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)


def test_bf16_sums_over_many_chunks_in_fp32() -> None:
    """A gradient that is summed in bf16 over 64 chunks is off by 0.9 %; rounded once, by 0.2 %."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(4_096, 64).bfloat16(), torch.randint(0, 512, (4_096,))
    weights = torch.full((4_096,), 1 / 4_096, dtype=torch.float64)
    head = TokenLossHead(64, 512, bias=False, dtype=torch.bfloat16)
    head.chunk, head.rule = 64, LogitRule()
    loss = head(hidden, labels, weights)
    assert loss.dtype == torch.float32  # not rounded to two digits
    loss.backward()
    exact = head.weight.detach().double().requires_grad_()
    expected = F.cross_entropy(hidden.double() @ exact.T, labels)
    expected.backward()
    assert head.weight.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (head.weight.grad.double() - exact.grad).norm() < 0.003 * exact.grad.norm()


def test_rules_of_families() -> None:
    assert LogitRule.of(SimpleNamespace()) == LogitRule()
    assert LogitRule.of(SimpleNamespace(logit_scale=0.25)) == LogitRule(0.25)
    assert LogitRule.of(SimpleNamespace(logits_scaling=8.0)) == LogitRule(0.125)
    assert LogitRule.of(SimpleNamespace(final_logit_softcapping=30.0)) == LogitRule(1.0, 30.0)
    assert LogitRule.of(SimpleNamespace(final_logit_softcapping=None, logits_scaling=1)) == LogitRule()

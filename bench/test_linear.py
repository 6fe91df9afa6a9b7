"""Linear attention against its plain form, two matrix products over features in memory: B 2, H 4, d 64, float32, relu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vix_kernels import linear_attention

BATCH, HEADS, WIDTH = 2, 4, 64


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As EfficientViT and SANA write it."""
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)


def problem(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_forward(tokens: int, against) -> None:
    q, k, v, _ = problem(tokens)
    with torch.no_grad():
        torch.testing.assert_close(linear_attention(q, k, v), plain(q, k, v))
        against(lambda: linear_attention(q, k, v), lambda: plain(q, k, v), budget=1.0)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_forward_and_backward(tokens: int, against) -> None:
    *leaves, dout = problem(tokens)
    leaves = [x.requires_grad_() for x in leaves]
    against(
        lambda: torch.autograd.grad(linear_attention(*leaves), leaves, dout),
        lambda: torch.autograd.grad(plain(*leaves), leaves, dout),
        budget=1.0,
    )


def test_kept_for_backward(kept) -> None:
    inputs = tuple(x.requires_grad_() for x in problem(4096)[:3])
    kept(linear_attention, plain, inputs, budget=0.3)

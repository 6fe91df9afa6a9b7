"""Nystrom attention against nystrom-attention without its linear maps: B 2, H 4, d 64, 64 landmarks, 33 taps, float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vix_kernels import nystrom_attention

peer = pytest.importorskip("nystrom_attention", reason="nystrom-attention is not installed (extra: bench)")

BATCH, HEADS, WIDTH, LANDMARKS = 2, 4, 64, 64


def side_by_side(*tensors: Tensor) -> Tensor:
    return torch.cat([x.detach().transpose(1, 2).flatten(2) for x in tensors], -1)


def problem(tokens: int) -> tuple[list[Tensor], Tensor, nn.Module]:
    """q, k, v and dout, q, k and v as the peer takes them, and the peer."""
    torch.manual_seed(0)
    ours = [torch.randn(BATCH, HEADS, tokens, WIDTH) for _ in range(4)]
    theirs = peer.NystromAttention(HEADS * WIDTH, dim_head=WIDTH, heads=HEADS, num_landmarks=LANDMARKS)
    theirs.to_qkv, theirs.to_out = nn.Identity(), nn.Identity()
    return ours, side_by_side(*ours[:3]), theirs


def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, **options: str) -> Tensor:
    return nystrom_attention(q, k, v, num_landmarks=LANDMARKS, conv_weight=weight, **options)


@pytest.mark.parametrize("tokens, budget", [(1024, 1.0), (4096, 0.42)])
def test_forward(tokens: int, budget: float, against) -> None:
    (*qkv, _), packed, theirs = problem(tokens)
    with torch.no_grad():
        expected, out = theirs(packed), attend(*qkv, theirs.res_conv.weight, landmarks="pad_front", pinv_init="original")
        torch.testing.assert_close(side_by_side(out), expected, atol=1e-4, rtol=1e-4)
        against(lambda: attend(*qkv, theirs.res_conv.weight), lambda: theirs(packed), budget=budget)


@pytest.mark.parametrize("tokens, budget", [(1024, 1.0), (4096, 0.6)])
def test_forward_and_backward(tokens: int, budget: float, against) -> None:
    (*qkv, dout), packed, theirs = problem(tokens)
    weight = theirs.res_conv.weight
    leaves, their_leaves = [*(x.requires_grad_() for x in qkv), weight], [packed.requires_grad_(), weight]
    their_dout = side_by_side(dout)
    against(
        lambda: torch.autograd.grad(attend(*leaves), leaves, dout),
        lambda: torch.autograd.grad(theirs(packed), their_leaves, their_dout),
        budget=budget,
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_memory_kept_for_backward(tokens: int, kept) -> None:
    (*qkv, _), packed, theirs = problem(tokens)
    leaves = [*(x.requires_grad_() for x in qkv), theirs.res_conv.weight, packed.requires_grad_()]
    kept(lambda *x: attend(*x[:4]), lambda *x: theirs(x[4]), tuple(leaves), budget=0.1)

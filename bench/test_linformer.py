"""Linformer attention against linformer: B 2, H 4, N 4096, d 64, K 256, float32; its linear maps are taken out."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vix_kernels import linformer_attention

peer = pytest.importorskip("linformer", reason="linformer is not installed (extra: bench)")

BATCH, HEADS, TOKENS, WIDTH, SLOTS = 2, 4, 4096, 64, 256


class Tokens(NamedTuple):
    """Leaves and the gradient of the output: heads apart as we take them, side by side as it does."""

    leaves: tuple[Tensor, ...]
    dout: Tensor


def merged(x: Tensor) -> Tensor:
    return x.detach().transpose(1, 2).flatten(2)


def problem() -> tuple[Tokens, Tokens, nn.Module]:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(BATCH, HEADS, TOKENS, WIDTH) for _ in range(4))
    theirs = peer.LinformerSelfAttention(HEADS * WIDTH, TOKENS, k=SLOTS, heads=HEADS)
    # Its values are its keys then, which costs it as much as values of their own.
    theirs.to_q = theirs.to_k = theirs.to_v = theirs.to_out = nn.Identity()
    projections = theirs.proj_k, theirs.proj_v
    return (
        Tokens((*(x.requires_grad_() for x in (q, k, v)), *projections), dout),
        Tokens((*(merged(x).requires_grad_() for x in (q, k)), *projections), merged(dout)),
        theirs,
    )


def test_forward(against) -> None:
    our, their, theirs = problem()
    q, k, v, *projections = our.leaves
    with torch.no_grad():
        torch.testing.assert_close(merged(linformer_attention(q, k, k, *projections)), theirs(*their.leaves[:2]))
        against(lambda: linformer_attention(*our.leaves), lambda: theirs(*their.leaves[:2]), budget=0.45)


def test_forward_and_backward(against) -> None:
    """Gradients of the tokens and of both projections."""
    our, their, theirs = problem()
    against(
        lambda: torch.autograd.grad(linformer_attention(*our.leaves), our.leaves, our.dout),
        lambda: torch.autograd.grad(theirs(*their.leaves[:2]), their.leaves, their.dout),
        budget=0.55,
    )


def test_memory_kept_for_backward(kept) -> None:
    our, their, theirs = problem()
    count = len(our.leaves)
    kept(
        lambda *leaves: linformer_attention(*leaves[:count]),
        lambda *leaves: theirs(*leaves[count : count + 2]),
        (*our.leaves, *their.leaves),
        budget=0.1,
    )

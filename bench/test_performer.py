"""Performer attention against performer-pytorch: B 2, H 4, d 64, M 256, float32."""

from __future__ import annotations

import pytest
import torch

from vix_kernels import orthogonal_projection, performer_attention

peer = pytest.importorskip("performer_pytorch", reason="performer-pytorch is not installed (extra: bench)")

BATCH, HEADS, WIDTH, FEATURES = 2, 4, 64, 256


def problem(tokens: int):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator) for _ in range(4))
    theirs = peer.FastAttention(dim_heads=WIDTH, nb_features=FEATURES)
    projection = orthogonal_projection(FEATURES, WIDTH, seed=0)
    theirs.projection_matrix.copy_(projection)
    return q, k, v, dout, lambda q, k, v: performer_attention(q, k, v, projection), theirs


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # Not the same function: theirs adds an eps of 1e-4 to the features. Close enough to catch a wrong one.
    assert ((ours - theirs).norm() / theirs.norm()) < 0.3


@pytest.mark.parametrize("tokens, budget", [(1024, 0.4), (4096, 0.22)])
def test_forward(tokens: int, budget: float, against) -> None:
    q, k, v, _, ours, theirs = problem(tokens)
    with torch.no_grad():
        check(ours(q / 4, k / 4, v), theirs(q / 4, k / 4, v))
        against(lambda: ours(q, k, v), lambda: theirs(q, k, v), budget=budget)


@pytest.mark.parametrize("tokens, budget", [(1024, 0.6), (4096, 0.33)])
def test_forward_and_backward(tokens: int, budget: float, against) -> None:
    q, k, v, dout, ours, theirs = problem(tokens)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    against(
        lambda: torch.autograd.grad(ours(*leaves), leaves, dout),
        lambda: torch.autograd.grad(theirs(*leaves), leaves, dout),
        budget=budget,
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_memory_kept_for_backward(tokens: int, kept) -> None:
    q, k, v, _, ours, theirs = problem(tokens)
    kept(ours, theirs, tuple(x.requires_grad_() for x in (q, k, v)), budget=0.1)

"""apply_rope on q and k against rotary-embedding-torch: B 2, H 4, d 64, float32."""

from __future__ import annotations

import pytest
import torch

from vix_kernels import apply_rope, rope_1d

peer = pytest.importorskip("rotary_embedding_torch", reason="rotary-embedding-torch is not installed (extra: bench)")

TOKENS, WIDTH = 4096, 64


def problem():
    generator = torch.Generator().manual_seed(0)
    q, k, dq, dk = (torch.randn(2, 4, TOKENS, WIDTH, generator=generator) for _ in range(4))
    embedding, rope = peer.RotaryEmbedding(dim=WIDTH), rope_1d(TOKENS, WIDTH)
    theirs = lambda q, k: (embedding.rotate_queries_or_keys(q), embedding.rotate_queries_or_keys(k))  # noqa: E731
    for a, b in zip(apply_rope(q, k, rope), theirs(q, k), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # their angles are products in float32
    return q, k, dq, dk, lambda q, k: apply_rope(q, k, rope), theirs


def test_forward(against) -> None:
    q, k, *_, ours, theirs = problem()
    with torch.no_grad():
        against(lambda: ours(q, k), lambda: theirs(q, k), budget=0.15)


def test_forward_and_backward(against) -> None:
    q, k, dq, dk, ours, theirs = problem()
    leaves = [x.requires_grad_() for x in (q, k)]
    against(
        lambda: torch.autograd.grad(ours(*leaves), leaves, (dq, dk)),
        lambda: torch.autograd.grad(theirs(*leaves), leaves, (dq, dk)),
        budget=0.25,
    )

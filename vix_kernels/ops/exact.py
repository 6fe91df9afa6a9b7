"""Exact rows: softmax attention for the first queries, which are usually class and register tokens.

    out_p = softmax(scale q_p k^T) v        for p < exact_rows

A classification head often reads only the outputs of these tokens. One additional pass, with these queries as the slots (see
primitives/aggregate.py), computes these outputs:

    rows, _ = aggregate(q[:, :, :exact_rows], k, v, scale=scale)

The cost is linear in the number of tokens. The other rows of the output do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Rotary
from ..primitives.aggregate import aggregate, aggregate_reference
from ..primitives.rotate import rotate_reference
from .rope import Rope


def compute_exact_rows(
    q: Tensor, k: Tensor, v: Tensor, count: int, scale: float, mask: Tensor | None, rope: Rope | None, backend: str
) -> Tensor:
    """Return the outputs (batch, heads, count, value_dim) of the first `count` queries, in float32 (float64 for float64 q)."""
    rotary = None if rope is None else rope.rotary
    return aggregate(first_queries(q, count, rope, mask), k, v, scale=scale, mask=mask, rotary=rotary, backend=backend)[0]


def with_exact_rows_reference(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, count: int, *, scale: float, mask: Tensor | None, rope: Rope | None
) -> Tensor:
    """Return `out` with its first `count` rows replaced by exact rows, in plain PyTorch.

    q and k are the queries and keys before the rotary embedding, which this function applies.
    """
    if not count:
        return out
    rotary = None if rope is None else rope.differentiable
    rows, _ = aggregate_reference(first_queries(q, count, rope, mask), k, v, scale=scale, mask=mask, rotary=rotary)
    return torch.cat((rows.to(out.dtype), out[:, :, count:]), 2)


def first_queries(q: Tensor, count: int, rope: Rope | None, mask: Tensor | None) -> Tensor:
    """Return the first `count` queries, after the rotary embedding.

    If there are as many queries as keys, padded queries are replaced by 0. This keeps a NaN in a padded query from reaching the
    gradients of the keys, which are sums over queries.
    """
    first = q[:, :, :count]
    if mask is not None and mask.shape[1] == q.shape[2]:
        first = first.masked_fill(~mask[:, None, :count, None], 0)
    if rope is None:
        return first
    cos, sin, interleaved, _ = rope.differentiable
    return rotate_reference(first, Rotary(cos[:, :count], sin[:, :count], interleaved))

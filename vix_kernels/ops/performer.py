"""Performer attention with FAVOR+ features (Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794).

    phi_j(x) = exp(c w_j . x - c^2 |x|^2 / 2),   c = sqrt(scale)                                    equation 5 of the paper
    out_n = sum_j phi_j(q_n) S_j / sum_j phi_j(q_n) z_j,    S_j = sum_n phi_j(k_n) v_n,    z_j = sum_n phi_j(k_n)

The vectors w_j are random. They are the slots in two passes of softmax attention (see primitives/aggregate.py and
primitives/broadcast.py):

    values, lse = aggregate(w, k, v, gaussian=True)        out = broadcast(q, w, values, lse)

Here values_j = S_j / z_j and lse_j = log2 z_j. The result is the same as above, because the terms in |q_n|^2 cancel and the
remaining weights are a softmax. Unlike direct evaluation, the two passes need no eps and no stabilizer, and do not underflow.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import backends
from ..plans import planned
from ..primitives import aggregate, broadcast
from .checks import autocast, check_exact_rows, check_integer, check_projection, check_qkv, check_scale
from .exact import compute_exact_rows, with_exact_rows_reference
from .rope import Rope, check_rope, mask_and_rotate_reference


@planned
def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Estimate softmax(scale q k^T) v with random features, in time linear in the number of tokens.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        projection: random features, (M, head_dim) or (heads, M, head_dim), float32 or float64. See orthogonal_projection.
        scale: scaling factor of the logits, > 0. Defaults to head_dim ** -0.5. q and k are multiplied by sqrt(scale).
        key_padding_mask: bool (batch, tokens), True = valid. If a sample has no valid key, its output is 0.
        rope: rotary embedding of q and k, applied inside the kernels. Requires as many queries as tokens.
        exact_rows: the number of leading queries (class and register tokens) that use exact softmax attention. See
            ops/exact.py.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, projection and rope.angles.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, key_padding_mask)
    rotary = None if rope is None else check_rope(rope, q, k)
    slots = check_projection(projection, q)
    scale = check_scale(scale, q.shape[3])
    check_exact_rows(exact_rows, q)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    if backend == "reference":
        return performer_attention_reference(
            q, k, v, projection, scale=scale, key_padding_mask=key_padding_mask, rope=rope, exact_rows=exact_rows
        )
    c = math.sqrt(scale)
    rows = compute_exact_rows(q, k, v, exact_rows, scale, key_padding_mask, rope, backend) if exact_rows else None
    values, lse = aggregate(slots, k, v, scale=c, gaussian=True, mask=key_padding_mask, backend=backend, rotary=rotary)
    return broadcast(q, slots, values, lse, scale=c, rows=rows, backend=backend, rotary=rotary)


def performer_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    scale: float,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Return the result of `performer_attention`, computed in plain PyTorch with all N x M features in memory.

    Supports all devices and torch.func transforms.
    """
    tokens = q, k, v
    q, k, v = mask_and_rotate_reference(q, k, v, key_padding_mask, rope)
    w = projection.to(q.dtype) * math.sqrt(scale)
    log_phi_k = k @ w.mT - (k * k).sum(-1, keepdim=True) * (scale / 2)
    if key_padding_mask is not None:
        valid = key_padding_mask[:, None, :, None]
        has_key = valid.any(-2, keepdim=True)
        log_phi_k = torch.where(valid | ~has_key, log_phi_k, float("-inf"))
    log_z = log_phi_k.logsumexp(-2, keepdim=True)
    values = (log_phi_k - log_z).exp().mT @ v
    weights = (q @ w.mT + log_z).softmax(-1)
    out = weights @ values
    out = out if key_padding_mask is None else torch.where(has_key, out, 0.0)
    return with_exact_rows_reference(out, *tokens, exact_rows, scale=scale, mask=key_padding_mask, rope=rope)


def orthogonal_projection(
    num_features: int,
    head_dim: int,
    *,
    seed: int,
    num_heads: int | None = None,
    scaling: Literal["chi", "sqrt"] = "chi",
) -> Tensor:
    """Draw random features in Haar-distributed orthogonal blocks (section 2.4 of arXiv 2009.14794).

    Args:
        num_features: M, the number of rows.
        head_dim: D, the number of columns. The rows of each block of D rows are orthogonal. The last block may be smaller.
        seed: seed of the random numbers. The same seed produces the same features on every rank and in every run.
        num_heads: number of heads with separate features. If None, all heads share one set of features.
        scaling: "chi": the rows have the same length distribution as Gaussian vectors. "sqrt": their length is sqrt(D).

    Returns:
        float32 (M, D) or (num_heads, M, D), on the CPU.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type. The message names the argument.
    """
    check_integer("num_features", num_features, 1)
    check_integer("head_dim", head_dim, 1)
    check_integer("seed", seed)
    if num_heads is not None:
        check_integer("num_heads", num_heads, 1)
    if scaling not in ("chi", "sqrt"):
        raise ValueError(f"scaling: expected 'chi' or 'sqrt', got {scaling!r}")
    generator = torch.Generator().manual_seed(seed)
    sets, blocks = num_heads or 1, math.ceil(num_features / head_dim)
    gaussian = torch.randn(sets, blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    # The Q of a QR decomposition is Haar distributed only after the signs of R's diagonal are applied to it
    # (Mezzadri, math-ph/0609050).
    orthogonal = orthogonal * triangular.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    rows = orthogonal.mT.reshape(sets, blocks * head_dim, head_dim)[:, :num_features]
    if scaling == "chi":
        lengths = torch.randn(sets, num_features, head_dim, generator=generator, dtype=torch.float64).norm(dim=-1)
    else:
        lengths = torch.full((sets, num_features), math.sqrt(head_dim), dtype=torch.float64)
    rows = (rows * lengths[..., None]).float()
    return rows if num_heads is not None else rows[0]

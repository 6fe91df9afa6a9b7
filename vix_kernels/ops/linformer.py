"""Linformer attention (Wang et al., Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768).

    out = softmax(scale q (E^T k)^T) (F^T v)                                                    equation 7 of the paper

The learned projections E and F combine the N tokens into K slots. The queries attend to these slots:

    keys, values = project(k, v, E, F)        out = broadcast(q, keys, values)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..layout import accumulator
from ..plans import planned
from ..primitives import broadcast, project
from ..primitives.broadcast import broadcast_reference
from .checks import autocast, check_exact_rows, check_qkv, check_scale, check_tensor, dtype_name
from .exact import compute_exact_rows, with_exact_rows_reference
from .rope import Rope, check_rope, mask_and_rotate_reference


@planned
def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over K slots, which are learned linear combinations of the tokens.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        key_projection: E, (tokens, K) or (heads, tokens, K), float32 or in q's dtype. If it has more rows than there are
            tokens, only the first rows are used.
        value_projection: F, with the shape and dtype of key_projection. If None, key_projection is also used for values.
        scale: scaling factor of the logits, > 0. Defaults to head_dim ** -0.5.
        key_padding_mask: bool (batch, tokens), True = valid. Padded tokens do not contribute to the slots. If a sample has no
            valid key, its output is 0.
        rope: rotary embedding of q and k, applied inside the kernels. k is rotated before it is projected. Requires as many
            queries as tokens.
        exact_rows: the number of leading queries (class and register tokens) that use exact softmax attention. See
            ops/exact.py.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, key_projection, value_projection and
        rope.angles.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, key_padding_mask)
    rotary = None if rope is None else check_rope(rope, q, k)
    key_projection = check_token_projection("key_projection", key_projection, k)
    if value_projection is not None:
        value_projection = check_token_projection("value_projection", value_projection, k)
        for name in ("shape", "dtype"):
            actual, expected = getattr(value_projection, name), getattr(key_projection, name)
            if actual != expected:
                raise ValueError(f"value_projection: expected key_projection's {name} {expected}, got {actual}")
    scale = check_scale(scale, q.shape[3])
    check_exact_rows(exact_rows, q)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    if backend == "reference":
        return linformer_attention_reference(
            q, k, v, key_projection, value_projection, scale=scale, key_padding_mask=key_padding_mask, rope=rope,
            exact_rows=exact_rows,
        )  # fmt: skip
    rows = compute_exact_rows(q, k, v, exact_rows, scale, key_padding_mask, rope, backend) if exact_rows else None
    keys, values = project(k, v, key_projection, value_projection, mask=key_padding_mask, backend=backend, rotary=rotary)
    return broadcast(q, keys, values, scale=scale, rows=rows, backend=backend, rotary=rotary)


def attend_to_slots(q: Tensor, keys: Tensor, values: Tensor, *, scale: float, backend: str) -> Tensor:
    """Return `softmax(scale q keys^T) values` for keys and values that are already projected.

    Args:
        q: (batch, heads, queries, head_dim).
        keys: (batch, heads, K, head_dim) in q's dtype.
        values: (batch, heads, K, value_dim) in any dtype.
    """
    backend = backends.resolve(backend, q, max(q.shape[3], values.shape[3]))
    values = values.to(accumulator(q.dtype))
    if backend == "reference":
        return broadcast_reference(q, keys, values, scale=scale)
    return broadcast(q, keys, values, scale=scale, backend=backend)


def linformer_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    scale: float,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Return the result of `linformer_attention`, computed in plain PyTorch with all N x K attention weights in memory.

    Supports all devices and torch.func transforms.
    """
    tokens = q, k, v
    q, k, v = mask_and_rotate_reference(q, k, v, key_padding_mask, rope)
    e = key_projection[..., : k.shape[2], :].to(k.dtype)
    f = e if value_projection is None else value_projection[..., : v.shape[2], :].to(v.dtype)
    out = (scale * q @ (e.mT @ k).mT).softmax(-1) @ (f.mT @ v)
    return with_exact_rows_reference(out, *tokens, exact_rows, scale=scale, mask=key_padding_mask, rope=rope)


def check_token_projection(name: str, projection: Tensor, k: Tensor) -> Tensor:
    """Check a projection for k's tokens, and return its first k.shape[2] rows as (heads or 1, tokens, K)."""
    check_tensor(name, projection)
    if projection.dim() not in (2, 3) or projection.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (tokens, K) or (heads, tokens, K), got {tuple(projection.shape)}")
    if projection.dtype not in (torch.float32, k.dtype):
        raise TypeError(f"{name}: expected float32 or q's dtype {dtype_name(k.dtype)}, got {dtype_name(projection.dtype)}")
    if projection.dim() == 3 and projection.shape[0] != k.shape[1]:
        raise ValueError(f"{name}: expected q's {k.shape[1]} heads, got {projection.shape[0]}")
    if projection.shape[-2] < k.shape[2]:
        raise ValueError(f"{name}: expected at least {k.shape[2]} rows, one per token of k, got {projection.shape[-2]}")
    if projection.device != k.device:
        raise ValueError(f"{name}: expected q's device {k.device}, got {projection.device}")
    # In eager mode, do not slice if all rows are used, because the backward pass of a slice copies the gradient.
    if torch.compiler.is_compiling() or projection.shape[-2] > k.shape[2]:
        projection = projection[..., : k.shape[2], :]
    projection = projection.to(torch.promote_types(projection.dtype, k.dtype))
    return projection[None] if projection.dim() == 2 else projection

"""Attention with learned exponential features (after Zhang et al., The Hedgehog and the Porcupine, arXiv 2402.04347).

    psi_j(q) = exp(c wq_j . q + b_j)        phi_j(k) = exp(c wk_j . k - g c^2 |k|^2 / 2)        c = sqrt(scale)
    out_n = sum_j psi_j(q_n) S_j / sum_j psi_j(q_n) z_j,    S_j = sum_n phi_j(k_n) v_n,    z_j = sum_n phi_j(k_n)

Unlike Performer attention (see performer.py), this method has separate, learned features for queries and keys, and a bias. With
wq = wk, b = 0 and g = 1, the two methods compute the same function. As in Performer attention, the computation has two passes,
and lse is in base 2. For g = 1, the passes are:

    values, lse = aggregate(wk, k, v, gaussian=True)        out = broadcast(q, wq, values, lse + b / ln 2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..plans import planned
from ..primitives import aggregate, broadcast
from .checks import autocast, check_exact_rows, check_number, check_projection, check_qkv, check_scale, check_tensor, dtype_name
from .exact import compute_exact_rows, with_exact_rows_reference
from .rope import Rope, check_rope, mask_and_rotate_reference


@planned
def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    feature_bias: Tensor | None = None,
    *,
    gaussian: bool | float = True,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention with M learned features of queries and keys, in time linear in the number of tokens.

    `vix_kernels.linearize` trains the features to reproduce the softmax attention of a model.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        query_features, key_features: wq and wk, float32 (M, head_dim) or (heads, M, head_dim). They must have the same shape.
        feature_bias: b, float32 (M,) or, if each head has separate features, (heads, M). None means 0.
        gaussian: g, the factor of the term c^2 |k|^2 / 2, >= 0. True means 1, and False means 0.
        scale: scaling factor of the softmax logits that the features approximate, > 0. Defaults to head_dim ** -0.5.
        key_padding_mask: bool (batch, tokens), True = valid. If a sample has no valid key, its output is 0.
        rope: rotary embedding of q and k, applied inside the kernels. Requires as many queries as tokens.
        exact_rows: the number of leading queries (class and register tokens) that use exact softmax attention. See
            ops/exact.py.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, query_features, key_features, feature_bias
        and rope.angles.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, key_padding_mask)
    rotary = None if rope is None else check_rope(rope, q, k)
    query_slots = check_projection(query_features, q, "query_features")
    key_slots = check_projection(key_features, q, "key_features")
    if query_features.shape != key_features.shape:
        expected, got = tuple(query_features.shape), tuple(key_features.shape)
        raise ValueError(f"key_features: expected query_features' shape {expected}, got {got}")
    _check_bias(feature_bias, query_features, q)
    gaussian = float(gaussian) if isinstance(gaussian, bool) else check_number("gaussian", gaussian, zero=True)
    scale = check_scale(scale, q.shape[3])
    check_exact_rows(exact_rows, q)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    if backend == "reference":
        return feature_attention_reference(
            q, k, v, query_features, key_features, feature_bias, gaussian=gaussian, scale=scale,
            key_padding_mask=key_padding_mask, rope=rope, exact_rows=exact_rows,
        )  # fmt: skip
    rows = compute_exact_rows(q, k, v, exact_rows, scale, key_padding_mask, rope, backend) if exact_rows else None
    # aggregate subtracts |scale k|^2 / 2, so a scale of c sqrt(g) gives the term g c^2 |k|^2 / 2. Dividing the slots by sqrt(g)
    # keeps the logits c wk . k unchanged.
    c, root = math.sqrt(scale), math.sqrt(gaussian) or 1.0
    values, lse = aggregate(
        key_slots if root == 1 else key_slots / root, k, v, scale=c * root, gaussian=gaussian > 0, mask=key_padding_mask,
        backend=backend, rotary=rotary,
    )  # fmt: skip
    if feature_bias is not None:
        lse = torch.add(lse, feature_bias.to(lse.dtype), alpha=1 / math.log(2))
    return broadcast(q, query_slots, values, lse, scale=c, rows=rows, backend=backend, rotary=rotary)


def feature_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    feature_bias: Tensor | None = None,
    *,
    gaussian: bool | float = True,
    scale: float,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Return the result of `feature_attention`, computed in plain PyTorch with all N x M features in memory.

    Supports all devices and torch.func transforms.
    """
    tokens = q, k, v
    q, k, v = mask_and_rotate_reference(q, k, v, key_padding_mask, rope)
    wq, wk = (x.to(q.dtype) * math.sqrt(scale) for x in (query_features, key_features))
    log_psi, log_phi = q @ wq.mT, k @ wk.mT - (k * k).sum(-1, keepdim=True) * (gaussian * scale / 2)
    if feature_bias is not None:
        log_psi = log_psi + feature_bias.to(q.dtype)[..., None, :]
    if key_padding_mask is not None:
        valid = key_padding_mask[:, None, :, None]
        has_key = valid.any(-2, keepdim=True)
        log_phi = torch.where(valid | ~has_key, log_phi, float("-inf"))
    log_z = log_phi.logsumexp(-2, keepdim=True)
    out = (log_psi + log_z).softmax(-1) @ ((log_phi - log_z).exp().mT @ v)
    out = out if key_padding_mask is None else torch.where(has_key, out, 0.0)
    return with_exact_rows_reference(out, *tokens, exact_rows, scale=scale, mask=key_padding_mask, rope=rope)


def _check_bias(bias: Tensor | None, features: Tensor, q: Tensor) -> None:
    if bias is None:
        return
    check_tensor("feature_bias", bias)
    if bias.shape != features.shape[:-1] and bias.shape != features.shape[-2:-1]:
        raise ValueError(f"feature_bias: expected shape {tuple(features.shape[:-1])}, got {tuple(bias.shape)}")
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"feature_bias: expected float32 (16 bits are not precise enough), got {dtype_name(bias.dtype)}")
    if bias.device != q.device:
        raise ValueError(f"feature_bias: expected q's device {q.device}, got {bias.device}")

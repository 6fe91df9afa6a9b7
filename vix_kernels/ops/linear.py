"""Linear attention (Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236).

    out_n = sum_j phi_j(q_n) S_j / (sum_j phi_j(q_n) z_j + eps)                          equations 4 and 5 of the paper
    S_j = sum_n phi_j(k_n) v_n,    z_j = sum_n phi_j(k_n)

phi(x) is relu(x) (EfficientViT, arXiv 2205.14756) or elu(x) + 1 (as in the paper). By default, phi is applied to each channel
of x. With a projection, phi is applied to head_dim^(-1/4) w_j . x, where w_j is row j of the projection. The Performer paper
(arXiv 2009.14794) calls this method generalized attention. The computation has two passes: linear_aggregate computes S and z,
and linear_broadcast computes the output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..plans import planned
from ..primitives import linear_aggregate, linear_broadcast
from ..primitives.linear import FEATURE_MAPS
from .checks import autocast, check_number, check_projection, check_qkv
from .rope import Rope, check_rope, mask_and_rotate_reference


@planned
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: Literal["relu", "elu"] = "relu",
    projection: Tensor | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with weights proportional to phi(q) . phi(k), in time linear in the number of tokens.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        feature_map: phi, "relu" or "elu" (elu + 1).
        projection: float32 (M, head_dim) or (heads, M, head_dim). phi is applied to the dot products of each query or key with
            the rows of the projection, times head_dim ** -0.25. If None, phi is applied to the channels of q and k.
        eps: a number >= 0 that is added to the denominator.
        key_padding_mask: bool (batch, tokens), True = valid. If a sample has no valid key, its output is 0.
        rope: rotary embedding of q and k, applied inside the kernels before phi. Requires as many queries as tokens.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, projection and rope.angles. With
        relu, the output of a query is 0 if no feature is positive for both the query and a valid key.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, key_padding_mask)
    rotary = None if rope is None else check_rope(rope, q, k)
    check_feature_map(feature_map, eps)
    slots = None if projection is None else check_projection(projection, q) * q.shape[3] ** -0.25
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    if backend == "reference":
        return linear_attention_reference(
            q, k, v, feature_map=feature_map, projection=projection, eps=eps, key_padding_mask=key_padding_mask, rope=rope
        )
    options = dict(feature_map=feature_map, backend=backend) | dict(rotary=rotary)
    sums, norms = linear_aggregate(slots, k, v, mask=key_padding_mask, **options)
    return linear_broadcast(q, slots, sums, norms, eps=eps, **options)


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "relu",
    projection: Tensor | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Return the result of `linear_attention`, computed in plain PyTorch with all features in memory.

    Supports all devices and torch.func transforms.
    """
    q, k, v = mask_and_rotate_reference(q, k, v, key_padding_mask, rope)
    if projection is not None:
        w = projection.to(q.dtype) * q.shape[3] ** -0.25
        q, k = q @ w.mT, k @ w.mT
    phi_q, phi_k = (F.relu(x) if feature_map == "relu" else F.elu(x) + 1 for x in (q, k))
    if key_padding_mask is not None:
        phi_k = torch.where(key_padding_mask[:, None, :, None], phi_k, 0.0)
    wide = torch.promote_types(q.dtype, torch.float32)
    z = phi_k.sum(-2, keepdim=True, dtype=wide)
    weights = phi_q * z
    total = weights.sum(-1, keepdim=True) + eps
    # Compute weighted means, because the sums in the equation overflow in float16 if there are many tokens.
    values = (phi_k / z.masked_fill(z == 0, 1)).to(v.dtype).mT @ v
    return (weights / total.masked_fill(total == 0, 1)).to(v.dtype) @ values


def check_feature_map(feature_map: str, eps: float) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map: expected one of {', '.join(map(repr, FEATURE_MAPS))}, got {feature_map!r}")
    check_number("eps", eps, zero=True)

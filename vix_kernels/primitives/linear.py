"""linear_aggregate and linear_broadcast: linear attention in two passes, with a feature map instead of a softmax.

    f_jn = phi(p_j . k_n)      S_j = sum_n f_jn v_n      z_j = sum_n f_jn
    f_nj = phi(p_j . q_n)      out_n = sum_j f_nj S_j / (sum_j f_nj z_j + eps)

phi is relu or elu + 1. The slots p_j are optional. Without slots, phi is applied to the channels of a token. linear_aggregate
returns S and z instead of the means S / z, because the gradients of S and z are finite even for the smallest z that float32 can
represent.

To avoid overflow, the kernels divide the numerator and the denominator of out_n by the largest z. For float16, they divide
both by the largest product f_nj z_j of the query instead. If eps divided by this product overflows float32, the output and the
gradients of k and v are 0. For eps = 1e-6, this happens only if features are below 1e-22.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import Rotary, accumulator, empty_like_tokens, flattened, joined, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register
from .rotate import angle_gradient, rotate_reference

FEATURE_MAPS = ("relu", "elu")

_KEYS = "Tensor? slots, Tensor k, Tensor v, Tensor? mask, Rotary? rotary, str feature_map"
_QUERIES = "Tensor q, Tensor? slots, Tensor sums, Tensor norms, Rotary? rotary, str feature_map"


def linear_aggregate(
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Return S, the sums of the values weighted by the features of the keys, and z, the sums of these features.

    Args:
        slots: (batch or 1, heads or 1, M, D), in k's dtype or float32. If None, phi is applied to the channels, so M = D.
        k: (batch, heads, N, D). Views with last stride 1 are not copied.
        v: (batch, heads, N, E), in k's dtype.
        feature_map: "relu" or "elu" (elu + 1).
        mask: bool (batch, N), True = valid.
        rotary: rotary embedding of k.
        backend: "torch" or "triton".

    Returns:
        sums S (batch, heads, M, E) and norms z (batch, heads, M), in float32 (float64 for float64 inputs). Differentiable in
        slots, k, v and rotary.angles.
    """
    k, v, slots = unit_last_stride(k), unit_last_stride(v), None if slots is None else unit_last_stride(slots)
    inputs = slots, k, v, mask, *flattened(rotary)
    if needs_autograd(inputs):
        return _LinearAggregate.apply(*inputs, feature_map, backend)
    return linear_aggregate_forward(slots, k, v, mask, rotary, feature_map, backend)


def linear_broadcast(
    q: Tensor,
    slots: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    *,
    feature_map: str,
    eps: float,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> Tensor:
    """Return the output of each query n: sum_j f_nj S_j / (sum_j f_nj z_j + eps).

    Args:
        q: (batch, heads, queries, D). Views with last stride 1 are not copied.
        slots, feature_map, backend: as in linear_aggregate.
        sums, norms: results of linear_aggregate.
        eps: a number that is added to the denominator. A denominator of 0 is replaced by 1.
        rotary: rotary embedding of q.

    Returns:
        out (batch, heads, queries, E) in q's dtype. Differentiable in q, slots, sums, norms and rotary.angles.
    """
    q, slots, sums = unit_last_stride(q), None if slots is None else unit_last_stride(slots), unit_last_stride(sums)
    inputs = q, slots, sums, norms, *flattened(rotary)
    if needs_autograd(inputs):
        return _LinearBroadcast.apply(*inputs, feature_map, eps, backend)
    return linear_broadcast_forward(q, slots, sums, norms, rotary, feature_map, eps, backend)[0]


def linear_aggregate_reference(
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Return S and z of `linear_aggregate`, computed with all N x M features in memory."""
    valid = None if mask is None else mask[:, None, :, None]
    if valid is not None:
        k, v = torch.where(valid, k, 0.0), torch.where(valid, v, 0.0)
    features = _features_reference(k, slots, feature_map, rotary)
    if valid is not None:
        features = torch.where(valid, features, 0.0)
    return features.mT @ v.to(features.dtype), features.sum(-2)


def linear_broadcast_reference(
    q: Tensor,
    slots: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    *,
    feature_map: str,
    eps: float,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output of `linear_broadcast`, and its denominator (batch, heads, queries)."""
    features = _features_reference(q, slots, feature_map, rotary)
    total = (features @ norms[..., None]).squeeze(-1) + eps
    return (features @ sums / torch.where(total == 0, 1.0, total)[..., None]).to(q.dtype), total


def _features_reference(x: Tensor, slots: Tensor | None, feature_map: str, rotary: Rotary | None) -> Tensor:
    x = x.to(accumulator(x.dtype))
    if rotary is not None:
        x = rotate_reference(x, rotary)
    if slots is not None:
        x = x @ slots.to(x.dtype).mT
    return F.relu(x) if feature_map == "relu" else F.elu(x) + 1


class _LinearAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, k, v, mask, cos, sin, angles, interleaved, feature_map, backend):
        ctx.save_for_backward(slots, k, v, mask, cos, sin, angles)
        ctx.interleaved, ctx.feature_map, ctx.backend = interleaved, feature_map, backend
        return linear_aggregate_forward(slots, k, v, mask, joined(cos, sin, interleaved), feature_map, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dsums, dnorms):
        slots, k, v, mask, cos, sin, _ = saved
        need_slots, need_k, need_v, _, _, _, need_angles, *_ = ctx.needs_input_grad
        needs = need_slots, need_k or need_angles, need_v
        rotary = joined(cos, sin, ctx.interleaved)
        grads = linear_aggregate_backward(dsums, dnorms, slots, k, v, mask, rotary, ctx.feature_map, needs, ctx.backend)
        dangles = angle_gradient(k, grads[1], cos, ctx.interleaved, ctx.backend) if need_angles else None
        dslots, dk, dv = (x if need else None for x, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return dslots, dk, dv, None, None, None, dangles, None, None, None


class _LinearBroadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, slots, sums, norms, cos, sin, angles, interleaved, feature_map, eps, backend):
        out, total = linear_broadcast_forward(
            q, slots, sums, norms, joined(cos, sin, interleaved), feature_map, eps, backend
        )  # fmt: skip
        ctx.save_for_backward(q, slots, sums, norms, cos, sin, angles, total)
        ctx.interleaved, ctx.feature_map, ctx.backend = interleaved, feature_map, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        q, slots, sums, norms, cos, sin, _, total = saved
        needs = ctx.needs_input_grad[:4]
        grads = linear_broadcast_backward(
            dout, q, slots, sums, norms, joined(cos, sin, ctx.interleaved), ctx.feature_map, total,
            (needs[1], needs[2] or needs[3]), ctx.backend,
        )  # fmt: skip
        dangles = angle_gradient(q, grads[0], cos, ctx.interleaved, ctx.backend) if ctx.needs_input_grad[6] else None
        grads = (x if need else None for x, need in zip(grads, needs, strict=True))
        return *grads, None, None, dangles, None, None, None, None


def _fake_aggregate_forward(slots, k, v, mask, rotary, feature_map, backend):
    batch, heads, _, width = k.shape
    num_slots = width if slots is None else slots.shape[2]
    dtype = accumulator(k.dtype)
    return k.new_empty(batch, heads, num_slots, v.shape[3], dtype=dtype), k.new_empty(batch, heads, num_slots, dtype=dtype)


def _fake_aggregate_backward(dsums, dnorms, slots, k, v, mask, rotary, feature_map, needs, backend):
    need_slots, need_k, need_v = needs
    dslots = slots.new_empty(slots.shape) if need_slots and slots is not None else k.new_empty(0)
    dk = empty_like_tokens(k, k.shape[3]) if need_k else k.new_empty(0)
    return dslots, dk, empty_like_tokens(v, v.shape[3]) if need_v else v.new_empty(0)


def _fake_broadcast_forward(q, slots, sums, norms, rotary, feature_map, eps, backend):
    return empty_like_tokens(q, sums.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _fake_broadcast_backward(dout, q, slots, sums, norms, rotary, feature_map, total, needs, backend):
    need_slots, need_sums = needs
    dslots = slots.new_empty(slots.shape) if need_slots and slots is not None else q.new_empty(0)
    dsums, dnorms = (sums.new_empty(shape if need_sums else (0,)) for shape in (sums.shape, sums.shape[:3]))
    return empty_like_tokens(q, q.shape[3]), dslots, dsums, dnorms


linear_aggregate_forward = register(
    f"linear_aggregate_forward({_KEYS}, str backend) -> (Tensor sums, Tensor norms)",
    module="linear_aggregate",
    fake=_fake_aggregate_forward,
)
linear_aggregate_backward = register(
    f"linear_aggregate_backward(Tensor dsums, Tensor dnorms, {_KEYS}, bool[] needs, str backend)"
    " -> (Tensor dslots, Tensor dk, Tensor dv)",
    module="linear_aggregate",
    fake=_fake_aggregate_backward,
)
linear_broadcast_forward = register(
    f"linear_broadcast_forward({_QUERIES}, float eps, str backend) -> (Tensor out, Tensor total)",
    module="linear_broadcast",
    fake=_fake_broadcast_forward,
)
linear_broadcast_backward = register(
    f"linear_broadcast_backward(Tensor dout, {_QUERIES}, Tensor total, bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dslots, Tensor dsums, Tensor dnorms)",
    module="linear_broadcast",
    fake=_fake_broadcast_backward,
)

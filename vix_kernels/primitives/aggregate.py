"""aggregate: M intermediate vectors, called slots, attend to N tokens.

    l_jn = scale p_j . k_n + b_n            values_j = sum_n softmax_n(l_jn) v_n            lse_j = log2 sum_n exp(l_jn)

If gaussian is set, the bias of a key is b_n = -|scale k_n|^2 / 2, so exp(l_jn) is FAVOR+ feature j of key n. Otherwise
the bias is 0. A masked key has b_n = -inf and is read as 0, even if it is NaN. A slot without valid keys has values 0 and
lse -inf. With RoPE, keys are rotated first.

lse is a base-2 logarithm, because the kernels use exp2. The registered operator also returns row_max_j = log2(e) max_n l_jn and
total_j = sum_n exp(l_jn) / 2^row_max_j, so lse_j = row_max_j + log2 total_j. The backward pass recomputes the
probabilities from row_max and total, because float32 loses the fractional bits of a large lse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import Rotary, Statistics, accumulator, empty_like_tokens, flattened, joined, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register
from .rotate import angle_gradient, rotate_reference

_PROBLEM = "Tensor slots, Tensor k, Tensor v, Tensor? mask, Rotary? rotary, float scale, bool gaussian"


def aggregate(
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    gaussian: bool = False,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention in which slots attend to tokens.

    Args:
        slots: (batch or 1, heads or 1, M, D), in k's dtype or float32.
        k: (batch, heads, N, D). Views with last stride 1 are not copied.
        v: (batch, heads, N, E), in k's dtype.
        scale: scaling factor of the logits.
        gaussian: whether to add the key bias of FAVOR+.
        mask: bool (batch, N), True = valid.
        rotary: rotary embedding of k.
        backend: "torch" or "triton".

    Returns:
        values (batch, heads, M, E) and lse (batch, heads, M), in float32 (float64 for float64 inputs). Differentiable in
        slots, k, v and rotary.angles.
    """
    k, v, slots = unit_last_stride(k), unit_last_stride(v), unit_last_stride(slots)
    inputs = slots, k, v, mask, *flattened(rotary)
    if needs_autograd(inputs):
        return _Aggregate.apply(*inputs, scale, gaussian, backend)
    return aggregate_forward(slots, k, v, mask, rotary, scale, gaussian, backend)[:2]


def aggregate_reference(
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    gaussian: bool = False,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Return values and lse of `aggregate`, computed with all N x M logits in memory."""
    if mask is not None:
        valid = mask[:, None, :, None]
        k, v = torch.where(valid, k, 0.0), torch.where(valid, v, 0.0)
    if rotary is not None:
        k = rotate_reference(k, rotary)
    slots = slots.to(k.dtype)
    logits = scale * slots @ k.mT
    if gaussian:
        logits = logits - (scale * k).square().sum(-1)[:, :, None] / 2
    if mask is not None:
        has_key = mask.any(-1)[:, None, None]
        logits = torch.where(valid.mT | ~has_key[..., None], logits, float("-inf"))
    values, lse = logits.softmax(-1) @ v, logits.logsumexp(-1) / math.log(2)
    if mask is not None:
        values, lse = torch.where(has_key[..., None], values, 0.0), torch.where(has_key, lse, float("-inf"))
    dtype = accumulator(k.dtype)
    return values.to(dtype), lse.to(dtype)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, k, v, mask, cos, sin, angles, interleaved, scale, gaussian, backend):
        values, lse, row_max, total = aggregate_forward(
            slots, k, v, mask, joined(cos, sin, interleaved), scale, gaussian, backend
        )  # fmt: skip
        ctx.save_for_backward(slots, k, v, mask, cos, sin, angles, values, row_max, total)
        ctx.interleaved, ctx.options = interleaved, (scale, gaussian)
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # the gradient of lse is often None
        return values, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dvalues, dlse):
        slots, k, v, mask, cos, sin, _, values, row_max, total = saved
        dvalues = torch.zeros_like(values) if dvalues is None else dvalues
        need_slots, need_k, need_v, _, _, _, need_angles, *_ = ctx.needs_input_grad
        needs = need_slots, need_k or need_angles, need_v
        grads = aggregate_backward(
            dvalues, dlse, slots, k, v, mask, joined(cos, sin, ctx.interleaved), *ctx.options, values,
            Statistics(row_max, total), needs, ctx.backend,
        )  # fmt: skip
        dangles = angle_gradient(k, grads[1], cos, ctx.interleaved, ctx.backend) if need_angles else None
        dslots, dk, dv = (x if need else None for x, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return dslots, dk, dv, None, None, None, dangles, None, None, None, None


def _fake_forward(slots, k, v, mask, rotary, scale, gaussian, backend):
    batch, heads, _, _ = k.shape
    dtype, num_slots = accumulator(k.dtype), slots.shape[2]
    values = k.new_empty(batch, heads, num_slots, v.shape[3], dtype=dtype)
    return values, *(k.new_empty(batch, heads, num_slots, dtype=dtype) for _ in range(3))


def _fake_backward(dvalues, dlse, slots, k, v, mask, rotary, scale, gaussian, values, statistics, needs, backend):
    need_slots, need_k, need_v = needs
    dslots = slots.new_empty(slots.shape if need_slots else (0,))
    dk = empty_like_tokens(k, k.shape[3]) if need_k else k.new_empty(0)
    return dslots, dk, empty_like_tokens(v, v.shape[3]) if need_v else v.new_empty(0)


aggregate_forward = register(
    f"aggregate_forward({_PROBLEM}, str backend) -> (Tensor values, Tensor lse, Tensor row_max, Tensor total)",
    module="aggregate",
    fake=_fake_forward,
)
aggregate_backward = register(
    f"aggregate_backward(Tensor dvalues, Tensor? dlse, {_PROBLEM}, Tensor values, Statistics statistics, bool[] needs, "
    "str backend) -> (Tensor dslots, Tensor dk, Tensor dv)",
    module="aggregate",
    fake=_fake_backward,
)

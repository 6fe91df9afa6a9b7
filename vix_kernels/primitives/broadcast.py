"""broadcast: N tokens read M slots.

    g_nj = scale p_j . q_n + a_j ln 2            out_n = sum_j softmax_j(g_nj) values_j

The bias a_j is in base 2, as aggregate returns its lse. A slot with bias -inf has no share; a token without slots returns 0.
Under RoPE queries are rotated first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import Rotary, Statistics, accumulator, empty_like_tokens, flattened, joined, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register
from .rotate import angle_gradient, rotate_reference

_PROBLEM = "Tensor q, Tensor slots, Tensor values, Tensor? slot_bias, Rotary? rotary, float scale"


def broadcast(
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None = None,
    *,
    scale: float,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> Tensor:
    """Softmax attention of the tokens over the slots.

    Args:
        q: (batch, heads, N, D). Any strides with a unit last one.
        slots: (batch or 1, heads or 1, M, D), in q's dtype or float32.
        values: (batch, heads, M, E), float32 (float64 for float64 queries).
        slot_bias: (batch, heads, M) in values' dtype, or None for 0.
        scale: factor of the logits.
        rotary: the rotation of q.
        backend: "torch" or "triton".

    Returns:
        out (batch, heads, N, E) in q's dtype. Differentiable in q, slots, values, slot_bias and rotary.angles.
    """
    q, slots, values = unit_last_stride(q), unit_last_stride(slots), unit_last_stride(values)
    inputs = q, slots, values, slot_bias, *flattened(rotary)
    if needs_autograd(inputs):
        return _Broadcast.apply(*inputs, scale, backend)
    return broadcast_forward(q, slots, values, slot_bias, rotary, scale, None, None, None, backend)[0]


def reads_out(q: Tensor, backend: str) -> bool:
    """Whether backward reads the output. Else it is summed again: of float32, only the same products cancel to the last bit."""
    return backend == "triton" and q.element_size() == 2


def bias_of_taking_part(taken: Tensor, values: Tensor) -> Tensor:
    """The slot bias (batch, heads, M) by which slots that are not `taken`, bool (batch, M), have no share."""
    bias = torch.where(taken, 0.0, float("-inf")).to(values.dtype)
    return bias[:, None].expand(values.shape[:3])


def broadcast_reference(
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None = None,
    *,
    scale: float,
    rotary: Rotary | None = None,
) -> Tensor:
    """The equation with all N x M logits in memory."""
    if rotary is not None:
        q = rotate_reference(q, rotary)
    logits = scale * q @ slots.to(q.dtype).mT
    if slot_bias is None:
        return logits.softmax(-1) @ values.to(q.dtype)
    has_slot = (slot_bias > float("-inf")).any(-1)[..., None, None]  # elsewhere, to stay finite, without the bias
    logits = logits + torch.where(has_slot, slot_bias[:, :, None] * math.log(2), 0.0).to(q.dtype)
    return torch.where(has_slot, logits.softmax(-1) @ values.to(q.dtype), 0.0)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, slots, values, slot_bias, cos, sin, angles, interleaved, scale, backend):
        residual = None, None, None
        out, top, total = broadcast_forward(
            q, slots, values, slot_bias, joined(cos, sin, interleaved), scale, *residual, backend
        )  # fmt: skip
        ctx.save_for_backward(
            q, slots, values, slot_bias, cos, sin, angles, out if reads_out(q, backend) else None, top, total
        )  # fmt: skip
        ctx.interleaved, ctx.scale = interleaved, scale
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        q, slots, values, slot_bias, cos, sin, _, out, top, total = saved
        needs = ctx.needs_input_grad[:4]
        grads = broadcast_backward(
            dout, q, slots, values, slot_bias, joined(cos, sin, ctx.interleaved), ctx.scale, out, Statistics(top, total),
            (needs[1], needs[2] or needs[3]), ctx.backend,
        )  # fmt: skip
        dangles = angle_gradient(q, grads[0], cos, ctx.interleaved, ctx.backend) if ctx.needs_input_grad[6] else None
        grads = (x if need else None for x, need in zip(grads, needs, strict=True))
        return *grads, None, None, dangles, None, None, None


def _fake_forward(q, slots, values, slot_bias, rotary, scale, v, conv_weight, mask, backend):
    sizes = q.shape[:3] if backend == "triton" else (0,)
    return empty_like_tokens(q, values.shape[3]), *(q.new_empty(sizes, dtype=accumulator(q.dtype)) for _ in range(2))


def _fake_backward(dout, q, slots, values, slot_bias, rotary, scale, out, statistics, needs, backend):
    need_slots, need_values = needs
    dslots = slots.new_empty(slots.shape if need_slots else (0,))
    dvalues, dbias = (values.new_empty(shape if need_values else (0,)) for shape in (values.shape, values.shape[:3]))
    return empty_like_tokens(q, q.shape[3]), dslots, dvalues, dbias


# top and total (batch, heads, N): the largest logit of a token, in base 2, and the sum of the exponentials above it, for the
# backward kernels; the PyTorch implementation leaves them empty. With v and conv_weight the convolution of
# primitives/token_conv.py is added to out, while it is in registers. The backward is that of the attention alone, which then
# needs out summed again: it receives None for it.
broadcast_forward = register(
    f"broadcast_forward({_PROBLEM}, Tensor? v, Tensor? conv_weight, Tensor? mask, str backend)"
    " -> (Tensor out, Tensor top, Tensor total)",
    module="broadcast",
    fake=_fake_forward,
)
broadcast_backward = register(
    f"broadcast_backward(Tensor dout, {_PROBLEM}, Tensor? out, Statistics statistics, bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dslots, Tensor dvalues, Tensor dbias)",
    module="broadcast",
    fake=_fake_backward,
)

"""broadcast: N tokens attend to M slots (see aggregate.py).

    g_nj = scale p_j . q_n + a_j ln 2            out_n = sum_j softmax_j(g_nj) values_j

The bias a_j of a slot p_j is a base-2 logarithm, like the lse that aggregate returns. A slot with bias -inf has probability 0.
If all slots have bias -inf, out is 0. A mask of the slots may be given instead of a bias. Then the bias is 0 for valid slots
and -inf for invalid slots. With RoPE, queries are rotated first.
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
    rows: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> Tensor:
    """Compute softmax attention in which tokens attend to slots.

    Args:
        q: (batch, heads, N, D). Views with last stride 1 are not copied.
        slots: (batch or 1, heads or 1, M, D), in q's dtype or float32.
        values: (batch, heads, M, E), float32 (float64 if q is float64).
        slot_bias: (batch, heads, M) in values' dtype, or a mask (batch, M) of any dtype. In a mask, a slot is valid if its
            element is not 0. If None, the bias is 0.
        scale: scaling factor of the logits.
        rows: (batch, heads, P, E) in values' dtype. These rows replace the outputs of the first P queries.
        rotary: rotary embedding of q.
        backend: "torch" or "triton".

    Returns:
        out (batch, heads, N, E) in q's dtype. Differentiable in q, slots, values, slot_bias (unless it is a
        mask), rows and rotary.angles.
    """
    q, slots, values = unit_last_stride(q), unit_last_stride(slots), unit_last_stride(values)
    inputs = q, slots, values, slot_bias, rows, *flattened(rotary)
    if needs_autograd(inputs):
        return _Broadcast.apply(*inputs, scale, backend)
    return with_rows(broadcast_forward(q, slots, values, slot_bias, rotary, scale, None, None, None, backend)[0], rows)


def with_rows(out: Tensor, rows: Tensor | None) -> Tensor:
    """Overwrite the first rows of `out` with `rows` in place, unless `rows` is None. Return `out`."""
    if rows is not None:
        out[:, :, : rows.shape[2]].copy_(rows)
    return out


def split_gradient(dout: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Compute the backward pass of `with_rows`.

    Return the first `rows` rows of dout in `dtype`, and dout with these rows set to 0. If `rows` is 0, the first result is
    None.
    """
    if not rows:
        return None, dout
    drows, dout = dout[:, :, :rows].to(dtype, copy=True), dout.clone()
    dout[:, :, :rows].zero_()
    return drows, dout


def reads_out(q: Tensor, backend: str) -> bool:
    """Return whether the backward pass reads the output of the forward pass.

    Only the Triton kernels for 16-bit dtypes read it.
    """
    return backend == "triton" and q.element_size() == 2


def broadcast_reference(
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None = None,
    *,
    scale: float,
    rotary: Rotary | None = None,
) -> Tensor:
    """Return the same output as `broadcast` with rows=None, computed with all N x M logits in memory."""
    if rotary is not None:
        q = rotate_reference(q, rotary)
    logits = scale * q @ slots.to(q.dtype).mT
    if slot_bias is None:
        return logits.softmax(-1) @ values.to(q.dtype)
    if slot_bias.dim() == 2:
        slot_bias = torch.where(slot_bias != 0, 0.0, float("-inf"))[:, None]
    has_slot = (slot_bias > float("-inf")).any(-1)[..., None, None]  # if no slot is valid, omit the bias to keep logits finite
    logits = logits + torch.where(has_slot, slot_bias[:, :, None] * math.log(2), 0.0).to(q.dtype)
    return torch.where(has_slot, logits.softmax(-1) @ values.to(q.dtype), 0.0)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, slots, values, slot_bias, rows, cos, sin, angles, interleaved, scale, backend):
        residual = None, None, None
        out, row_max, inverse = broadcast_forward(
            q, slots, values, slot_bias, joined(cos, sin, interleaved), scale, *residual, backend
        )  # fmt: skip
        out = with_rows(out, rows)
        ctx.save_for_backward(
            q, slots, values, slot_bias, cos, sin, angles, out if reads_out(q, backend) else None, row_max, inverse
        )  # fmt: skip
        ctx.interleaved, ctx.scale, ctx.backend = interleaved, scale, backend
        ctx.rows = 0 if rows is None else rows.shape[2]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        q, slots, values, slot_bias, cos, sin, _, out, row_max, inverse = saved
        needs = ctx.needs_input_grad[:4]
        drows, dout = split_gradient(dout, ctx.rows, values.dtype)
        grads = broadcast_backward(
            dout, q, slots, values, slot_bias, joined(cos, sin, ctx.interleaved), ctx.scale, out, Statistics(row_max, inverse),
            (needs[1], needs[2] or needs[3]), ctx.backend,
        )  # fmt: skip
        dangles = angle_gradient(q, grads[0], cos, ctx.interleaved, ctx.backend) if ctx.needs_input_grad[7] else None
        grads = (x if need else None for x, need in zip(grads, needs, strict=True))
        return *grads, drows, None, None, dangles, None, None, None


def _fake_forward(q, slots, values, slot_bias, rotary, scale, v, conv_weight, mask, backend):
    sizes = q.shape[:3] if backend == "triton" else (0,)
    return empty_like_tokens(q, values.shape[3]), *(q.new_empty(sizes, dtype=accumulator(q.dtype)) for _ in range(2))


def _fake_backward(dout, q, slots, values, slot_bias, rotary, scale, out, statistics, needs, backend):
    need_slots, need_values = needs
    dslots = slots.new_empty(slots.shape if need_slots else (0,))
    dvalues, dbias = (values.new_empty(shape if need_values else (0,)) for shape in (values.shape, values.shape[:3]))
    return empty_like_tokens(q, q.shape[3]), dslots, dvalues, dbias


# row_max_n = log2(e) max_j g_nj and inverse_n = 2^row_max_n / sum_j exp(g_nj). Both are (batch, heads, N). The backward
# kernels read them. The PyTorch implementation returns empty tensors instead. If v and conv_weight are given, the forward
# kernel also adds the convolution of primitives/token_conv.py to out, in registers. broadcast_backward does not
# compute the gradients of the convolution. If the forward kernel added a convolution, the argument `out` of
# broadcast_backward must be None, so that broadcast_backward recomputes the output without the convolution.
broadcast_forward = register(
    f"broadcast_forward({_PROBLEM}, Tensor? v, Tensor? conv_weight, Tensor? mask, str backend)"
    " -> (Tensor out, Tensor row_max, Tensor inverse)",
    module="broadcast",
    fake=_fake_forward,
)
broadcast_backward = register(
    f"broadcast_backward(Tensor dout, {_PROBLEM}, Tensor? out, Statistics statistics, bool[] needs, str backend)"
    " -> (Tensor dq, Tensor dslots, Tensor dvalues, Tensor dbias)",
    module="broadcast",
    fake=_fake_backward,
)

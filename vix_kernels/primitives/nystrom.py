"""nystrom: all primitives of Nystrom attention in a single autograd.Function, for ops/nystrom.py.

    q~, k~ = landmarks(q), landmarks(k)        values = aggregate(q~, k, v)        out = broadcast(q, k~, pinv(q~, k~) values)

The gradients of q and k are sums of terms from several primitives. The backward kernels add these terms in registers, whereas
autograd would add them in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import LandmarkGradients, Pool, Rotary, Statistics, flattened, joined, unit_last_stride
from .aggregate import aggregate_backward, aggregate_forward
from .autograd import once_differentiable
from .broadcast import broadcast_backward, broadcast_forward, reads_out, split_gradient, with_rows
from .landmarks import landmarks_backward, landmarks_forward
from .pinv import pinv_backward, pinv_forward
from .registry import refuse_transforms
from .rotate import angle_gradient
from .token_conv import token_conv_backward


def nystrom(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    iterations: int,
    init: str,
    pool: Pool,
    rows: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> Tensor:
    """Return the output of Nystrom attention, (batch, heads, queries, E) in q's dtype.

    `mask` is the padding mask of the keys. If there are as many queries as keys, it also excludes padded queries from the
    landmarks. `pool` defines the windows of the landmarks. `scale` is the scaling factor of all logits. `iterations` and `init`
    are arguments of `pinv`. `rows` is an argument of `broadcast`. `rotary` is the rotary embedding of q and k. `conv_weight` is
    the weight of `token_conv`.

    Differentiable in q, k, v, conv_weight, rows and rotary.angles.
    """
    refuse_transforms()
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    return _Nystrom.apply(q, k, v, conv_weight, rows, mask, *flattened(rotary), (pool, scale, iterations, init), backend)


def mask_of_queries(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the mask for queries: `mask` if there are as many queries as keys, as in self-attention, else None."""
    return mask if mask is not None and mask.shape[1] == q.shape[2] else None


class _Nystrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, weight, rows, mask, cos, sin, angles, interleaved, options, backend):
        pool, scale, *inverse = options
        q_mask, rotary = mask_of_queries(mask, q), joined(cos, sin, interleaved)
        q_marks, k_marks, q_counts, k_counts = landmarks_forward(q, k, q_mask, mask, rotary, pool, backend)
        values, _, row_max, total = aggregate_forward(q_marks, k, v, mask, rotary, scale, False, backend)
        counts = (None, None) if mask is None else (q_counts, k_counts)
        weighted = pinv_forward(q_marks, k_marks, values, *counts, scale, *inverse, backend)
        residual = (None, None, None) if weight is None else (v, weight, mask)
        out, out_max, out_inverse = broadcast_forward(q, k_marks, weighted, counts[1], rotary, scale, *residual, backend)
        out = with_rows(out, rows)
        ctx.save_for_backward(
            q, k, v, weight, mask, cos, sin, angles, q_marks, k_marks, q_counts, k_counts, values, row_max, total, weighted,
            out if weight is None and reads_out(q, backend) else None, out_max, out_inverse,
        )  # fmt: skip
        ctx.interleaved, ctx.options, ctx.backend = interleaved, options, backend
        ctx.rows = 0 if rows is None else rows.shape[2]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        (
            q, k, v, weight, mask, cos, sin, _, q_marks, k_marks, q_counts, k_counts, values, row_max, total, weighted,
            out, out_max, out_inverse,
        ) = saved  # fmt: skip
        need_q, need_k, need_v, need_weight = ctx.needs_input_grad[:4]
        need_angles = ctx.needs_input_grad[8]
        need_q, need_k = need_q or need_angles, need_k or need_angles
        (pool, scale, *inverse), backend = ctx.options, ctx.backend
        q_mask, rotary = mask_of_queries(mask, q), joined(cos, sin, ctx.interleaved)
        counts = (None, None) if mask is None else (q_counts, k_counts)
        drows, dout = split_gradient(dout, ctx.rows, values.dtype)

        # First compute dq, dk and dv without the paths through the landmarks, and both terms of each landmark's gradient.
        dq, dk_marks, dweighted, _ = broadcast_backward(
            dout, q, k_marks, weighted, counts[1], rotary, scale, out, Statistics(out_max, out_inverse), (need_k, True), backend
        )
        dq_marks, dk_marks_2, dvalues = pinv_backward(
            dweighted, q_marks, k_marks, values, *counts, scale, *inverse, (need_q, need_k, True), backend
        )
        dq_marks_2, dk, dv = aggregate_backward(
            dvalues, None, q_marks, k, v, mask, rotary, scale, False, values, Statistics(row_max, total),
            (need_q, need_k, need_v), backend,
        )  # fmt: skip
        dq, dk = landmarks_backward(
            LandmarkGradients(dq, dk, dq_marks, dq_marks_2, dk_marks, dk_marks_2), q, k, q_mask, mask, rotary, pool,
            q_counts, k_counts, (need_q, need_k), backend,
        )  # fmt: skip
        dweight = None
        if weight is not None and (need_v or need_weight):
            dv, dweight = token_conv_backward(dout, v, weight, mask, dv if need_v else None, (need_v, need_weight), backend)
        dangles = None
        if need_angles:
            dangles = angle_gradient(q, dq, cos, ctx.interleaved, backend)
            dangles = dangles + angle_gradient(k, dk, cos, ctx.interleaved, backend)
        grads = (x if need else None for x, need in zip((dq, dk, dv, dweight), ctx.needs_input_grad, strict=False))
        return *grads, drows, None, None, None, dangles, *(None,) * 3

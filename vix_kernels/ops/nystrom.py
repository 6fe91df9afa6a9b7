"""Nystrom attention (Xiong et al., A Nystrom-Based Algorithm for Approximating Self-Attention, arXiv 2102.03902).

    out = F Z B v + conv(v),    F = softmax(scale q k~^T),    B = softmax(scale q~ k^T)                 equation 13 of the paper
    Z ~ pinv(A),    A = softmax(scale q~ k~^T)

q~ and k~ are landmarks, means of queries and of keys over segments of the sequence or cells of a grid. They are the slots of
the two moves, with the pseudo-inverse of a small matrix between them:

    values = aggregate(q~, k, v)        out = broadcast(q, k~, Z values)

so neither an attention of tokens to landmarks nor one of tokens to tokens is ever stored. Z is what six steps of an iteration
of order three reach (equation 11 of the paper), a filter on the spectrum of A that is part of the model: not its limit.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..layout import unit_last_stride
from ..primitives.aggregate import aggregate_backward, aggregate_forward, aggregate_reference
from ..primitives.autograd import once_differentiable
from ..primitives.broadcast import (
    bias_of_taking_part,
    broadcast_backward,
    broadcast_forward,
    broadcast_reference,
    reads_out,
)
from ..primitives.landmarks import landmarks_backward, landmarks_forward, landmarks_reference
from ..primitives.pinv import INITS, pinv_backward, pinv_forward, pinv_reference
from ..primitives.registry import refuse_transforms
from ..primitives.rotate import angle_gradient
from ..primitives.token_conv import token_conv_backward, token_conv_reference
from .checks import autocast, check_floating, check_integer, check_mask, check_qkv, check_scale
from .pooling import pooling
from .rope import Rope, check_rope

LANDMARKS = ("segment", "grid", "pad_front")


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_landmarks: int = 64,
    landmarks: Literal["segment", "grid", "pad_front"] = "segment",
    grid_size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    pinv_iterations: int = 6,
    pinv_init: Literal["exact", "original"] = "exact",
    conv_weight: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    backend: str = "auto",
) -> Tensor:
    """Approximation of softmax(scale q k^T) v through landmarks.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Any strides with a unit last one.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        num_landmarks: how many means the tokens behind the prefix are pooled to; at most as many as these tokens.
        landmarks: where they stand. "segment": equal runs of the sequence, the first ones a token shorter where the number
            does not divide. "grid": cells of the (height, width) map `grid_size`, by adaptive average pooling to the rows x
            columns = num_landmarks that fit its aspect best; on images it is by far the better one. "pad_front": segments of
            a sequence that is padded with zero tokens in front to a multiple, which without a mask are keys too, as in the
            package nystrom-attention; for its weights.
        grid_size: height and width of the token map behind the prefix, for "grid".
        prefix_tokens: tokens in front (class, registers) that are landmarks of their own, beyond num_landmarks.
        pinv_iterations: steps to the pseudo-inverse; weights belong to the number they were trained with.
        pinv_init: what the iteration starts from: "exact", each matrix over its own norm, or "original", over the largest of
            the batch as in the published code, so that samples depend on their batch mates; for its weights.
        conv_weight: (heads, 1, taps, 1), the weight of a depthwise Conv2d over the tokens of v whose result is added; odd taps.
        scale: a number > 0, default head_dim ** -0.5.
        key_padding_mask: bool (batch, tokens), True = the token takes part. With as many queries as tokens it also leaves
            padding out of the landmarks of q. A sample without any valid key returns 0.
        rope: rotary embedding of q and k, applied inside the kernels, landmarks included; needs as many queries as tokens.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, conv_weight and rope.angles.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        RuntimeError: backend="triton" cannot run here; the message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    check_mask(key_padding_mask, k)
    check_rope(rope, q, k)
    scale = check_scale(scale, q.shape[3])
    _check_conv(conv_weight, q, k)
    check_nystrom(landmarks, pinv_iterations, pinv_init)
    if (landmarks == "grid") != (grid_size is not None):
        raise ValueError(f"grid_size: expected (height, width) for landmarks='grid' and None else, got {grid_size}")
    if landmarks == "pad_front" and prefix_tokens:
        raise ValueError(f"prefix_tokens: expected 0 for landmarks='pad_front', got {prefix_tokens}")
    for tokens in (q.shape[2], k.shape[2]):
        pool = pooling("num_landmarks", num_landmarks, grid_size, prefix_tokens, tokens)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    queries, mask = q.shape[2], key_padding_mask
    if landmarks == "pad_front":
        q, k, v, mask, rope = _pad_front(q, k, v, mask, rope, num_landmarks)
    attend = nystrom_attention_reference if backend == "reference" else _fused
    out = attend(
        q, k, v, pool=pool, pinv_iterations=pinv_iterations, pinv_init=pinv_init, conv_weight=conv_weight, scale=scale,
        key_padding_mask=mask, rope=rope, **({} if backend == "reference" else {"backend": backend}),
    )  # fmt: skip
    return out[:, :, -queries:] if landmarks == "pad_front" else out


def nystrom_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pool: dict[str, Any],
    pinv_iterations: int = 6,
    pinv_init: str = "exact",
    conv_weight: Tensor | None = None,
    scale: float,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """The equations with all N x L shares in memory, in plain PyTorch; any device, any transform."""
    mask, q_mask = key_padding_mask, _query_mask(key_padding_mask, q)
    turns = {} if rope is None else rope.differentiable_tables
    q_marks, k_marks, q_counts, k_counts = landmarks_reference(q, k, q_mask=q_mask, k_mask=mask, **pool, **turns)
    counts = {} if mask is None else dict(q_counts=q_counts, k_counts=k_counts)
    values, _ = aggregate_reference(q_marks, k, v, scale=scale, mask=mask, **turns)
    values = pinv_reference(q_marks, k_marks, values, scale=scale, iterations=pinv_iterations, init=pinv_init, **counts)
    bias = None if mask is None else bias_of_taking_part(k_counts > 0, values)
    out = broadcast_reference(q, k_marks, values, bias, scale=scale, **turns)
    return out if conv_weight is None else out + token_conv_reference(v, conv_weight, mask=mask)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, *, pool: dict[str, Any], pinv_iterations: int, pinv_init: str,
    conv_weight: Tensor | None, scale: float, key_padding_mask: Tensor | None, rope: Rope | None, backend: str,
) -> Tensor:  # fmt: skip
    refuse_transforms()
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    tables = (None, None, None, True) if rope is None else (rope.cos, rope.sin, rope.angles, rope.interleaved)
    return _Nystrom.apply(
        q, k, v, conv_weight, key_padding_mask, *tables, tuple(pool.values()), scale, pinv_iterations, pinv_init, backend
    )  # fmt: skip


class _Nystrom(torch.autograd.Function):
    """The moves in one piece: tokens gather the parts of their gradients inside the kernels, not by additions between them."""

    @staticmethod
    def forward(ctx, q, k, v, weight, mask, cos, sin, angles, interleaved, pool, scale, iterations, init, backend):
        q_mask, rotation = _query_mask(mask, q), (cos, sin, interleaved)
        q_marks, k_marks, q_counts, k_counts = landmarks_forward(q, k, q_mask, mask, *rotation, *pool, backend)
        values, _, top, total = aggregate_forward(q_marks, k, v, mask, *rotation, scale, False, backend)
        counts = (None, None) if mask is None else (q_counts, k_counts)
        weighted = pinv_forward(q_marks, k_marks, values, *counts, scale, iterations, init, backend)
        bias = None if mask is None else bias_of_taking_part(k_counts > 0, weighted)
        residual = (None, None, None) if weight is None else (v, weight, mask)
        out, out_top, out_total = broadcast_forward(q, k_marks, weighted, bias, *rotation, scale, *residual, backend)
        ctx.save_for_backward(
            q, k, v, weight, mask, cos, sin, angles, q_marks, k_marks, q_counts, k_counts, values, top, total, weighted,
            out if weight is None and reads_out(q, backend) else None, out_top, out_total,
        )  # fmt: skip
        ctx.interleaved, ctx.pool, ctx.options, ctx.backend = interleaved, pool, (scale, iterations, init), backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        (
            q, k, v, weight, mask, cos, sin, _, q_marks, k_marks, q_counts, k_counts, values, top, total, weighted,
            out, out_top, out_total,
        ) = saved  # fmt: skip
        need_q, need_k, need_v, need_weight = ctx.needs_input_grad[:4]
        need_angles = ctx.needs_input_grad[7]
        need_q, need_k = need_q or need_angles, need_k or need_angles
        (scale, *iteration), backend = ctx.options, ctx.backend
        q_mask, rotation = _query_mask(mask, q), (cos, sin, ctx.interleaved)
        counts = (None, None) if mask is None else (q_counts, k_counts)
        bias = None if mask is None else bias_of_taking_part(k_counts > 0, weighted)

        # The tokens' own parts of dq, dk and dv, and two parts each of the gradients of the landmarks
        dq, dk_marks, dweighted, _ = broadcast_backward(
            dout, q, k_marks, weighted, bias, *rotation, scale, out, out_top, out_total, need_k, True, backend
        )
        dq_marks, dk_marks_2, dvalues = pinv_backward(
            dweighted, q_marks, k_marks, values, *counts, scale, *iteration, need_q, need_k, True, backend
        )
        dq_marks_2, dk, dv = aggregate_backward(
            dvalues, None, q_marks, k, v, mask, *rotation, scale, False, values, top, total, need_q, need_k, need_v, backend
        )
        dq, dk = landmarks_backward(
            dq, dk, dq_marks, dq_marks_2, dk_marks, dk_marks_2, q, k, q_mask, mask, *rotation, *ctx.pool, q_counts, k_counts,
            need_q, need_k, backend,
        )  # fmt: skip
        dweight = None
        if weight is not None and (need_v or need_weight):
            dv, dweight = token_conv_backward(dout, v, weight, mask, dv if need_v else None, need_v, need_weight, backend)
        dangles = None
        if need_angles:
            dangles = angle_gradient(q, dq, cos, ctx.interleaved, backend)
            dangles = dangles + angle_gradient(k, dk, cos, ctx.interleaved, backend)
        grads = (x if need else None for x, need in zip((dq, dk, dv, dweight), ctx.needs_input_grad, strict=False))
        return *grads, None, None, None, dangles, *(None,) * 6


def _pad_front(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None, num_landmarks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Rope | None]:
    """Zero tokens in front, up to a multiple of num_landmarks; they are not rotated."""

    def pad(x: Tensor, tokens: int, value: float = 0.0) -> Tensor:
        return F.pad(x, (0, 0, -tokens % num_landmarks, 0), value=value)

    queries, tokens = q.shape[2], k.shape[2]
    if rope is not None:
        angles = None if rope.angles is None else pad(rope.angles, tokens)
        rope = Rope(pad(rope.cos, tokens, 1.0), pad(rope.sin, tokens), rope.layout, angles)
    if mask is not None:
        mask = F.pad(mask, (-tokens % num_landmarks, 0), value=False)
    return pad(q, queries), pad(k, tokens), pad(v, tokens), mask, rope


def _query_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Of self-attention, where queries and keys are the same tokens."""
    return mask if mask is not None and mask.shape[1] == q.shape[2] else None


def _check_conv(weight: Tensor | None, q: Tensor, k: Tensor) -> None:
    if weight is None:
        return
    check_floating("conv_weight", weight)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[3] != 1:
        raise ValueError(f"conv_weight: expected shape (heads, 1, taps, 1), got {tuple(weight.shape)}")
    if weight.shape[0] != q.shape[1]:
        raise ValueError(f"conv_weight: expected q's {q.shape[1]} heads, got {weight.shape[0]}")
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"conv_weight: expected an odd number of taps, got {weight.shape[2]}")
    if weight.device != q.device:
        raise ValueError(f"conv_weight: expected q's device {q.device}, got {weight.device}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"conv_weight: expected as many queries as tokens, got {q.shape[2]} and {k.shape[2]}")


def check_nystrom(landmarks: str, pinv_iterations: int, pinv_init: str) -> None:
    if landmarks not in LANDMARKS:
        raise ValueError(f"landmarks: expected one of {', '.join(map(repr, LANDMARKS))}, got {landmarks!r}")
    check_integer("pinv_iterations", pinv_iterations, 0)
    if pinv_init not in INITS:
        raise ValueError(f"pinv_init: expected one of {', '.join(map(repr, INITS))}, got {pinv_init!r}")

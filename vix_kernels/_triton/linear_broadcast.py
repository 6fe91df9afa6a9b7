"""Kernels for `linear_broadcast`: tokens are averages of slots, weighted by features.

See primitives/linear.py for the equations. The kernels have the same loops as the kernels for `broadcast`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens, unit_last_stride
from .features import apply_map, feature_config, feature_strides, load_logits, load_state, slope, slot_rows
from .launch import launch, rotary_arguments, slot_strides, token_strides
from .merge import empty_slots, merge_sums, sum_slots
from .tiles import (
    cast,
    dot,
    load_rotated,
    load_slots,
    load_tile,
    row_products,
    slot_program,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
    token_program,
)

HALF_MAX = tl.constexpr(65504.0)
SMALLEST = tl.constexpr(2.0**-100)  # lower limit of the running max, so that its inverse is finite


@triton.jit(do_not_specialize=["N", "M", "sums_b", "sums_h", "norms_b", "norms_h", "angle_h", "eps"])
def linear_broadcast_forward_kernel(
    q, slots, sums, norms, cos, sin, out, total,
    q_b, q_h, q_n, slots_b, slots_h, slots_m, sums_b, sums_h, sums_m, norms_b, norms_h, norms_m, angle_h,
    out_b, out_h, out_n,
    H, N, M, eps,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out and its denominator, total, for a tile of tokens."""
    i_bh, o_n, valid = token_program(N, BLOCK_N)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    q += i_b * q_b + i_h * q_h
    slots += i_b * slots_b + i_h * slots_h

    # As in a softmax, the weights and their sum are divided by a running max, so that the weights do not overflow in 16 bits.
    b_max = tl.full((BLOCK_N,), SMALLEST, COMPUTE)
    b_total = tl.zeros((BLOCK_N,), COMPUTE)
    b_out = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        b_l = load_logits(
            q, o_n, q_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
        b_values, b_norms = load_state(
            sums + i_b * sums_b + i_h * sums_h, norms + i_b * norms_b + i_h * norms_h, sums_m, norms_m,
            o_m, M, E, BLOCK_E,
        )  # fmt: skip
        b_w = apply_map(b_l, ELU) * b_norms[None, :]
        new_max = tl.maximum(b_max, tl.max(b_w, 1))
        over = 1.0 / new_max
        b_p = cast(b_w * over[:, None], q.dtype.element_ty)  # the numerator and the denominator use the same rounded weights
        b_total = b_total * (b_max * over) + tl.sum(b_p.to(COMPUTE), 1)
        b_out = dot(b_p, cast(b_values, q.dtype.element_ty), b_out * (b_max * over)[:, None], PRECISION)
        b_max = new_max

    guard = tl.zeros((BLOCK_N,), COMPUTE) + eps
    tl.store(total + i_bh * N + o_n, b_total * b_max + guard, mask=valid)
    b_total = b_total + guard / b_max
    b_out = b_out / tl.where(b_total == 0, 1.0, b_total)[:, None]
    store_tile(b_out, out + i_b * out_b + i_h * out_h, o_n, out_n, valid, E, BLOCK_E, 0, True)


@triton.jit
def weight_scale(norms, HALF: tl.constexpr):
    """Return the factor by which the weights f / t of each slot are multiplied, where f is a feature and t is a token's total.

    If HALF, the factor is the slot's norm z, because f / t may overflow in float16, but f z / t is at most 1. If z is 0 or HALF
    is False, the factor is 1.
    """
    if HALF:
        scale = tl.where(norms == 0, 1.0, norms)
    else:
        scale = tl.full(norms.shape, 1.0, norms.dtype)
    return scale


@triton.jit
def load_terms(
    dout, d_n, q, o_n, q_n, used, slots, slots_m, sums, norms, sums_m, norms_m, first_slot, cos, sin, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the logits (tokens, BLOCK_M), the products <dout, values> (tokens, BLOCK_M) and the norms of the slots."""
    b_l = load_logits(
        q, o_n, q_n, used, slots, slots_m, first_slot, cos, sin, M,
        D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
    )  # fmt: skip
    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    b_values, b_norms = load_state(sums, norms, sums_m, norms_m, o_m, M, E, BLOCK_E)
    b_dout = load_tile(dout, o_n, d_n, used, E, BLOCK_E, 0, True)
    # Values are split into two 16-bit tiles instead of being rounded to a single one, because the differences between the
    # products and their mean may be small.
    WIDE: tl.constexpr = b_values.dtype != b_dout.dtype
    b_dp = row_products(b_dout, b_values, tl.zeros((o_n.shape[0], BLOCK_M), COMPUTE), False, WIDE, PRECISION)
    return b_l, b_dp, b_norms


@triton.jit(do_not_specialize=["N", "M", "sums_b", "sums_h", "norms_b", "norms_h", "angle_h"])
def linear_broadcast_tokens_kernel(
    dout, q, slots, sums, norms, cos, sin, total, delta, used, dq,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, sums_b, sums_h, sums_m, norms_b, norms_h, norms_m,
    angle_h, dq_b, dq_h, dq_n,
    H, N, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq for a tile of tokens. For the slot gradients, also compute delta = <dout, out> and a mask of the used tokens.

    delta is recomputed from the features, because `out` may have been rounded. If <dout, values> - delta is small, the rounding
    error would dominate it. A token whose dout is 0 is not used. Its query is read as 0, so the token does not contribute to
    any gradient, even if it is padding and its query contains NaN.
    """
    i_bh, o_n, valid = token_program(N, BLOCK_N)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    q += i_b * q_b + i_h * q_h
    slots += i_b * slots_b + i_h * slots_h
    sums += i_b * sums_b + i_h * sums_h
    norms += i_b * norms_b + i_h * norms_h
    dq += i_b * dq_b + i_h * dq_h
    dout += i_b * d_b + i_h * d_h
    b_used = tl.max((load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True) != 0).to(tl.int32), 1) > 0
    tl.store(used + i_bh * N + o_n, b_used.to(tl.uint8), mask=valid)
    b_total = tl.load(total + i_bh * N + o_n, mask=b_used, other=1.0)
    b_total = tl.where(b_total == 0, 1.0, b_total)

    b_delta = tl.zeros((BLOCK_N,), COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        b_l, b_dp, b_norms = load_terms(
            dout, d_n, q, o_n, q_n, b_used, slots, slots_m, sums, norms, sums_m, norms_m, first_slot,
            cos + angles, sin + angles, M,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        b_delta += tl.sum(apply_map(b_l, ELU) * (b_norms[None, :] / b_total[:, None]) * b_dp, 1)
    tl.store(delta + i_bh * N + o_n, b_delta, mask=valid)

    b_dq = tl.zeros((BLOCK_N, BLOCK_D if PROJECTED else 1), COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        b_l, b_dp, b_norms = load_terms(
            dout, d_n, q, o_n, q_n, b_used, slots, slots_m, sums, norms, sums_m, norms_m, first_slot,
            cos + angles, sin + angles, M,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        b_dl = slope(b_l, ELU) * (b_norms[None, :] / b_total[:, None]) * (b_dp - b_delta[:, None])
        if PROJECTED:
            o_m = first_slot + tl.arange(0, BLOCK_M)
            b_slots = cast(load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED), dout.dtype.element_ty)
            b_dq = dot(cast(b_dl, dout.dtype.element_ty), b_slots, b_dq, PRECISION)
        else:
            store_unrotated(
                b_dl, dq, o_n, dq_n, valid, cos + angles, sin + angles, D, BLOCK_M, ROTARY, INTERLEAVED, first_slot
            )  # fmt: skip
    if PROJECTED:
        store_unrotated(b_dq, dq, o_n, dq_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "M", "sums_b", "sums_h", "norms_b", "norms_h", "angle_h", "chunk"])
def linear_broadcast_slots_kernel(
    dout, q, slots, sums, norms, cos, sin, total, delta, used, dslots, dsums, dnorms,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, sums_b, sums_h, sums_m, norms_b, norms_h, norms_m,
    angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    NEED_SLOTS: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a chunk of tokens to dsums, dnorms and, if NEED_SLOTS, dslots.

    Each program handles a tile of slots of one sample and head.
    """
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    q += i_b * q_b + i_h * q_h
    dout += i_b * d_b + i_h * d_h
    slots += i_b * slots_b + i_h * slots_h
    sums += i_b * sums_b + i_h * sums_h
    norms += i_b * norms_b + i_h * norms_h

    HALF: tl.constexpr = dout.dtype.element_ty == tl.float16
    b_dslots = tl.zeros((BLOCK_M, BLOCK_D if NEED_SLOTS else 1), COMPUTE)
    b_dsums = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_dnorms = tl.zeros((BLOCK_M,), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_dout = load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True)
        b_delta = tl.load(delta + i_bh * N + o_n, mask=valid, other=0.0)
        b_used = tl.load(used + i_bh * N + o_n, mask=valid, other=0) != 0
        b_total = tl.load(total + i_bh * N + o_n, mask=b_used, other=float("inf"))  # inf makes the weight 0
        b_total = tl.where(b_total == 0, 1.0, b_total)
        b_l, b_dp, b_norms = load_terms(
            dout, d_n, q, o_n, q_n, b_used, slots, slots_m, sums, norms, sums_m, norms_m,
            first_slot, cos + angles, sin + angles, M,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        b_size = weight_scale(b_norms, HALF)
        b_w = apply_map(b_l, ELU) * (b_size[None, :] / b_total[:, None])
        if HALF:  # weights of slots without keys may overflow; they are multiplied by 0 later, and inf * 0 would be NaN
            b_w = tl.where(b_w > HALF_MAX, HALF_MAX, b_w)
        b_p = cast(b_w, b_dout.dtype)
        b_dsums = dot(tl.trans(b_p), b_dout, b_dsums, PRECISION)
        b_dnorms -= tl.sum(b_p.to(COMPUTE) * b_delta[:, None], 0)
        if NEED_SLOTS:
            b_dl = slope(b_l, ELU) * (b_norms[None, :] / b_total[:, None]) * (b_dp - b_delta[:, None])
            b_q = load_rotated(q, o_n, q_n, b_used, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
            b_dslots = dot(tl.trans(cast(b_dl, b_q.dtype)), b_q, b_dslots, PRECISION)

    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    b_size = weight_scale(tl.load(norms + o_m.to(tl.int64) * norms_m, mask=o_m < M, other=1.0), HALF)
    store_state(b_dsums / b_size[:, None], b_dnorms / b_size, dsums, dnorms, part, o_m, M, E, BLOCK_E)
    if NEED_SLOTS:
        store_slots(b_dslots, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def linear_broadcast_forward(
    q: Tensor, slots: Tensor | None, sums: Tensor, norms: Tensor, rotary: Rotary | None, feature_map: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = q.shape
    num_slots, value_width = sums.shape[2:]
    config = feature_config("linear_broadcast_forward", q, sums, slots)
    out = empty_like_tokens(q, value_width)
    total = q.new_empty(batch, num_heads, tokens, dtype=config.compute)
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)
    launch(
        linear_broadcast_forward_kernel,
        (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
        q, q if slots is None else slots, sums, norms, cos, sin, out, total,
        *token_strides(q), *feature_strides(slots), *slot_strides(sums), *norms.stride(), angle_h, *token_strides(out),
        num_heads, tokens, num_slots, eps,
        **turn, PROJECTED=slots is not None, ELU=feature_map == "elu",
        **config.meta(width, value_width),
    )  # fmt: skip
    return out, total


def linear_broadcast_backward(
    dout: Tensor, q: Tensor, slots: Tensor | None, sums: Tensor, norms: Tensor, rotary: Rotary | None, feature_map: str,
    total: Tensor, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_slots, need_sums = needs
    batch, num_heads, tokens, width = q.shape
    num_slots, value_width = sums.shape[2:]
    dout = unit_last_stride(dout)
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)
    inputs = (dout, q, q if slots is None else slots, sums, norms, cos, sin)
    strides = (
        *token_strides(dout), *token_strides(q), *feature_strides(slots), *slot_strides(sums), *norms.stride(), angle_h,
    )  # fmt: skip
    variant = dict(
        **turn, PROJECTED=slots is not None, ELU=feature_map == "elu"
    )  # fmt: skip

    config = feature_config("linear_broadcast_tokens", q, sums, slots)
    dq, delta = empty_like_tokens(q, width), total.new_empty(total.shape)
    used = total.new_empty(total.shape, dtype=torch.uint8)
    launch(
        linear_broadcast_tokens_kernel,
        (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
        *inputs, total, delta, used, dq, *strides, *token_strides(dq), num_heads, tokens, num_slots,
        **variant, **config.meta(width, value_width),
    )  # fmt: skip
    need_slots = need_slots and slots is not None
    if not (need_slots or need_sums):
        return dq, q.new_empty(0), sums.new_empty(0), sums.new_empty(0)

    config = feature_config("linear_broadcast_slots", q, sums, slots)
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dsums = q.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=config.compute)
    dnorms = q.new_empty(batch, num_heads, chunks, num_slots, dtype=config.compute)
    dslots = empty_slots(slots, batch, num_heads, chunks, config.compute) if need_slots else q.new_empty(0)
    launch(
        linear_broadcast_slots_kernel,
        (programs * chunks,),
        *inputs, total, delta, used, dslots, dsums, dnorms, *strides, num_heads, tokens, num_slots, chunk,
        NEED_SLOTS=need_slots, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    dslots = sum_slots(dslots, slots) if need_slots else q.new_empty(0)
    return dq, dslots, *(merge_sums(dsums, dnorms) if need_sums else (sums.new_empty(0), sums.new_empty(0)))

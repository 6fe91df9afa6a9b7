"""Kernels for `linear_broadcast`: output tokens are averages of the slots' values, weighted by features.

See primitives/linear.py for the equations. The kernels have the same loops as the kernels for `broadcast`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens, unit_last_stride
from .features import (
    COPIES,
    apply_map,
    copies,
    feature_config,
    feature_strides,
    load_operands,
    outer_product,
    slot_rows,
    sum_copies,
)
from .launch import cdiv, launch, rotary_arguments, slot_strides, token_strides
from .merge import empty_slots, merge_sums, sum_slots
from .tiles import (
    LN2,
    cast,
    dot,
    left_products,
    load_rotated,
    load_tile,
    right_products,
    slot_program,
    split,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
)

HALF_MAX = tl.constexpr(65504.0)  # the largest finite float16 number
HALF_SCALE = tl.constexpr(2.0**14)  # factor of float16 weights, which are at most 1, to avoid subnormal weights
SMALLEST = tl.constexpr(2.0**-100)  # lower limit of maxima, so that their inverses are finite
TINY = tl.constexpr(2.0**-126)  # lower limit of denominators, so that 0 / 0 becomes 0


@triton.jit
def largest_norm(norms, norms_m, M, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the largest of a head's norms. `load_state` divides by this number to avoid overflow."""
    b_max = tl.full((BLOCK_M,), SMALLEST, COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        o_m = first_slot + tl.arange(0, BLOCK_M)
        b_max = tl.maximum(b_max, tl.load(norms + o_m.to(tl.int64) * norms_m, mask=o_m < M, other=0.0))
    return tl.max(b_max, 0)


@triton.jit
def load_state(
    slots, slots_m, sums, norms, sums_m, norms_m, largest, first_slot, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr, SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """For a tile of slots, return two operands for logits (see load_operands), two operands for values, and the norms.

    The norms are divided by `largest`. In float16, whose range is too small for sums / largest, the values are sums / norms. In
    other dtypes, they are sums / largest. For 16-bit tokens, the two operands for values are the rounded values and the
    rounding errors. Rows whose index is M or greater are 0.
    """
    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    o_e = tl.arange(0, BLOCK_E)
    at = o_m.to(tl.int64)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    b_values = tl.load(sums + at[:, None] * sums_m + o_e[None, :], mask=inside, other=0.0)
    b_norms = tl.load(norms + at * norms_m, mask=o_m < M, other=0.0)
    if DTYPE == tl.float16:
        b_values = b_values / tl.where(b_norms == 0, 1.0, b_norms)[:, None]
    else:
        b_values = b_values / largest
    b_norms = b_norms / largest
    b_left, b_right = split(b_values, DTYPE)
    b_high, b_low = b_left, b_right
    if PROJECTED:
        b_high, b_low = load_operands(
            slots, first_slot, slots_m, M, D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, ELU, SPLIT, DTYPE
        )  # fmt: skip
    return b_high, b_low, b_left, b_right, b_norms


@triton.jit(do_not_specialize=["N", "M", "sums_b", "sums_h", "norms_b", "norms_h", "angle_h", "eps", "chunk"])
def linear_broadcast_forward_kernel(
    q, slots, sums, norms, cos, sin, out, total,
    q_b, q_h, q_n, slots_b, slots_h, slots_m, sums_b, sums_h, sums_m, norms_b, norms_h, norms_m, angle_h,
    out_b, out_h, out_n,
    H, N, M, eps, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Compute out and its denominator, total, for a chunk of tokens. If not TILED, the slots are loaded only once."""
    i_bh, _, _, first, last = slot_program(1, N, chunk, 1)
    i_b, i_h = i_bh // H, i_bh % H
    cos += i_h * angle_h
    sin += i_h * angle_h
    q += i_b * q_b + i_h * q_h
    slots += i_b * slots_b + i_h * slots_h
    sums += i_b * sums_b + i_h * sums_h
    norms += i_b * norms_b + i_h * norms_h
    out += i_b * out_b + i_h * out_h
    DTYPE: tl.constexpr = q.dtype.element_ty
    HALF: tl.constexpr = DTYPE == tl.float16
    largest = largest_norm(norms, norms_m, M, BLOCK_M, COMPUTE)
    guard = tl.zeros((BLOCK_N,), COMPUTE) + eps
    if not TILED:
        b_high, b_low, b_left, b_right, b_norms = load_state(
            slots, slots_m, sums, norms, sums_m, norms_m, largest, 0, M,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT, DTYPE,
        )  # fmt: skip
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        if PROJECTED:
            b_q = load_rotated(q, o_n, q_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_max = tl.full((BLOCK_N,), SMALLEST, COMPUTE)
        b_total = tl.zeros((BLOCK_N, COPIES), COMPUTE)
        b_out = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
        for first_slot in range(0, M if TILED else BLOCK_M, BLOCK_M):
            if TILED:
                b_high, b_low, b_left, b_right, b_norms = load_state(
                    slots, slots_m, sums, norms, sums_m, norms_m, largest, first_slot, M,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT, DTYPE,
                )  # fmt: skip
            if PROJECTED:
                b_l = right_products(b_q, b_high, b_low, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), SPLIT, PRECISION)
            else:
                b_l = load_rotated(q, o_n, q_n, valid, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot).to(
                    COMPUTE
                )
            b_p = apply_map(b_l, ELU, PROJECTED)[0]
            b_scale = b_norms
            if HALF:  # as in a softmax, the weights are divided by a running max, so that they do not overflow
                b_p = b_p * b_norms[None, :]
                new_max = tl.maximum(b_max, tl.max(b_p, 1))
                b_p = b_p * (1.0 / new_max)[:, None]
                if TILED:
                    decay = b_max / new_max
                    b_out, b_total = b_out * decay[:, None], b_total * decay[:, None]
                b_max = new_max
                b_scale = tl.full((BLOCK_M,), 1.0, COMPUTE)
            b_p = cast(b_p, DTYPE)  # the numerator and the denominator use the same rounded features
            b_out = dot(b_p, b_left, b_out, PRECISION)
            b_total = dot(b_p, tl.trans(copies(b_scale, DTYPE)), b_total, PRECISION)
        b_scale = b_max * largest if HALF else tl.zeros((BLOCK_N,), COMPUTE) + largest
        b_sum = sum_copies(b_total)
        tl.store(total + i_bh * N + o_n, b_sum * b_scale + guard, mask=valid)
        b_out = b_out * (1.0 / tl.maximum(b_sum + guard / b_scale, TINY))[:, None]
        store_tile(b_out, out, o_n, out_n, valid, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "M", "sums_b", "sums_h", "norms_b", "norms_h", "angle_h", "chunk"])
def linear_broadcast_tokens_kernel(
    dout, q, slots, sums, norms, cos, sin, total, delta, scale, dq,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, sums_b, sums_h, sums_m, norms_b, norms_h, norms_m,
    angle_h, dq_b, dq_h, dq_n,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Compute dq for a chunk of tokens. For the slot gradients, also compute delta = <dout, out> and scale = largest / total.

    `largest` is the head's largest norm. delta is recomputed from the features, because `out` may have been rounded, and dq
    depends on differences <dout, sums / norms> - delta that can be smaller than this rounding error. For a token whose dout
    is 0, such as padding, scale is 0, and the query is read as 0. The token then does not contribute to any gradient, even if
    its query contains NaN. If not TILED, the slots are loaded only once.
    """
    i_bh, _, _, first, last = slot_program(1, N, chunk, 1)
    i_b, i_h = i_bh // H, i_bh % H
    cos += i_h * angle_h
    sin += i_h * angle_h
    q += i_b * q_b + i_h * q_h
    slots += i_b * slots_b + i_h * slots_h
    sums += i_b * sums_b + i_h * sums_h
    norms += i_b * norms_b + i_h * norms_h
    dq += i_b * dq_b + i_h * dq_h
    dout += i_b * d_b + i_h * d_h
    DTYPE: tl.constexpr = dout.dtype.element_ty
    HALF: tl.constexpr = DTYPE == tl.float16
    WIDE: tl.constexpr = DTYPE != COMPUTE
    FOLDED: tl.constexpr = DTYPE == tl.bfloat16 and PROJECTED
    PASSES: tl.constexpr = 2 if TILED else 1  # the first pass computes delta, and the last pass computes dq
    largest = largest_norm(norms, norms_m, M, BLOCK_M, COMPUTE)
    if not TILED:
        b_high, b_low, b_left, b_right, b_norms = load_state(
            slots, slots_m, sums, norms, sums_m, norms_m, largest, 0, M,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT, DTYPE,
        )  # fmt: skip
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_dout = load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True)
        b_used = ~(tl.sum(tl.abs(b_dout.to(COMPUTE)), 1) == 0)  # a token whose dout contains NaN is used
        b_total = tl.load(total + i_bh * N + o_n, mask=b_used, other=float("inf"))
        b_scale = largest / tl.where(b_total == 0, 1.0, b_total)
        b_q = b_dout
        if PROJECTED:
            b_q = load_rotated(q, o_n, q_n, b_used, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_delta = tl.zeros((BLOCK_N,), COMPUTE)
        b_out = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
        b_dq = tl.zeros((BLOCK_N, BLOCK_D if PROJECTED else 1), COMPUTE)
        for i in tl.static_range(PASSES):
            for first_slot in range(0, M if TILED else BLOCK_M, BLOCK_M):
                if TILED:
                    b_high, b_low, b_left, b_right, b_norms = load_state(
                        slots, slots_m, sums, norms, sums_m, norms_m, largest, first_slot, M,
                        D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT, DTYPE,
                    )  # fmt: skip
                if PROJECTED:
                    b_l = right_products(b_q, b_high, b_low, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), SPLIT, PRECISION)
                else:
                    b_l = load_rotated(q, o_n, q_n, b_used, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot)
                b_f, b_slopes = apply_map(b_l.to(COMPUTE), ELU, PROJECTED)
                if i == 0:
                    if HALF:  # turn the features into weights, which are at most 1
                        b_f = b_f * b_norms[None, :] * b_scale[:, None]
                    b_f = cast(b_f, DTYPE)
                    b_out = dot(b_f, b_left, b_out, PRECISION)
                    if WIDE:
                        b_out = dot(b_f, b_right, b_out, PRECISION)
                    b_delta = tl.sum(b_out * b_dout, 1) * (1.0 if HALF else b_scale)
                if i == PASSES - 1:
                    # Use both operands for values, because the differences between the products and their mean may be small.
                    b_dp = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
                    if FOLDED:
                        b_dp = outer_product(-b_delta, b_norms, b_dp, DTYPE, PRECISION)
                    b_dp = right_products(b_dout, b_left, b_right, b_dp, WIDE, PRECISION)
                    if HALF:
                        b_dl = b_slopes * b_norms[None, :] * (b_dp * b_scale[:, None] - (b_delta * b_scale)[:, None])
                    elif FOLDED:
                        b_dl = b_slopes * b_dp
                    else:
                        b_dl = b_slopes * (b_dp - b_norms[None, :] * b_delta[:, None])
                    if PROJECTED:
                        b_dq = dot(cast(b_dl, DTYPE), b_high, b_dq, PRECISION)
                    else:
                        b_dl = b_dl if HALF else b_dl * b_scale[:, None]
                        store_unrotated(
                            b_dl, dq, o_n, dq_n, valid, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, first_slot
                        )  # fmt: skip
        tl.store(delta + i_bh * N + o_n, b_delta, mask=valid)
        tl.store(scale + i_bh * N + o_n, b_scale, mask=valid)
        if PROJECTED:
            b_dq = b_dq if HALF else b_dq * b_scale[:, None]
            b_dq = b_dq * LN2 if ELU else b_dq
            store_unrotated(b_dq, dq, o_n, dq_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "M", "sums_b", "sums_h", "norms_b", "norms_h", "angle_h", "chunk"])
def linear_broadcast_slots_kernel(
    dout, q, slots, sums, norms, cos, sin, delta, scale, dslots, dsums, dnorms,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, sums_b, sums_h, sums_m, norms_b, norms_h, norms_m,
    angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    NEED_SLOTS: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a tile of slots, compute the contribution of a chunk of tokens to dsums, dnorms and, if NEED_SLOTS, dslots.

    In the formulas of the gradients, features are divided by `total`, the denominator of out. The kernel divides dout and delta
    instead of features, except in float16, where these quotients could overflow. In float16, it multiplies features by
    HALF_SCALE and the slot's norm, and divides them by the total. The results are <= HALF_SCALE.
    """
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    cos += i_h * angle_h
    sin += i_h * angle_h
    q += i_b * q_b + i_h * q_h
    dout += i_b * d_b + i_h * d_h
    norms += i_b * norms_b + i_h * norms_h
    DTYPE: tl.constexpr = dout.dtype.element_ty
    HALF: tl.constexpr = DTYPE == tl.float16
    largest = largest_norm(norms, norms_m, M, BLOCK_M, COMPUTE)
    b_high, b_low, b_left, b_right, b_norms = load_state(
        slots + i_b * slots_b + i_h * slots_h, slots_m, sums + i_b * sums_b + i_h * sums_h, norms, sums_m, norms_m,
        largest, first_slot, M,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT, DTYPE,
    )  # fmt: skip
    b_size = tl.where(b_norms == 0, 1.0, b_norms) * HALF_SCALE if HALF else tl.full((BLOCK_M,), 1.0, COMPUTE)
    b_dslots = tl.zeros((BLOCK_M, BLOCK_D if NEED_SLOTS else 1), COMPUTE)
    b_dsums = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_dnorms = tl.zeros((BLOCK_M, COPIES), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_dout = load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True)
        b_delta = tl.load(delta + i_bh * N + o_n, mask=valid, other=0.0)
        b_scale = tl.load(scale + i_bh * N + o_n, mask=valid, other=0.0)
        used = b_scale != 0
        zeros = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        if PROJECTED:
            b_q = load_rotated(q, o_n, q_n, used, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
            b_l = left_products(b_high, b_low, b_q, zeros, SPLIT, PRECISION)
        else:
            b_l = tl.trans(
                load_rotated(q, o_n, q_n, used, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot).to(COMPUTE)
            )
        b_f, b_slopes = apply_map(b_l, ELU, PROJECTED)
        if HALF:  # features of slots with norm 0 can overflow; their gradients are multiplied by 0 later, and inf * 0 is NaN
            b_p = cast(tl.minimum(b_f * (b_size[:, None] * b_scale[None, :]), HALF_MAX, tl.PropagateNan.ALL), DTYPE)
            b_dsums = dot(b_p, b_dout, b_dsums, PRECISION)
            b_dnorms = dot(b_p, tl.trans(copies(-b_delta, DTYPE)), b_dnorms, PRECISION)
        else:
            b_p = cast(b_f, DTYPE)
            b_dsums = dot(b_p, cast(b_dout.to(COMPUTE) * b_scale[:, None], DTYPE), b_dsums, PRECISION)
            b_dnorms = dot(b_p, tl.trans(copies(-b_delta * b_scale, DTYPE)), b_dnorms, PRECISION)
        if NEED_SLOTS:
            b_dp = left_products(b_left, b_right, b_dout, zeros, COMPUTE != DTYPE, PRECISION)
            if HALF:
                b_dp = b_norms[:, None] * (b_dp - b_delta[None, :])
            else:
                b_dp = b_dp - b_norms[:, None] * b_delta[None, :]
            b_dslots = dot(cast(b_slopes * b_dp * b_scale[None, :], DTYPE), b_q, b_dslots, PRECISION)

    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    b_size = b_size * largest
    store_state(b_dsums / b_size[:, None], sum_copies(b_dnorms) / b_size, dsums, dnorms, part, o_m, M, E, BLOCK_E)
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
    chunk, chunks = config.chunk(batch * num_heads, tokens)
    launch(
        linear_broadcast_forward_kernel,
        (batch * num_heads * chunks,),
        q, q if slots is None else slots, sums, norms, cos, sin, out, total,
        *token_strides(q), *feature_strides(slots), *slot_strides(sums), *norms.stride(), angle_h, *token_strides(out),
        num_heads, tokens, num_slots, eps, chunk,
        **turn, PROJECTED=slots is not None, ELU=feature_map == "elu", TILED=num_slots > config.tile.slots,
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
    variant = dict(**turn, PROJECTED=slots is not None, ELU=feature_map == "elu")

    config = feature_config("linear_broadcast_tokens", q, sums, slots)
    dq = empty_like_tokens(q, width)
    delta, scale = total.new_empty(total.shape), total.new_empty(total.shape)
    chunk, chunks = config.chunk(batch * num_heads, tokens)
    launch(
        linear_broadcast_tokens_kernel,
        (batch * num_heads * chunks,),
        *inputs, total, delta, scale, dq, *strides, *token_strides(dq), num_heads, tokens, num_slots, chunk,
        TILED=num_slots > config.tile.slots, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    need_slots = need_slots and slots is not None
    if not (need_slots or need_sums):
        return dq, q.new_empty(0), sums.new_empty(0), sums.new_empty(0)

    config = feature_config("linear_broadcast_slots_learned" if need_slots else "linear_broadcast_slots", q, sums, slots)
    programs = batch * num_heads * cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dsums = q.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=config.compute)
    dnorms = q.new_empty(batch, num_heads, chunks, num_slots, dtype=config.compute)
    dslots = empty_slots(slots, batch, num_heads, chunks, config.compute) if need_slots else q.new_empty(0)
    launch(
        linear_broadcast_slots_kernel,
        (programs * chunks,),
        *inputs, delta, scale, dslots, dsums, dnorms, *strides, num_heads, tokens, num_slots, chunk,
        NEED_SLOTS=need_slots, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    dslots = sum_slots(dslots, slots) if need_slots else q.new_empty(0)
    return dq, dslots, *(merge_sums(dsums, dnorms) if need_sums else (sums.new_empty(0), sums.new_empty(0)))

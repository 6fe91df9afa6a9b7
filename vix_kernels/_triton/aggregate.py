"""Kernels for `aggregate`: M slots attend to N tokens (see primitives/aggregate.py for the equations).

Logits are in base 2, so every exponential is one exp2. In the forward kernel and in the kernel for slot gradients, a program
keeps a tile of slots and loops over a chunk of the tokens. In the kernel for token gradients, a program keeps a tile of tokens
and loops over the slots. No kernel uses atomics: each output is written once, by one program, and chunks are merged in a fixed
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, Statistics, empty_like_tokens, unit_last_stride
from .launch import (
    launch,
    launch_config,
    mask_strides,
    merge_arguments,
    output_strides,
    padded,
    rotary_arguments,
    slot_strides,
    token_strides,
    triton_dtype,
)
from .merge import empty_slots, sum_slots
from .tiles import (
    LOG2E,
    cast,
    dot,
    exps_below,
    load_rotated,
    load_slots,
    load_tile,
    load_unit,
    rotate_pairs,
    row_products,
    slot_program,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
    token_program,
)


@triton.jit
def key_bias(k, valid, scale, GAUSSIAN: tl.constexpr, COMPUTE: tl.constexpr):
    """Return a base-2 bias for each key: -|scale k|^2 / (2 ln 2) if GAUSSIAN, otherwise 0. Masked keys have bias -inf."""
    bias = tl.zeros((k.shape[0],), COMPUTE)
    if GAUSSIAN:
        x = k.to(COMPUTE)
        bias -= tl.sum(x * x, 1) * (0.5 * LOG2E * scale * scale)
        bias += bias - bias  # turns -inf into NaN if the square overflows, because -inf would mask the key
    return tl.where(valid, bias, float("-inf"))


@triton.jit(do_not_specialize=["N", "M", "scale", "mask_b", "angle_h", "chunk"])
def aggregate_forward_kernel(
    slots, k, v, mask, cos, sin, values, lse, row_max, total,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, scale, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, GAUSSIAN: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute values, lse, row_max and total for a tile of slots over a chunk of tokens."""
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = first_slot + tl.arange(0, BLOCK_M)
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    angles = i_h * angle_h
    b_slots = load_slots(slots + i_b * slots_b + i_h * slots_h, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)

    b_max = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
    b_sum = tl.zeros((BLOCK_M,), COMPUTE)
    b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        if MASKED:
            valid &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=valid, other=0) != 0
        b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_bias = key_bias(b_k, valid, scale, GAUSSIAN, COMPUTE)
        b_l = row_products(b_slots, b_k, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), SPLIT, False, PRECISION)
        b_l = b_l * (scale * LOG2E) + b_bias[None, :]

        new_max = tl.maximum(b_max, tl.max(b_l, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # avoids inf - inf before the first valid key
        b_p = tl.exp2(b_l - shift[:, None])
        decay = tl.exp2(b_max - shift)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_values = dot(cast(b_p, b_v.dtype), b_v, b_values * decay[:, None], PRECISION)
        b_max = new_max

    b_values = b_values / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    store_state(b_values, b_max + tl.log2(b_sum), values, lse, part, o_m, M, E, BLOCK_E)
    rows = part * M + o_m
    tl.store(row_max + rows, tl.where(b_max == float("-inf"), 0.0, b_max), mask=o_m < M)
    tl.store(total + rows, b_sum, mask=o_m < M)


@triton.jit(do_not_specialize=["chunks", "M"])
def merge_softmax_kernel(
    parts, part_row_max, part_totals, values, lse, row_max, totals, chunks, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Merge the results of the chunks of tokens.

    The merged values are the average of the chunks' values, weighted by total * exp2(row_max). The kernel also computes
    row_max, total and lse over all tokens.
    """
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    part_rows = i_bh * chunks * M + o_m

    b_row_max = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
    for i in range(chunks):
        b_total = tl.load(part_totals + part_rows + i * M, mask=o_m < M, other=0.0)
        b_part_row_max = tl.load(part_row_max + part_rows + i * M, mask=o_m < M, other=float("-inf"))
        # The row_max of a chunk without valid keys is ignored.
        b_row_max = tl.maximum(b_row_max, tl.where(b_total == 0, float("-inf"), b_part_row_max))
    b_row_max = tl.where(b_row_max == float("-inf"), 0.0, b_row_max)
    b_sum = tl.zeros((BLOCK_M,), COMPUTE)
    b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for i in range(chunks):
        rows = part_rows + i * M
        b_total = tl.load(part_totals + rows, mask=o_m < M, other=0.0)
        b_part_row_max = tl.load(part_row_max + rows, mask=o_m < M, other=float("-inf"))
        weight = tl.where(b_total == 0, 0.0, b_total * tl.exp2(b_part_row_max - b_row_max))
        b_part = tl.load(parts + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
        b_sum += weight
        b_values += b_part * weight[:, None]
    b_values = b_values / tl.where(b_sum == 0, 1.0, b_sum)[:, None]

    rows = i_bh * M + o_m
    tl.store(values + rows[:, None] * E + o_e[None, :], b_values, mask=inside)
    tl.store(lse + rows, b_row_max + tl.log2(b_sum), mask=o_m < M)
    tl.store(row_max + rows, b_row_max, mask=o_m < M)
    tl.store(totals + rows, b_sum, mask=o_m < M)


@triton.jit(do_not_specialize=["M", "d_b", "d_h", "dnumber_b", "dnumber_h"])
def aggregate_prepare_kernel(
    dvalues, dnumber, values, total, delta, size, unit,
    d_b, d_h, d_m, dnumber_b, dnumber_h, dnumber_m, H, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    SOFTMAX: tl.constexpr, NUMBERS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute size, unit and delta for the gradient kernels.

    The gradient of a logit is (size <unit, v> - delta) times the exponential of the logit or, for features, times the slope of
    the feature map. size * unit is dvalues / total, and unit has the tokens' dtype. dvalues is a sum over all tokens, so in
    float16 it can overflow even if dk and dv do not. size therefore includes a power of two that keeps unit within [-1, 1].

    If SOFTMAX, delta = (<dvalues, values> - dlse / ln 2) / total. <dvalues, values> is computed in the same way as <unit, v> in
    the gradient kernels, so that the two cancel if a slot attends to only one token. If not SOFTMAX, the kernel prepares the
    gradient of sums weighted by features. Then delta = -dnumber, and 1 is used in place of total.
    """
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    rows = i_bh * M + o_m
    at = o_m.to(tl.int64)
    d = tl.load(dvalues + i_b * d_b + i_h * d_h + at[:, None] * d_m + o_e[None, :], mask=inside, other=0.0).to(COMPUTE)
    largest = tl.max(tl.abs(d), 1)
    # size is limited to the range of normal float32 numbers, so that 1 / size is finite. If all values of a row are below this
    # range, they are not scaled up to 1. Infinite rows stay infinite.
    exponent = tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0)))
    b_size = tl.exp2(tl.minimum(tl.maximum(exponent, -126.0), 126.0))
    b_unit = cast(d / b_size[:, None], unit.dtype.element_ty)
    b_delta = tl.zeros((BLOCK_M,), COMPUTE)
    inverse = tl.full((BLOCK_M,), 1.0, COMPUTE)
    if SOFTMAX:
        b_values = tl.load(values + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
        WIDE: tl.constexpr = b_values.dtype != b_unit.dtype
        products = row_products(b_unit, b_values, tl.zeros((BLOCK_M, BLOCK_M), COMPUTE), False, WIDE, PRECISION)
        own = tl.arange(0, BLOCK_M)
        b_delta += tl.sum(tl.where(own[:, None] == own[None, :], products, 0.0), 1) * b_size
        b_total = tl.load(total + rows, mask=o_m < M, other=1.0)
        inverse = 1.0 / tl.where(b_total == 0, 1.0, b_total)
    if NUMBERS:
        b_number = tl.load(dnumber + i_b * dnumber_b + i_h * dnumber_h + at * dnumber_m, mask=o_m < M, other=0.0)
        b_delta -= b_number * LOG2E if SOFTMAX else b_number
    tl.store(delta + rows, b_delta * inverse, mask=o_m < M)
    tl.store(size + rows, b_size * inverse, mask=o_m < M)
    tl.store(unit + rows[:, None] * E + o_e[None, :], b_unit, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "scale", "mask_b", "angle_h"])
def aggregate_tokens_kernel(
    slots, k, v, mask, cos, sin, row_max, delta, size, unit, dk, dv,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, M, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, GAUSSIAN: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute dk (if KEYS) and dv (if VALUES) for a tile of tokens."""
    i_bh, o_n, inside = token_program(N, BLOCK_N)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    slots += i_b * slots_b + i_h * slots_h

    valid = inside
    if MASKED:
        valid &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=inside, other=0) != 0
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
    b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
    b_bias = key_bias(b_k, valid, scale, GAUSSIAN, COMPUTE)

    b_dk = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    b_dv = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
    b_db = tl.zeros((BLOCK_N,), COMPUTE)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_slots = load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
        b_unit, b_size, b_delta = load_unit(unit, size, delta, i_bh * M + o_m, o_m < M, E, BLOCK_E)
        b_row_max = tl.load(row_max + i_bh * M + o_m, mask=o_m < M, other=0.0)

        b_l = row_products(b_k, b_slots, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, SPLIT, PRECISION, SWAPPED=True)
        b_p = exps_below(b_l * (scale * LOG2E) + b_bias[:, None], b_row_max[None, :])
        if VALUES:
            b_dv = dot(cast(b_p * b_size[None, :], b_v.dtype), b_unit, b_dv, PRECISION)
        if KEYS:
            b_dp = row_products(b_v, b_unit, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION, SWAPPED=True)
            b_dl = b_p * (b_dp * b_size[None, :] - b_delta[None, :])
            b_dk = dot(cast(b_dl, b_k.dtype), cast(b_slots, b_k.dtype), b_dk, PRECISION)
            b_db += tl.sum(b_dl, 1)

    if KEYS:
        b_dk *= scale
        if GAUSSIAN:  # load the keys again, because keeping them during the loop would occupy registers for a whole tile
            b_k = load_tile(k, o_n, k_n, valid, D, BLOCK_D, ROTARY, INTERLEAVED, AGAIN=True)
            b_x = b_k.to(COMPUTE)
            if ROTARY > 0:
                b_x = rotate_pairs(b_x, o_n, valid, cos + angles, sin + angles, ROTARY, False, AGAIN=True)
            b_dk -= b_x * (scale * scale * b_db)[:, None]
        b_dk = tl.where(valid[:, None], b_dk, 0.0)  # masked tokens get 0 even if a slot's gradient is NaN
        dk += i_b * dk_b + i_h * dk_h
        store_unrotated(b_dk, dk, o_n, dk_n, inside, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)
    if VALUES:
        b_dv = tl.where(valid[:, None], b_dv, 0.0)
        dv += i_b * dv_b + i_h * dv_h
        store_tile(b_dv, dv, o_n, dv_n, inside, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "M", "scale", "mask_b", "angle_h", "chunk"])
def aggregate_slots_kernel(
    slots, k, v, mask, cos, sin, row_max, delta, size, unit, dslots,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, scale, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, GAUSSIAN: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a chunk of tokens to dslots, for a tile of slots of one sample and head."""
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = first_slot + tl.arange(0, BLOCK_M)
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    angles = i_h * angle_h
    b_slots = load_slots(slots + i_b * slots_b + i_h * slots_h, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    b_unit, b_size, b_delta = load_unit(unit, size, delta, i_bh * M + o_m, o_m < M, E, BLOCK_E)
    b_row_max = tl.load(row_max + i_bh * M + o_m, mask=o_m < M, other=0.0)

    b_dslots = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        if MASKED:
            valid &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=valid, other=0) != 0
        b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_bias = key_bias(b_k, valid, scale, GAUSSIAN, COMPUTE)
        b_l = row_products(b_slots, b_k, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), SPLIT, False, PRECISION)
        b_p = exps_below(b_l * (scale * LOG2E) + b_bias[None, :], b_row_max[:, None])
        b_dp = row_products(b_unit, b_v, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), False, False, PRECISION)
        b_dl = b_p * (b_dp * b_size[:, None] - b_delta[:, None])
        b_dslots = dot(cast(b_dl, b_k.dtype), b_k, b_dslots, PRECISION)

    store_slots(b_dslots * scale, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def aggregate_forward(
    slots: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None, scale: float, gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    num_slots, value_width = slots.shape[2], v.shape[3]
    config = launch_config("aggregate_forward", k, max(width, value_width), slots)
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    values = k.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=config.compute)
    lse, row_max, total = (k.new_empty(batch, num_heads, chunks, num_slots, dtype=config.compute) for _ in range(3))
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)
    launch(
        aggregate_forward_kernel,
        (programs * chunks,),
        slots, k, v, k if mask is None else mask, cos, sin, values, lse, row_max, total,
        *slot_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h,
        num_heads, tokens, num_slots, scale, chunk,
        **turn, GAUSSIAN=gaussian, MASKED=mask is not None,
        **config.meta(width, value_width),
    )  # fmt: skip
    if chunks == 1:
        return values.squeeze(2), lse.squeeze(2), row_max.squeeze(2), total.squeeze(2)
    grid, results, meta = merge_arguments(values, outputs=3)
    launch(merge_softmax_kernel, grid, values, row_max, total, *results, chunks, num_slots, **meta)
    return results


def prepare(
    dvalues: Tensor, dnumber: Tensor | None, values: Tensor | None, total: Tensor | None, dtype: torch.dtype, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch aggregate_prepare_kernel.

    Args:
        dvalues: gradient of values or sums, (batch, heads, M, E).
        dnumber: gradient of lse or norms, (batch, heads, M), or None if it is 0.
        values, total: results of aggregate_forward, or None for the gradient of sums weighted by features.
        dtype: dtype of the tokens.
        precision: precision of float32 products.

    Returns:
        delta and size (batch, heads, M), and unit (batch, heads, M, E) in `dtype`.
    """
    batch, num_heads, num_slots, width = dvalues.shape
    dvalues = unit_last_stride(dvalues)
    delta, size = (dvalues.new_empty(dvalues.shape[:3]) for _ in range(2))
    unit = dvalues.new_empty(dvalues.shape, dtype=dtype)
    block = 16
    warps = 8 if dtype == torch.float32 and width > 64 else 4  # with 4 warps, the kernel would spill registers
    launch(
        aggregate_prepare_kernel,
        (batch * num_heads * triton.cdiv(num_slots, block),),
        dvalues, *(dvalues if x is None else x for x in (dnumber, values, total)), delta, size, unit,
        *slot_strides(dvalues), *((0, 0, 0) if dnumber is None else dnumber.stride()), num_heads, num_slots,
        E=width, BLOCK_E=padded(width), BLOCK_M=block, SOFTMAX=total is not None, NUMBERS=dnumber is not None,
        COMPUTE=triton_dtype(dvalues.dtype), PRECISION=precision,
        num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return delta, size, unit


def aggregate_backward(
    dvalues: Tensor, dlse: Tensor | None, slots: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None,
    scale: float, gaussian: bool, values: Tensor, statistics: Statistics, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (need_slots, need_k, need_v), (row_max, total) = needs, statistics
    batch, num_heads, tokens, width = k.shape
    num_slots, value_width = slots.shape[2], v.shape[3]
    config = launch_config("aggregate_tokens", k, max(width, value_width), slots)
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)

    delta, size, unit = prepare(dvalues, dlse, values, total, v.dtype, config.precision)
    inputs = (slots, k, v, k if mask is None else mask, cos, sin, row_max, delta, size, unit)
    strides = (*slot_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h)
    variant = dict(**turn, GAUSSIAN=gaussian, MASKED=mask is not None)
    dk = empty_like_tokens(k, width) if need_k else k.new_empty(0)
    dv = empty_like_tokens(v, value_width) if need_v else v.new_empty(0)
    for keys, contents in ((need_k, False), (False, need_v)) if config.tile.apart else ((need_k, need_v),):
        if keys or contents:
            launch(
                aggregate_tokens_kernel,
                (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
                *inputs, dk, dv, *strides, *output_strides(dk), *output_strides(dv), num_heads, tokens, num_slots, scale,
                KEYS=keys, VALUES=contents, **variant, **config.meta(width, value_width),
            )  # fmt: skip
    if not need_slots:
        return slots.new_empty(0), dk, dv

    config = launch_config("aggregate_slots", k, max(width, value_width), slots)
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dslots = empty_slots(slots, batch, num_heads, chunks, config.compute)
    launch(
        aggregate_slots_kernel,
        (programs * chunks,),
        *inputs, dslots, *strides, num_heads, tokens, num_slots, scale, chunk,
        **variant, **config.meta(width, value_width),
    )  # fmt: skip
    return sum_slots(dslots, slots), dk, dv

"""Kernels for `aggregate`: M slots attend to N tokens (see primitives/aggregate.py for the equations).

Logits are in base 2, so every exponential is one exp2. In the forward kernel and in the kernel for slot gradients, a program
loads a tile of slots and then loops over a chunk of the tokens. In the kernel for token gradients, a program loads all slots
before its loop over a chunk of the tokens, if there are at most `Tile.resident` tiles of slots. Otherwise, the program loads
the slots again for each tile of tokens. No kernel uses atomics. Each output is written once, by one program, and the results of
chunks are merged in a fixed order.

FOLD is set if slots are float32 and tokens are bfloat16. With FOLD, the loaded slots include the factor scale * log2(e), and
`size` is 1 (see prepare.py). In this case, matrix products add vectors, such as the bias of the keys, to tiles (see
logits.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, Statistics, empty_like_tokens
from .launch import (
    cdiv,
    launch,
    launch_config,
    mask_strides,
    merge_arguments,
    output_strides,
    rotary_arguments,
    slot_strides,
    token_strides,
)
from .logits import bias_columns, exps_at_most_one, key_logits, ones_columns, slot_parts
from .merge import empty_slots, merge_softmax_kernel, sum_slots
from .prepare import prepare
from .tiles import (
    LN2,
    LOG2E,
    cast,
    dot,
    exps_below,
    is_valid,
    load_rotated,
    load_slots,
    load_tile,
    load_unit,
    right_products,
    row_products,
    slot_program,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
    stream_program,
    swapped_products,
    table_start,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the most negative finite float32 number


@triton.jit
def key_bias(k, scale, GAUSSIAN: tl.constexpr, COMPUTE: tl.constexpr):
    """Return a base-2 bias for each key: -|scale k|^2 / (2 ln 2) if GAUSSIAN, otherwise 0."""
    bias = tl.zeros((k.shape[0],), COMPUTE)
    if GAUSSIAN:
        x = k.to(COMPUTE)
        bias -= tl.sum(x * x, 1) * (0.5 * LOG2E * scale * scale)
        bias += bias - bias  # turns -inf into NaN if the square overflows, because -inf would mask the key
    return bias


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
    FOLD: tl.constexpr = SPLIT and k.dtype.element_ty == tl.bfloat16
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = first_slot + tl.arange(0, BLOCK_M)
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    angles = table_start(i_h, angle_h, ROTARY)
    b_slots = load_slots(slots + i_b * slots_b + i_h * slots_h, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    high, low = slot_parts(b_slots, scale, k.dtype.element_ty, SPLIT, FOLD)

    # Start at the lowest finite number instead of -inf, because -inf - -inf is NaN.
    b_max = tl.full((BLOCK_M,), LOWEST, COMPUTE)
    b_sum = tl.zeros((BLOCK_M,), COMPUTE)
    b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < last, MASKED)
        b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_bias = tl.where(valid, key_bias(b_k, scale, GAUSSIAN, COMPUTE), float("-inf"))
        b_l = key_logits(high, low, b_k, b_bias, scale, SPLIT, FOLD, COMPUTE, PRECISION)

        new_max = tl.maximum(b_max, tl.max(b_l, 1))
        b_p = tl.exp2(b_l - new_max[:, None])
        decay = tl.exp2(b_max - new_max)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        # With `b_values * decay` as the accumulator of the product, ptxas would serialize all products on sm_90.
        b_pv = dot(cast(b_p, b_v.dtype), b_v, tl.zeros((BLOCK_M, BLOCK_E), COMPUTE), PRECISION)
        b_values = tl.fma(b_values, decay[:, None], b_pv)
        b_max = new_max

    b_max = tl.where(b_sum == 0, 0.0, b_max)
    b_values = b_values / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    store_state(b_values, b_max + tl.log2(b_sum), values, lse, part, o_m, M, E, BLOCK_E)
    rows = part * M + o_m
    tl.store(row_max + rows, b_max, mask=o_m < M)
    tl.store(total + rows, b_sum, mask=o_m < M)


@triton.jit
def slot_operands(
    slots, row_max, delta, size, unit, slots_m, i_bh, first_slot, M, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Load a tile of slots for the gradient kernels.

    Returns:
        The two tiles from `slot_parts`, unit, size, row_max and delta. Without FOLD, row_max and delta are vectors. With FOLD,
        `bias_columns` converts the negated vectors to tiles. To subtract a vector, kernels add the product of its tile and
        `ones_columns`.
    """
    o_m = first_slot + tl.arange(0, BLOCK_M)
    b_slots = load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    high, low = slot_parts(b_slots, scale, unit.dtype.element_ty, SPLIT, FOLD)
    b_unit, b_size, b_delta = load_unit(unit, size, delta, i_bh * M + o_m, o_m < M, E, BLOCK_E)
    b_row_max = tl.load(row_max + i_bh * M + o_m, mask=o_m < M, other=0.0)
    if FOLD:
        b_row_max, b_delta = bias_columns(-b_row_max), bias_columns(-b_delta)
    return high, low, b_unit, b_size, b_row_max, b_delta


@triton.jit
def add_token_gradients(
    b_dk, b_db, b_dv, b_k, b_v, b_bias, operands, scale,
    SPLIT: tl.constexpr, FOLD: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Return dk, db and dv with the contribution of a tile of slots added.

    For each key, db is the sum of the logit gradients over the slots. `operands` is the result of slot_operands.
    """
    high, low, b_unit, b_size, b_row_max, b_delta = operands
    ROWS: tl.constexpr = b_k.shape[0]
    COLUMNS: tl.constexpr = high.shape[0]
    zeros = tl.zeros((ROWS, COLUMNS), COMPUTE)
    acc = zeros
    if FOLD:
        acc = dot(bias_columns(b_bias), tl.trans(ones_columns(COLUMNS)), zeros, PRECISION)
    if SPLIT:
        b_l = right_products(b_k, high, low, acc, SPLIT, PRECISION)
    else:
        b_l = swapped_products(b_k, high, acc, PRECISION)
    if KEYS:
        b_dp = swapped_products(b_v, b_unit, zeros, PRECISION)
    if FOLD:
        b_p = exps_at_most_one(dot(ones_columns(ROWS), tl.trans(b_row_max), b_l, PRECISION))
        b_weight = b_p
    else:
        b_p = exps_below(b_l * (scale * LOG2E) + b_bias[:, None], b_row_max[None, :])
        b_weight = b_p * b_size[None, :]
    if KEYS:
        if FOLD:
            b_dl = cast(b_p * dot(ones_columns(ROWS), tl.trans(b_delta), b_dp, PRECISION), b_k.dtype)
        else:
            b_dl = b_p * (b_dp * b_size[None, :] - b_delta[None, :])
            b_db += tl.sum(b_dl, 1)
            b_dl = cast(b_dl, b_k.dtype)
    if VALUES:
        b_dv = dot(cast(b_weight, b_v.dtype), b_unit, b_dv, PRECISION)
    if KEYS:
        b_dk = dot(b_dl, high, b_dk, PRECISION)
        if FOLD:
            b_db = dot(b_dl, tl.full((COLUMNS, 16), 1 / 16, b_k.dtype), b_db, PRECISION)
    return b_dk, b_db, b_dv


@triton.jit(do_not_specialize=["N", "M", "scale", "mask_b", "angle_h", "chunk"])
def aggregate_tokens_kernel(
    slots, k, v, mask, cos, sin, row_max, delta, size, unit, dk, dv,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, M, scale, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, GAUSSIAN: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute dk (if KEYS) and dv (if VALUES) for a chunk of tokens. For TILES, see LaunchConfig.stream."""
    FOLD: tl.constexpr = SPLIT and k.dtype.element_ty == tl.bfloat16
    i_bh, first, last = stream_program(N, chunk)
    i_b, i_h = i_bh // H, i_bh % H
    angles = table_start(i_h, angle_h, ROTARY)
    slots += i_b * slots_b + i_h * slots_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    dk += i_b * dk_b + i_h * dk_h
    dv += i_b * dv_b + i_h * dv_h
    resident = ()
    for i in tl.static_range(TILES):
        resident = resident + (
            slot_operands(
                slots, row_max, delta, size, unit, slots_m, i_bh, i * BLOCK_M, M, scale,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, SPLIT, FOLD,
            ),
        )  # fmt: skip

    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        inside = o_n < last
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, inside, MASKED)
        b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_bias = key_bias(b_k, scale, GAUSSIAN, COMPUTE)
        b_dk = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        b_db = tl.zeros((BLOCK_N, 16) if FOLD else (BLOCK_N,), COMPUTE)
        b_dv = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
        if TILES > 0:
            for i in tl.static_range(TILES):
                b_dk, b_db, b_dv = add_token_gradients(
                    b_dk, b_db, b_dv, b_k, b_v, b_bias, resident[i], scale, SPLIT, FOLD, COMPUTE, PRECISION, KEYS, VALUES
                )  # fmt: skip
        else:
            for first_slot in range(0, M, BLOCK_M):
                operands = slot_operands(
                    slots, row_max, delta, size, unit, slots_m, i_bh, first_slot, M, scale,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, SPLIT, FOLD,
                )  # fmt: skip
                b_dk, b_db, b_dv = add_token_gradients(
                    b_dk, b_db, b_dv, b_k, b_v, b_bias, operands, scale, SPLIT, FOLD, COMPUTE, PRECISION, KEYS, VALUES
                )  # fmt: skip

        if KEYS:
            b_dk *= LN2 if FOLD else scale
            if GAUSSIAN:
                if FOLD:
                    b_db = tl.sum(b_db, 1)
                if BLOCK_D > 32:  # load the keys again, because keeping them would occupy too many registers
                    b_k = load_rotated(
                        k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE, AGAIN=True
                    )  # fmt: skip
                b_dk -= b_k.to(COMPUTE) * (scale * scale * b_db)[:, None]
            if MASKED:  # masked tokens have gradient 0, even if the gradient of a slot is NaN
                b_dk = tl.where(valid[:, None], b_dk, 0.0)
            store_unrotated(b_dk, dk, o_n, dk_n, inside, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)
        if VALUES:
            if MASKED:
                b_dv = tl.where(valid[:, None], b_dv, 0.0)
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
    FOLD: tl.constexpr = SPLIT and k.dtype.element_ty == tl.bfloat16
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = first_slot + tl.arange(0, BLOCK_M)
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    angles = table_start(i_h, angle_h, ROTARY)
    high, low, b_unit, b_size, b_row_max, b_delta = slot_operands(
        slots + i_b * slots_b + i_h * slots_h, row_max, delta, size, unit, slots_m, i_bh, first_slot, M, scale,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, SPLIT, FOLD,
    )  # fmt: skip

    b_dslots = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < last, MASKED)
        b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_bias = key_bias(b_k, scale, GAUSSIAN, COMPUTE)
        b_l = key_logits(high, low, b_k, b_bias, scale, SPLIT, FOLD, COMPUTE, PRECISION)
        b_dp = row_products(b_unit, b_v, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), PRECISION)
        if FOLD:
            ones = tl.trans(ones_columns(BLOCK_N))
            b_p = exps_at_most_one(dot(b_row_max, ones, b_l, PRECISION))
            b_dl = b_p * dot(b_delta, ones, b_dp, PRECISION)
        else:
            b_dl = exps_below(b_l, b_row_max[:, None]) * (b_dp * b_size[:, None] - b_delta[:, None])
        b_dslots = dot(cast(b_dl, b_k.dtype), b_k, b_dslots, PRECISION)  # the keys of invalid tokens are 0

    store_slots(b_dslots * scale, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def aggregate_forward(
    slots: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None, scale: float, gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    num_slots, value_width = slots.shape[2], v.shape[3]
    config = launch_config("aggregate_forward", k, max(width, value_width), slots)
    block, keep = config.keep(num_slots)
    programs = batch * num_heads * cdiv(num_slots, block)
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
        **config.meta(width, value_width) | keep,
    )  # fmt: skip
    if chunks == 1:
        return values.squeeze(2), lse.squeeze(2), row_max.squeeze(2), total.squeeze(2)
    grid, results, meta = merge_arguments(values, outputs=3)
    launch(merge_softmax_kernel, grid, values, row_max, total, *results, chunks, num_slots, **meta)
    return results


def aggregate_backward(
    dvalues: Tensor, dlse: Tensor | None, slots: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None,
    scale: float, gaussian: bool, values: Tensor, statistics: Statistics, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (need_slots, need_k, need_v), (row_max, total) = needs, statistics
    batch, num_heads, tokens, width = k.shape
    num_slots, value_width = slots.shape[2], v.shape[3]
    # Slots in the tokens' dtype, more than 128 slots, and the factors that keep float16 in range need more registers.
    heavy = slots.dtype == k.dtype or num_slots > 128 or k.dtype == torch.float16
    config = launch_config("aggregate_tokens", k, max(width, value_width), slots, heavy)
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)

    delta, size, unit = prepare(dvalues, dlse, values, total, v.dtype, config.precision)
    inputs = (slots, k, v, k if mask is None else mask, cos, sin, row_max, delta, size, unit)
    strides = (*slot_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h)
    variant = dict(**turn, GAUSSIAN=gaussian, MASKED=mask is not None)
    dk = empty_like_tokens(k, width) if need_k else k.new_empty(0)
    dv = empty_like_tokens(v, value_width) if need_v else v.new_empty(0)
    chunk, stream = config.stream(batch * num_heads, tokens, num_slots)
    for keys, contents in ((need_k, False), (False, need_v)) if config.tile.apart else ((need_k, need_v),):
        if keys or contents:
            launch(
                aggregate_tokens_kernel,
                (batch * num_heads * cdiv(tokens, chunk),),
                *inputs, dk, dv, *strides, *output_strides(dk), *output_strides(dv), num_heads, tokens, num_slots, scale, chunk,
                KEYS=keys, VALUES=contents, **variant, **config.meta(width, value_width) | stream,
            )  # fmt: skip
    if not need_slots:
        return slots.new_empty(0), dk, dv

    config = launch_config("aggregate_slots", k, max(width, value_width), slots)
    block, keep = config.keep(num_slots)
    programs = batch * num_heads * cdiv(num_slots, block)
    chunk, chunks = config.chunk(programs, tokens)
    dslots = empty_slots(slots, batch, num_heads, chunks, config.compute)
    launch(
        aggregate_slots_kernel,
        (programs * chunks,),
        *inputs, dslots, *strides, num_heads, tokens, num_slots, scale, chunk,
        **variant, **config.meta(width, value_width) | keep,
    )  # fmt: skip
    return sum_slots(dslots, slots), dk, dv

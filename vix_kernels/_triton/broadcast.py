"""Kernels for `broadcast`: N tokens attend to M slots (see primitives/broadcast.py for the equations).

Logits are in base 2. In the forward kernel and in the kernel for token gradients, a program loads all slots before its loop
over a chunk of the tokens, if there are at most `Tile.resident` tiles of slots. In the kernel for slot gradients, a program
loads a tile of slots and then loops over a chunk of the tokens. If one tile contains all slots and `Tile.apart` is False, this
kernel also computes the token gradients. Each output is written once, by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, Statistics, empty_like_tokens, unit_last_stride
from .launch import cdiv, is_heavy, launch, launch_config, mask_strides, rotary_arguments, slot_strides, token_strides
from .logits import exps_at_most_one, load_attended, slot_logits
from .merge import empty_slots, merge_sums, sum_slots
from .tiles import (
    LN2,
    cast,
    dot,
    load_rotated,
    load_tile,
    row_products,
    slot_program,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
    stream_program,
    table_start,
)
from .token_conv import banded


@triton.jit(do_not_specialize=["N", "M", "scale", "values_b", "values_h", "bias_b", "bias_h", "angle_h", "mask_b", "chunk"])
def broadcast_forward_kernel(
    q, slots, values, bias, cos, sin, v, weight, mask, out, row_max, inverse,
    q_b, q_h, q_n, slots_b, slots_h, slots_m, values_b, values_h, values_m, bias_b, bias_h, bias_m, angle_h,
    v_b, v_h, v_n, mask_b, mask_n, out_b, out_h, out_n,
    H, N, M, scale, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BIASED: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out, row_max and inverse (1 / total) for a chunk of tokens. If TAPS > 0, add the convolution of v to out."""
    i_bh, first, last = stream_program(N, chunk)
    i_b, i_h = i_bh // H, i_bh % H
    angles = table_start(i_h, angle_h, ROTARY)
    slots += i_b * slots_b + i_h * slots_h
    values += i_b * values_b + i_h * values_h
    bias += i_b * bias_b + i_h * bias_h
    q += i_b * q_b + i_h * q_h
    out += i_b * out_b + i_h * out_h
    if BIASED != "none":
        empty = has_no_slot(bias, bias_m, M, BIASED, BLOCK_M)
    tiles = ()
    for i in tl.static_range(TILES):
        tiles += (
            load_attended(
                slots, values, bias, slots_m, values_m, bias_m, i * BLOCK_M, M, scale, q.dtype.element_ty,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, BIASED, SPLIT, COMPUTE,
            ),
        )  # fmt: skip

    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_q = load_rotated(q, o_n, q_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_max = tl.full((BLOCK_N,), float("-inf"), COMPUTE)
        b_sum = tl.zeros((BLOCK_N,), COMPUTE)
        b_out = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
        for i in tl.static_range(TILES):
            b_max, b_sum, b_out = attend(b_q, tiles[i], b_max, b_sum, b_out, scale, i == 0, SPLIT, COMPUTE, PRECISION)
        if TILES == 0:
            for first_slot in range(0, M, BLOCK_M):
                operands = load_attended(
                    slots, values, bias, slots_m, values_m, bias_m, first_slot, M, scale, q.dtype.element_ty,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, BIASED, SPLIT, COMPUTE,
                )  # fmt: skip
                b_max, b_sum, b_out = attend(b_q, operands, b_max, b_sum, b_out, scale, False, SPLIT, COMPUTE, PRECISION)

        b_inverse = 1.0 / b_sum
        b_out *= b_inverse[:, None]
        if BIASED != "none":
            b_out, b_inverse = tl.where(empty, 0.0, b_out), tl.where(empty, 0.0, b_inverse)
        tl.store(row_max + i_bh * N + o_n, b_max, mask=valid)
        tl.store(inverse + i_bh * N + o_n, b_inverse, mask=valid)
        if TAPS > 0:
            b_out = banded(
                b_out, v + i_b * v_b + i_h * v_h, weight + i_h * TAPS, mask + i_b * mask_b, start, N, v_n, mask_n,
                TAPS, False, MASKED, E, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip
        store_tile(b_out, out, o_n, out_n, valid, E, BLOCK_E, 0, True)


@triton.jit
def attend(
    q, operands, row_max, total, out, scale,
    FIRST: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return row_max, total and out after adding a tile of slots to the softmax. If FIRST, ignore the previous values."""
    high, low, values, bias = operands
    logits = slot_logits(q, high, low, bias, scale, SPLIT, COMPUTE, PRECISION)
    new_max = tl.max(logits, 1)
    if not FIRST:
        new_max = tl.maximum(row_max, new_max)
    p = tl.exp2(logits - new_max[:, None])
    new_total = tl.sum(p, 1)
    new_out = dot(cast(p, values.dtype), values, tl.zeros_like(out), PRECISION)
    if not FIRST:
        decay = tl.exp2(row_max - new_max)
        # An accumulator that starts with out * decay would make ptxas wait after every matrix instruction.
        new_total = tl.fma(total, decay, new_total)
        new_out = tl.fma(out, tl.broadcast_to(decay[:, None], out.shape), new_out)
    return new_max, new_total, new_out


@triton.jit
def has_no_slot(bias, bias_m, M, BIASED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return whether every slot of a head is invalid. A slot is invalid if its bias is -inf (0 if BIASED is "mask")."""
    found = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        ABSENT: tl.constexpr = 0.0 if BIASED == "mask" else float("-inf")
        found |= (tl.load(bias + o_m.to(tl.int64) * bias_m, mask=o_m < M, other=ABSENT) != ABSENT).to(tl.int32)
    return tl.max(found, 0) == 0


@triton.jit
def load_statistics(row_max, inverse, o_n, valid):
    """Return row_max and inverse of a tile of tokens, and a mask of the tokens whose query is read.

    The inverse is 0 if the head has no valid slot, and NaN if the query contains NaN or infinity. In both cases, the query is
    not read, and the returned row_max is infinite, so that the exponentials are 0.
    """
    b_inverse = tl.load(inverse + o_n, mask=valid, other=0.0)
    known = b_inverse > 0
    b_row_max = tl.load(row_max + o_n, mask=valid, other=0.0)
    return tl.where(known, b_row_max, float("inf")), b_inverse, known


@triton.jit
def without_padding(inverse, dout):
    """Return `inverse` with 0 instead of NaN for tokens whose dout is 0.

    These tokens may be padding. They do not contribute to gradients, even if their queries contain NaN.
    """
    used = tl.max(tl.abs(dout.to(inverse.dtype)), 1) != 0
    return tl.where((inverse == inverse) | used, inverse, 0.0)


@triton.jit
def tile_products(
    q, dout, row_max, operands, scale, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return two tiles (tokens, slots): exp2(logit - row_max) and <dout, values>."""
    high, low, values, bias = operands
    logits = slot_logits(q, high, low, bias, scale, SPLIT, COMPUTE, PRECISION)
    e = exps_at_most_one(logits - row_max[:, None])
    return e, row_products(dout, values, tl.zeros(e.shape, COMPUTE), PRECISION)


@triton.jit
def add_dq(
    dq, q, dout, row_max, delta, operands, scale, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return dq plus the contribution of a tile of slots. The caller scales the rows of the final dq."""
    e, dp = tile_products(q, dout, row_max, operands, scale, SPLIT, COMPUTE, PRECISION)
    return dot(cast(e * (dp - delta[:, None]), q.dtype), operands[0], dq, PRECISION)


@triton.jit
def column_sums(x, acc, PRECISION: tl.constexpr):
    """Return acc with the sum of column j of x added to row j. For a 16-bit x, a matrix product with ones computes the sums."""
    if x.dtype == tl.float32 or x.dtype == tl.float64:
        acc += tl.sum(x, 0)[:, None]
    else:
        sums = dot(tl.trans(x), tl.full((x.shape[0], 16), 1.0, x.dtype), tl.zeros_like(acc), PRECISION)
        acc = tl.fma(acc, tl.full(acc.shape, 1.0, acc.dtype), sums)
    return acc


@triton.jit(do_not_specialize=["N", "M", "scale", "values_b", "values_h", "bias_b", "bias_h", "angle_h", "chunk"])
def broadcast_tokens_kernel(
    dout, q, slots, values, bias, cos, sin, out, row_max, inverse, delta, dq,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, values_b, values_h, values_m, bias_b, bias_h, bias_m,
    angle_h, out_b, out_h, out_n, dq_b, dq_h, dq_n,
    H, N, M, scale, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BIASED: tl.constexpr,
    KNOWN: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq and delta = <dout, out> for a chunk of tokens. Compute delta from `out` if KNOWN, otherwise from the slots."""
    i_bh, first, last = stream_program(N, chunk)
    i_b, i_h = i_bh // H, i_bh % H
    angles = table_start(i_h, angle_h, ROTARY)
    slots += i_b * slots_b + i_h * slots_h
    values += i_b * values_b + i_h * values_h
    bias += i_b * bias_b + i_h * bias_h
    q += i_b * q_b + i_h * q_h
    dout += i_b * d_b + i_h * d_h
    out += i_b * out_b + i_h * out_h
    dq += i_b * dq_b + i_h * dq_h
    tiles = ()
    for i in tl.static_range(TILES):
        tiles += (
            load_attended(
                slots, values, bias, slots_m, values_m, bias_m, i * BLOCK_M, M, scale, q.dtype.element_ty,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, BIASED, SPLIT, COMPUTE,
            ),
        )  # fmt: skip

    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_dout = load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True)
        b_row_max, b_inverse, known = load_statistics(row_max + i_bh * N, inverse + i_bh * N, o_n, valid)
        b_inverse = without_padding(b_inverse, b_dout)
        b_q = load_rotated(q, o_n, q_n, known, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_delta = tl.zeros((BLOCK_N,), COMPUTE)
        if KNOWN:
            b_out = load_tile(out, o_n, out_n, valid, E, BLOCK_E, 0, True)
            b_delta += tl.sum(b_dout.to(COMPUTE) * b_out.to(COMPUTE), 1)
        else:
            for first_slot in range(0, M, BLOCK_M):
                operands = load_attended(
                    slots, values, bias, slots_m, values_m, bias_m, first_slot, M, scale, q.dtype.element_ty,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, BIASED, SPLIT, COMPUTE,
                )  # fmt: skip
                b_e, b_dp = tile_products(b_q, b_dout, b_row_max, operands, scale, SPLIT, COMPUTE, PRECISION)
                b_delta += tl.sum(b_e * b_dp, 1)
            b_delta *= b_inverse
        tl.store(delta + i_bh * N + o_n, tl.where(b_inverse == 0, 0.0, b_delta), mask=valid)

        b_dq = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for i in tl.static_range(TILES):
            b_dq = add_dq(b_dq, b_q, b_dout, b_row_max, b_delta, tiles[i], scale, SPLIT, COMPUTE, PRECISION)
        if TILES == 0:
            for first_slot in range(0, M, BLOCK_M):
                operands = load_attended(
                    slots, values, bias, slots_m, values_m, bias_m, first_slot, M, scale, q.dtype.element_ty,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, BIASED, SPLIT, COMPUTE,
                )  # fmt: skip
                b_dq = add_dq(b_dq, b_q, b_dout, b_row_max, b_delta, operands, scale, SPLIT, COMPUTE, PRECISION)
        b_dq *= (b_inverse * (LN2 if SPLIT else scale))[:, None]
        store_unrotated(b_dq, dq, o_n, dq_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "M", "scale", "values_b", "values_h", "bias_b", "bias_h", "angle_h", "chunk"])
def broadcast_slots_kernel(
    dout, q, slots, values, bias, cos, sin, row_max, inverse, delta, dq, dslots, dvalues, dbias,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, values_b, values_h, values_m, bias_b, bias_h, bias_m,
    angle_h, dq_b, dq_h, dq_n,
    H, N, M, scale, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BIASED: tl.constexpr,
    NEED_SLOTS: tl.constexpr, FUSED: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a chunk of tokens to dvalues, dbias and, if NEED_SLOTS, dslots, for a tile of slots.

    If FUSED, the tile contains all slots, and the kernel also computes dq.
    """
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = table_start(i_h, angle_h, ROTARY)
    q += i_b * q_b + i_h * q_h
    dout += i_b * d_b + i_h * d_h
    dq += i_b * dq_b + i_h * dq_h
    operands = load_attended(
        slots + i_b * slots_b + i_h * slots_h, values + i_b * values_b + i_h * values_h, bias + i_b * bias_b + i_h * bias_h,
        slots_m, values_m, bias_m, first_slot, M, scale, q.dtype.element_ty,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, BIASED, SPLIT, COMPUTE,
    )  # fmt: skip
    b_dslots = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
    b_dvalues = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_dbias = tl.zeros((BLOCK_M, 16), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_dout = load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True)
        b_row_max, b_inverse, known = load_statistics(row_max + i_bh * N, inverse + i_bh * N, o_n, valid)
        if FUSED:
            b_inverse = without_padding(b_inverse, b_dout)
        else:
            b_delta = tl.load(delta + i_bh * N + o_n, mask=valid, other=0.0)
            b_inverse = tl.where((b_inverse == b_inverse) | (b_delta != b_delta), b_inverse, 0.0)
        b_q = load_rotated(q, o_n, q_n, known, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_e, b_dp = tile_products(b_q, b_dout, b_row_max, operands, scale, SPLIT, COMPUTE, PRECISION)
        b_p = b_e * b_inverse[:, None]
        b_dg = b_p * b_dp
        if FUSED:
            b_delta = tl.sum(b_dg, 1)
        b_dg = cast(tl.fma(b_p, tl.broadcast_to(-b_delta[:, None], b_p.shape), b_dg), b_q.dtype)
        if FUSED:
            b_dq = dot(b_dg, operands[0], tl.zeros((BLOCK_N, BLOCK_D), COMPUTE), PRECISION) * (LN2 if SPLIT else scale)
            store_unrotated(b_dq, dq, o_n, dq_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)
        b_dvalues = dot(tl.trans(cast(b_p, b_dout.dtype)), b_dout, b_dvalues, PRECISION)
        b_dbias = column_sums(b_dg, b_dbias, PRECISION)
        if NEED_SLOTS:
            b_dslots = dot(tl.trans(b_dg), b_q, b_dslots, PRECISION)

    o_m = first_slot + tl.arange(0, BLOCK_M)
    store_state(b_dvalues, tl.max(b_dbias, 1) * LN2, dvalues, dbias, part, o_m, M, E, BLOCK_E)
    if NEED_SLOTS:
        store_slots(b_dslots * scale, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def bias_arguments(slot_bias: Tensor | None, values: Tensor) -> tuple[Tensor, tuple[int, int, int], str]:
    """Return the bias or mask of the slots (or a placeholder), its strides, and BIASED: "none", "bias" or "mask"."""
    if slot_bias is None:
        return values, (0, 0, 0), "none"
    if slot_bias.dim() == 2:
        return slot_bias, (slot_bias.stride(0), 0, slot_bias.stride(1)), "mask"
    return slot_bias, slot_bias.stride(), "bias"


def broadcast_forward(
    q: Tensor, slots: Tensor, values: Tensor, slot_bias: Tensor | None, rotary: Rotary | None, scale: float, v: Tensor |
    None, conv_weight: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = q.shape
    num_slots, value_width = values.shape[2:]
    config = launch_config("broadcast_forward", q, max(width, value_width), slots, is_heavy(q, slots, rotary))
    out = empty_like_tokens(q, value_width)
    row_max, inverse = (q.new_empty(batch, num_heads, tokens, dtype=config.compute) for _ in range(2))
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)
    bias, strides_of_bias, biased = bias_arguments(slot_bias, values)
    residual = (q, q, q) if v is None else (v, conv_weight.contiguous(), v if mask is None else mask)
    chunk, keep = config.stream(batch * num_heads, tokens, num_slots)
    launch(
        broadcast_forward_kernel,
        (batch * num_heads * cdiv(tokens, chunk),),
        q, slots, values, bias, cos, sin, *residual, out, row_max, inverse,
        *token_strides(q), *slot_strides(slots), *slot_strides(values), *strides_of_bias, angle_h,
        *token_strides(residual[0]), *mask_strides(mask), *token_strides(out), num_heads, tokens, num_slots, scale, chunk,
        **turn, BIASED=biased,
        TAPS=0 if conv_weight is None else conv_weight.shape[2], BLOCK_K=config.tile.slots, MASKED=mask is not None,
        **config.meta(width, value_width) | keep,
    )  # fmt: skip
    return out, row_max, inverse


def broadcast_backward(
    dout: Tensor, q: Tensor, slots: Tensor, values: Tensor, slot_bias: Tensor | None, rotary: Rotary | None, scale: float,
    out: Tensor | None, statistics: Statistics, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (need_slots, need_values), (row_max, inverse) = needs, statistics
    batch, num_heads, tokens, width = q.shape
    num_slots, value_width = values.shape[2:]
    dout = unit_last_stride(dout)
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)
    bias, strides_of_bias, biased = bias_arguments(slot_bias, values)
    inputs = (dout, q, slots, values, bias, cos, sin)
    strides = (
        *token_strides(dout), *token_strides(q), *slot_strides(slots), *slot_strides(values), *strides_of_bias, angle_h,
    )  # fmt: skip
    variant = dict(**turn, BIASED=biased)

    dq = empty_like_tokens(q, width)
    slots_config = launch_config("broadcast_slots", q, max(width, value_width), slots, need_slots or rotary is not None)
    block = slots_config.slots(num_slots)
    fused = num_slots <= block and not slots_config.tile.apart and (need_slots or need_values)
    delta = q if fused else torch.empty_like(row_max)
    if not fused:
        config = launch_config("broadcast_tokens", q, max(width, value_width), slots, is_heavy(q, slots, rotary))
        known = q if out is None else out
        chunk, keep = config.stream(batch * num_heads, tokens, num_slots)
        launch(
            broadcast_tokens_kernel,
            (batch * num_heads * cdiv(tokens, chunk),),
            *inputs, known, row_max, inverse, delta, dq,
            *strides, *token_strides(known), *token_strides(dq), num_heads, tokens, num_slots, scale, chunk,
            KNOWN=out is not None, **variant, **config.meta(width, value_width) | keep,
        )  # fmt: skip
    if not (need_slots or need_values):
        return dq, slots.new_empty(0), values.new_empty(0), values.new_empty(0)

    programs = batch * num_heads * cdiv(num_slots, block)
    chunk, chunks = slots_config.chunk(programs, tokens)
    dvalues = q.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=slots_config.compute)
    dbias = q.new_empty(batch, num_heads, chunks, num_slots, dtype=slots_config.compute)
    dslots = empty_slots(slots, batch, num_heads, chunks, slots_config.compute) if need_slots else q.new_empty(0)
    launch(
        broadcast_slots_kernel,
        (programs * chunks,),
        *inputs, row_max, inverse, delta, dq, dslots, dvalues, dbias,
        *strides, *token_strides(dq), num_heads, tokens, num_slots, scale, chunk,
        NEED_SLOTS=need_slots, FUSED=fused, **variant, **slots_config.meta(width, value_width) | dict(BLOCK_M=block),
    )  # fmt: skip
    dslots = sum_slots(dslots, slots) if need_slots else slots.new_empty(0)
    return dq, dslots, *(merge_sums(dvalues, dbias) if need_values else (values.new_empty(0), values.new_empty(0)))

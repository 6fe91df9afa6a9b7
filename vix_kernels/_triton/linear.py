"""Kernels of `linear_aggregate` and `linear_broadcast` (primitives/linear.py states the equations).

They walk as the kernels of the softmax moves do, with a feature map in the place of the exponential: no maximum, no
normaliser to carry along. With slots a tile of features is a product; without, it is a tile of the tokens' own channels, so
that no head is ever held as a whole.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.layout import empty_like_tokens, unit_last_stride
from .configs import LaunchConfig, launch_config
from .launch import launch
from .layout import mask_strides, output_strides, padded, rotary_arguments, slot_strides, token_strides
from .merge import merge, sum_slots
from .tiles import (
    LOG2E,
    cast,
    dot,
    load_rotated,
    load_slots,
    load_tile,
    row_products,
    slot_channels,
    slot_program,
    store_tile,
    store_unrotated,
)


@triton.jit
def feature_program(M, N, chunk, BLOCK_M: tl.constexpr):
    """slot_program, with the first slot of the tile in the place of all of them."""
    i_bh, part, _, first, last = slot_program(M, N, chunk, BLOCK_M)
    return i_bh, part, tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M, first, last


@triton.jit
def apply_map(logits, ELU: tl.constexpr):
    """elu + 1, or relu; NaN stays NaN."""
    if ELU:
        features = tl.where(logits > 0, logits + 1.0, tl.exp2(logits * LOG2E))
    else:
        features = tl.where(logits <= 0, 0.0, logits)
    return features


@triton.jit
def slope(logits, ELU: tl.constexpr):
    """The derivative of the map."""
    if ELU:
        slopes = tl.where(logits > 0, 1.0, tl.exp2(logits * LOG2E))
    else:
        slopes = tl.where(logits <= 0, 0.0, 1.0)
    return slopes


@triton.jit
def load_logits(
    x, o_n, x_n, valid, slots, slots_m, first_slot, cos, sin, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PROJECTED: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the map is applied to (tokens, BLOCK_M): products of tokens and slots, or channels of the tokens."""
    if PROJECTED:
        b_x = load_rotated(x, o_n, x_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        o_m = first_slot + tl.arange(0, BLOCK_M)
        b_slots = load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
        b_l = row_products(b_x, b_slots, tl.zeros((o_n.shape[0], BLOCK_M), COMPUTE), False, SPLIT, PRECISION)
    else:
        b_l = load_rotated(x, o_n, x_n, valid, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot).to(COMPUTE)
    return b_l


@triton.jit
def slot_rows(
    first_slot, D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PROJECTED: tl.constexpr,
):  # fmt: skip
    """The slots that stand in the columns of a tile of logits."""
    if PROJECTED:
        o_m = first_slot + tl.arange(0, BLOCK_M)
    else:
        o_m = slot_channels(D, BLOCK_M, ROTARY, INTERLEAVED, first_slot)
    return o_m


@triton.jit
def load_state(values, mass, values_m, mass_m, o_m, M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """values (slots, BLOCK_E) and mass (slots), 0 beyond M."""
    o_e = tl.arange(0, BLOCK_E)
    at = o_m.to(tl.int64)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    b_values = tl.load(values + at[:, None] * values_m + o_e[None, :], mask=inside, other=0.0)
    return b_values, tl.load(mass + at * mass_m, mask=o_m < M, other=0.0)


@triton.jit
def store_state(b_values, b_mass, values, mass, part, o_m, M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    o_e = tl.arange(0, BLOCK_E)
    rows = part * M + o_m
    tl.store(mass + rows, b_mass, mask=o_m < M)
    tl.store(values + rows[:, None] * E + o_e[None, :], b_values, mask=(o_m < M)[:, None] & (o_e < E)[None, :])


@triton.jit
def store_slots(
    b_dslots, dslots, part, o_m, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    channels = slot_channels(D, BLOCK_D, ROTARY, INTERLEAVED)
    inside = (o_m < M)[:, None] & (channels < D)[None, :]
    tl.store(dslots + (part * M + o_m)[:, None] * D + channels[None, :], b_dslots, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h", "chunk"])
def linear_aggregate_forward_kernel(
    slots, k, v, mask, cos, sin, values, mass,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """values and mass of a tile of slots over a chunk of tokens."""
    i_bh, part, first_slot, first, last = feature_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h

    b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_mass = tl.zeros((BLOCK_M,), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        if MASKED:
            valid &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=valid, other=0) != 0
        b_l = load_logits(
            k, o_n, k_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_f = cast(tl.where(valid[:, None], apply_map(b_l, ELU), 0.0), b_v.dtype)
        b_mass += tl.sum(b_f.to(COMPUTE), 0)
        b_values = dot(tl.trans(b_f), b_v, b_values, PRECISION)

    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    store_state(b_values / N, b_mass / N, values, mass, part, o_m, M, E, BLOCK_E)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h"])
def linear_aggregate_tokens_kernel(
    slots, k, v, mask, cos, sin, dvalues, dmass, dk, dv,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    dvalues_b, dvalues_h, dvalues_m, dmass_b, dmass_h, dmass_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of tokens."""
    token_tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    angles = i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h
    dk += i_b * dk_b + i_h * dk_h
    inside = o_n < N
    valid = inside
    if MASKED:
        valid &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=inside, other=0) != 0
    b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)

    b_dv = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D if PROJECTED else 1), COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        b_l = load_logits(
            k, o_n, k_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
        b_dvalues, b_dmass = load_state(
            dvalues + i_b * dvalues_b + i_h * dvalues_h, dmass + i_b * dmass_b + i_h * dmass_h, dvalues_m, dmass_m,
            o_m, M, E, BLOCK_E,
        )  # fmt: skip
        b_dvalues = cast(b_dvalues / N, b_v.dtype)
        if VALUES:
            b_f = cast(tl.where(valid[:, None], apply_map(b_l, ELU), 0.0), b_v.dtype)
            b_dv = dot(b_f, b_dvalues, b_dv, PRECISION)
        if KEYS:
            b_df = row_products(b_v, b_dvalues, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION)
            b_dl = tl.where(valid[:, None], (b_df + (b_dmass / N)[None, :]) * slope(b_l, ELU), 0.0)
            if PROJECTED:
                b_slots = cast(load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED), b_v.dtype)
                b_dk = dot(cast(b_dl, b_v.dtype), b_slots, b_dk, PRECISION)
            else:
                store_unrotated(
                    b_dl, dk, o_n, dk_n, inside, cos + angles, sin + angles, D, BLOCK_M, ROTARY, INTERLEAVED, first_slot
                )  # fmt: skip
    if KEYS and PROJECTED:
        store_unrotated(b_dk, dk, o_n, dk_n, inside, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)
    if VALUES:
        b_dv = tl.where(valid[:, None], b_dv, 0.0)  # even where a slot's gradient is infinite
        store_tile(b_dv, dv + i_b * dv_b + i_h * dv_h, o_n, dv_n, inside, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h", "chunk"])
def linear_aggregate_slots_kernel(
    slots, k, v, mask, cos, sin, dvalues, dmass, dslots,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    dvalues_b, dvalues_h, dvalues_m, dmass_b, dmass_h, dmass_m,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dslots of a tile of slots over a chunk of tokens, for each batch and head."""
    i_bh, part, first_slot, first, last = feature_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h
    o_m = first_slot + tl.arange(0, BLOCK_M)
    b_dvalues, b_dmass = load_state(
        dvalues + i_b * dvalues_b + i_h * dvalues_h, dmass + i_b * dmass_b + i_h * dmass_h, dvalues_m, dmass_m,
        o_m, M, E, BLOCK_E,
    )  # fmt: skip
    b_dvalues = cast(b_dvalues / N, v.dtype.element_ty)

    b_dslots = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        if MASKED:
            valid &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=valid, other=0) != 0
        b_l = load_logits(
            k, o_n, k_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_df = row_products(b_v, b_dvalues, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION)
        b_dl = tl.where(valid[:, None], (b_df + (b_dmass / N)[None, :]) * slope(b_l, ELU), 0.0)
        b_dslots = dot(tl.trans(cast(b_dl, b_k.dtype)), b_k, b_dslots, PRECISION)

    store_slots(b_dslots, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "M", "values_b", "values_h", "mass_b", "mass_h", "angle_h", "keys", "eps"])
def linear_broadcast_forward_kernel(
    q, slots, values, mass, cos, sin, out, total,
    q_b, q_h, q_n, slots_b, slots_h, slots_m, values_b, values_h, values_m, mass_b, mass_h, mass_m, angle_h,
    out_b, out_h, out_n,
    H, N, M, keys, eps,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and total, the denominator, of a tile of tokens."""
    token_tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = o_n < N
    angles = i_h * angle_h
    q += i_b * q_b + i_h * q_h
    slots += i_b * slots_b + i_h * slots_h

    b_out = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
    b_total = tl.zeros((BLOCK_N,), COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        b_l = load_logits(
            q, o_n, q_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
        b_values, b_mass = load_state(
            values + i_b * values_b + i_h * values_h, mass + i_b * mass_b + i_h * mass_h, values_m, mass_m,
            o_m, M, E, BLOCK_E,
        )  # fmt: skip
        b_f = cast(apply_map(b_l, ELU), q.dtype.element_ty)  # rounded in numerator and denominator alike
        b_total += tl.sum(b_f.to(COMPUTE) * b_mass[None, :], 1)
        b_out = dot(b_f, cast(b_values, q.dtype.element_ty), b_out, PRECISION)

    b_total += (tl.zeros((BLOCK_N,), COMPUTE) + eps) / keys
    tl.store(total + i_bh * N + o_n, b_total, mask=valid)
    # A query without features meets no mass: 0 / 0 without a guard.
    b_out = b_out / tl.where(b_total == 0, 1.0, b_total)[:, None]
    store_tile(b_out, out + i_b * out_b + i_h * out_h, o_n, out_n, valid, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "M", "values_b", "values_h", "mass_b", "mass_h", "angle_h"])
def linear_broadcast_tokens_kernel(
    dout, q, slots, values, mass, cos, sin, out, total, delta, dq,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, values_b, values_h, values_m, mass_b, mass_h, mass_m,
    angle_h, out_b, out_h, out_n, dq_b, dq_h, dq_n,
    H, N, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of tokens, and delta = <dout, out> for the slot gradients."""
    token_tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = o_n < N
    angles = i_h * angle_h
    q += i_b * q_b + i_h * q_h
    slots += i_b * slots_b + i_h * slots_h
    dq += i_b * dq_b + i_h * dq_h
    b_dout = load_tile(dout + i_b * d_b + i_h * d_h, o_n, d_n, valid, E, BLOCK_E, 0, True)
    b_out = load_tile(out + i_b * out_b + i_h * out_h, o_n, out_n, valid, E, BLOCK_E, 0, True)
    b_delta = tl.sum(b_dout.to(COMPUTE) * b_out.to(COMPUTE), 1)
    tl.store(delta + i_bh * N + o_n, b_delta, mask=valid)
    b_total = tl.load(total + i_bh * N + o_n, mask=valid, other=1.0)
    b_total = tl.where(b_total == 0, 1.0, b_total)

    b_dq = tl.zeros((BLOCK_N, BLOCK_D if PROJECTED else 1), COMPUTE)
    for first_slot in range(0, M, BLOCK_M):
        b_l = load_logits(
            q, o_n, q_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
        b_values, b_mass = load_state(
            values + i_b * values_b + i_h * values_h, mass + i_b * mass_b + i_h * mass_h, values_m, mass_m,
            o_m, M, E, BLOCK_E,
        )  # fmt: skip
        b_values = cast(b_values, b_dout.dtype)
        b_df = row_products(b_dout, b_values, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION)
        b_dl = (b_df - b_delta[:, None] * b_mass[None, :]) / b_total[:, None] * slope(b_l, ELU)
        if PROJECTED:
            b_slots = cast(load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED), b_dout.dtype)
            b_dq = dot(cast(b_dl, b_dout.dtype), b_slots, b_dq, PRECISION)
        else:
            store_unrotated(
                b_dl, dq, o_n, dq_n, valid, cos + angles, sin + angles, D, BLOCK_M, ROTARY, INTERLEAVED, first_slot
            )  # fmt: skip
    if PROJECTED:
        store_unrotated(b_dq, dq, o_n, dq_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "M", "values_b", "values_h", "mass_b", "mass_h", "angle_h", "chunk"])
def linear_broadcast_slots_kernel(
    dout, q, slots, values, mass, cos, sin, total, delta, dslots, dvalues, dmass,
    d_b, d_h, d_n, q_b, q_h, q_n, slots_b, slots_h, slots_m, values_b, values_h, values_m, mass_b, mass_h, mass_m,
    angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    NEED_SLOTS: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dvalues, dmass and, if asked for, dslots of a tile of slots over a chunk of tokens, for each batch and head."""
    i_bh, part, first_slot, first, last = feature_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    q += i_b * q_b + i_h * q_h
    dout += i_b * d_b + i_h * d_h
    slots += i_b * slots_b + i_h * slots_h
    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)

    b_dslots = tl.zeros((BLOCK_M, BLOCK_D if NEED_SLOTS else 1), COMPUTE)
    b_dvalues = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_dmass = tl.zeros((BLOCK_M,), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = o_n < last
        b_l = load_logits(
            q, o_n, q_n, valid, slots, slots_m, first_slot, cos + angles, sin + angles, M,
            D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, SPLIT, COMPUTE, PRECISION,
        )  # fmt: skip
        b_dout = load_tile(dout, o_n, d_n, valid, E, BLOCK_E, 0, True)
        b_delta = tl.load(delta + i_bh * N + o_n, mask=valid, other=0.0)
        b_total = tl.load(total + i_bh * N + o_n, mask=valid, other=1.0)
        b_total = tl.where(b_total == 0, 1.0, b_total)
        b_f = apply_map(b_l, ELU) / b_total[:, None]
        b_dmass -= tl.sum(b_f * b_delta[:, None], 0)
        b_dvalues = dot(tl.trans(cast(b_f, b_dout.dtype)), b_dout, b_dvalues, PRECISION)
        if NEED_SLOTS:
            b_values, b_mass = load_state(
                values + i_b * values_b + i_h * values_h, mass + i_b * mass_b + i_h * mass_h, values_m, mass_m,
                o_m, M, E, BLOCK_E,
            )  # fmt: skip
            b_values = cast(b_values, b_dout.dtype)
            b_df = row_products(b_dout, b_values, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION)
            b_dl = (b_df - b_delta[:, None] * b_mass[None, :]) / b_total[:, None] * slope(b_l, ELU)
            b_q = load_rotated(q, o_n, q_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
            b_dslots = dot(tl.trans(cast(b_dl, b_q.dtype)), b_q, b_dslots, PRECISION)

    store_state(b_dvalues, b_dmass, dvalues, dmass, part, o_m, M, E, BLOCK_E)
    if NEED_SLOTS:
        store_slots(b_dslots, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def linear_aggregate_forward(
    slots: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, feature_map: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    value_width = v.shape[3]
    config = _config("linear_aggregate_forward", k, v, slots)
    num_slots = width if slots is None else slots.shape[2]
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    values = k.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=config.compute)
    mass = k.new_empty(batch, num_heads, chunks, num_slots, dtype=config.compute)
    cos, sin, rotary, angle_h = rotary_arguments(cos, sin, k)
    launch(
        linear_aggregate_forward_kernel,
        (programs * chunks,),
        k if slots is None else slots, k, v, k if mask is None else mask, cos, sin, values, mass,
        *_slot_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h,
        num_heads, tokens, num_slots, chunk,
        ROTARY=rotary, INTERLEAVED=interleaved, MASKED=mask is not None, PROJECTED=slots is not None,
        ELU=feature_map == "elu", **config.meta(width, value_width),
    )  # fmt: skip
    return merge(values, mass, softmax=False)


def linear_aggregate_backward(
    dvalues: Tensor, dmass: Tensor, slots: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, need_slots: bool, need_k: bool, need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    value_width = v.shape[3]
    num_slots = width if slots is None else slots.shape[2]
    dvalues = unit_last_stride(dvalues)
    cos, sin, rotary, angle_h = rotary_arguments(cos, sin, k)
    inputs = (k if slots is None else slots, k, v, k if mask is None else mask, cos, sin, dvalues, dmass)
    strides = (
        *_slot_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h,
        *token_strides(dvalues), *dmass.stride(),
    )  # fmt: skip
    variant = dict(
        ROTARY=rotary, INTERLEAVED=interleaved, MASKED=mask is not None, PROJECTED=slots is not None,
        ELU=feature_map == "elu",
    )  # fmt: skip

    dk = empty_like_tokens(k, width) if need_k else k.new_empty(0)
    dv = empty_like_tokens(v, value_width) if need_v else v.new_empty(0)
    if need_k or need_v:
        config = _config("linear_aggregate_tokens", k, v, slots)
        launch(
            linear_aggregate_tokens_kernel,
            (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
            *inputs, dk, dv, *strides, *output_strides(dk), *output_strides(dv), num_heads, tokens, num_slots,
            KEYS=need_k, VALUES=need_v, **variant, **config.meta(width, value_width),
        )  # fmt: skip
    if slots is None or not need_slots:
        return k.new_empty(0), dk, dv

    config = _config("linear_aggregate_slots", k, v, slots)
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dslots = k.new_empty(batch, num_heads, chunks, num_slots, width, dtype=config.compute)
    launch(
        linear_aggregate_slots_kernel,
        (programs * chunks,),
        *inputs, dslots, *strides, num_heads, tokens, num_slots, chunk, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    return sum_slots(dslots, slots), dk, dv


def linear_broadcast_forward(
    q: Tensor, slots: Tensor | None, values: Tensor, mass: Tensor, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, feature_map: str, eps: float, keys: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = q.shape
    num_slots, value_width = values.shape[2:]
    config = _config("linear_broadcast_forward", q, values, slots)
    out = empty_like_tokens(q, value_width)
    total = q.new_empty(batch, num_heads, tokens, dtype=config.compute)
    cos, sin, rotary, angle_h = rotary_arguments(cos, sin, q)
    launch(
        linear_broadcast_forward_kernel,
        (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
        q, q if slots is None else slots, values, mass, cos, sin, out, total,
        *token_strides(q), *_slot_strides(slots), *slot_strides(values), *mass.stride(), angle_h, *token_strides(out),
        num_heads, tokens, num_slots, keys, eps,
        ROTARY=rotary, INTERLEAVED=interleaved, PROJECTED=slots is not None, ELU=feature_map == "elu",
        **config.meta(width, value_width),
    )  # fmt: skip
    return out, total


def linear_broadcast_backward(
    dout: Tensor, q: Tensor, slots: Tensor | None, values: Tensor, mass: Tensor, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, feature_map: str, out: Tensor, total: Tensor, need_slots: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = q.shape
    num_slots, value_width = values.shape[2:]
    dout = unit_last_stride(dout)
    cos, sin, rotary, angle_h = rotary_arguments(cos, sin, q)
    inputs = (dout, q, q if slots is None else slots, values, mass, cos, sin)
    strides = (
        *token_strides(dout), *token_strides(q), *_slot_strides(slots), *slot_strides(values), *mass.stride(), angle_h,
    )  # fmt: skip
    variant = dict(
        ROTARY=rotary, INTERLEAVED=interleaved, PROJECTED=slots is not None, ELU=feature_map == "elu"
    )  # fmt: skip

    config = _config("linear_broadcast_tokens", q, values, slots)
    dq, delta = empty_like_tokens(q, width), total.new_empty(total.shape)
    launch(
        linear_broadcast_tokens_kernel,
        (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
        *inputs, out, total, delta, dq, *strides, *token_strides(out), *token_strides(dq), num_heads, tokens, num_slots,
        **variant, **config.meta(width, value_width),
    )  # fmt: skip
    need_slots = need_slots and slots is not None
    if not (need_slots or need_values):
        return dq, q.new_empty(0), values.new_empty(0), values.new_empty(0)

    config = _config("linear_broadcast_slots", q, values, slots)
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dvalues = q.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=config.compute)
    dmass = q.new_empty(batch, num_heads, chunks, num_slots, dtype=config.compute)
    dslots = q.new_empty((batch, num_heads, chunks, num_slots, width) if need_slots else (0,), dtype=config.compute)
    launch(
        linear_broadcast_slots_kernel,
        (programs * chunks,),
        *inputs, total, delta, dslots, dvalues, dmass, *strides, num_heads, tokens, num_slots, chunk,
        NEED_SLOTS=need_slots, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    dslots = sum_slots(dslots, slots) if need_slots else q.new_empty(0)
    return dq, dslots, *(merge(dvalues, dmass, softmax=False) if need_values else (values.new_empty(0), values.new_empty(0)))


def _config(kernel: str, tokens: Tensor, values: Tensor, slots: Tensor | None) -> LaunchConfig:
    config = launch_config(kernel, tokens, max(tokens.shape[3], values.shape[3]), tokens if slots is None else slots)
    if slots is None:  # never more columns than a head has
        config = replace(config, tile=config.tile._replace(slots=min(config.tile.slots, padded(tokens.shape[3]))))
    return config


def _slot_strides(slots: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if slots is None else slot_strides(slots)

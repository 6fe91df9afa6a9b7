"""Kernels for `linear_aggregate`: slots are sums of tokens, weighted by features.

See primitives/linear.py for the equations. The kernels have the same loops as the kernels for `aggregate`, but they keep no
running max and do not normalize the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens
from .aggregate import prepare
from .features import apply_map, feature_config, feature_strides, load_logits, slope, slot_rows
from .launch import launch, mask_strides, merge_arguments, output_strides, rotary_arguments, token_strides
from .merge import empty_slots, merge_sums_kernel, sum_slots
from .tiles import (
    cast,
    dot,
    load_rotated,
    load_slots,
    load_tile,
    load_unit,
    row_products,
    slot_program,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
    token_program,
)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h", "chunk"])
def linear_aggregate_forward_kernel(
    slots, k, v, mask, cos, sin, sums, norms,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute sums and norms for a tile of slots over a chunk of tokens."""
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h

    b_sums = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_norms = tl.zeros((BLOCK_M,), COMPUTE)
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
        b_norms += tl.sum(b_f.to(COMPUTE), 0)  # sums the rounded features, because the product below uses them, too
        b_sums = dot(tl.trans(b_f), b_v, b_sums, PRECISION)

    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    store_state(b_sums, b_norms, sums, norms, part, o_m, M, E, BLOCK_E)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h"])
def linear_aggregate_tokens_kernel(
    slots, k, v, mask, cos, sin, delta, size, unit, dk, dv,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute dk (if KEYS) and dv (if VALUES) for a tile of tokens."""
    i_bh, o_n, inside = token_program(N, BLOCK_N)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h
    dk += i_b * dk_b + i_h * dk_h
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
        b_unit, b_size, b_delta = load_unit(unit, size, delta, i_bh * M + o_m, o_m < M, E, BLOCK_E)
        if VALUES:
            b_dv = dot(cast(apply_map(b_l, ELU) * b_size[None, :], b_v.dtype), b_unit, b_dv, PRECISION)
        if KEYS:
            b_dp = row_products(b_v, b_unit, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION)
            b_dl = slope(b_l, ELU) * (b_dp * b_size[None, :] - b_delta[None, :])
            b_dl = tl.where(valid[:, None], b_dl, 0.0)
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
        b_dv = tl.where(valid[:, None], b_dv, 0.0)
        store_tile(b_dv, dv + i_b * dv_b + i_h * dv_h, o_n, dv_n, inside, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h", "chunk"])
def linear_aggregate_slots_kernel(
    slots, k, v, mask, cos, sin, delta, size, unit, dslots,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a chunk of tokens to dslots, for a tile of slots of one sample and head."""
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    angles = i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h
    o_m = first_slot + tl.arange(0, BLOCK_M)
    b_unit, b_size, b_delta = load_unit(unit, size, delta, i_bh * M + o_m, o_m < M, E, BLOCK_E)

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
        b_dp = row_products(b_v, b_unit, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), False, False, PRECISION)
        b_dl = slope(b_l, ELU) * (b_dp * b_size[None, :] - b_delta[None, :])
        b_dl = tl.where(valid[:, None], b_dl, 0.0)
        b_dslots = dot(tl.trans(cast(b_dl, b_k.dtype)), b_k, b_dslots, PRECISION)

    store_slots(b_dslots, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def linear_aggregate_forward(
    slots: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None, feature_map: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    value_width = v.shape[3]
    config = feature_config("linear_aggregate_forward", k, v, slots)
    num_slots = width if slots is None else slots.shape[2]
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    sums = k.new_empty(batch, num_heads, chunks, num_slots, value_width, dtype=config.compute)
    norms = k.new_empty(batch, num_heads, chunks, num_slots, dtype=config.compute)
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)
    launch(
        linear_aggregate_forward_kernel,
        (programs * chunks,),
        k if slots is None else slots, k, v, k if mask is None else mask, cos, sin, sums, norms,
        *feature_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h,
        num_heads, tokens, num_slots, chunk,
        **turn, MASKED=mask is not None, PROJECTED=slots is not None,
        ELU=feature_map == "elu", **config.meta(width, value_width),
    )  # fmt: skip
    if chunks == 1:
        return sums.squeeze(2), norms.squeeze(2)
    grid, results, meta = merge_arguments(sums, outputs=1)
    launch(merge_sums_kernel, grid, sums, norms, *results, chunks, num_slots, **meta)
    return results


def linear_aggregate_backward(
    dsums: Tensor, dnorms: Tensor, slots: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None,
    feature_map: str, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_slots, need_k, need_v = needs
    batch, num_heads, tokens, width = k.shape
    value_width = v.shape[3]
    num_slots = width if slots is None else slots.shape[2]
    config = feature_config("linear_aggregate_tokens", k, v, slots)
    delta, size, unit = prepare(dsums, dnorms, None, None, v.dtype, config.precision)
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)
    inputs = (k if slots is None else slots, k, v, k if mask is None else mask, cos, sin, delta, size, unit)
    strides = (*feature_strides(slots), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h)
    variant = dict(
        **turn, MASKED=mask is not None, PROJECTED=slots is not None,
        ELU=feature_map == "elu",
    )  # fmt: skip

    dk = empty_like_tokens(k, width) if need_k else k.new_empty(0)
    dv = empty_like_tokens(v, value_width) if need_v else v.new_empty(0)
    if need_k or need_v:
        launch(
            linear_aggregate_tokens_kernel,
            (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
            *inputs, dk, dv, *strides, *output_strides(dk), *output_strides(dv), num_heads, tokens, num_slots,
            KEYS=need_k, VALUES=need_v, **variant, **config.meta(width, value_width),
        )  # fmt: skip
    if slots is None or not need_slots:
        return k.new_empty(0), dk, dv

    config = feature_config("linear_aggregate_slots", k, v, slots)
    programs = batch * num_heads * triton.cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dslots = empty_slots(slots, batch, num_heads, chunks, config.compute)
    launch(
        linear_aggregate_slots_kernel,
        (programs * chunks,),
        *inputs, dslots, *strides, num_heads, tokens, num_slots, chunk, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    return sum_slots(dslots, slots), dk, dv

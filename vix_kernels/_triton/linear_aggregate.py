"""Kernels for `linear_aggregate`, which sums the values of the tokens for each slot, weighted by features.

See primitives/linear.py for the equations. The kernels have the same loops as the kernels for `aggregate`, but keep no running
maximum and do not normalize the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens
from .features import (
    COPIES,
    apply_map,
    copies,
    feature_config,
    feature_strides,
    load_operands,
    slot_rows,
)
from .launch import cdiv, launch, mask_strides, merge_arguments, output_strides, rotary_arguments, token_strides
from .merge import empty_slots, merge_sums_kernel, sum_slots
from .prepare import prepare
from .tiles import (
    LN2,
    cast,
    dot,
    is_valid,
    left_products,
    load_rotated,
    load_tile,
    load_unit,
    right_products,
    row_products,
    slot_program,
    store_slots,
    store_state,
    store_tile,
    store_unrotated,
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
    cos += i_h * angle_h
    sin += i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h

    if PROJECTED:
        b_high, b_low = load_operands(
            slots, first_slot, slots_m, M, D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, ELU, SPLIT, k.dtype.element_ty
        )  # fmt: skip
    b_sums = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    b_norms = tl.zeros((BLOCK_M, COPIES), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < last, MASKED)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        if PROJECTED:
            b_k = load_rotated(k, o_n, k_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
            b_l = left_products(b_high, b_low, b_k, tl.zeros((BLOCK_M, BLOCK_N), COMPUTE), SPLIT, PRECISION)
            b_f = cast(apply_map(b_l, ELU, PROJECTED)[0], b_v.dtype)
        else:
            b_l = load_rotated(k, o_n, k_n, valid, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot).to(COMPUTE)
            b_f = apply_map(b_l, ELU, PROJECTED)[0]
            b_f = tl.trans(cast(b_f, b_v.dtype))
        b_sums = dot(b_f, b_v, b_sums, PRECISION)
        # A token that is not valid is read as 0, so its features are finite. In both sums, these features are multiplied by 0.
        b_valid = cast(tl.where(valid, 1.0, 0.0).to(COMPUTE), b_v.dtype)
        b_norms = dot(b_f, tl.trans(tl.broadcast_to(b_valid[None, :], (COPIES, BLOCK_N))), b_norms, PRECISION)

    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    store_state(b_sums, tl.sum(b_norms, 1) / COPIES, sums, norms, part, o_m, M, E, BLOCK_E)


@triton.jit
def load_gradients(
    slots, slots_m, unit, size, delta, i_bh, first_slot, M,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return two operands for logits, and unit, size and delta (see prepare.py), for a tile of slots.

    The operands for logits are used only if PROJECTED. `size` keeps `unit` within the range of float16. For other dtypes, this
    function multiplies unit by size, and the kernels do not use size. The multiplication is exact, because size is a power of
    two.
    """
    o_m = slot_rows(first_slot, D, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED)
    b_unit, b_size, b_delta = load_unit(unit, size, delta, i_bh * M + o_m, o_m < M, E, BLOCK_E)
    if unit.dtype.element_ty != tl.float16:
        b_unit = cast(b_unit.to(b_size.dtype) * b_size[:, None], unit.dtype.element_ty)
    b_high, b_low = b_unit, b_unit
    if PROJECTED:
        b_high, b_low = load_operands(
            slots, first_slot, slots_m, M, D, BLOCK_D, BLOCK_M, ROTARY, INTERLEAVED, ELU, SPLIT, unit.dtype.element_ty
        )  # fmt: skip
    return b_high, b_low, b_unit, b_size, b_delta


@triton.jit
def gradient_products(x, unit, size, delta, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the gradients of the features, size * <x, unit> - delta, as a tile (tokens, slots)."""
    acc = tl.zeros((x.shape[0], unit.shape[0]), COMPUTE)
    if x.dtype == tl.bfloat16:  # subtracting delta in a matrix product needs no instruction per feature
        ones = cast(tl.full((x.shape[0], COPIES), 2.0 / COPIES, COMPUTE), x.dtype)
        acc = dot(ones, copies(-delta, x.dtype), acc, PRECISION)
        products = dot(x, tl.trans(unit), acc, PRECISION)
    elif x.dtype == tl.float16:
        products = dot(x, tl.trans(unit), acc, PRECISION) * size[None, :] - delta[None, :]
    else:
        products = row_products(x, unit, acc, PRECISION) - delta[None, :]
    return products


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h", "chunk"])
def linear_aggregate_tokens_kernel(
    slots, k, v, mask, cos, sin, delta, size, unit, dk, dv,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, PROJECTED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    """Compute dk (if KEYS) and dv (if VALUES) for a chunk of tokens. If not TILED, the slots are loaded only once."""
    i_bh, _, _, first, last = slot_program(1, N, chunk, 1)
    i_b, i_h = i_bh // H, i_bh % H
    cos += i_h * angle_h
    sin += i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    slots += i_b * slots_b + i_h * slots_h
    dk += i_b * dk_b + i_h * dk_h
    HALF: tl.constexpr = v.dtype.element_ty == tl.float16
    if not TILED:
        b_high, b_low, b_unit, b_size, b_delta = load_gradients(
            slots, slots_m, unit, size, delta, i_bh, 0, M,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT,
        )  # fmt: skip
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        inside = o_n < last
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, inside, MASKED)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        if PROJECTED:
            b_k = load_rotated(k, o_n, k_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_dv = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
        b_dk = tl.zeros((BLOCK_N, BLOCK_D if PROJECTED else 1), COMPUTE)
        for first_slot in range(0, M if TILED else BLOCK_M, BLOCK_M):
            if TILED:
                b_high, b_low, b_unit, b_size, b_delta = load_gradients(
                    slots, slots_m, unit, size, delta, i_bh, first_slot, M,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, PROJECTED, ELU, SPLIT,
                )  # fmt: skip
            if PROJECTED:
                b_l = right_products(b_k, b_high, b_low, tl.zeros((BLOCK_N, BLOCK_M), COMPUTE), SPLIT, PRECISION)
            else:
                b_l = load_rotated(k, o_n, k_n, valid, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot).to(
                    COMPUTE
                )
            b_f, b_slopes = apply_map(b_l, ELU, PROJECTED)
            if VALUES:
                b_dv = dot(cast(b_f * b_size[None, :] if HALF else b_f, b_v.dtype), b_unit, b_dv, PRECISION)
            if KEYS:
                b_dl = b_slopes * gradient_products(b_v, b_unit, b_size, b_delta, COMPUTE, PRECISION)
                if PROJECTED:
                    b_dk = dot(cast(b_dl, b_v.dtype), b_high, b_dk, PRECISION)
                else:
                    if MASKED:
                        b_dl = tl.where(valid[:, None], b_dl, 0.0)
                    store_unrotated(
                        b_dl, dk, o_n, dk_n, inside, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, first_slot
                    )  # fmt: skip
        if KEYS and PROJECTED:
            b_dk = b_dk * LN2 if ELU else b_dk  # if ELU, b_high includes the factor log2(e)
            if MASKED:
                b_dk = tl.where(valid[:, None], b_dk, 0.0)
            store_unrotated(b_dk, dk, o_n, dk_n, inside, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED)
        if VALUES:
            if MASKED:
                b_dv = tl.where(valid[:, None], b_dv, 0.0)
            store_tile(b_dv, dv + i_b * dv_b + i_h * dv_h, o_n, dv_n, inside, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "M", "mask_b", "angle_h", "chunk"])
def linear_aggregate_slots_kernel(
    slots, k, v, mask, cos, sin, delta, size, unit, dslots,
    slots_b, slots_h, slots_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, ELU: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a chunk of tokens to dslots, for a tile of slots of one sample and head."""
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    cos += i_h * angle_h
    sin += i_h * angle_h
    k += i_b * k_b + i_h * k_h
    v += i_b * v_b + i_h * v_h
    HALF: tl.constexpr = v.dtype.element_ty == tl.float16
    b_high, b_low, b_unit, b_size, b_delta = load_gradients(
        slots + i_b * slots_b + i_h * slots_h, slots_m, unit, size, delta, i_bh, first_slot, M,
        D, E, BLOCK_D, BLOCK_E, BLOCK_M, ROTARY, INTERLEAVED, True, ELU, SPLIT,
    )  # fmt: skip

    b_dslots = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < last, MASKED)
        b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
        b_k = load_rotated(k, o_n, k_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
        b_slopes = apply_map(left_products(b_high, b_low, b_k, zeros, SPLIT, PRECISION), ELU, True)[1]
        b_dp = row_products(b_unit, b_v, zeros, PRECISION)
        b_dl = b_slopes * ((b_dp * b_size[:, None] if HALF else b_dp) - b_delta[:, None])
        b_dslots = dot(cast(b_dl, b_k.dtype), b_k, b_dslots, PRECISION)  # rows of b_k for invalid tokens are 0

    o_m = first_slot + tl.arange(0, BLOCK_M)
    store_slots(b_dslots, dslots, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)


def linear_aggregate_forward(
    slots: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None, feature_map: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    value_width = v.shape[3]
    config = feature_config("linear_aggregate_forward", k, v, slots)
    num_slots = width if slots is None else slots.shape[2]
    programs = batch * num_heads * cdiv(num_slots, config.tile.slots)
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
    variant = dict(**turn, MASKED=mask is not None, ELU=feature_map == "elu")

    dk = empty_like_tokens(k, width) if need_k else k.new_empty(0)
    dv = empty_like_tokens(v, value_width) if need_v else v.new_empty(0)
    if need_k or need_v:
        chunk, chunks = config.chunk(batch * num_heads, tokens)
        launch(
            linear_aggregate_tokens_kernel,
            (batch * num_heads * chunks,),
            *inputs, dk, dv, *strides, *output_strides(dk), *output_strides(dv), num_heads, tokens, num_slots, chunk,
            KEYS=need_k, VALUES=need_v, PROJECTED=slots is not None, TILED=num_slots > config.tile.slots,
            **variant, **config.meta(width, value_width),
        )  # fmt: skip
    if slots is None or not need_slots:
        return k.new_empty(0), dk, dv

    config = feature_config("linear_aggregate_slots", k, v, slots)
    programs = batch * num_heads * cdiv(num_slots, config.tile.slots)
    chunk, chunks = config.chunk(programs, tokens)
    dslots = empty_slots(slots, batch, num_heads, chunks, config.compute)
    launch(
        linear_aggregate_slots_kernel,
        (programs * chunks,),
        *inputs, dslots, *strides, num_heads, tokens, num_slots, chunk, **variant, **config.meta(width, value_width),
    )  # fmt: skip
    return sum_slots(dslots, slots), dk, dv

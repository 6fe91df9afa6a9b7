"""Kernels for `project`: K slots are learned linear combinations of N tokens (see primitives/project.py for the equations).

The results for keys and for values are two independent sums. The last axis of each grid selects one of them. Each program
accumulates only one of the sums, so its tile can have enough slots for matrix instructions.

Triton specializes the kernels on whether the number of slots is divisible by 16, because divisibility allows 128-bit loads. The
kernels are not specialized on the number of tokens.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens
from .launch import (
    LaunchConfig,
    cdiv,
    launch,
    launch_config,
    mask_strides,
    output_strides,
    rotary_arguments,
    token_strides,
)
from .sums import split_items, sum_chunks
from .tiles import (
    cast,
    dot,
    is_valid,
    load_rotated,
    load_slots,
    load_tile,
    row_products,
    slot_program,
    store_slots,
    store_tile,
    store_unrotated,
)


@triton.jit
def load_weights(base, o_n, stride, valid, o_m, M, DTYPE: tl.constexpr):
    """Load a tile (tokens, slots) of a projection and round it to DTYPE. The weights of invalid tokens are 0."""
    at = base + o_n.to(tl.int64)[:, None] * stride + o_m[None, :]
    return cast(tl.load(at, mask=valid[:, None] & (o_m < M)[None, :], other=0.0), DTYPE)


@triton.jit(do_not_specialize=["N", "mask_b", "angle_h", "chunk"])
def project_forward_kernel(
    key_weights, value_weights, k, v, mask, cos, sin, keys, values,
    e_h, e_n, f_h, f_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    H, N, M, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a chunk of tokens to a tile of slots: keys if program_id(1) is 0, otherwise values."""
    i_bh, part, first_slot, first, last = slot_program(M, N, chunk, BLOCK_M)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = first_slot + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = k.dtype.element_ty
    if tl.program_id(1) == 0:
        k += i_b * k_b + i_h * k_h
        key_weights += i_h * e_h
        angles = i_h * angle_h
        b_keys = tl.zeros((BLOCK_M, BLOCK_D), COMPUTE)
        for start in range(first, last, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < last, MASKED)
            b_e = load_weights(key_weights, o_n, e_n, valid, o_m, M, DTYPE)
            b_k = load_rotated(k, o_n, k_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
            b_keys = dot(tl.trans(b_e), b_k, b_keys, PRECISION)
        store_slots(cast(b_keys, keys.dtype.element_ty), keys, part, o_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    else:
        v += i_b * v_b + i_h * v_h
        value_weights += i_h * f_h
        b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
        for start in range(first, last, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < last, MASKED)
            b_f = load_weights(value_weights, o_n, f_n, valid, o_m, M, DTYPE)
            b_v = load_tile(v, o_n, v_n, valid, E, BLOCK_E, 0, True)
            b_values = dot(tl.trans(b_f), b_v, b_values, PRECISION)
        store_slots(b_values, values, part, o_m, M, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "mask_b", "angle_h", "first_side"])
def project_tokens_kernel(
    dkeys, dvalues, key_weights, value_weights, mask, cos, sin, dk, dv,
    dkeys_b, dkeys_h, dkeys_m, dvalues_b, dvalues_h, dvalues_m, e_h, e_n, f_h, f_n, mask_b, mask_n, angle_h,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, M, first_side,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a tile of tokens, compute dk if program_id(1) + first_side is 0, otherwise dv."""
    token_tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = o_n < N
    valid = is_valid(mask, i_b, mask_b, mask_n, o_n, inside, MASKED)
    DTYPE: tl.constexpr = dk.dtype.element_ty
    if tl.program_id(1) + first_side == 0:
        dkeys += i_b * dkeys_b + i_h * dkeys_h
        key_weights += i_h * e_h
        angles = i_h * angle_h
        b_dk = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
        for start in range(0, M, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            b_e = load_weights(key_weights, o_n, e_n, valid, o_m, M, DTYPE)
            b_dkeys = load_slots(dkeys, o_m, dkeys_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
            b_dk = dot(b_e, b_dkeys, b_dk, PRECISION)
        if MASKED:
            b_dk = tl.where(valid[:, None], b_dk, 0.0)  # masked tokens have gradient 0, even if the gradient of a slot is NaN
        dk += i_b * dk_b + i_h * dk_h
        store_unrotated(b_dk, dk, o_n, dk_n, inside, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED)
    else:
        dvalues += i_b * dvalues_b + i_h * dvalues_h
        value_weights += i_h * f_h
        b_dv = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
        for start in range(0, M, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            b_f = load_weights(value_weights, o_n, f_n, valid, o_m, M, DTYPE)
            b_dvalues = cast(load_slots(dvalues, o_m, dvalues_m, M, E, BLOCK_E, 0, True), DTYPE)
            b_dv = dot(b_f, b_dvalues, b_dv, PRECISION)
        if MASKED:
            b_dv = tl.where(valid[:, None], b_dv, 0.0)
        store_tile(b_dv, dv + i_b * dv_b + i_h * dv_h, o_n, dv_n, inside, E, BLOCK_E, 0, True)


@triton.jit
def token_products(
    acc, i_h, dkeys, k, mask, cos, sin,
    dkeys_b, dkeys_h, dkeys_m, k_b, k_h, k_n, mask_b, mask_n, angle_h, first, last, heads, N, M, o_n, o_m,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc (tokens, slots) plus the sum of the products <k_n, dkeys_j> over the items from `first` to `last` (exclusive).

    Item i is sample i // heads and head i_h + i % heads. The order of summation is fixed.
    """
    for i in range(first, last):
        i_b, j_h = (i // heads).to(tl.int64), i_h + i % heads
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, o_n < N, MASKED)
        angles = j_h * angle_h
        b_k = load_rotated(
            k + i_b * k_b + j_h * k_h, o_n, k_n, valid, cos + angles, sin + angles,
            D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE,
        )  # fmt: skip
        b_dkeys = load_slots(dkeys + i_b * dkeys_b + j_h * dkeys_h, o_m, dkeys_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
        acc = row_products(b_k, cast(b_dkeys, b_k.dtype), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["items", "chunk", "chunks", "N", "mask_b", "angle_h", "first_side"])
def project_weights_kernel(
    dkeys, dvalues, k, v, mask, cos, sin, de, df,
    dkeys_b, dkeys_h, dkeys_m, dvalues_b, dvalues_h, dvalues_m, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_n, angle_h,
    items, chunk, chunks, heads, N, M, first_side,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr, ONE: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dE or dF for a tile of tokens and slots, summed over a chunk of items.

    An item is a (sample, head) pair. All items in a chunk use the same projection (E or F). If ONE, E projects both keys and
    values, so dE is the sum of both gradients.
    """
    token_tiles, slot_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    part = (tl.program_id(0) // (token_tiles * slot_tiles)).to(tl.int64)
    row = part // chunks
    first = (part % chunks).to(tl.int32) * chunk
    last = tl.minimum(first + chunk, items)
    o_n = tl.program_id(0) // slot_tiles % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(0) % slot_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    at = (part * N + o_n)[:, None] * M + o_m[None, :]
    inside = (o_n < N)[:, None] & (o_m < M)[None, :]
    side = tl.program_id(1) + first_side
    acc = tl.zeros((BLOCK_N, BLOCK_M), COMPUTE)
    if side == 0:
        acc = token_products(
            acc, row * heads, dkeys, k, mask, cos, sin,
            dkeys_b, dkeys_h, dkeys_m, k_b, k_h, k_n, mask_b, mask_n, angle_h, first, last, heads, N, M, o_n, o_m,
            D, BLOCK_D, ROTARY, INTERLEAVED, MASKED, COMPUTE, PRECISION,
        )  # fmt: skip
        if ONE:
            acc = token_products(
                acc, row * heads, dvalues, v, mask, cos, sin,
                dvalues_b, dvalues_h, dvalues_m, v_b, v_h, v_n, mask_b, mask_n, angle_h, first, last, heads, N, M, o_n, o_m,
                E, BLOCK_E, 0, True, MASKED, COMPUTE, PRECISION,
            )  # fmt: skip
        tl.store(de + at, cast(acc, de.dtype.element_ty), mask=inside)
    else:
        acc = token_products(
            acc, row * heads, dvalues, v, mask, cos, sin,
            dvalues_b, dvalues_h, dvalues_m, v_b, v_h, v_n, mask_b, mask_n, angle_h, first, last, heads, N, M, o_n, o_m,
            E, BLOCK_E, 0, True, MASKED, COMPUTE, PRECISION,
        )  # fmt: skip
        tl.store(df + at, cast(acc, df.dtype.element_ty), mask=inside)


def meta(config: LaunchConfig, width: int, value_width: int) -> dict[str, Any]:
    """Return the constexprs and launch options that the three kernels share."""
    options = config.meta(width, value_width)
    del options["SPLIT"]  # projections are rounded to the tokens' dtype, as under autocast, and not split
    return options


def project_forward(
    key_projection: Tensor, value_projection: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None,
    rotary: Rotary | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, tokens, width = k.shape
    num_slots, value_width = key_projection.shape[2], v.shape[3]
    e, f = key_projection, key_projection if value_projection is None else value_projection
    config = launch_config("project_forward", k, max(width, value_width), e)
    programs = batch * num_heads * cdiv(num_slots, config.tile.slots)
    # Aim for one program per multiprocessor. More chunks would increase memory traffic, because the slots of each chunk are
    # written and read again.
    chunk, chunks = config.chunk(2 * config.resident * programs, tokens)
    keys = k.new_empty(batch, num_heads, num_slots, width)
    values = v.new_empty(batch, num_heads, num_slots, value_width, dtype=config.compute)
    parts = keys, values
    if chunks > 1:
        parts = [x.new_empty(batch, num_heads, chunks, *x.shape[2:], dtype=config.compute) for x in parts]
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)
    launch(
        project_forward_kernel,
        (programs * chunks, 2),
        e, f, k, v, k if mask is None else mask, cos, sin, *parts,
        *weight_strides(e), *weight_strides(f), *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h,
        num_heads, tokens, num_slots, chunk,
        **turn, MASKED=mask is not None, **meta(config, width, value_width),
    )  # fmt: skip
    if chunks > 1:
        sum_chunks(config, batch * num_heads, chunks, (parts[0], keys), (parts[1], values))
    return keys, values


def project_backward(
    dkeys: Tensor, dvalues: Tensor, key_projection: Tensor, value_projection: Tensor | None, k: Tensor, v: Tensor,
    mask: Tensor | None, rotary: Rotary | None, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_key_projection, need_value_projection, need_k, need_v = needs
    batch, num_heads, tokens, width = k.shape
    rows, _, num_slots = key_projection.shape
    value_width = v.shape[3]
    e, f = key_projection, key_projection if value_projection is None else value_projection
    cos, sin, angle_h, turn = rotary_arguments(rotary, k)
    mask_pointer = k if mask is None else mask
    slots = (*dkeys.stride()[:3], *dvalues.stride()[:3])
    variant = dict(**turn, MASKED=mask is not None)

    dk = empty_like_tokens(k, width) if need_k else k.new_empty(0)
    dv = empty_like_tokens(v, value_width) if need_v else v.new_empty(0)
    if need_k or need_v:
        config = launch_config("project_tokens", k, max(width, value_width), e)
        launch(
            project_tokens_kernel,
            (batch * num_heads * cdiv(tokens, config.tile.tokens), need_k + need_v),
            dkeys, dvalues, e, f, mask_pointer, cos, sin, dk, dv,
            *slots, *weight_strides(e), *weight_strides(f), *mask_strides(mask), angle_h,
            *output_strides(dk), *output_strides(dv), num_heads, tokens, num_slots, 1 - need_k,
            **variant, **meta(config, width, value_width),
        )  # fmt: skip

    de = e.new_empty(e.shape if need_key_projection else (0,))
    df = f.new_empty(f.shape if need_value_projection else (0,))
    if need_key_projection or need_value_projection:
        config = launch_config("project_weights", k, max(width, value_width), e)
        slot_tiles = cdiv(num_slots, config.tile.slots)
        sides, heads = need_key_projection + need_value_projection, num_heads // rows
        chunk, chunks = split_items(config, rows * cdiv(tokens, config.step) * slot_tiles * sides, batch * heads)
        parts = [x if chunks == 1 else x.new_empty(rows, chunks, *x.shape[1:], dtype=config.compute) for x in (de, df)]
        launch(
            project_weights_kernel,
            (rows * chunks * cdiv(tokens, config.tile.tokens) * slot_tiles, sides),
            dkeys, dvalues, k, v, mask_pointer, cos, sin, *parts,
            *slots, *token_strides(k), *token_strides(v), *mask_strides(mask), angle_h,
            batch * heads, chunk, chunks, heads, tokens, num_slots, 1 - need_key_projection,
            ONE=value_projection is None, **variant, **meta(config, width, value_width),
        )  # fmt: skip
        if chunks > 1:
            pairs = zip(parts, (de, df), (need_key_projection, need_value_projection), strict=True)
            sum_chunks(config, rows, chunks, *((part, sums) for part, sums, need in pairs if need))
    return de, df, dk, dv


def weight_strides(projection: Tensor) -> tuple[int, int]:
    """Return the head and token strides of `projection`. The head stride is 0 if all heads share the projection."""
    return 0 if projection.shape[0] == 1 else projection.stride(0), projection.stride(1)

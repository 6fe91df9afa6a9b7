"""Kernels for `token_conv`: products of a banded matrix and tokens (see primitives/token_conv.py for the equation).

To compute a tile of outputs, a program splits the tile into groups of up to 32 tokens. For each group, it reads a window with
TAPS - 1 additional tokens. It multiplies the banded matrix by up to BLOCK_K tokens of each window at a time.

The gradient of v is a convolution of dout with the reversed filter. For the gradient of the filter, the tokens of a tile are
multiplied by a window of dout, and the products are summed along diagonals.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs, empty_like_tokens, unit_last_stride
from .launch import LaunchConfig, cdiv, launch, launch_config, mask_strides, output_strides, padded, token_strides
from .sums import sum_chunks
from .tiles import cast, dot, load_tile, store_tile


@triton.jit
def valid_rows(rows, first, last, mask, mask_n, MASKED: tl.constexpr):
    """Return a mask of the rows from `first` to `last` (exclusive). If MASKED, the rows of invalid tokens are excluded."""
    valid = (rows >= first) & (rows < last)
    if MASKED:
        valid &= tl.load(mask + rows.to(tl.int64) * mask_n, mask=valid, other=0) != 0
    return valid


@triton.jit
def banded(
    acc, x, weight, mask, first, N, x_n, mask_n,
    TAPS: tl.constexpr, FLIP: tl.constexpr, MASKED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc (tokens, BLOCK_E) plus the convolution of x. Row 0 of acc is token `first`. FLIP reverses the filter.

    x, weight and mask point to the data of one sample and head. weight is contiguous. x_n and mask_n are the strides between
    tokens. The tokens of acc form groups of up to 32. The windows of all groups are loaded side by side, as columns of one
    tile, and multiplied by the same banded matrix. This matrix is kept small, because each of its elements takes a separate
    load.
    """
    GROUP: tl.constexpr = min(acc.shape[0], 32)
    GROUPS: tl.constexpr = acc.shape[0] // GROUP
    STEP: tl.constexpr = min(BLOCK_K, 1024 // x.dtype.element_ty.primitive_bitwidth)  # 128 bytes; more would spill registers
    o_n, o_g, o_column = tl.arange(0, GROUP), tl.arange(0, GROUPS), tl.arange(0, GROUPS * BLOCK_E)
    first -= TAPS // 2
    b_sum = tl.zeros((GROUP, GROUPS * BLOCK_E), acc.dtype)
    for offset in range(0, GROUP + TAPS - 1, STEP):
        o_k = offset + tl.arange(0, STEP)
        rows = first + o_k[:, None] + (o_column // BLOCK_E * GROUP)[None, :]
        valid = (rows >= 0) & (rows < N) & (o_k < GROUP + TAPS - 1)[:, None] & (o_column % BLOCK_E < E)[None, :]
        if MASKED:  # one load per row instead of one per element
            unmasked = valid_rows(first + o_k[:, None] + (o_g * GROUP)[None, :], 0, N, mask, mask_n, True)
            valid &= tl.reshape(tl.broadcast_to(unmasked[:, :, None], (STEP, GROUPS, BLOCK_E)), valid.shape)
        b_x = tl.load(x + rows.to(tl.int64) * x_n + (o_column % BLOCK_E)[None, :], mask=valid, other=0.0)
        taps = o_k[None, :] - o_n[:, None]
        inside = (taps >= 0) & (taps < TAPS)
        if FLIP:
            taps = TAPS - 1 - taps
        b_band = tl.load(weight + taps, mask=inside, other=0.0)
        b_sum = dot(cast(b_band, b_x.dtype), b_x, b_sum, PRECISION)
    b_sum = tl.permute(tl.reshape(b_sum, (GROUP, GROUPS, BLOCK_E)), (1, 0, 2))
    return acc + tl.reshape(b_sum, acc.shape)


@triton.jit(do_not_specialize=["N", "mask_b"])
def token_conv_forward_kernel(
    v, weight, mask, out,
    v_b, v_h, v_n, mask_b, mask_n, out_b, out_h, out_n, H, N,
    TAPS: tl.constexpr, MASKED: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the convolution for a tile of tokens."""
    token_tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    first = tl.program_id(0) % token_tiles * BLOCK_N
    b_out = banded(
        tl.zeros((BLOCK_N, BLOCK_E), COMPUTE), v + i_b * v_b + i_h * v_h, weight + i_h * TAPS, mask + i_b * mask_b,
        first, N, v_n, mask_n, TAPS, False, MASKED, E, BLOCK_E, BLOCK_K, PRECISION,
    )  # fmt: skip
    o_n = first + tl.arange(0, BLOCK_N)
    store_tile(b_out, out + i_b * out_b + i_h * out_h, o_n, out_n, o_n < N, E, BLOCK_E, 0, True)


@triton.jit(do_not_specialize=["N", "chunk", "mask_b"])
def token_conv_backward_kernel(
    dout, v, weight, mask, dv_other, dv, dweight,
    d_b, d_h, d_n, v_b, v_h, v_n, mask_b, mask_n, other_b, other_h, other_n, dv_b, dv_h, dv_n, H, N, chunk,
    TAPS: tl.constexpr, MASKED: tl.constexpr, ADD: tl.constexpr, NEED_V: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dv for a chunk of tokens, and the contribution of the chunk to dweight. If ADD, add dv_other to dv."""
    chunks = tl.cdiv(N, chunk)
    part = tl.program_id(0).to(tl.int64)
    i_bh = part // chunks
    i_b, i_h = i_bh // H, i_bh % H
    begin = (part % chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, N)
    dout += i_b * d_b + i_h * d_h
    v += i_b * v_b + i_h * v_h
    mask += i_b * mask_b
    o_n = tl.arange(0, BLOCK_N)

    if NEED_V:
        dv_other += i_b * other_b + i_h * other_h
        dv += i_b * dv_b + i_h * dv_h
        for first in range(begin, end, BLOCK_N):
            inside = first + o_n < end
            valid = valid_rows(first + o_n, begin, end, mask, mask_n, MASKED)
            b_dv = tl.zeros((BLOCK_N, BLOCK_E), COMPUTE)
            if ADD:
                b_dv = load_tile(dv_other, first + o_n, other_n, valid, E, BLOCK_E, 0, True).to(COMPUTE)
            b_dv = banded(
                b_dv, dout, weight + i_h * TAPS, mask, first, N, d_n, mask_n,
                TAPS, True, False, E, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip
            b_dv = tl.where(valid[:, None], b_dv, 0.0)
            store_tile(b_dv, dv, first + o_n, dv_n, inside, E, BLOCK_E, 0, True)

    if NEED_WEIGHT:
        COLUMNS: tl.constexpr = min(BLOCK_E, 64)  # whole float32 rows do not fit in registers
        o_t = tl.arange(0, BLOCK_T)
        b_dweight = tl.zeros((BLOCK_T,), COMPUTE)
        for offset in range(0, BLOCK_N + TAPS - 1, BLOCK_K):
            b_products = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
            for first in range(begin, end, BLOCK_N):
                valid = valid_rows(first + o_n, begin, end, mask, mask_n, MASKED)
                rows = first - TAPS // 2 + offset + tl.arange(0, BLOCK_K)
                exists = (rows >= 0) & (rows < N)
                for column in range(0, E, COLUMNS):
                    b_v = load_tile(v, first + o_n, v_n, valid, E, COLUMNS, 0, True, False, column)
                    b_dout = load_tile(dout, rows, d_n, exists, E, COLUMNS, 0, True, False, column)
                    b_products = dot(b_v, tl.trans(b_dout), b_products, PRECISION)
            o_k = o_n[:, None] + o_t[None, :] - offset
            inside = (o_k >= 0) & (o_k < BLOCK_K)
            b_diagonals = tl.gather(b_products, tl.where(inside, o_k, 0), 1)
            b_dweight += tl.sum(tl.where(inside, b_diagonals, 0.0), 0)
        row = i_h * (tl.num_programs(0) // H) + i_b * chunks + part % chunks  # all partial sums of a head are adjacent
        # The window moves over dout instead of v, so the taps are in reverse order.
        tl.store(dweight + row * TAPS + TAPS - 1 - o_t, b_dweight, mask=o_t < TAPS)


def token_conv_forward(v: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    batch, num_heads, tokens, width = v.shape
    config = launch_config("token_conv_forward", v, width, weight)
    out = empty_like_tokens(v, width)
    launch(
        token_conv_forward_kernel,
        (batch * num_heads * cdiv(tokens, config.tile.tokens),),
        v, weight.contiguous(), v if mask is None else mask, out,
        *token_strides(v), *mask_strides(mask), *token_strides(out), num_heads, tokens,
        **_meta(config, v, weight, mask),
    )  # fmt: skip
    return out


def token_conv_backward(
    dout: Tensor, v: Tensor, weight: Tensor, mask: Tensor | None, dv_other: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor]:
    need_v, need_weight = needs
    batch, num_heads, tokens, width = v.shape
    taps = weight.shape[2]
    dout = unit_last_stride(dout)
    add = need_v and dv_other is not None
    other = unit_last_stride(dv_other) if add else v
    config = launch_config("token_conv_backward", v, width, weight)
    if need_weight:
        chunk, chunks = config.chunk(batch * num_heads, tokens)
    else:  # there is no sum over a chunk, so each tile can be a chunk
        chunk, chunks = config.tile.tokens, cdiv(tokens, config.tile.tokens)
    dv = empty_like_tokens(v, width) if need_v else v.new_empty(0)
    parts = v.new_empty((num_heads, batch * chunks, taps) if need_weight else (0,), dtype=config.compute)
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    launch(
        token_conv_backward_kernel,
        (batch * num_heads * chunks,),
        dout, v, weight.contiguous(), v if mask is None else mask, other, dv, parts,
        *token_strides(dout), *token_strides(v), *mask_strides(mask), *token_strides(other), *output_strides(dv),
        num_heads, tokens, chunk,
        ADD=add, NEED_V=need_v, NEED_WEIGHT=need_weight, BLOCK_T=padded(taps),
        **_meta(config, v, weight, mask),
    )  # fmt: skip
    if need_weight:
        sum_chunks(config, num_heads, batch * chunks, (parts, dweight))
    return dv, dweight


def _meta(config: LaunchConfig, v: Tensor, weight: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Return the constexprs and launch options that both kernels share."""
    width = v.shape[3]
    return dict(
        TAPS=weight.shape[2], MASKED=mask is not None, E=width, BLOCK_E=padded(width),
        BLOCK_N=config.tile.tokens, BLOCK_K=config.tile.slots, COMPUTE=config.triton_compute, PRECISION=config.precision,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip

"""Kernels for `rotate`.

One kernel applies the rotary embedding to q and k or, with INVERSE set, computes the gradients of q and k. Another kernel
computes the gradient of the angles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Rotary, empty_like_tokens
from .launch import cdiv, launch, launch_config, padded, rotary_arguments, token_strides
from .sums import split_items, sum_chunks
from .tiles import load_tile, rotate_pairs, store_tile, token_program


@triton.jit(do_not_specialize=["N", "angle_h"])
def rotate_kernel(
    q, k, cos, sin, q_out, k_out,
    q_b, q_h, q_n, k_b, k_h, k_n, q_out_b, q_out_h, q_out_n, k_out_b, k_out_h, k_out_n, angle_h,
    H, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    i_bh, o_n, valid = token_program(N, BLOCK_N)
    i_b, i_h = i_bh // H, i_bh % H
    cos += i_h * angle_h
    sin += i_h * angle_h
    b_q = load_tile(q + i_b * q_b + i_h * q_h, o_n, q_n, valid, D, BLOCK_D, ROTARY, INTERLEAVED).to(COMPUTE)
    b_k = load_tile(k + i_b * k_b + i_h * k_h, o_n, k_n, valid, D, BLOCK_D, ROTARY, INTERLEAVED).to(COMPUTE)
    b_q = rotate_pairs(b_q, o_n, valid, cos, sin, ROTARY, INVERSE)
    b_k = rotate_pairs(b_k, o_n, valid, cos, sin, ROTARY, INVERSE)
    q_out += i_b * q_out_b + i_h * q_out_h
    k_out += i_b * k_out_b + i_h * k_out_h
    store_tile(b_q, q_out, o_n, q_out_n, valid, D, BLOCK_D, ROTARY, INTERLEAVED)
    store_tile(b_k, k_out, o_n, k_out_n, valid, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(do_not_specialize=["N", "items", "chunk", "chunks", "heads"])
def angle_gradient_kernel(
    x, dx, dangles,
    x_b, x_h, x_n, dx_b, dx_h, dx_n,
    items, chunk, chunks, heads, N,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the angles for a tile of tokens.

    The gradient is summed in a fixed order over a chunk of items. An item is a (sample, head) pair. All items in a chunk use
    the same angles.
    """
    part, o_n, inside = token_program(N, BLOCK_N)
    i_h = part // chunks
    first = (part % chunks).to(tl.int32) * chunk
    x += i_h * x_h
    dx += i_h * dx_h
    b_dangles = tl.zeros((BLOCK_N, BLOCK_D // 2), COMPUTE)
    for i in range(first, tl.minimum(first + chunk, items)):
        i_b = (i // heads).to(tl.int64)
        j_h = (i % heads).to(tl.int64)
        b_x = load_tile(x + i_b * x_b + j_h * x_h, o_n, x_n, inside, ROTARY, BLOCK_D, ROTARY, INTERLEAVED)
        b_dx = load_tile(dx + i_b * dx_b + j_h * dx_h, o_n, dx_n, inside, ROTARY, BLOCK_D, ROTARY, INTERLEAVED)
        u, v = tl.split(tl.reshape(b_x.to(COMPUTE), (BLOCK_N, BLOCK_D // 2, 2)))
        du, dv = tl.split(tl.reshape(b_dx.to(COMPUTE), (BLOCK_N, BLOCK_D // 2, 2)))
        b_dangles += tl.where(dv == 0, 0.0, u * dv) - tl.where(du == 0, 0.0, v * du)  # padding may contain NaN
    pairs = tl.arange(0, BLOCK_D // 2)
    at = (part * N + o_n)[:, None] * (ROTARY // 2) + pairs[None, :]
    tl.store(dangles + at, b_dangles, mask=inside[:, None] & (pairs < ROTARY // 2)[None, :])


def angle_gradient(x: Tensor, dx: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    batch, num_heads, tokens, _ = x.shape
    rows, _, half = angles.shape  # one table per head, or one table for all heads
    dangles = angles.new_empty(angles.shape)
    config = launch_config("rotate", x, 2 * half, angles)
    tiles, heads = rows * cdiv(tokens, config.tile.tokens), num_heads // rows
    chunk, chunks = split_items(config, rows * cdiv(tokens, config.step), batch * heads)
    parts = dangles if chunks == 1 else dangles.new_empty(rows, chunks, tokens, half, dtype=config.compute)
    launch(
        angle_gradient_kernel,
        (tiles * chunks,),
        x, dx, parts,
        *token_strides(x), *token_strides(dx), batch * heads, chunk, chunks, heads, tokens,
        BLOCK_D=padded(2 * half), BLOCK_N=config.tile.tokens,
        ROTARY=2 * half, INTERLEAVED=interleaved, COMPUTE=config.triton_compute,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if chunks > 1:
        sum_chunks(config, rows, chunks, (parts, dangles))
    return dangles if batch else dangles.zero_()


def rotate(q: Tensor, k: Tensor, rotary: Rotary, inverse: bool) -> tuple[Tensor, Tensor]:
    batch, num_heads, tokens, width = q.shape
    q_out, k_out = empty_like_tokens(q, width), empty_like_tokens(k, width)
    config = launch_config("rotate", q, width, rotary.cos)
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)
    launch(
        rotate_kernel,
        (batch * num_heads * cdiv(tokens, config.tile.tokens),),
        q, k, cos, sin, q_out, k_out,
        *token_strides(q), *token_strides(k), *token_strides(q_out), *token_strides(k_out), angle_h, num_heads, tokens,
        D=width, BLOCK_D=padded(width), BLOCK_N=config.tile.tokens,
        **turn, INVERSE=inverse, COMPUTE=config.triton_compute,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return q_out, k_out

"""Kernel of `rotate`: rotary embedding of q and k in one launch; the gradient is the same kernel with INVERSE."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.layout import empty_like_tokens
from .configs import launch_config
from .launch import launch
from .layout import padded, rotary_arguments, token_strides
from .tiles import load_tile, rotate_pairs, store_tile


@triton.jit(do_not_specialize=["N", "angle_h"])
def rotate_kernel(
    q, k, cos, sin, q_out, k_out,
    q_b, q_h, q_n, k_b, k_h, k_n, q_out_b, q_out_h, q_out_n, k_out_b, k_out_h, k_out_n, angle_h,
    H, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    token_tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = o_n < N
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


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    batch, num_heads, tokens, width = q.shape
    q_out, k_out = empty_like_tokens(q, width), empty_like_tokens(k, width)
    config = launch_config("rotate", q, width, cos)
    cos, sin, rotary, angle_h = rotary_arguments(cos, sin, q)
    launch(
        rotate_kernel,
        (batch * num_heads * triton.cdiv(tokens, config.tile.tokens),),
        q, k, cos, sin, q_out, k_out,
        *token_strides(q), *token_strides(k), *token_strides(q_out), *token_strides(k_out), angle_h, num_heads, tokens,
        D=width, BLOCK_D=padded(width), BLOCK_N=config.tile.tokens,
        ROTARY=rotary, INTERLEAVED=interleaved, INVERSE=inverse, COMPUTE=config.triton_compute,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return q_out, k_out

"""Kernels for `landmarks`: a forward kernel for the landmarks of q and k, and a backward kernel for the gradients of q and k.

A landmark is the mean of the tokens in a window. In the forward kernel, a program computes a tile of landmarks. It loops over
their windows and reads BLOCK_N tokens of each window at a time. In the backward kernel, a program computes the gradient of a
tile of tokens. For each token, it adds the contributions of the landmarks whose windows contain the token. There is one such
landmark, or up to four if windows overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import LandmarkGradients, Needs, Pool, Rotary, empty_like_tokens
from .launch import cdiv, launch, launch_config, mask_strides, output_strides, padded, rotary_arguments, token_strides
from .tiles import is_valid, load_rotated, load_tile, rotate_pairs, store_tile


@triton.jit
def window(j, size, count, ADAPTIVE: tl.constexpr):
    """Return the first token and the length of window j of the `count` windows along an axis of `size` tokens."""
    if ADAPTIVE:
        j = j.to(tl.int64)
        first = j * size // count
        length = ((j + 1) * size + count - 1) // count - first
        first, length = first.to(tl.int32), length.to(tl.int32)
    else:
        longer = j - (count - size % count)  # if positive, how many of the windows before window j have one extra token
        first = j * (size // count) + tl.maximum(longer, 0)
        length = size // count + (longer >= 0).to(tl.int32)
    return first, length


@triton.jit
def windows_of(token, size, count, ADAPTIVE: tl.constexpr):
    """Return the indices of the first and the last window that contain `token`."""
    if ADAPTIVE:
        token = token.to(tl.int64)
        first = (token * count // size).to(tl.int32)
        last = (((token + 1) * count - 1) // size).to(tl.int32)
    else:
        short = size // count
        split = count - size % count
        first = tl.where(token < split * short, token // short, split + (token - split * short) // (short + 1))
        last = first
    return first, last


@triton.jit
def mean(
    marks, counts, x, mask, x_b, x_h, x_n, mask_b, mask_n, columns, longest, cos, sin, angle_h,
    H, prefix, rows, mark_rows, mark_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the means of x for a tile of landmarks, and the number of valid tokens in each mean."""
    L = prefix + mark_rows * mark_columns
    i_bh = (tl.program_id(0) // tl.cdiv(L, BLOCK_M)).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    first_mark = tl.program_id(0) % tl.cdiv(L, BLOCK_M) * BLOCK_M
    x += i_b * x_b + i_h * x_h
    angles = i_h * angle_h

    # A tile of tokens has BLOCK_N groups of rows, and each group has one token per landmark. With this order, each thread can
    # sum over the groups in its registers.
    o_row = tl.arange(0, BLOCK_N * BLOCK_M)
    o_token, o_mark = o_row // BLOCK_M, first_mark + o_row % BLOCK_M
    on_grid = tl.maximum(o_mark - prefix, 0)
    up, height = window(on_grid // mark_columns, rows, mark_rows, ADAPTIVE)
    along, breadth = window(on_grid % mark_columns, columns, mark_columns, ADAPTIVE)
    own = o_mark < prefix
    corner = tl.where(own, o_mark, prefix + up * columns + along)
    size = tl.where(o_mark < L, tl.where(own, 1, height * breadth), 0)

    b_sum = tl.zeros((BLOCK_N * BLOCK_M, BLOCK_D), COMPUTE)
    b_count = tl.zeros((BLOCK_N * BLOCK_M,), tl.float32)
    for start in range(0, longest, BLOCK_N):
        step = start + o_token
        o_n = corner + step // breadth * columns + step % breadth
        valid = is_valid(mask, i_b, mask_b, mask_n, o_n, step < size, MASKED)
        b_x = load_rotated(x, o_n, x_n, valid, cos + angles, sin + angles, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        b_sum += b_x.to(COMPUTE)
        b_count += valid.to(tl.float32)

    b_sum = tl.sum(tl.reshape(b_sum, (BLOCK_N, BLOCK_M, BLOCK_D)), 0)
    b_count = tl.sum(tl.reshape(b_count, (BLOCK_N, BLOCK_M)), 0)
    b_mean = b_sum / tl.maximum(b_count, 1.0).to(COMPUTE)[:, None]
    o_m = first_mark + tl.arange(0, BLOCK_M)
    store_tile(b_mean, marks + i_bh * L * D, o_m, D, o_m < L, D, BLOCK_D, ROTARY, INTERLEAVED)
    if i_h == 0:  # all heads of a sample have the same counts
        tl.store(counts + i_b * L + o_m, b_count, mask=o_m < L)


@triton.jit(
    do_not_specialize=[
        "prefix", "rows", "mark_rows", "mark_columns", "angle_h",
        "q_mask_b", "q_columns", "q_longest", "k_mask_b", "k_columns", "k_longest",
    ]
)  # fmt: skip
def landmarks_kernel(
    q_marks, q_counts, q, q_mask, q_b, q_h, q_n, q_mask_b, q_mask_n, q_columns, q_longest,
    k_marks, k_counts, k, k_mask, k_b, k_h, k_n, k_mask_b, k_mask_n, k_columns, k_longest,
    cos, sin, angle_h, H, prefix, rows, mark_rows, mark_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ADAPTIVE: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of landmarks of q (program_id(1) = 0) or of k (program_id(1) = 1)."""
    if tl.program_id(1) == 0:
        mean(
            q_marks, q_counts, q, q_mask, q_b, q_h, q_n, q_mask_b, q_mask_n, q_columns, q_longest, cos, sin, angle_h,
            H, prefix, rows, mark_rows, mark_columns,
            D, BLOCK_D, BLOCK_M, BLOCK_N, ROTARY, INTERLEAVED, ADAPTIVE, Q_MASKED, COMPUTE,
        )  # fmt: skip
    else:
        mean(
            k_marks, k_counts, k, k_mask, k_b, k_h, k_n, k_mask_b, k_mask_n, k_columns, k_longest, cos, sin, angle_h,
            H, prefix, rows, mark_rows, mark_columns,
            D, BLOCK_D, BLOCK_M, BLOCK_N, ROTARY, INTERLEAVED, ADAPTIVE, K_MASKED, COMPUTE,
        )  # fmt: skip


@triton.jit
def token_gradient(
    dx, other, dmarks, more, counts, mask, dx_b, dx_h, dx_n, other_b, other_h, other_n, mask_b, mask_n, columns, token_tiles,
    cos, sin, angle_h, H, prefix, rows, mark_rows, mark_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ADAPTIVE: tl.constexpr,
    OTHER: tl.constexpr, MORE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute dx for a tile of tokens from the gradients of the landmarks.

    The gradients of the landmarks are dmarks + more if MORE, otherwise dmarks. If OTHER, `other` is added to dx.
    """
    L = prefix + mark_rows * mark_columns
    N = prefix + rows * columns
    i_bh = (tl.program_id(0) // token_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = o_n < N
    valid = is_valid(mask, i_b, mask_b, mask_n, o_n, inside, MASKED)
    own = o_n < prefix
    on_grid = tl.maximum(o_n - prefix, 0)
    first_row, last_row = windows_of(on_grid // columns, rows, mark_rows, ADAPTIVE)
    first_column, last_column = windows_of(on_grid % columns, columns, mark_columns, ADAPTIVE)

    b_dx = tl.zeros((BLOCK_N, BLOCK_D), COMPUTE)
    for i in tl.static_range(4 if ADAPTIVE else 1):
        row, column = first_row + i // 2, first_column + i % 2
        o_m = tl.where(own, o_n, prefix + row * mark_columns + column)
        reached = valid & (row <= last_row) & (column <= last_column)
        if i > 0:
            reached &= o_n >= prefix
        b_count = tl.load(counts + i_b * L + o_m, mask=reached, other=1.0).to(COMPUTE)
        b_d = load_tile(dmarks + i_bh * L * D, o_m, D, reached, D, BLOCK_D, ROTARY, INTERLEAVED).to(COMPUTE)
        if MORE:
            b_d += load_tile(more + i_bh * L * D, o_m, D, reached, D, BLOCK_D, ROTARY, INTERLEAVED).to(COMPUTE)
        b_dx += b_d * (1.0 / b_count)[:, None]

    if ROTARY > 0:
        b_dx = rotate_pairs(b_dx, o_n, inside, cos + i_h * angle_h, sin + i_h * angle_h, ROTARY, True)
    if OTHER:
        b_dx += load_tile(
            other + i_b * other_b + i_h * other_h, o_n, other_n, inside, D, BLOCK_D, ROTARY, INTERLEAVED
        ).to(COMPUTE)  # fmt: skip
    store_tile(b_dx, dx + i_b * dx_b + i_h * dx_h, o_n, dx_n, inside, D, BLOCK_D, ROTARY, INTERLEAVED)


@triton.jit(
    do_not_specialize=[
        "prefix", "rows", "mark_rows", "mark_columns", "angle_h", "first", "token_tiles",
        "q_mask_b", "q_columns", "k_mask_b", "k_columns",
    ]
)  # fmt: skip
def landmarks_backward_kernel(
    dq, q_other, dq_marks, q_more, q_counts, q_mask,
    dq_b, dq_h, dq_n, q_other_b, q_other_h, q_other_n, q_mask_b, q_mask_n, q_columns,
    dk, k_other, dk_marks, k_more, k_counts, k_mask,
    dk_b, dk_h, dk_n, k_other_b, k_other_h, k_other_n, k_mask_b, k_mask_n, k_columns,
    first, token_tiles, cos, sin, angle_h, H, prefix, rows, mark_rows, mark_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ADAPTIVE: tl.constexpr,
    Q_OTHER: tl.constexpr, Q_MORE: tl.constexpr, Q_MASKED: tl.constexpr,
    K_OTHER: tl.constexpr, K_MORE: tl.constexpr, K_MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile of tokens of q (first + program_id(1) = 0) or of k (first + program_id(1) = 1)."""
    if first + tl.program_id(1) == 0:
        token_gradient(
            dq, q_other, dq_marks, q_more, q_counts, q_mask,
            dq_b, dq_h, dq_n, q_other_b, q_other_h, q_other_n, q_mask_b, q_mask_n, q_columns,
            token_tiles, cos, sin, angle_h, H, prefix, rows, mark_rows, mark_columns,
            D, BLOCK_D, BLOCK_N, ROTARY, INTERLEAVED, ADAPTIVE, Q_OTHER, Q_MORE, Q_MASKED, COMPUTE,
        )  # fmt: skip
    else:
        token_gradient(
            dk, k_other, dk_marks, k_more, k_counts, k_mask,
            dk_b, dk_h, dk_n, k_other_b, k_other_h, k_other_n, k_mask_b, k_mask_n, k_columns,
            token_tiles, cos, sin, angle_h, H, prefix, rows, mark_rows, mark_columns,
            D, BLOCK_D, BLOCK_N, ROTARY, INTERLEAVED, ADAPTIVE, K_OTHER, K_MORE, K_MASKED, COMPUTE,
        )  # fmt: skip


def longest_window(size: int, count: int, adaptive: bool) -> int:
    """Return the length of the longest of `count` windows along an axis of `size` tokens."""
    rest = size % count
    return -(-size // count) + int(adaptive and rest > 0 and count % rest > 0)


def landmarks_forward(
    q: Tensor, k: Tensor | None, q_mask: Tensor | None, k_mask: Tensor | None, rotary: Rotary | None, pool: Pool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, _, width = q.shape
    prefix, rows, mark_rows, mark_columns, adaptive = pool
    num_marks = prefix + mark_rows * mark_columns
    config = launch_config("landmarks", q, width, q)
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)

    def side(x: Tensor, mask: Tensor | None) -> tuple[Tensor | int, ...]:
        marks = x.new_empty(batch, num_heads, num_marks, width)
        counts = x.new_empty(batch, num_marks, dtype=torch.float32)
        columns = (x.shape[2] - prefix) // rows
        longest = longest_window(rows, mark_rows, adaptive) * longest_window(columns, mark_columns, adaptive)
        return marks, counts, x, x if mask is None else mask, *token_strides(x), *mask_strides(mask), columns, longest

    of_q = side(q, q_mask)
    of_k = of_q if k is None else side(k, k_mask)
    launch(
        landmarks_kernel,
        (batch * num_heads * cdiv(num_marks, config.tile.slots), 1 if k is None else 2),
        *of_q, *of_k, cos, sin, angle_h, num_heads, prefix, rows, mark_rows, mark_columns,
        D=width, BLOCK_D=padded(width), BLOCK_M=config.tile.slots, BLOCK_N=config.tile.tokens,
        **turn, ADAPTIVE=adaptive,
        Q_MASKED=q_mask is not None, K_MASKED=k_mask is not None, COMPUTE=config.triton_compute,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    q_marks, q_counts, *_ = of_q
    k_marks, k_counts, *_ = of_k if k is not None else (q_marks.new_empty(0), q_counts.new_empty(0))
    return q_marks, k_marks, q_counts, k_counts


def landmarks_backward(
    gradients: LandmarkGradients, q: Tensor, k: Tensor | None, q_mask: Tensor | None, k_mask: Tensor | None,
    rotary: Rotary | None, pool: Pool, q_counts: Tensor, k_counts: Tensor | None, needs: Needs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, _, width = q.shape
    dq_other, dk_other, dq_marks, dq_marks_2, dk_marks, dk_marks_2 = gradients
    (need_q, need_k), (prefix, rows, mark_rows, mark_columns, adaptive) = needs, pool
    dq = empty_like_tokens(q, width) if need_q else q.new_empty(0)
    dk = empty_like_tokens(k, width) if need_k else q.new_empty(0)
    config = launch_config("landmarks_backward", q, width, q)
    cos, sin, angle_h, turn = rotary_arguments(rotary, q)
    token_tiles = cdiv(max(x.shape[2] for x in (q, k) if x is not None), config.tile.tokens)

    def side(
        x: Tensor, dx: Tensor, other: Tensor | None, dmarks: Tensor, more: Tensor | None, counts: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | int, ...]:
        dmarks, columns = dmarks.contiguous(), (x.shape[2] - prefix) // rows
        more, other, mask_bn = dmarks if more is None else more.contiguous(), dx if other is None else other, mask_strides(mask)
        return (
            dx, other, dmarks, more, counts, dx if mask is None else mask,
            *output_strides(dx), *output_strides(other), *mask_bn, columns,
        )  # fmt: skip

    if not (need_q or need_k):
        return dq, dk
    of_q = side(q, dq, dq_other, dq_marks, dq_marks_2, q_counts, q_mask) if need_q else ()
    of_k = side(k, dk, dk_other, dk_marks, dk_marks_2, k_counts, k_mask) if need_k else of_q
    launch(
        landmarks_backward_kernel,
        (batch * num_heads * token_tiles, need_q + need_k),
        *(of_q or of_k), *of_k, 0 if need_q else 1, token_tiles, cos, sin, angle_h, num_heads,
        prefix, rows, mark_rows, mark_columns,
        D=width, BLOCK_D=padded(width), BLOCK_N=config.tile.tokens,
        **turn, ADAPTIVE=adaptive,
        Q_OTHER=dq_other is not None, Q_MORE=dq_marks_2 is not None, Q_MASKED=q_mask is not None,
        K_OTHER=dk_other is not None, K_MORE=dk_marks_2 is not None, K_MASKED=k_mask is not None,
        COMPUTE=config.triton_compute,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dq, dk

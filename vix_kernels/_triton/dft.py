"""Kernels for `dft`: matrix products with cosines and sines (see primitives/dft.py for the equation).

The input has N tokens and D channels, and indices are modulo N and D. Let C_N[a, n] = cos(2 pi an / N) and
S_N[a, n] = sin(2 pi an / N). For 0 <= n <= N / 2, let row n of E be the sum of tokens n and -n, and let row n of O be their
difference. If n = -n, row n of E is token n. Then

    P = C_N (E C_D)        R = S_N (O S_D)        y at (a, b) and (-a, -b) is P - R        y at (-a, b) and (a, -b) is P + R

Therefore, only half of the rows n, half of the rows a and half of the columns b are needed. The first kernel computes tables of
cosines and sines, the second kernel sums over channels, and the third kernel sums over tokens. Each call recomputes the tables,
because a cache would need to handle streams and CUDA graphs.

The intermediate result is zero-padded to a multiple of BLOCK_K rows per sample, so the loop in the third kernel needs no masks.
A tile may contain rows of several samples (in the second kernel) or columns of several samples (in the third kernel).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, cdiv, launch, launch_config
from .tiles import cast, dot

WIDTH = 64  # width to look up in the launch table; the tiles do not depend on the number of channels
ALIGNED = 16  # the intermediate result has a multiple of this number of columns, for 128-bit accesses
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def turn(index, length, COMPUTE: tl.constexpr):
    """Return the cosine and the sine of 2 pi index / length, for 0 <= index < length."""
    quarter = (4 * index + length // 2) // length
    rest = (4 * index - quarter * length).to(COMPUTE) / length * HALF_PI  # -pi / 4 to pi / 4, from the nearest quarter turn
    square = rest * rest
    c = tl.full(index.shape, 1.0, COMPUTE)
    s = tl.full(index.shape, 1.0, COMPUTE)
    TERMS: tl.constexpr = 9 if COMPUTE == tl.float64 else 5
    for i in tl.static_range(TERMS, 0, -1):
        c = 1.0 - c * square * (1.0 / (2 * i * (2 * i - 1)))
        s = 1.0 - s * square * (1.0 / (2 * i * (2 * i + 1)))
    s *= rest
    odd = quarter % 2 == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where((quarter + 1) & 2 != 0, -cos, cos)
    return cos, tl.where(quarter & 2 != 0, -sin, sin)


@triton.jit
def store_turns(cos, sin, i, length, rows, columns, COMPUTE: tl.constexpr):
    """Store elements `i` of two (rows, columns) tables: the cosines and sines of 2 pi row * column / length."""
    c, s = turn((i // columns) * (i % columns) % length, length, COMPUTE)
    inside = i < rows * columns
    tl.store(cos + i, cast(c, cos.dtype.element_ty), mask=inside)
    tl.store(sin + i, cast(s, sin.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def dft_tables_kernel(
    over_channels, over_tokens, N, D, channel_rows, channel_columns, token_rows, token_columns,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute a block of the tables for channels (program_id(1) = 0) or for tokens (program_id(1) = 1)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        sin = over_channels + channel_rows * channel_columns
        store_turns(over_channels, sin, i, D, channel_rows, channel_columns, COMPUTE)
    else:
        sin = over_tokens + token_rows * token_columns
        store_turns(over_tokens, sin, i, N, token_rows, token_columns, COMPUTE)


@triton.jit(do_not_specialize=["B", "N"])
def dft_channels_kernel(
    x, table, folded, x_b, x_n, B, N, rows,
    D: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, SHRINK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the products E C_D and O S_D, multiplied by SHRINK / 2 to avoid overflow in float16.

    The table has PADDED columns. Each product has the shape (rows, COLUMNS).
    """
    column_tiles: tl.constexpr = PADDED // BLOCK_C
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tl.arange(0, BLOCK_K)
    i_b, o_n = row // rows, row % rows
    valid = (i_b < B) & (o_n < N // 2 + 1)
    mirror = tl.where(o_n == 0, 0, N - o_n)
    # The weight 1/2 keeps the sums in the range of x. If a token and its mirror image are the same, the sum contains the token
    # twice, so the weight is 1/4.
    weight = tl.where(o_n == mirror, 0.25, 0.5).to(COMPUTE)[:, None]
    p_x = x + (i_b * x_b + o_n * x_n)[:, None] + o_k[None, :]
    p_y = x + (i_b * x_b + mirror * x_n)[:, None] + o_k[None, :]
    p_cos = table + o_k[:, None] * PADDED + o_c[None, :]
    p_sin = p_cos + tl.cdiv(D, BLOCK_K) * BLOCK_K * PADDED

    dtype = x.dtype.element_ty
    b_even = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    b_odd = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    for start in range(0, D, BLOCK_K):
        inside = valid[:, None] & (start + o_k < D)[None, :]
        b_x = tl.load(p_x + start, mask=inside, other=0.0).to(COMPUTE) * weight
        b_y = tl.load(p_y + start, mask=inside, other=0.0).to(COMPUTE)
        b_cos, b_sin = tl.load(p_cos + start * PADDED), tl.load(p_sin + start * PADDED)
        b_even = dot(cast(tl.fma(b_y, weight, b_x), dtype), b_cos, b_even, PRECISION)
        b_odd = dot(cast(tl.fma(-b_y, weight, b_x), dtype), b_sin, b_odd, PRECISION)

    at = (i_b * 2 * rows + o_n)[:, None] * COLUMNS + o_c[None, :]
    inside = (i_b < B)[:, None] & (o_c < COLUMNS)[None, :]
    tl.store(folded + at, cast(b_even * SHRINK, dtype), mask=inside)
    tl.store(folded + rows * COLUMNS + at, cast(b_odd * SHRINK, dtype), mask=inside)


@triton.jit(do_not_specialize=["B", "N"])
def dft_tokens_kernel(
    table, folded, y, B, N, rows, table_rows,
    D: tl.constexpr, COLUMNS: tl.constexpr, SHRINK: tl.constexpr, ORTHO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute y for a tile of rows a <= N / 2 and columns b < COLUMNS, and for the mirror images of the tile."""
    row_tiles = tl.cdiv(table_rows, BLOCK_N)
    o_a = tl.program_id(0) % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_C
    i_b = first // COLUMNS
    column = tl.multiple_of((first % COLUMNS).to(tl.int32), 16) + tl.arange(0, BLOCK_C)
    o_k = tl.arange(0, BLOCK_K)
    later, o_c = column // COLUMNS, column % COLUMNS  # the tile begins in sample i_b and may extend to later samples
    exists = i_b + later < B
    p_cos = table + o_a[:, None] * rows + o_k[None, :]
    p_sin = p_cos + table_rows * rows
    at = (tl.where(exists, later, 0) * 2 * rows * COLUMNS + o_c)[None, :] + (o_k * COLUMNS)[:, None]
    p_even = folded + i_b * 2 * rows * COLUMNS + at
    p_odd = p_even + rows * COLUMNS

    dtype = y.dtype.element_ty
    b_p = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    b_r = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    for start in range(0, rows, BLOCK_K):
        b_p = dot(tl.load(p_cos + start), tl.load(p_even + start * COLUMNS), b_p, PRECISION)
        b_r = dot(tl.load(p_sin + start), tl.load(p_odd + start * COLUMNS), b_r, PRECISION)

    scale = tl.full((1, 1), 2 / SHRINK, COMPUTE)
    if ORTHO:
        scale /= tl.sqrt((N * D).to(COMPUTE))
    minus, plus = cast((b_p - b_r) * scale, dtype), cast((b_p + b_r) * scale, dtype)
    y += i_b * N * D
    here = (later * N * D)[None, :] + (o_a * D)[:, None]
    there = (later * N * D)[None, :] + ((N - o_a) * D)[:, None]
    real = (o_a < N // 2 + 1)[:, None]
    mirrored = ((o_a >= 1) & (o_a < N - N // 2))[:, None]
    columns = (exists & (o_c < D))[None, :]
    tl.store(y + here + o_c[None, :], minus, mask=real & columns)
    tl.store(y + there + o_c[None, :], plus, mask=mirrored & columns)
    if COLUMNS < D:
        columns = (exists & (o_c >= 1) & (o_c <= D - COLUMNS))[None, :]
        tl.store(y + here + (D - o_c)[None, :], plus, mask=real & columns)
        tl.store(y + there + (D - o_c)[None, :], minus, mask=mirrored & columns)


def dft(x: Tensor, ortho: bool) -> Tensor:
    batch, tokens, width = x.shape
    over_channels, over_tokens = (launch_config(kernel, x, WIDTH, x) for kernel in ("dft_channels", "dft_tokens"))
    width_step, step = 64 // x.element_size(), 128 // x.element_size()  # channels and tokens per step
    half = tokens // 2 + 1
    # `columns` is a multiple of ALIGNED, so a few columns beyond half of the channels are computed. They are stored directly
    # instead of as mirror images of other columns, because stores of mirror images are not vectorized.
    columns, rows = _multiple(width // 2 + 1, ALIGNED), _multiple(half, step)
    padded_width, padded_columns = _multiple(width, width_step), _multiple(columns, over_channels.tile.slots)
    padded_rows = _multiple(half, over_tokens.tile.tokens)
    channel_table, token_table = x.new_empty(2, padded_width, padded_columns), x.new_empty(2, padded_rows, rows)
    block = 1024
    launch(
        dft_tables_kernel,
        (cdiv(max(channel_table.numel(), token_table.numel()) // 2, block), 2),
        channel_table, token_table, tokens, width, padded_width, padded_columns, padded_rows, rows,
        BLOCK=block, COMPUTE=over_tokens.triton_compute, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip

    folded, y = x.new_empty(batch, 2, rows, columns), x.new_empty(x.shape)
    # SHRINK scales the intermediate result to about an eighth of the magnitude of x, to avoid overflow in float16. It is a
    # power of two, so the scaling does not round.
    sizes = dict(D=width, COLUMNS=columns, SHRINK=2.0 ** -(width.bit_length() // 2 + 2))
    launch(
        dft_channels_kernel,
        (cdiv(batch * rows, over_channels.tile.tokens) * (padded_columns // over_channels.tile.slots),),
        x, channel_table, folded, x.stride(0), x.stride(1), batch, tokens, rows,
        PADDED=padded_columns, BLOCK_K=width_step, **sizes, **_meta(over_channels),
    )  # fmt: skip
    launch(
        dft_tokens_kernel,
        (cdiv(batch * columns, over_tokens.tile.slots) * (padded_rows // over_tokens.tile.tokens),),
        token_table, folded, y, batch, tokens, rows, padded_rows,
        ORTHO=ortho, BLOCK_K=step, **sizes, **_meta(over_tokens),
    )  # fmt: skip
    return y


def _multiple(size: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `size`."""
    return cdiv(size, unit) * unit


def _meta(config: LaunchConfig) -> dict[str, Any]:
    tile = config.tile
    return dict(
        BLOCK_N=tile.tokens, BLOCK_C=tile.slots, COMPUTE=config.triton_compute, PRECISION=config.precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip

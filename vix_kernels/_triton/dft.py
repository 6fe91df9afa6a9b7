"""Kernels for `dft`: products with cosines and sines, folded along both axes (see primitives/dft.py for the equation).

The input has N tokens and D channels, and indices are modulo N and D. Let C_N[a, n] = cos(2 pi an / N) and
S_N[a, n] = sin(2 pi an / N), and let row n of E and O be the sum and the difference of the tokens n and -n. Then

    P = C_N (E C_D)        R = S_N (O S_D)        y at (a, b) and (-a, -b) is P - R        y at (-a, b) and (a, -b) is P + R

Therefore only half of the tokens, half of the rows a and half of the columns b are needed. The first kernel sums over channels,
and the second kernel sums over tokens. Cosines and sines are never stored in memory. Each kernel computes a tile of them
once, and in every step of its loop it rotates this tile by the angles of that step.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, launch, launch_config
from .tiles import cast, dot, load_tile

WIDTH = 64  # width to look up in the launch table; the tiles do not depend on the number of channels
BLOCK_K = 32  # tokens or channels per step
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def turn(index, length, COMPUTE: tl.constexpr):
    """Return the cosine and the sine of 2 pi index / length, for 0 <= index < length."""
    quarter = (4 * index + length // 2) // length
    rest = (4 * index - quarter * length).to(COMPUTE) / length * HALF_PI  # angle from the nearest quarter turn, <= pi / 4
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
def turned(c, s, turn_c, turn_s):
    """Return the cosine and the sine of the sum of two angles, given the cosine and the sine of each."""
    return c * turn_c - s * turn_s, s * turn_c + c * turn_s


@triton.jit(do_not_specialize=["N"])
def dft_channels_kernel(
    x, folded, x_b, x_n, N,
    D: tl.constexpr, COLUMNS: tl.constexpr, SHRINK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the products E C_D and O S_D, multiplied by SHRINK / 2.

    Each product has the shape (N // 2 + 1, COLUMNS).
    """
    half = N // 2 + 1
    row_tiles = tl.cdiv(half, BLOCK_N)
    column_tiles = COLUMNS // BLOCK_C
    i_b = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    o_n = tl.program_id(0) // column_tiles % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) % column_tiles * BLOCK_C
    o_c = column + tl.arange(0, BLOCK_C)
    valid = o_n < half
    mirror = tl.where(o_n == 0, 0, N - o_n)
    # The weight 1/2 keeps the sums in the range of x. If a token and its mirror image are the same, the sum contains the token
    # twice, so the weight is 1/4.
    weight = tl.where(o_n == mirror, 0.25, 0.5).to(COMPUTE)[:, None]
    x += i_b * x_b

    dtype = x.dtype.element_ty
    o_k = tl.arange(0, BLOCK_K)
    b_c, b_s = turn(o_k[:, None] * o_c[None, :] % D, D, COMPUTE)
    b_even = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    b_odd = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    for start in range(0, D, BLOCK_K):
        b_x = load_tile(x, o_n, x_n, valid, D, BLOCK_K, 0, True, False, start).to(COMPUTE) * weight
        b_y = load_tile(x, mirror, x_n, valid, D, BLOCK_K, 0, True, False, start).to(COMPUTE) * weight
        turn_c, turn_s = turn(start * o_c % D, D, COMPUTE)
        cos, sin = turned(b_c, b_s, turn_c[None, :], turn_s[None, :])
        b_even = dot(cast(b_x + b_y, dtype), cast(cos, dtype), b_even, PRECISION)
        b_odd = dot(cast(b_x - b_y, dtype), cast(sin, dtype), b_odd, PRECISION)

    folded += i_b * 2 * half * COLUMNS
    at = o_n[:, None] * COLUMNS + o_c[None, :]
    tl.store(folded + at, cast(b_even * SHRINK, dtype), mask=valid[:, None])
    tl.store(folded + half * COLUMNS + at, cast(b_odd * SHRINK, dtype), mask=valid[:, None])


@triton.jit(do_not_specialize=["N"])
def dft_tokens_kernel(
    folded, y, N,
    D: tl.constexpr, COLUMNS: tl.constexpr, SHRINK: tl.constexpr, ORTHO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute y for a tile of rows a <= N / 2 and columns b < COLUMNS, and for the mirror images of the tile."""
    half = N // 2 + 1
    row_tiles = tl.cdiv(half, BLOCK_N)
    column_tiles = COLUMNS // BLOCK_C
    i_b = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    column = tl.program_id(0) // row_tiles % column_tiles * BLOCK_C
    o_c = column + tl.arange(0, BLOCK_C)
    o_a = tl.program_id(0) % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    folded += i_b * 2 * half * COLUMNS

    dtype = y.dtype.element_ty
    o_k = tl.arange(0, BLOCK_K)
    b_c, b_s = turn(o_a[:, None] * o_k[None, :] % N, N, COMPUTE)
    b_p = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    b_r = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    for start in range(0, half, BLOCK_K):
        o_n = start + o_k
        at = o_n[:, None] * COLUMNS + o_c[None, :]
        b_even = tl.load(folded + at, mask=(o_n < half)[:, None], other=0.0)
        b_odd = tl.load(folded + half * COLUMNS + at, mask=(o_n < half)[:, None], other=0.0)
        turn_c, turn_s = turn(o_a * start % N, N, COMPUTE)
        cos, sin = turned(b_c, b_s, turn_c[:, None], turn_s[:, None])
        b_p = dot(cast(cos, dtype), b_even, b_p, PRECISION)
        b_r = dot(cast(sin, dtype), b_odd, b_r, PRECISION)

    scale = tl.full((1, 1), 2 / SHRINK, COMPUTE)
    if ORTHO:
        scale /= tl.sqrt((N * D).to(COMPUTE))
    minus, plus = cast((b_p - b_r) * scale, dtype), cast((b_p + b_r) * scale, dtype)
    y += i_b * N * D
    here = y + o_a[:, None] * D
    there = y + (N - o_a)[:, None] * D
    rows = (o_a < half)[:, None]
    mirrored = ((o_a >= 1) & (o_a < N - N // 2))[:, None]
    columns = (o_c < D)[None, :]
    tl.store(here + o_c[None, :], minus, mask=rows & columns)
    tl.store(there + o_c[None, :], plus, mask=mirrored & columns)
    if COLUMNS < D:
        columns = ((o_c >= 1) & (o_c <= D - COLUMNS))[None, :]
        tl.store(here + (D - o_c)[None, :], plus, mask=rows & columns)
        tl.store(there + (D - o_c)[None, :], minus, mask=mirrored & columns)


def dft(x: Tensor, ortho: bool) -> Tensor:
    batch, tokens, width = x.shape
    over_channels, over_tokens = (launch_config(kernel, x, WIDTH, x) for kernel in ("dft_channels", "dft_tokens"))
    # The last tile may extend beyond half of the channels. The kernels compute its additional columns instead of storing mirror
    # images of other columns there, because stores of mirror images are not vectorized.
    block = max(over_channels.tile.slots, over_tokens.tile.slots)
    half, columns = tokens // 2 + 1, triton.cdiv(width // 2 + 1, block) * block
    folded, y = x.new_empty(batch, 2, half, columns), x.new_empty(x.shape)
    # SHRINK scales the intermediate result to about an eighth of the magnitude of x, to avoid overflow in float16. It is a
    # power of two, so the scaling does not round.
    sizes = dict(D=width, COLUMNS=columns, SHRINK=2.0 ** -(width.bit_length() // 2 + 2))
    launch(
        dft_channels_kernel, _grid(over_channels, batch, half, columns),
        x, folded, x.stride(0), x.stride(1), tokens, **sizes, **_meta(over_channels),
    )  # fmt: skip
    launch(
        dft_tokens_kernel, _grid(over_tokens, batch, half, columns),
        folded, y, tokens, ORTHO=ortho, **sizes, **_meta(over_tokens),
    )  # fmt: skip
    return y


def _grid(config: LaunchConfig, batch: int, rows: int, columns: int) -> tuple[int]:
    return (batch * triton.cdiv(rows, config.tile.tokens) * (columns // config.tile.slots),)


def _meta(config: LaunchConfig) -> dict[str, Any]:
    tile = config.tile
    return dict(
        BLOCK_N=tile.tokens, BLOCK_C=tile.slots, BLOCK_K=BLOCK_K, COMPUTE=config.triton_compute, PRECISION=config.precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip

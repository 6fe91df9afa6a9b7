"""Device functions shared by the kernels: matrix products with a given precision, and loads and stores of tiles.

A tile has one row per token or slot, and BLOCK_D columns. The columns are the channels of a head, starting at channel `column`
and padded with zeros. With RoPE, the columns are in pair order: columns 2i and 2i + 1 are the two channels rotated by angle i.
Loads convert from the order in memory to pair order, and stores convert back. Logits are sums over columns, so the order
of the columns does not matter if it is the same for tokens and slots.
"""

import triton
import triton.language as tl

from ..backends import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Triton's interpreter multiplies the bit patterns of bfloat16 tiles instead of their values. When it converts to bfloat16, it
# truncates instead of rounding. If INTERPRETED, `dot` and `cast` avoid both, to match a GPU. Compiled kernels do not contain
# this code.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in acc's dtype.

    On a GPU, each element of the result depends only on its element of acc, its row of a and its column of b. In the
    interpreter, the rounding would also depend on the shape of the tile, so the sum is computed in float64 and then rounded.
    """
    if INTERPRETED:
        x = tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64), out_dtype=tl.float64).to(acc.dtype)
    else:
        x = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return x


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Convert x to DTYPE, rounding to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, bits)  # rounded, so truncation is exact
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def split(x, DTYPE: tl.constexpr):
    """Split x into two DTYPE tiles whose sum approximates x.

    With both tiles, float32 slots keep at least 16 bits of precision in products with 16-bit tokens.
    """
    high = cast(x, DTYPE)
    return high, cast(x - high.to(x.dtype), DTYPE)


@triton.jit
def split_parts(x, DTYPE: tl.constexpr, SPLIT: tl.constexpr):
    """Return split(x, DTYPE) if SPLIT, otherwise (x, x). In the second case, products use only the first tile."""
    high, low = x, x
    if SPLIT:
        high, low = split(x, DTYPE)
    return high, low


@triton.jit
def slot_program(M, N, chunk, BLOCK_M: tl.constexpr):
    """Return the (sample, head) pair, the tile of slots and the chunk of tokens that a program processes.

    Tokens are split into chunks because the batch and the heads alone may not fill the device. The results of the chunks are
    stored as (batch x heads, chunks, M).

    Returns:
        The index of the (sample, head) pair, the index of the chunk among the chunks of all pairs, the first slot, the first
        token, and the end of the chunk (exclusive).
    """
    slot_tiles = tl.cdiv(M, BLOCK_M)
    chunks = tl.cdiv(N, chunk)
    part = (tl.program_id(0) // slot_tiles).to(tl.int64)
    first = (part % chunks).to(tl.int32) * chunk
    return part // chunks, part, tl.program_id(0) % slot_tiles * BLOCK_M, first, tl.minimum(first + chunk, N)


@triton.jit
def token_program(N, BLOCK_N: tl.constexpr):
    """Return the (sample, head) pair and the tile of tokens that a program processes.

    Returns:
        The index of the (sample, head) pair, the indices of the tokens, and a mask of the indices below N.
    """
    token_tiles = tl.cdiv(N, BLOCK_N)
    o_n = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return (tl.program_id(0) // token_tiles).to(tl.int64), o_n, o_n < N


@triton.jit
def stream_program(N, chunk):
    """Return the (sample, head) pair and the chunk of tokens that a program processes with all slots of the head.

    Returns:
        The index of the (sample, head) pair, the first token, and the end of the chunk (exclusive).
    """
    chunks = tl.cdiv(N, chunk)
    first = tl.program_id(0) % chunks * chunk
    return (tl.program_id(0) // chunks).to(tl.int64), first, tl.minimum(first + chunk, N)


@triton.jit
def is_valid(mask, i_b, mask_b, mask_n, o_n, inside, MASKED: tl.constexpr):
    """Return a mask of the tokens that are `inside` and, if MASKED, valid."""
    if MASKED:
        inside &= tl.load(mask + i_b * mask_b + o_n.to(tl.int64) * mask_n, mask=inside, other=0) != 0
    return inside


@triton.jit
def table_start(head, angle_h, ROTARY: tl.constexpr):
    """Return the offset of a head's table in cos and sin.

    A table has a row of ROTARY / 2 elements per token. If ROTARY / 2 is a multiple of 4, 8 or 16, so is head * angle_h.
    tl.multiple_of passes this hint to the compiler, which can then load up to 128 bits at a time.
    """
    start = head * angle_h
    if ROTARY > 0 and (ROTARY // 2) % 16 == 0:
        start = tl.multiple_of(start, 16)
    elif ROTARY > 0 and (ROTARY // 2) % 8 == 0:
        start = tl.multiple_of(start, 8)
    elif ROTARY > 0 and (ROTARY // 2) % 4 == 0:
        start = tl.multiple_of(start, 4)
    return start


@triton.jit
def rotate_pairs(
    x, angles, valid, cos, sin, ROTARY: tl.constexpr, INVERSE: tl.constexpr, AGAIN: tl.constexpr = False, column=0
):  # fmt: skip
    """Rotate the pairs of columns of x (rows, BLOCK_D), or rotate them back if INVERSE.

    For each row of x, `angles` contains the index of a row of cos and sin. `column` is the index of the first column of x in
    the head. Columns of the head with an index of ROTARY or greater do not change.
    """
    pairs = column // 2 + tl.arange(0, x.shape[1] // 2)
    at = angles[:, None] * (ROTARY // 2) + pairs[None, :]
    inside = valid[:, None] & (pairs < ROTARY // 2)[None, :]
    # Gradient kernels load the same values before a loop and, with AGAIN, after it. The eviction policies differ, so the
    # compiler does not merge the two loads. The values of a merged load would occupy registers during the loop.
    if AGAIN:
        c = tl.load(cos + at, mask=inside, other=1.0).to(x.dtype)
        s = tl.load(sin + at, mask=inside, other=0.0).to(x.dtype)
    else:
        c = tl.load(cos + at, mask=inside, other=1.0, eviction_policy="evict_last").to(x.dtype)
        s = tl.load(sin + at, mask=inside, other=0.0, eviction_policy="evict_last").to(x.dtype)
    if INVERSE:
        s = -s
    u, v = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(u * c - v * s, u * s + v * c), x.shape)


@triton.jit
def pair_channels(BLOCK_D: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, column):
    """Return the first and the second channel of each pair, and masks of the channels below D.

    This function is for embeddings that are not INTERLEAVED: pair i consists of the channels i and i + ROTARY / 2. From channel
    ROTARY on, adjacent channels form pairs.
    """
    pairs = column // 2 + tl.arange(0, BLOCK_D // 2)
    if ROTARY == D:  # a separate case, so that the compiler sees two contiguous ranges and uses 128-bit accesses
        first, second = pairs, pairs + D // 2
        has_first, has_second = pairs < D // 2, pairs < D // 2
    else:
        first = tl.where(pairs < ROTARY // 2, pairs, 2 * pairs)
        second = tl.where(pairs < ROTARY // 2, pairs + ROTARY // 2, 2 * pairs + 1)
        has_first, has_second = first < D, second < D
    return first, second, has_first, has_second


@triton.jit
def load(pointers, mask, AGAIN: tl.constexpr):
    """Load values, or 0 where `mask` is False.

    Set AGAIN to load the same values a second time, after a loop. A different eviction policy then keeps the compiler from
    reusing the first load.
    """
    if AGAIN:
        x = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    return x


@triton.jit
def load_tile(
    base, rows, stride, valid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, AGAIN: tl.constexpr = False,
    column=0,
):  # fmt: skip
    """Load a tile of tokens (rows, BLOCK_D), in pair order if ROTARY > 0. Rows that are not valid are 0."""
    start = base + rows.to(tl.int64) * stride
    if ROTARY == 0 or INTERLEAVED:
        columns = column + tl.arange(0, BLOCK_D)
        x = load(start[:, None] + columns[None, :], valid[:, None] & (columns < D)[None, :], AGAIN)
    else:
        first, second, has_first, has_second = pair_channels(BLOCK_D, D, ROTARY, column)
        u = load(start[:, None] + first[None, :], valid[:, None] & has_first[None, :], AGAIN)
        v = load(start[:, None] + second[None, :], valid[:, None] & has_second[None, :], AGAIN)
        x = tl.reshape(tl.join(u, v), (rows.shape[0], BLOCK_D))
    return x


@triton.jit
def store_tile(
    x, base, rows, stride, valid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, column=0,
):  # fmt: skip
    """Round x to the dtype of `base` and store it in the layout that load_tile reads. Skip rows that are not valid."""
    start = base + rows.to(tl.int64) * stride
    x = cast(x, base.dtype.element_ty)
    if ROTARY == 0 or INTERLEAVED:
        columns = column + tl.arange(0, BLOCK_D)
        tl.store(start[:, None] + columns[None, :], x, mask=valid[:, None] & (columns < D)[None, :])
    else:
        first, second, has_first, has_second = pair_channels(BLOCK_D, D, ROTARY, column)
        u, v = tl.split(tl.reshape(x, (x.shape[0], BLOCK_D // 2, 2)))
        tl.store(start[:, None] + first[None, :], u, mask=valid[:, None] & has_first[None, :])
        tl.store(start[:, None] + second[None, :], v, mask=valid[:, None] & has_second[None, :])


@triton.jit
def load_rotated(
    base, rows, stride, valid, cos, sin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, COMPUTE: tl.constexpr,
    column=0, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Load a tile of tokens and rotate it if ROTARY > 0. The result has the dtype of the tokens in memory."""
    x = load_tile(base, rows, stride, valid, D, BLOCK_D, ROTARY, INTERLEAVED, AGAIN, column)
    if ROTARY > 0:
        x = cast(rotate_pairs(x.to(COMPUTE), rows, valid, cos, sin, ROTARY, False, AGAIN, column), x.dtype)
    return x


@triton.jit
def store_unrotated(
    x, base, rows, stride, valid, cos, sin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, column=0,
):  # fmt: skip
    """Store the gradient of a tile that load_rotated has loaded. If ROTARY > 0, the gradient is rotated back first."""
    if ROTARY > 0:
        x = rotate_pairs(x, rows, valid, cos, sin, ROTARY, True, True, column)
    store_tile(x, base, rows, stride, valid, D, BLOCK_D, ROTARY, INTERLEAVED, column)


@triton.jit
def slot_channels(D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, column=0):
    """Return the index of the channel in each column of a tile."""
    columns = column + tl.arange(0, BLOCK_D)
    if ROTARY > 0 and not INTERLEAVED:
        columns = tl.where(columns < ROTARY, columns // 2 + (columns % 2) * (ROTARY // 2), columns)
    return columns


@triton.jit
def load_slots(
    base, rows, stride, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load a tile of slots (rows, BLOCK_D) in the column order of the tokens. Rows whose index is M or greater are 0."""
    columns = slot_channels(D, BLOCK_D, ROTARY, INTERLEAVED)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_unit(unit, size, delta, rows, inside, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load unit, size and delta, the results of `prepare`, for a tile of slots. Rows that are not `inside` are 0."""
    o_e = tl.arange(0, BLOCK_E)
    b_unit = tl.load(unit + rows[:, None] * E + o_e[None, :], mask=inside[:, None] & (o_e < E)[None, :], other=0.0)
    b_size = tl.load(size + rows, mask=inside, other=0.0)
    b_delta = tl.load(delta + rows, mask=inside, other=0.0)
    return b_unit, b_size, b_delta


@triton.jit
def store_slots(
    x, base, part, o_m, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store a tile x of slots or slot gradients, computed from one chunk of tokens.

    The columns of x are in the order of load_slots. They are stored in channel order.
    """
    columns = slot_channels(D, BLOCK_D, ROTARY, INTERLEAVED)
    inside = (o_m < M)[:, None] & (columns < D)[None, :]
    tl.store(base + (part * M + o_m)[:, None] * D + columns[None, :], cast(x, base.dtype.element_ty), mask=inside)


@triton.jit
def store_state(b_values, b_number, values, number, part, o_m, M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store the results of one chunk of tokens for a tile of slots: a row of values and a scalar, such as lse, per slot."""
    rows = part * M + o_m
    o_e = tl.arange(0, BLOCK_E)
    tl.store(number + rows, b_number, mask=o_m < M)
    tl.store(values + rows[:, None] * E + o_e[None, :], b_values, mask=(o_m < M)[:, None] & (o_e < E)[None, :])


@triton.jit
def exps_below(logits, row_max):
    """Return exp2(logits - row_max), limited to 1.

    `row_max` contains the largest logit of each slot in the forward pass. In the backward pass, a logit can be slightly larger
    than `row_max`, because it can be rounded differently.
    """
    return tl.exp2(tl.minimum(logits - row_max, 0.0))


@triton.jit
def halves(x):
    """Return the left and the right half of the columns of x."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def halved_products(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x @ y^T, computed as two products, each over half of the columns."""
    left_x, right_x = halves(x)
    left_y, right_y = halves(y)
    return dot(right_x, tl.trans(right_y), dot(left_x, tl.trans(left_y), acc, PRECISION), PRECISION)


@triton.jit
def row_products(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x @ y^T for operands in the same dtype."""
    if x.dtype == tl.float32 and x.shape[1] > 128:  # in quarters, because rows of 256 float32 elements do not fit in registers
        left_x, right_x = halves(x)
        left_y, right_y = halves(y)
        acc = halved_products(right_x, right_y, halved_products(left_x, left_y, acc, PRECISION), PRECISION)
    else:
        acc = dot(x, tl.trans(y), acc, PRECISION)
    return acc


@triton.jit
def swapped_products(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x @ y^T, bit-identical to the transpose of row_products(y, x, acc^T).

    If a float32 product is computed as three TF32 products, its rounding depends on which operand is on the left. The backward
    pass must round logits as the forward pass does.
    """
    if x.dtype == tl.float32:
        acc = tl.trans(row_products(y, x, tl.trans(acc), PRECISION))
    else:
        acc = row_products(x, y, acc, PRECISION)
    return acc


@triton.jit
def left_products(high, low, y, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x @ y^T, where (high, low) is split_parts(x, y.dtype, SPLIT)."""
    if SPLIT:
        acc = dot(high, tl.trans(y), dot(low, tl.trans(y), acc, PRECISION), PRECISION)
    else:
        acc = row_products(high, y, acc, PRECISION)
    return acc


@triton.jit
def right_products(x, high, low, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x @ y^T, where (high, low) is split_parts(y, x.dtype, SPLIT)."""
    if SPLIT:
        acc = dot(x, tl.trans(high), dot(x, tl.trans(low), acc, PRECISION), PRECISION)
    else:
        acc = row_products(x, high, acc, PRECISION)
    return acc

"""Device functions for the logits of softmax attention between tokens and slots (see primitives/aggregate.py).

A kernel computes one exponential per logit. In the time that one exponential takes, a multiprocessor issues about eight
instructions, so every instruction per logit counts. Where possible, these functions work per slot or per token instead of per
logit, or use matrix instructions.

If slots are float32 and tokens are 16-bit (SPLIT), each tile of slots is split into two 16-bit tiles when it is loaded. With
FOLD, the tile is first multiplied by scale * log2(e), and vectors, such as biases, are added by a matrix product. With SPLIT,
`broadcast` always uses FOLD, and `aggregate` uses it only for bfloat16. A float32 number y is the sum of three bfloat16 numbers
y0, y1 and y2, so the addition

    acc[n, m] + y[m]  =  acc + [1 1 1 0 ... 0] @ [y0 y1 y2 0 ... 0]^T

takes one matrix instruction with an inner dimension of 16, the smallest possible, instead of an addition per logit.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .tiles import INTERPRETED, LOG2E, cast, dot, left_products, load_slots, right_products, split_parts

EXCLUDED = tl.constexpr(-3e38)  # bias of invalid slots instead of -inf, because -inf - -inf would be NaN


@triton.jit
def slot_parts(slots, scale, DTYPE: tl.constexpr, SPLIT: tl.constexpr, FOLD: tl.constexpr):
    """Return the slots as two tiles.

    If SPLIT, the results are two DTYPE tiles whose sum approximates the slots. Otherwise, both results are the slots, and
    products use only the first one. If FOLD, the slots are multiplied by scale * log2(e) before the split. For bfloat16, the
    multiplication does not reduce the precision of the split, because bfloat16 has the range of float32.
    """
    if FOLD:
        slots = slots * (scale * LOG2E)
    return split_parts(slots, DTYPE, SPLIT)


@triton.jit
def three_columns(x, y, z):
    """Return a bfloat16 tile (rows, 16) whose first columns are x, y and z, and whose other columns are 0.

    The cast to bfloat16 follows the reshape, because Triton 3.8 and 3.9 crash if a transposed operand of a product is a
    reshaped `tl.join`.
    """
    zero = tl.zeros_like(x)
    none = tl.join(tl.join(zero, zero), tl.join(zero, zero))
    tile = tl.join(tl.join(tl.join(tl.join(x, y), tl.join(z, zero)), none), tl.join(none, none))
    return cast(tl.reshape(tl.permute(tile, (0, 4, 3, 2, 1)), (x.shape[0], 16)), tl.bfloat16)


@triton.jit
def bias_columns(bias):
    """Return a tile (rows, 16) whose product with the transpose of `ones_columns` has `bias` in every column.

    `bias` is float32 and may contain -inf.
    """
    high = cast(bias, tl.bfloat16).to(bias.dtype)
    rest = tl.where(bias == float("-inf"), 0.0, bias - high)  # -inf - -inf would be NaN
    middle = cast(rest, tl.bfloat16).to(bias.dtype)
    return three_columns(high, middle, rest - middle)


@triton.jit
def ones_columns(ROWS: tl.constexpr):
    """Return a tile (ROWS, 16) with ones in its first three columns and zeros elsewhere (see `bias_columns`)."""
    column = tl.arange(0, 16)
    return tl.broadcast_to(tl.where(column < 3, 1.0, 0.0).to(tl.bfloat16)[None, :], (ROWS, 16))


@triton.jit
def key_logits(
    high, low, k, bias, scale, SPLIT: tl.constexpr, FOLD: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return the base-2 logits (slots, tokens) of a tile of slots and a tile of keys.

    `high` and `low` are the slots, as returned by `slot_parts`. `bias` has one number per key.
    """
    acc = tl.zeros((high.shape[0], k.shape[0]), COMPUTE)
    if FOLD:
        acc = dot(ones_columns(high.shape[0]), tl.trans(bias_columns(bias)), acc, PRECISION)
    acc = left_products(high, low, k, acc, SPLIT, PRECISION)
    if not FOLD:
        acc = acc * (scale * LOG2E) + bias[None, :]
    return acc


@triton.jit
def exps_at_most_one(x):
    """Return exp2(-|x|), where x is a logit minus the maximum. If rounding makes x positive, the result is still at most 1.

    On NVIDIA GPUs, the exponential instruction computes -|x| at no cost. Without inline PTX, LLVM would add a bitwise or.
    """
    if INTERPRETED:
        p = tl.exp2(-tl.abs(x))
    elif is_cuda():
        asm: tl.constexpr = "{ .reg .f32 t; abs.f32 t, $1; neg.f32 t, t; ex2.approx.ftz.f32 $0, t; }"
        p = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        p = tl.exp2(-tl.abs(x))
    return p


@triton.jit
def slot_bias(bias, o_m, bias_m, M, BIASED: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the base-2 bias of a tile of slots.

    The bias of invalid slots and of indices >= M is EXCLUDED, so that their probability is 0.
    """
    if BIASED == "mask":
        b_bias = tl.where(tl.load(bias + o_m.to(tl.int64) * bias_m, mask=o_m < M, other=0) != 0, 0.0, EXCLUDED).to(COMPUTE)
    elif BIASED == "bias":
        b_bias = tl.load(bias + o_m.to(tl.int64) * bias_m, mask=o_m < M, other=EXCLUDED)
        b_bias = tl.maximum(b_bias, EXCLUDED, propagate_nan=tl.PropagateNan.ALL)
    else:
        b_bias = tl.where(o_m < M, 0.0, EXCLUDED).to(COMPUTE)
    return b_bias


@triton.jit
def load_attended(
    slots, values, bias, slots_m, values_m, bias_m, start, M, scale, DTYPE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load a tile of slots for `attend` and `tile_products`.

    Returns:
        high and low (the two tiles that `slot_parts` returns), the values, and the base-2 bias. If SPLIT, the bias is a tile
        (see `bias_columns`).
    """
    o_m = start + tl.arange(0, BLOCK_M)
    b_slots = load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    high, low = slot_parts(b_slots, scale, DTYPE, SPLIT, SPLIT)
    b_values = cast(load_slots(values, o_m, values_m, M, E, BLOCK_E, 0, True), DTYPE)
    b_bias = slot_bias(bias, o_m, bias_m, M, BIASED, COMPUTE)
    if SPLIT:
        b_bias = bias_columns(b_bias)
    return high, low, b_values, b_bias


@triton.jit
def slot_logits(q, high, low, bias, scale, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the base-2 logits of a tile of tokens and a tile of slots. For high, low and bias, see `load_attended`."""
    acc = tl.zeros((q.shape[0], high.shape[0]), COMPUTE)
    if SPLIT:
        acc = dot(ones_columns(q.shape[0]), tl.trans(bias), acc, PRECISION)
    acc = right_products(q, high, low, acc, SPLIT, PRECISION)
    if not SPLIT:
        acc = acc * (scale * LOG2E) + bias[None, :]
    return acc

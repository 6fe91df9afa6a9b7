"""Device functions for the logits of softmax attention.

A kernel at the hardware's limit computes one exponential per logit and issues about eight instructions for it, so every
instruction per logit counts. These functions move work from the logits to the slots, the tokens and the tensor cores.

If slots are float32 and tokens 16-bit (SPLIT), slots are multiplied by scale * log2(e) and split into two 16-bit tiles once,
before the loop over tokens. Vectors, such as the bias of the slots, are then added by a product as well: a float32 number is
the sum of three bfloat16 numbers, so

    acc[n, m] + x[n] + y[m]  =  acc + [x0 x1 x2 1 1 1] @ [1 1 1 y0 y1 y2]^T

takes one matrix instruction whose inner dimension is 16, the smallest there is, instead of two additions per logit.
"""

import triton
import triton.language as tl

from .tiles import LOG2E, cast, dot, load_slots, split, whole_products

LOWEST = tl.constexpr(-3e38)  # stands for -inf, whose three parts would be NaN; finite in bfloat16 and float32


@triton.jit
def terms(x):
    """Split a float32 vector into three bfloat16 vectors whose sum is x to 24 bits. -inf becomes LOWEST."""
    x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    high = cast(x, tl.bfloat16)
    rest = x - high.to(x.dtype)
    middle = cast(rest, tl.bfloat16)
    return high, middle, cast(rest - middle.to(x.dtype), tl.bfloat16)


@triton.jit
def term_tile(a0, a1, a2, b0, b1, b2, c0, c1, c2):
    """Return a bfloat16 tile (rows, 16) whose columns are nine vectors and zeros, in an order that all such tiles share."""
    z = tl.zeros_like(a0)
    left = tl.join(tl.join(tl.join(a0, a1), tl.join(a2, b0)), tl.join(tl.join(b1, b2), tl.join(c0, c1)))
    right = tl.join(tl.join(tl.join(c2, z), tl.join(z, z)), tl.join(tl.join(z, z), tl.join(z, z)))
    return tl.reshape(tl.join(left, right), (a0.shape[0], 16))


@triton.jit
def term_rows(a, b, c, FIRST: tl.constexpr):
    """Return a bfloat16 tile (16, columns) whose rows FIRST to FIRST + 2 are a, b and c. The others are 0.

    This is the right operand for a term_tile. A transposed join there would crash Triton 3.6 to 3.9.
    """
    row = tl.arange(0, 16)[:, None]
    rest = tl.where(row == FIRST + 2, c[None, :], 0.0).to(tl.bfloat16)
    return tl.where(row == FIRST, a[None, :], tl.where(row == FIRST + 1, b[None, :], rest))


@triton.jit
def slot_bias(bias, o_m, bias_m, M, BIASED: tl.constexpr, COMPUTE: tl.constexpr):
    """Return the base-2 bias of a tile of slots. It is LOWEST for indices of M or greater, so their probability is 0."""
    if BIASED == "mask":
        b_bias = tl.where(tl.load(bias + o_m.to(tl.int64) * bias_m, mask=o_m < M, other=0) != 0, 0.0, LOWEST).to(COMPUTE)
    elif BIASED:
        b_bias = tl.load(bias + o_m.to(tl.int64) * bias_m, mask=o_m < M, other=LOWEST)
        b_bias = tl.maximum(b_bias, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    else:
        b_bias = tl.where(o_m < M, 0.0, LOWEST).to(COMPUTE)
    return b_bias


@triton.jit
def load_attended(
    slots, values, bias, slots_m, values_m, bias_m, start, M, scale, DTYPE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load a tile of slots and their values. Return the operands of slot_logits, with the values before the last of them."""
    o_m = start + tl.arange(0, BLOCK_M)
    high = load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    b_values = cast(load_slots(values, o_m, values_m, M, E, BLOCK_E, 0, True), DTYPE)
    b_bias = slot_bias(bias, o_m, bias_m, M, BIASED, COMPUTE)
    low = high
    if SPLIT:
        high, low = split(high * (scale * LOG2E), DTYPE)
        a, b, c = terms(b_bias)
        b_bias = term_rows(a, b, c, 0)
    return high, low, b_values, b_bias


@triton.jit
def slot_logits(q, high, low, bias, scale, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the base-2 logits of a tile of tokens and a tile of slots."""
    acc = tl.zeros((q.shape[0], high.shape[0]), COMPUTE)
    if SPLIT:  # bias, in three columns, is multiplied by ones
        acc = dot(tl.full((q.shape[0], 16), 1.0, tl.bfloat16), bias, acc, PRECISION)
        acc = dot(q, tl.trans(high), dot(q, tl.trans(low), acc, PRECISION), PRECISION)
    else:
        acc = whole_products(q, high, acc, PRECISION) * (scale * LOG2E) + bias[None, :]
    return acc

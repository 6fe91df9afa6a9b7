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

from .tiles import cast

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

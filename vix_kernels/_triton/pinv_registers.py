"""Iterations of `pinv` on matrices in registers, and a forward kernel with these iterations.

See _torch/pinv.py for the equations. For every polynomial p, Z p(A Z) = p(Z A) Z. The kernels can therefore multiply from the
left:

    X = Z A    W = X X - 7 X    Y = W X + 15 X    Z' = 1/4 (13 Z - Y Z)

The left operand of a product is then usually the result of the previous product, which is still in registers. The right operand
is stored in shared memory. Unless the inputs are float64, each operand consists of one or two float16 parts (see `parts`). A
product with one part per operand has the same error as a TF32 product and takes half the time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pinv_landmarks import attention, has_landmark, load_rows, start_scale
from .pinv_steps import DA, DY, DZ, A, Z, part
from .tiles import cast, dot, store_tile

UNIT = tl.constexpr(64.0)  # factor of operands that are split into two parts, so that the low part is not subnormal
LARGEST = tl.constexpr(7)  # the largest element of dZ is scaled to at least 2^-LARGEST and less than 2^(1 - LARGEST)


@triton.jit
def parts(x, PARTS: tl.constexpr):
    """Return x as two tiles, high and low, for `product`.

    If PARTS is 0, both are x. If PARTS is 1, both are x in float16. If PARTS is 2, they are two float16 tiles whose sum
    approximates UNIT * x.
    """
    if PARTS == 0:
        high, low = x, x
    elif PARTS == 1:
        high = cast(x, tl.float16)
        low = high
    else:
        x *= UNIT
        high = cast(x, tl.float16)
        low = cast(x - high.to(x.dtype), tl.float16)
    return high, low


@triton.jit
def product(
    x, y, COMPUTE: tl.constexpr, PARTS: tl.constexpr, X_TURNED: tl.constexpr = False, Y_TURNED: tl.constexpr = False,
):  # fmt: skip
    """Return x @ y. x is transposed if X_TURNED, and y is transposed if Y_TURNED. For PARTS, see `parts`.

    With two parts, the result has about the precision of float32. The product of the two low parts is negligible at this
    precision, so it is skipped.
    """
    zeros = tl.zeros((x.shape[0], y.shape[0]), COMPUTE)
    x, x_low = parts(x, PARTS)
    y, y_low = parts(y, PARTS)
    if X_TURNED:
        x, x_low = tl.trans(x), tl.trans(x_low)
    if Y_TURNED:
        y, y_low = tl.trans(y), tl.trans(y_low)
    if PARTS == 2:
        acc = dot(x, y, dot(x, y_low, dot(x_low, y, zeros, "ieee"), "ieee"), "ieee") * (1 / (UNIT * UNIT))
    else:
        acc = dot(x, y, zeros, "ieee")
    return acc


@triton.jit
def polynomial(a, z, COMPUTE: tl.constexpr, PARTS: tl.constexpr):
    """Return X and Y, computed from A and Z."""
    x = product(z, a, COMPUTE, PARTS)
    w = product(x, x, COMPUTE, PARTS) - 7 * x
    return x, product(w, x, COMPUTE, PARTS) + 15 * x


@triton.jit
def advance(a, z, COMPUTE: tl.constexpr, PARTS: tl.constexpr):
    """Return the next Z, computed from A and the current Z."""
    _, y = polynomial(a, z, COMPUTE, PARTS)
    return 3.25 * z - 0.25 * product(y, z, COMPUTE, PARTS)


@triton.jit
def normalize(dz, size, PARTS: tl.constexpr):
    """Return dz and `size`, rescaled by a power of two such that the gradient dz * size does not change.

    The scaling keeps dz and its products within the range of float16. If PARTS is 0, both are returned unchanged.
    """
    if PARTS > 0:
        exponent = tl.max(tl.max(tl.abs(dz), 1), 0).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent + LARGEST, 1), 253)
        dz *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        size *= (exponent << 23).to(tl.float32, bitcast=True)
    return dz, size


@triton.jit
def differentiate(memory, a, z, dz, SIZE: tl.constexpr, COMPUTE: tl.constexpr, PARTS: tl.constexpr):
    """Backpropagate through the iteration that computes the next Z from `z`. `dz` is the gradient of the next Z.

    Return the gradient of `z`, and the contribution of the iteration to dA. X and Y are symmetric up to rounding, so they are
    not transposed.
    """
    p_dz, p_dy = part(memory, DZ, 0, 0, SIZE, SIZE, SIZE), part(memory, DY, 0, 0, SIZE, SIZE, SIZE)
    x, y = polynomial(a, z, COMPUTE, PARTS)
    dy = product(dz, z, COMPUTE, PARTS, Y_TURNED=True) * -0.25
    dz = 3.25 * dz - 0.25 * product(y, dz, COMPUTE, PARTS)
    tl.store(p_dz, dz)
    if PARTS == 2:
        tl.store(p_dy, dy)
    tl.debug_barrier()  # wait until all threads have written dZ and dY
    right = product(dy, x, COMPUTE, PARTS) - 7 * dy
    left = product(x, dy, COMPUTE, PARTS) + right
    dx = product(right, x, COMPUTE, PARTS) + product(x, left, COMPUTE, PARTS)
    if PARTS == 2:
        dy = tl.load(p_dy)
    dx += 15 * dy
    da = product(z, dx, COMPUTE, PARTS, X_TURNED=True)
    dz = tl.load(p_dz) + product(dx, a, COMPUTE, PARTS, Y_TURNED=True)
    tl.debug_barrier()  # wait until all threads have read dZ and dY
    return dz, da


@triton.jit
def advance_all(memory, history, iterations, SIZE: tl.constexpr, COMPUTE: tl.constexpr, PARTS: tl.constexpr):
    """Run all iterations. Replace Z in `memory` with the result, and store the input of each iteration in `history`."""
    a, z = tl.load(part(memory, A, 0, 0, SIZE, SIZE, SIZE)), tl.load(part(memory, Z, 0, 0, SIZE, SIZE, SIZE))
    for t in tl.range(0, iterations, disable_licm=True):
        tl.store(part(history, 0, t * SIZE, 0, SIZE, SIZE, SIZE), cast(z, history.dtype.element_ty))
        z = advance(a, z, COMPUTE, PARTS)
    tl.debug_barrier()  # wait until all threads have read Z_0
    tl.store(part(memory, Z, 0, 0, SIZE, SIZE, SIZE), z)
    tl.debug_barrier()


@triton.jit
def differentiate_all(memory, history, iterations, SIZE: tl.constexpr, COMPUTE: tl.constexpr, PARTS: tl.constexpr):
    """Backpropagate through all iterations.

    Matrix DZ in `memory` contains the gradient of the final Z. Replace it with the gradient of Z_0. Add the contributions of
    all iterations to matrix DA.
    """
    p_dz, p_da = part(memory, DZ, 0, 0, SIZE, SIZE, SIZE), part(memory, DA, 0, 0, SIZE, SIZE, SIZE)
    dz, size = tl.load(p_dz), tl.full((), 1.0, COMPUTE)
    for t in tl.range(iterations - 1, -1, -1, disable_licm=True):
        tl.debug_barrier()  # wait until all threads have written dA
        dz, size = normalize(dz, size, PARTS)
        a = tl.load(part(memory, A, 0, 0, SIZE, SIZE, SIZE))
        z = tl.load(part(history, 0, t * SIZE, 0, SIZE, SIZE, SIZE))
        dz, da = differentiate(memory, a, z, dz, SIZE, COMPUTE, PARTS)
        tl.store(p_da, tl.load(p_da) + da * size)
    tl.debug_barrier()  # wait until all threads have read dZ
    tl.store(p_dz, dz * size)
    tl.debug_barrier()


@triton.jit
def store_products(
    x, y, out, y_l, out_l, counts, i_b, counts_b, counts_l, L, TURNED: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store x @ y in `out`. x is transposed if TURNED. For each row of y, `counts` has the number of tokens in its landmark."""
    o_l = tl.arange(0, SIZE)
    if TURNED:
        x = tl.trans(x)
    for column in range(0, WIDTH, STEP):
        b_y = load_rows(y, y_l, o_l, column, counts, i_b, counts_b, counts_l, L, WIDTH, STEP, MASKED)
        b_out = dot(x, b_y.to(x.dtype), tl.zeros((SIZE, STEP), x.dtype), PRECISION)
        store_tile(b_out, out, o_l, out_l, o_l < L, WIDTH, STEP, 0, True, column)


@triton.jit(do_not_specialize=["L", "iterations", "scale", "q_counts_b", "k_counts_b"])
def pinv_forward_registers_kernel(
    q, k, values, q_counts, k_counts, out,
    q_b, q_h, q_l, k_b, k_h, k_l, values_b, values_h, values_l, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
    out_b, out_h, out_l, H, L, iterations, scale,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute out = Z @ values for one head of one sample. Z is the result of the last iteration."""
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    q, k, values = q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h, values + i_b * values_b + i_h * values_h
    o_l = tl.arange(0, SIZE)
    has_row = has_landmark(q_counts, i_b, q_counts_b, q_counts_l, o_l, L, Q_MASKED)
    has_column = has_landmark(k_counts, i_b, k_counts_b, k_counts_l, o_l, L, K_MASKED)
    b_a = attention(q, k, q_l, k_l, o_l, o_l, has_row, has_column, scale, D, STEP, COMPUTE, PRECISION)
    s, _ = start_scale(tl.sum(b_a, 0))
    b_z = tl.trans(b_a) / s
    for _ in range(iterations):
        b_z = advance(b_a, b_z, COMPUTE, PARTS)
    out += i_b * out_b + i_h * out_h
    store_products(
        b_z, values, out, values_l, out_l, q_counts, i_b, q_counts_b, q_counts_l, L, False, E, SIZE, STEP, Q_MASKED, PRECISION
    )  # fmt: skip

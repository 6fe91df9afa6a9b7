"""Iterations of `pinv` on matrices in global memory (see _torch/pinv.py for the equations).

The matrices of a head are padded with zeros to SIZE x SIZE. They are stored one after the other in a buffer that only one
program uses. To save registers, `multiply` computes ROWS rows at a time, and sums over STEP columns of the left matrix at a
time. Barriers are needed because threads read values that other threads have stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot

# The index (PLACE) of each matrix in the buffer of a program. The forward kernel uses only the first FORWARD matrices. dW
# overwrites Y, and dX overwrites dY, once the old matrix is no longer needed.
A, Z, X, W, Y = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
DY, DZ, DA, MIDDLE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
DW, DX = Y, DY
FORWARD, BACKWARD = tl.constexpr(5), tl.constexpr(9)


@triton.jit
def part(memory, PLACE: tl.constexpr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Return pointers to ROWS rows and COLUMNS columns of the matrix with index PLACE, starting at `row` and `column`.

    The pointers for different matrices differ by a constant, which needs no register.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return memory + (rows[:, None] * SIZE + columns[None, :]) + (PLACE * SIZE * SIZE + row * SIZE + column)


@triton.jit
def multiply(
    memory, LEFT: tl.constexpr, RIGHT: tl.constexpr, OUT: tl.constexpr, L,
    SIZE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    LEFT_TURNED: tl.constexpr = False, RIGHT_TURNED: tl.constexpr = False, FACTOR: tl.constexpr = 1,
    OTHER: tl.constexpr = 0, WEIGHT: tl.constexpr = 0, ADD: tl.constexpr = False,
):  # fmt: skip
    """Compute OUT = FACTOR * (LEFT @ RIGHT + WEIGHT * OTHER + OUT). The last term is added only if ADD.

    LEFT is transposed if LEFT_TURNED, and RIGHT is transposed if RIGHT_TURNED. Unless LEFT is transposed, OUT may be the same
    matrix as LEFT.
    """
    ROWS: tl.constexpr = min(SIZE, 64)
    for row in range(0, SIZE, ROWS):
        if WEIGHT == 0:
            acc = tl.zeros((ROWS, SIZE), memory.dtype.element_ty)
        else:
            acc = tl.load(part(memory, OTHER, row, 0, ROWS, SIZE, SIZE)) * WEIGHT
        if ADD:
            acc += tl.load(part(memory, OUT, row, 0, ROWS, SIZE, SIZE))
        for start in range(0, L, STEP):
            if LEFT_TURNED:
                x = tl.trans(tl.load(part(memory, LEFT, start, row, STEP, ROWS, SIZE)))
            else:
                x = tl.load(part(memory, LEFT, row, start, ROWS, STEP, SIZE))
            if RIGHT_TURNED:
                y = tl.trans(tl.load(part(memory, RIGHT, 0, start, SIZE, STEP, SIZE)))
            else:
                y = tl.load(part(memory, RIGHT, start, 0, STEP, SIZE, SIZE))
            acc = dot(x, y, acc, PRECISION)
        tl.debug_barrier()  # wait until all threads have read the old OUT
        tl.store(part(memory, OUT, row, 0, ROWS, SIZE, SIZE), acc * FACTOR)
    tl.debug_barrier()  # wait until all threads have written the new OUT


@triton.jit
def polynomial(memory, L, SIZE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """Compute X, W and Y from A and Z."""
    multiply(memory, A, Z, X, L, SIZE, STEP, PRECISION)
    multiply(memory, X, X, W, L, SIZE, STEP, PRECISION, OTHER=X, WEIGHT=-7)
    multiply(memory, X, W, Y, L, SIZE, STEP, PRECISION, OTHER=X, WEIGHT=15)


@triton.jit
def advance(memory, L, SIZE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """Run one iteration: replace Z with the next Z."""
    polynomial(memory, L, SIZE, STEP, PRECISION)
    multiply(memory, Z, Y, Z, L, SIZE, STEP, PRECISION, OTHER=Z, WEIGHT=-13, FACTOR=-0.25)


@triton.jit
def differentiate(memory, L, SIZE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """Backpropagate through the iteration that computes the next Z from Z.

    Replace dZ, the gradient of the next Z, with the gradient of Z. Add the contribution of the iteration to dA.
    """
    polynomial(memory, L, SIZE, STEP, PRECISION)
    multiply(memory, Z, DZ, DY, L, SIZE, STEP, PRECISION, LEFT_TURNED=True, FACTOR=-0.25)
    multiply(memory, DZ, Y, DZ, L, SIZE, STEP, PRECISION, RIGHT_TURNED=True, OTHER=DZ, WEIGHT=-13, FACTOR=-0.25)
    multiply(memory, X, DY, DW, L, SIZE, STEP, PRECISION, LEFT_TURNED=True)
    multiply(memory, DY, W, DX, L, SIZE, STEP, PRECISION, RIGHT_TURNED=True, OTHER=DY, WEIGHT=15)
    multiply(memory, DW, X, DX, L, SIZE, STEP, PRECISION, RIGHT_TURNED=True, OTHER=DW, WEIGHT=-7, ADD=True)
    multiply(memory, X, DW, DX, L, SIZE, STEP, PRECISION, LEFT_TURNED=True, ADD=True)
    multiply(memory, DX, Z, DA, L, SIZE, STEP, PRECISION, RIGHT_TURNED=True, ADD=True)
    multiply(memory, A, DX, DZ, L, SIZE, STEP, PRECISION, LEFT_TURNED=True, ADD=True)


@triton.jit
def restart(memory, s, late, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Set Z to Z_0 = A^T / s or, if `late`, to the matrix that `keep_middle` has saved."""
    for row in range(0, SIZE, STEP):
        z = tl.trans(tl.load(part(memory, A, 0, row, SIZE, STEP, SIZE))) / s
        if late:
            z = tl.load(part(memory, MIDDLE, row, 0, STEP, SIZE, SIZE))
        tl.store(part(memory, Z, row, 0, STEP, SIZE, SIZE), z)
    tl.debug_barrier()


@triton.jit
def keep_middle(memory, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Save Z for `restart`. Call this function before the middle iteration."""
    for row in range(0, SIZE, STEP):
        z = tl.load(part(memory, Z, row, 0, STEP, SIZE, SIZE))
        tl.store(part(memory, MIDDLE, row, 0, STEP, SIZE, SIZE), z)
    tl.debug_barrier()

"""Kernels of `pinv` (primitives/pinv.py states the equations, primitives/batched_pinv.py the steps): a program a head.

The L x L matrices of a head stand in registers up to L = 64. Larger ones fit neither there nor in shared memory: each has a
place in global memory, from which products take them in slices. That memory is a program's own, so as many programs as there
are multiprocessors walk over the heads, and what they write stays in the second-level cache.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..primitives import batched_pinv
from .configs import launch_config
from .launch import launch
from .layout import mask_strides, output_strides, padded, token_strides
from .tiles import LOG2E, dot, load_tile, row_products, store_tile

MOST_LANDMARKS = 128
IN_REGISTERS = 64
FORWARD_PLACES, BACKWARD_PLACES = 4, 9  # matrices of a program in memory


@triton.jit
def square(place, SIZE: tl.constexpr):
    """Pointers to a matrix in memory."""
    rows = tl.arange(0, SIZE)
    return place + rows[:, None] * SIZE + rows[None, :]


@triton.jit
def hold(x, place, IN_MEMORY: tl.constexpr):
    """The matrix x as `product` takes it: x itself, or its place in memory."""
    if IN_MEMORY:
        tl.debug_barrier()  # threads have read what stood there
        tl.store(square(place, x.shape[0]), x)
        tl.debug_barrier()  # and may read what others wrote
        held = place
    else:
        held = x
    return held


@triton.jit
def read(held, SIZE: tl.constexpr):
    """A matrix that is held."""
    if held.dtype.is_ptr():
        x = tl.load(square(held, SIZE))
    else:
        x = held
    return x


@triton.jit
def product(
    x, y, acc, STEP: tl.constexpr, PRECISION: tl.constexpr, X_TURNED: tl.constexpr = False, Y_TURNED: tl.constexpr = False
):  # fmt: skip
    """acc + x @ y of matrices that are held, transposed where TURNED."""
    if x.dtype.is_ptr():
        SIZE: tl.constexpr = acc.shape[0]
        rows = tl.arange(0, SIZE)
        for start in range(0, SIZE, STEP):
            slice = start + tl.arange(0, STEP)
            if X_TURNED:
                b_x = tl.trans(tl.load(x + slice[:, None] * SIZE + rows[None, :]))
            else:
                b_x = tl.load(x + rows[:, None] * SIZE + slice[None, :])
            if Y_TURNED:
                b_y = tl.trans(tl.load(y + rows[:, None] * SIZE + slice[None, :]))
            else:
                b_y = tl.load(y + slice[:, None] * SIZE + rows[None, :])
            acc = dot(b_x, b_y, acc, PRECISION)
    else:
        acc = dot(tl.trans(x) if X_TURNED else x, tl.trans(y) if Y_TURNED else y, acc, PRECISION)
    return acc


@triton.jit
def takes_part(counts, i_b, counts_b, counts_l, landmarks, L, MASKED: tl.constexpr):
    """Which landmarks there are, of those that average tokens."""
    valid = landmarks < L
    if MASKED:
        valid &= tl.load(counts + i_b * counts_b + landmarks.to(tl.int64) * counts_l, mask=valid, other=0.0) > 0
    return valid


@triton.jit
def attention(
    q, k, q_l, k_l, rows, columns, scale,
    D: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A, 0 outside of `rows` and `columns`."""
    landmarks = tl.arange(0, SIZE)
    logits = tl.zeros((SIZE, SIZE), COMPUTE)
    for column in range(0, D, STEP):
        b_q = load_tile(q, landmarks, q_l, rows, D, STEP, 0, True, False, column)
        b_k = load_tile(k, landmarks, k_l, columns, D, STEP, 0, True, False, column)
        logits = row_products(b_q, b_k, logits, False, False, PRECISION)
    logits = tl.where(columns[None, :], logits * (scale * LOG2E), float("-inf"))
    top = tl.max(logits, 1)
    a = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(a, 1)
    return tl.where(rows[:, None], a / tl.where(total == 0, 1.0, total)[:, None], 0.0)


@triton.jit
def start_scale(a):
    """The largest column sum of A, or 1 if it is 0, and what share of its gradient each column takes."""
    sums = tl.sum(a, 0)
    s = tl.max(sums, 0)
    largest = (sums == s).to(a.dtype)
    return tl.where(s == 0, 1.0, s), largest / tl.sum(largest, 0)


@triton.jit
def polynomial(
    a, z, x_place, w_place, y_place, SIZE: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """X, W and Y of a step."""
    x = hold(product(a, z, tl.zeros((SIZE, SIZE), COMPUTE), STEP, PRECISION), x_place, IN_MEMORY)
    w = hold(product(x, x, read(x, SIZE) * -7, STEP, PRECISION), w_place, IN_MEMORY)
    y = hold(product(x, w, read(x, SIZE) * 15, STEP, PRECISION), y_place, IN_MEMORY)
    return x, w, y


@triton.jit
def walk(
    a, z, steps, z_place, x_place, w_place, SIZE: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Z after some steps more."""
    for _ in range(steps):
        x, w, y = polynomial(a, z, x_place, w_place, w_place, SIZE, STEP, COMPUTE, PRECISION, IN_MEMORY)
        z = hold(product(z, y, read(z, SIZE) * -13, STEP, PRECISION) * -0.25, z_place, IN_MEMORY)
    return z


@triton.jit(do_not_specialize=["pairs", "L", "iterations", "scale", "q_counts_b", "k_counts_b"])
def pinv_forward_kernel(
    q, k, values, q_counts, k_counts, out, places,
    q_b, q_h, q_l, k_b, k_h, k_l, values_b, values_h, values_l, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
    out_b, out_h, out_l, pairs, H, L, iterations, scale,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """out of the heads of all samples, (batch x heads) `pairs`."""
    MATRIX: tl.constexpr = SIZE * SIZE
    landmarks = tl.arange(0, SIZE)
    places += tl.program_id(0).to(tl.int64) * (4 * MATRIX)
    for i_bh in range(tl.program_id(0), pairs, tl.num_programs(0)):
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        rows = takes_part(q_counts, i_b, q_counts_b, q_counts_l, landmarks, L, Q_MASKED)
        columns = takes_part(k_counts, i_b, k_counts_b, k_counts_l, landmarks, L, K_MASKED)
        b_a = attention(
            q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h, q_l, k_l, rows, columns, scale,
            D, SIZE, STEP, COMPUTE, PRECISION,
        )  # fmt: skip
        s, _ = start_scale(b_a)
        a = hold(b_a, places, IN_MEMORY)
        z = hold(tl.trans(b_a) / s, places + MATRIX, IN_MEMORY)
        z = walk(
            a, z, iterations, places + MATRIX, places + 2 * MATRIX, places + 3 * MATRIX,
            SIZE, STEP, COMPUTE, PRECISION, IN_MEMORY,
        )  # fmt: skip
        for column in range(0, E, STEP):
            b_v = load_tile(
                values + i_b * values_b + i_h * values_h, landmarks, values_l, rows, E, STEP, 0, True, False, column
            )  # fmt: skip
            b_out = dot(read(z, SIZE), b_v, tl.zeros((SIZE, STEP), COMPUTE), PRECISION)
            store_tile(b_out, out + i_b * out_b + i_h * out_h, landmarks, out_l, landmarks < L, E, STEP, 0, True, column)


@triton.jit(do_not_specialize=["pairs", "L", "iterations", "scale", "q_counts_b", "k_counts_b"])
def pinv_backward_kernel(
    dout, q, k, values, q_counts, k_counts, dq, dk, dvalues, places,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, values_b, values_h, values_l,
    q_counts_b, q_counts_l, k_counts_b, k_counts_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dvalues_b, dvalues_h, dvalues_l, pairs, H, L, iterations, scale,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_VALUES: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """dq, dk and dvalues of the heads of all samples; steps are walked again, from the start or from the middle one."""
    MATRIX: tl.constexpr = SIZE * SIZE
    landmarks = tl.arange(0, SIZE)
    inside = landmarks < L
    places += tl.program_id(0).to(tl.int64) * (9 * MATRIX)
    z_place, x_place, w_place = places + MATRIX, places + 2 * MATRIX, places + 3 * MATRIX
    y_place, dy_place, dz_place = places + 4 * MATRIX, places + 5 * MATRIX, places + 6 * MATRIX
    half = iterations // 2
    zeros = tl.zeros((SIZE, SIZE), COMPUTE)
    for i_bh in range(tl.program_id(0), pairs, tl.num_programs(0)):
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        rows = takes_part(q_counts, i_b, q_counts_b, q_counts_l, landmarks, L, Q_MASKED)
        columns = takes_part(k_counts, i_b, k_counts_b, k_counts_l, landmarks, L, K_MASKED)
        p_q, p_k = q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h
        p_values, p_dout = values + i_b * values_b + i_h * values_h, dout + i_b * dout_b + i_h * dout_h
        b_a = attention(p_q, p_k, q_l, k_l, rows, columns, scale, D, SIZE, STEP, COMPUTE, PRECISION)
        s, share = start_scale(b_a)
        a = hold(b_a, places, IN_MEMORY)
        z = hold(tl.trans(b_a) / s, z_place, IN_MEMORY)
        z = walk(a, z, half, z_place, x_place, w_place, SIZE, STEP, COMPUTE, PRECISION, IN_MEMORY)
        if NEED_Q or NEED_K:
            middle = hold(read(z, SIZE), places + 7 * MATRIX, IN_MEMORY)
        if NEED_VALUES:
            z = walk(a, z, iterations - half, z_place, x_place, w_place, SIZE, STEP, COMPUTE, PRECISION, IN_MEMORY)
            for column in range(0, E, STEP):
                b_dout = load_tile(p_dout, landmarks, dout_l, columns, E, STEP, 0, True, False, column)
                b_dv = dot(tl.trans(read(z, SIZE)), b_dout, tl.zeros((SIZE, STEP), COMPUTE), PRECISION)
                store_tile(
                    b_dv, dvalues + i_b * dvalues_b + i_h * dvalues_h, landmarks, dvalues_l, inside, E, STEP, 0, True, column
                )  # fmt: skip
        if NEED_Q or NEED_K:
            b_dz = zeros
            for column in range(0, E, STEP):
                b_dout = load_tile(p_dout, landmarks, dout_l, columns, E, STEP, 0, True, False, column)
                b_v = load_tile(p_values, landmarks, values_l, rows, E, STEP, 0, True, False, column)
                b_dz = row_products(b_dout, b_v, b_dz, False, False, PRECISION)
            dz = hold(b_dz, dz_place, IN_MEMORY)
            da = hold(zeros, places + 8 * MATRIX, IN_MEMORY)
            for t in range(iterations - 1, -1, -1):
                late = t >= half
                z = hold(tl.where(late, read(middle, SIZE), tl.trans(read(a, SIZE)) / s), z_place, IN_MEMORY)
                steps = tl.where(late, t - half, t)
                z = walk(a, z, steps, z_place, x_place, w_place, SIZE, STEP, COMPUTE, PRECISION, IN_MEMORY)
                x, w, y = polynomial(a, z, x_place, w_place, y_place, SIZE, STEP, COMPUTE, PRECISION, IN_MEMORY)
                dy = hold(product(z, dz, zeros, STEP, PRECISION, X_TURNED=True) * -0.25, dy_place, IN_MEMORY)
                b_dz = product(dz, y, read(dz, SIZE) * -13, STEP, PRECISION, Y_TURNED=True) * -0.25
                dz = hold(b_dz, dz_place, IN_MEMORY)
                dw = hold(product(x, dy, zeros, STEP, PRECISION, X_TURNED=True), y_place, IN_MEMORY)
                b_dx = product(dy, w, read(dy, SIZE) * 15 - read(dw, SIZE) * 7, STEP, PRECISION, Y_TURNED=True)
                b_dx = product(dw, x, b_dx, STEP, PRECISION, Y_TURNED=True)
                b_dx = product(x, dw, b_dx, STEP, PRECISION, X_TURNED=True)
                dx = hold(b_dx, dy_place, IN_MEMORY)
                da = hold(product(dx, z, read(da, SIZE), STEP, PRECISION, Y_TURNED=True), places + 8 * MATRIX, IN_MEMORY)
                dz = hold(product(a, dx, read(dz, SIZE), STEP, PRECISION, X_TURNED=True), dz_place, IN_MEMORY)

            b_a, b_dz = read(a, SIZE), tl.trans(read(dz, SIZE))
            ds = -tl.sum(tl.sum(b_dz * b_a, 1), 0) / (s * s)
            b_da = read(da, SIZE) + b_dz / s + (ds * share)[None, :]
            b_dl = b_a * (b_da - tl.sum(b_da * b_a, 1)[:, None]) * scale
            for column in range(0, D, STEP):
                if NEED_Q:
                    b_k = load_tile(p_k, landmarks, k_l, columns, D, STEP, 0, True, False, column).to(COMPUTE)
                    b_dq = dot(b_dl, b_k, tl.zeros((SIZE, STEP), COMPUTE), PRECISION)
                    store_tile(b_dq, dq + i_b * dq_b + i_h * dq_h, landmarks, dq_l, inside, D, STEP, 0, True, column)
                if NEED_K:
                    b_q = load_tile(p_q, landmarks, q_l, rows, D, STEP, 0, True, False, column).to(COMPUTE)
                    b_dk = dot(tl.trans(b_dl), b_q, tl.zeros((SIZE, STEP), COMPUTE), PRECISION)
                    store_tile(b_dk, dk + i_b * dk_b + i_h * dk_h, landmarks, dk_l, inside, D, STEP, 0, True, column)


def pinv_forward(
    q_marks: Tensor, k_marks: Tensor, values: Tensor, q_counts: Tensor | None, k_counts: Tensor | None,
    scale: float, iterations: int, init: str,
) -> Tensor:  # fmt: skip
    if init == "original" or q_marks.shape[2] > MOST_LANDMARKS:
        return batched_pinv.pinv_forward(q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init)
    out = values.new_empty(values.shape)
    programs, places, meta = _configure("pinv_forward", FORWARD_PLACES, q_marks, values)
    launch(
        pinv_forward_kernel,
        (programs,),
        q_marks, k_marks, values, *_counts(q_counts, k_counts, values), out, places,
        *token_strides(q_marks), *token_strides(k_marks), *token_strides(values),
        *mask_strides(q_counts), *mask_strides(k_counts), *token_strides(out),
        *_sizes(q_marks), iterations, scale,
        Q_MASKED=q_counts is not None, K_MASKED=k_counts is not None, **meta,
    )  # fmt: skip
    return out


def pinv_backward(
    dout: Tensor, q_marks: Tensor, k_marks: Tensor, values: Tensor, q_counts: Tensor | None, k_counts: Tensor | None,
    scale: float, iterations: int, init: str, need_q: bool, need_k: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if init == "original" or q_marks.shape[2] > MOST_LANDMARKS:
        return batched_pinv.pinv_backward(
            dout, q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init, need_q, need_k, need_values
        )
    needs = (q_marks, need_q), (k_marks, need_k), (values, need_values)
    dq, dk, dvalues = (x.new_empty(x.shape if need else (0,)) for x, need in needs)
    programs, places, meta = _configure("pinv_backward", BACKWARD_PLACES, q_marks, values)
    launch(
        pinv_backward_kernel,
        (programs,),
        dout, q_marks, k_marks, values, *_counts(q_counts, k_counts, values), dq, dk, dvalues, places,
        *token_strides(dout), *token_strides(q_marks), *token_strides(k_marks), *token_strides(values),
        *mask_strides(q_counts), *mask_strides(k_counts),
        *output_strides(dq), *output_strides(dk), *output_strides(dvalues), *_sizes(q_marks), iterations, scale,
        Q_MASKED=q_counts is not None, K_MASKED=k_counts is not None,
        NEED_Q=need_q, NEED_K=need_k, NEED_VALUES=need_values, **meta,
    )  # fmt: skip
    return dq, dk, dvalues


def _configure(kernel: str, places: int, q_marks: Tensor, values: Tensor) -> tuple[int, Tensor, dict[str, Any]]:
    """How many programs, the places of their matrices, and the constexprs and options of the launch."""
    pairs, _, landmarks = _sizes(q_marks)
    config = launch_config(kernel, q_marks, landmarks, values)
    size = padded(landmarks)
    in_memory = size > IN_REGISTERS
    programs = min(pairs, max(1, config.multiprocessors)) if in_memory else pairs
    memory = values.new_empty(programs * places * size * size if in_memory else 0)
    return programs, memory, dict(
        D=q_marks.shape[3], E=values.shape[3], SIZE=size, STEP=config.tile.tokens,
        COMPUTE=config.triton_compute, PRECISION=config.precision, IN_MEMORY=in_memory,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _sizes(q_marks: Tensor) -> tuple[int, int, int]:
    batch, num_heads, landmarks, _ = q_marks.shape
    return batch * num_heads, num_heads, landmarks


def _counts(q_counts: Tensor | None, k_counts: Tensor | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    return stand_in if q_counts is None else q_counts, stand_in if k_counts is None else k_counts

"""Kernels for `pinv` (see primitives/pinv.py for the equations and _torch/pinv.py for the equations of a step).

Each program processes whole heads. For up to 64 landmarks, the forward kernel keeps its L x L matrices in registers if they
fit. Otherwise, and always in backward, each program stores its matrices in a separate block of global memory (see
pinv_steps.py). To keep these blocks in the L2 cache, only as many programs are launched as can run at the same time. They loop
over the heads of all samples.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs
from .launch import LaunchConfig, architecture, launch, launch_config, mask_strides, output_strides, padded, token_strides
from .pinv_steps import BACKWARD, DA, DY, DZ, FORWARD, A, Z, advance, differentiate, keep_middle, part, restart
from .tiles import LOG2E, dot, load_tile, row_products, store_tile

WARPS_A_MULTIPROCESSOR = 8  # number of warps that fit in a multiprocessor if each thread has 255 registers


@triton.jit
def is_valid(counts, i_b, counts_b, counts_l, landmarks, L, MASKED: tl.constexpr):
    """Return a mask of the landmarks that exist and, if MASKED, are means of at least one token."""
    valid = landmarks < L
    if MASKED:
        valid &= tl.load(counts + i_b * counts_b + landmarks.to(tl.int64) * counts_l, mask=valid, other=0.0) > 0
    return valid


@triton.jit
def load_rows(
    base, stride, rows, column, counts, i_b, counts_b, counts_l, L,
    WIDTH: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load STEP columns, from `column` on, of the landmarks whose indices are `rows`. Rows of invalid landmarks are 0."""
    valid = is_valid(counts, i_b, counts_b, counts_l, rows, L, MASKED)
    return load_tile(base, rows, stride, valid, WIDTH, STEP, 0, True, False, column)


@triton.jit
def apply(
    memory, PLACE: tl.constexpr, TURNED: tl.constexpr, base, stride, column, counts, i_b, counts_b, counts_l, L,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the product of the matrix at PLACE (transposed if TURNED) and STEP columns of `base`, loaded with load_rows."""
    acc = tl.zeros((SIZE, STEP), memory.dtype.element_ty)
    for start in range(0, L, STEP):
        rows = start + tl.arange(0, STEP)
        y = load_rows(base, stride, rows, column, counts, i_b, counts_b, counts_l, L, WIDTH, STEP, MASKED)
        if TURNED:
            x = tl.trans(tl.load(part(memory, PLACE, start, 0, STEP, SIZE, SIZE)))
        else:
            x = tl.load(part(memory, PLACE, 0, start, SIZE, STEP, SIZE))
        acc = dot(x, y.to(acc.dtype), acc, PRECISION)
    return acc


@triton.jit
def attention(
    q, k, q_l, k_l, rows, columns, has_row, has_column, scale,
    D: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rows of A, the attention of query landmarks to key landmarks. Rows and columns of invalid landmarks are 0."""
    logits = tl.zeros((rows.shape[0], columns.shape[0]), COMPUTE)
    for column in range(0, D, STEP):
        b_q = load_tile(q, rows, q_l, has_row, D, STEP, 0, True, False, column)
        b_k = load_tile(k, columns, k_l, has_column, D, STEP, 0, True, False, column)
        logits = row_products(b_q, b_k, logits, False, False, PRECISION)
    logits = tl.where(has_column[None, :], logits * (scale * LOG2E), float("-inf"))
    row_max = tl.max(logits, 1)
    a = tl.exp2(logits - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    total = tl.sum(a, 1)
    return tl.where(has_row[:, None], a / tl.where(total == 0, 1.0, total)[:, None], 0.0)


@triton.jit
def start_scale(sums):
    """Return the initial scale s and, for each column of A, the fraction of the gradient of s that the column receives.

    s is the largest column sum of A, or 1 if that sum is 0.
    """
    s = tl.max(sums, 0)
    largest = (sums == s).to(sums.dtype)
    return tl.where(s == 0, 1.0, s), largest / tl.sum(largest, 0)


@triton.jit
def start(
    memory, q, k, q_l, k_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l, L, scale,
    D: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute A and the first Z and store them in `memory`. Return the results of start_scale."""
    columns = tl.arange(0, SIZE)
    has_column = is_valid(k_counts, i_b, k_counts_b, k_counts_l, columns, L, K_MASKED)
    sums = tl.zeros((SIZE,), COMPUTE)
    tl.debug_barrier()  # wait until all threads have read the matrices of the previous head
    for row in range(0, SIZE, STEP):
        rows = row + tl.arange(0, STEP)
        has_row = is_valid(q_counts, i_b, q_counts_b, q_counts_l, rows, L, Q_MASKED)
        a = attention(q, k, q_l, k_l, rows, columns, has_row, has_column, scale, D, STEP, COMPUTE, PRECISION)
        sums += tl.sum(a, 0)
        tl.store(part(memory, A, row, 0, STEP, SIZE, SIZE), a)
    tl.debug_barrier()
    s, share = start_scale(sums)
    restart(memory, s, False, SIZE, STEP)
    return s, share


@triton.jit
def start_gradient(
    memory, dout, values, dout_l, values_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l, L,
    E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the final Z and store it in `memory` as dZ. Set dA to zeros."""
    columns = tl.arange(0, SIZE)
    for row in range(0, SIZE, STEP):
        rows = row + tl.arange(0, STEP)
        dz = tl.zeros((STEP, SIZE), COMPUTE)
        for column in range(0, E, STEP):
            b_dout = load_rows(dout, dout_l, rows, column, k_counts, i_b, k_counts_b, k_counts_l, L, E, STEP, K_MASKED)
            b_v = load_rows(values, values_l, columns, column, q_counts, i_b, q_counts_b, q_counts_l, L, E, STEP, Q_MASKED)
            dz = row_products(b_dout, b_v, dz, False, False, PRECISION)
        tl.store(part(memory, DZ, row, 0, STEP, SIZE, SIZE), dz)
        tl.store(part(memory, DA, row, 0, STEP, SIZE, SIZE), tl.zeros((STEP, SIZE), COMPUTE))
    tl.debug_barrier()


@triton.jit
def end_gradient(memory, s, share, scale, SIZE: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr):
    """Backpropagate through the first Z and the softmax, and store the gradient of q k^T at place DY."""
    sums = tl.zeros((STEP,), COMPUTE)
    for row in range(0, SIZE, STEP):
        a = tl.load(part(memory, A, row, 0, STEP, SIZE, SIZE))
        dz = tl.trans(tl.load(part(memory, DZ, 0, row, SIZE, STEP, SIZE)))
        sums += tl.sum(a * dz, 1)
    ds = -tl.sum(sums, 0) / (s * s)
    for row in range(0, SIZE, STEP):
        a = tl.load(part(memory, A, row, 0, STEP, SIZE, SIZE))
        dz = tl.trans(tl.load(part(memory, DZ, 0, row, SIZE, STEP, SIZE)))
        da = tl.load(part(memory, DA, row, 0, STEP, SIZE, SIZE)) + dz / s + (ds * share)[None, :]
        tl.store(part(memory, DY, row, 0, STEP, SIZE, SIZE), a * (da - tl.sum(da * a, 1)[:, None]) * scale)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["pairs", "L", "iterations", "scale", "q_counts_b", "k_counts_b"])
def pinv_forward_kernel(
    q, k, values, q_counts, k_counts, out, memory,
    q_b, q_h, q_l, k_b, k_h, k_l, values_b, values_h, values_l, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
    out_b, out_h, out_l, pairs, H, L, iterations, scale,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Compute `out` for the heads of all samples. `pairs` is batch x heads."""
    landmarks = tl.arange(0, SIZE)
    zeros = tl.zeros((SIZE, SIZE), COMPUTE)
    memory += tl.program_id(0).to(tl.int64) * (FORWARD * SIZE * SIZE)
    for i_bh in range(tl.program_id(0), pairs, tl.num_programs(0)):
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_q, p_k = q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h
        p_values, p_out = values + i_b * values_b + i_h * values_h, out + i_b * out_b + i_h * out_h
        if IN_MEMORY:
            s, _ = start(
                memory, p_q, p_k, q_l, k_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
                L, scale, D, SIZE, STEP, Q_MASKED, K_MASKED, COMPUTE, PRECISION,
            )  # fmt: skip
            for _ in range(iterations):
                advance(memory, L, SIZE, STEP, PRECISION)
            for column in range(0, E, STEP):
                b_out = apply(
                    memory, Z, False, p_values, values_l, column, q_counts, i_b, q_counts_b, q_counts_l, L,
                    E, SIZE, STEP, Q_MASKED, PRECISION,
                )  # fmt: skip
                store_tile(b_out, p_out, landmarks, out_l, landmarks < L, E, STEP, 0, True, column)
        else:
            has_row = is_valid(q_counts, i_b, q_counts_b, q_counts_l, landmarks, L, Q_MASKED)
            has_column = is_valid(k_counts, i_b, k_counts_b, k_counts_l, landmarks, L, K_MASKED)
            b_a = attention(
                p_q, p_k, q_l, k_l, landmarks, landmarks, has_row, has_column, scale, D, STEP, COMPUTE, PRECISION
            )  # fmt: skip
            s, _ = start_scale(tl.sum(b_a, 0))
            b_z = tl.trans(b_a) / s
            for _ in range(iterations):
                b_x = dot(b_a, b_z, zeros, PRECISION)
                b_y = dot(b_x, dot(b_x, b_x, b_x * -7, PRECISION), b_x * 15, PRECISION)
                b_z = dot(b_z, b_y, b_z * -13, PRECISION) * -0.25
            for column in range(0, E, STEP):
                b_v = load_tile(p_values, landmarks, values_l, has_row, E, STEP, 0, True, False, column)
                b_out = dot(b_z, b_v, tl.zeros((SIZE, STEP), COMPUTE), PRECISION)
                store_tile(b_out, p_out, landmarks, out_l, landmarks < L, E, STEP, 0, True, column)


@triton.jit(do_not_specialize=["pairs", "L", "iterations", "scale", "q_counts_b", "k_counts_b"])
def pinv_backward_kernel(
    dout, q, k, values, q_counts, k_counts, dq, dk, dvalues, memory,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, values_b, values_h, values_l,
    q_counts_b, q_counts_l, k_counts_b, k_counts_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dvalues_b, dvalues_h, dvalues_l, pairs, H, L, iterations, scale,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_VALUES: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dvalues for the heads of all samples.

    The Z of each step is recomputed, starting from the first Z or from the saved Z of the middle step.
    """
    landmarks = tl.arange(0, SIZE)
    inside = landmarks < L
    memory += tl.program_id(0).to(tl.int64) * (BACKWARD * SIZE * SIZE)
    half = iterations // 2
    # disable_licm keeps the compiler from moving computations out of this loop. Their results would occupy registers that the
    # products need.
    for i_bh in tl.range(tl.program_id(0), pairs, tl.num_programs(0), disable_licm=True):
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_q, p_k = q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h
        p_values, p_dout = values + i_b * values_b + i_h * values_h, dout + i_b * dout_b + i_h * dout_h
        s, share = start(
            memory, p_q, p_k, q_l, k_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
            L, scale, D, SIZE, STEP, Q_MASKED, K_MASKED, COMPUTE, PRECISION,
        )  # fmt: skip
        for t in range(iterations):
            if t == half:
                keep_middle(memory, SIZE, STEP)
            advance(memory, L, SIZE, STEP, PRECISION)
        if NEED_VALUES:
            for column in range(0, E, STEP):
                b_dv = apply(
                    memory, Z, True, p_dout, dout_l, column, k_counts, i_b, k_counts_b, k_counts_l, L,
                    E, SIZE, STEP, K_MASKED, PRECISION,
                )  # fmt: skip
                p_dvalues = dvalues + i_b * dvalues_b + i_h * dvalues_h
                store_tile(b_dv, p_dvalues, landmarks, dvalues_l, inside, E, STEP, 0, True, column)
        if NEED_Q or NEED_K:
            start_gradient(
                memory, p_dout, p_values, dout_l, values_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l,
                k_counts_b, k_counts_l, L, E, SIZE, STEP, Q_MASKED, K_MASKED, COMPUTE, PRECISION,
            )  # fmt: skip
            for t in range(iterations - 1, -1, -1):
                late = t >= half
                restart(memory, s, late, SIZE, STEP)
                for _ in range(tl.where(late, t - half, t)):
                    advance(memory, L, SIZE, STEP, PRECISION)
                differentiate(memory, L, SIZE, STEP, PRECISION)
            end_gradient(memory, s, share, scale, SIZE, STEP, COMPUTE)
            for column in range(0, D, STEP):
                if NEED_Q:
                    b_dq = apply(
                        memory, DY, False, p_k, k_l, column, k_counts, i_b, k_counts_b, k_counts_l, L,
                        D, SIZE, STEP, K_MASKED, PRECISION,
                    )  # fmt: skip
                    store_tile(b_dq, dq + i_b * dq_b + i_h * dq_h, landmarks, dq_l, inside, D, STEP, 0, True, column)
                if NEED_K:
                    b_dk = apply(
                        memory, DY, True, p_q, q_l, column, q_counts, i_b, q_counts_b, q_counts_l, L,
                        D, SIZE, STEP, Q_MASKED, PRECISION,
                    )  # fmt: skip
                    store_tile(b_dk, dk + i_b * dk_b + i_h * dk_h, landmarks, dk_l, inside, D, STEP, 0, True, column)


def pinv_forward(
    q_marks: Tensor, k_marks: Tensor, values: Tensor, q_counts: Tensor | None, k_counts: Tensor | None,
    scale: float, iterations: int, init: str,
) -> Tensor:  # fmt: skip
    out = values.new_empty(values.shape)
    config = launch_config("pinv_forward", q_marks, q_marks.shape[2], values)
    in_memory = padded(q_marks.shape[2]) > config.tile.slots
    programs, memory = _memory(config, FORWARD.value, q_marks, values) if in_memory else (_sizes(q_marks)[0], values)
    launch(
        pinv_forward_kernel,
        (programs,),
        q_marks, k_marks, values, *_counts(q_counts, k_counts, values), out, memory,
        *token_strides(q_marks), *token_strides(k_marks), *token_strides(values),
        *mask_strides(q_counts), *mask_strides(k_counts), *token_strides(out),
        *_sizes(q_marks), iterations, scale,
        Q_MASKED=q_counts is not None, K_MASKED=k_counts is not None, IN_MEMORY=in_memory, **_meta(config, q_marks, values),
    )  # fmt: skip
    return out


def pinv_backward(
    dout: Tensor, q_marks: Tensor, k_marks: Tensor, values: Tensor, q_counts: Tensor | None, k_counts: Tensor | None,
    scale: float, iterations: int, init: str, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_q, need_k, need_values = needs
    inputs = (q_marks, k_marks, values)
    dq, dk, dvalues = (x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True))
    config = launch_config("pinv_backward", q_marks, q_marks.shape[2], values)
    programs, memory = _memory(config, BACKWARD.value, q_marks, values)
    launch(
        pinv_backward_kernel,
        (programs,),
        dout, q_marks, k_marks, values, *_counts(q_counts, k_counts, values), dq, dk, dvalues, memory,
        *token_strides(dout), *token_strides(q_marks), *token_strides(k_marks), *token_strides(values),
        *mask_strides(q_counts), *mask_strides(k_counts),
        *output_strides(dq), *output_strides(dk), *output_strides(dvalues), *_sizes(q_marks), iterations, scale,
        Q_MASKED=q_counts is not None, K_MASKED=k_counts is not None,
        NEED_Q=need_q, NEED_K=need_k, NEED_VALUES=need_values, **_meta(config, q_marks, values),
    )  # fmt: skip
    return dq, dk, dvalues


def _memory(config: LaunchConfig, matrices: int, q_marks: Tensor, values: Tensor) -> tuple[int, Tensor]:
    """Return the number of programs, and an uninitialized tensor with room for `matrices` matrices per program."""
    pairs, _, landmarks = _sizes(q_marks)
    programs = min(pairs, max(1, config.multiprocessors * WARPS_A_MULTIPROCESSOR // config.tile.num_warps))
    return programs, values.new_empty(programs * matrices * padded(landmarks) ** 2)


def _meta(config: LaunchConfig, q_marks: Tensor, values: Tensor) -> dict[str, Any]:
    """Return the constexprs and launch options that both kernels share."""
    meta = dict(
        D=q_marks.shape[3], E=values.shape[3], SIZE=padded(q_marks.shape[2]), STEP=config.tile.tokens,
        COMPUTE=config.triton_compute, PRECISION=config.precision,
        num_warps=config.tile.num_warps, num_stages=config.tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    # Without this limit, ptxas spills registers to fit one more program on a multiprocessor.
    return meta if architecture(q_marks.device).startswith("gfx") else meta | dict(maxnreg=255)


def _sizes(q_marks: Tensor) -> tuple[int, int, int]:
    batch, num_heads, landmarks, _ = q_marks.shape
    return batch * num_heads, num_heads, landmarks


def _counts(q_counts: Tensor | None, k_counts: Tensor | None, placeholder: Tensor) -> tuple[Tensor, Tensor]:
    return placeholder if q_counts is None else q_counts, placeholder if k_counts is None else k_counts

"""Kernels for `pinv`. See primitives/pinv.py for the equations, and _torch/pinv.py for the computation of an iteration.

Each program processes whole heads. If the number of landmarks L is at most `Tile.slots` and there are at most
REGISTER_ITERATIONS iterations, each iteration keeps its L x L matrices in registers (see pinv_registers.py). Otherwise, the
matrices are in global memory, in a separate buffer for each program (see pinv_steps.py). To keep these buffers in the L2 cache,
each kernel in this file is launched with only as many programs as can run at the same time. The programs loop over the heads of
all samples.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Needs
from .launch import LaunchConfig, architecture, launch, launch_config, mask_strides, output_strides, padded, token_strides
from .pinv_landmarks import attention, has_landmark, load_rows, start_scale
from .pinv_registers import advance_all, differentiate_all, pinv_forward_registers_kernel
from .pinv_steps import BACKWARD, DA, DY, DZ, FORWARD, A, Z, advance, differentiate, keep_middle, part, restart
from .tiles import dot, row_products, store_tile

WARPS_A_MULTIPROCESSOR = 8  # number of warps that fit on a multiprocessor if each thread has 255 registers
# Largest number of iterations whose products do not overflow float16. An iteration can multiply Z and dZ by up to 13 / 4.
REGISTER_ITERATIONS = 8


@triton.jit
def apply(
    memory, PLACE: tl.constexpr, TURNED: tl.constexpr, base, stride, column, counts, i_b, counts_b, counts_l, L,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the product of matrix PLACE (transposed if TURNED) in `memory` and STEP columns of `base` (see load_rows)."""
    acc = tl.zeros((SIZE, STEP), memory.dtype.element_ty)
    for start in tl.range(0, L, STEP, disable_licm=True):
        rows = start + tl.arange(0, STEP)
        y = load_rows(base, stride, rows, column, counts, i_b, counts_b, counts_l, L, WIDTH, STEP, MASKED)
        if TURNED:
            x = tl.trans(tl.load(part(memory, PLACE, start, 0, STEP, SIZE, SIZE)))
        else:
            x = tl.load(part(memory, PLACE, 0, start, SIZE, STEP, SIZE))
        acc = dot(x, y.to(acc.dtype), acc, PRECISION)
    return acc


@triton.jit
def start(
    memory, q, k, q_l, k_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l, L, scale,
    D: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute A and Z_0 = A^T / s, store both in `memory`, and return s."""
    columns = tl.arange(0, SIZE)
    has_column = has_landmark(k_counts, i_b, k_counts_b, k_counts_l, columns, L, K_MASKED)
    sums = tl.zeros((SIZE,), COMPUTE)
    tl.debug_barrier()  # wait until all threads have read the matrices of the previous head
    for row in tl.range(0, SIZE, STEP, disable_licm=True):
        rows = row + tl.arange(0, STEP)
        has_row = has_landmark(q_counts, i_b, q_counts_b, q_counts_l, rows, L, Q_MASKED)
        a = attention(q, k, q_l, k_l, rows, columns, has_row, has_column, scale, D, STEP, COMPUTE, PRECISION)
        sums += tl.sum(a, 0)
        tl.store(part(memory, A, row, 0, STEP, SIZE, SIZE), a)
    tl.debug_barrier()
    s, _ = start_scale(sums)
    restart(memory, s, False, SIZE, STEP)
    return s


@triton.jit
def start_gradient(
    memory, dout, values, dout_l, values_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l, L,
    E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the final Z and store it in `memory` as matrix DZ. Fill matrix DA with zeros."""
    columns = tl.arange(0, SIZE)
    for row in tl.range(0, SIZE, STEP, disable_licm=True):
        rows = row + tl.arange(0, STEP)
        dz = tl.zeros((STEP, SIZE), COMPUTE)
        for column in tl.range(0, E, STEP, disable_licm=True):
            b_dout = load_rows(dout, dout_l, rows, column, k_counts, i_b, k_counts_b, k_counts_l, L, E, STEP, K_MASKED)
            b_v = load_rows(values, values_l, columns, column, q_counts, i_b, q_counts_b, q_counts_l, L, E, STEP, Q_MASKED)
            dz = row_products(b_dout, b_v, dz, PRECISION)
        tl.store(part(memory, DZ, row, 0, STEP, SIZE, SIZE), dz)
        tl.store(part(memory, DA, row, 0, STEP, SIZE, SIZE), tl.zeros((STEP, SIZE), COMPUTE))
    tl.debug_barrier()


@triton.jit
def end_gradient(memory, scale, SIZE: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr):
    """Backpropagate through Z_0 and the softmax, and store the gradient of q k^T in `memory` as matrix DY."""
    sums, products = tl.zeros((SIZE,), COMPUTE), tl.zeros((STEP,), COMPUTE)
    for row in tl.range(0, SIZE, STEP, disable_licm=True):
        a = tl.load(part(memory, A, row, 0, STEP, SIZE, SIZE))
        dz = tl.trans(tl.load(part(memory, DZ, 0, row, SIZE, STEP, SIZE)))
        sums += tl.sum(a, 0)
        products += tl.sum(a * dz, 1)
    s, share = start_scale(sums)  # recomputed, because keeping these numbers would occupy registers during the iterations
    ds = -tl.sum(products, 0) / (s * s)
    for row in tl.range(0, SIZE, STEP, disable_licm=True):
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
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out = Z @ values for all heads of all samples. Z is the result of the last iteration. `pairs` = batch * heads."""
    landmarks = tl.arange(0, SIZE)
    memory += tl.program_id(0).to(tl.int64) * (FORWARD * SIZE * SIZE)
    for i_bh in range(tl.program_id(0), pairs, tl.num_programs(0)):
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_q, p_k = q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h
        p_values, p_out = values + i_b * values_b + i_h * values_h, out + i_b * out_b + i_h * out_h
        start(
            memory, p_q, p_k, q_l, k_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
            L, scale, D, SIZE, STEP, Q_MASKED, K_MASKED, COMPUTE, PRECISION,
        )  # fmt: skip
        for _ in range(iterations):
            advance(memory, L, SIZE, STEP, PRECISION)
        for column in tl.range(0, E, STEP, disable_licm=True):
            b_out = apply(
                memory, Z, False, p_values, values_l, column, q_counts, i_b, q_counts_b, q_counts_l, L,
                E, SIZE, STEP, Q_MASKED, PRECISION,
            )  # fmt: skip
            store_tile(b_out, p_out, landmarks, out_l, landmarks < L, E, STEP, 0, True, column)


@triton.jit(do_not_specialize=["pairs", "L", "iterations", "scale", "q_counts_b", "k_counts_b"])
def pinv_backward_kernel(
    dout, q, k, values, q_counts, k_counts, dq, dk, dvalues, memory, history,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, values_b, values_h, values_l,
    q_counts_b, q_counts_l, k_counts_b, k_counts_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dvalues_b, dvalues_h, dvalues_l, pairs, H, L, iterations, scale,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_VALUES: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dvalues for all heads of all samples.

    To backpropagate through an iteration, the kernel needs Z, the input of the iteration. If IN_MEMORY, it recomputes this Z
    from Z_0 or from the Z that it saved before the middle iteration. Otherwise, it stores every Z in `history`. For PARTS, see
    pinv_registers.parts.
    """
    landmarks = tl.arange(0, SIZE)
    inside = landmarks < L
    memory += tl.program_id(0).to(tl.int64) * (BACKWARD * SIZE * SIZE)
    history += tl.program_id(0).to(tl.int64) * iterations * (SIZE * SIZE)
    half = iterations // 2
    # disable_licm keeps the compiler from moving computations out of this loop. Their results would occupy registers that the
    # products need.
    for i_bh in tl.range(tl.program_id(0), pairs, tl.num_programs(0), disable_licm=True):
        i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
        p_q, p_k = q + i_b * q_b + i_h * q_h, k + i_b * k_b + i_h * k_h
        p_values, p_dout = values + i_b * values_b + i_h * values_h, dout + i_b * dout_b + i_h * dout_h
        s = start(
            memory, p_q, p_k, q_l, k_l, q_counts, k_counts, i_b, q_counts_b, q_counts_l, k_counts_b, k_counts_l,
            L, scale, D, SIZE, STEP, Q_MASKED, K_MASKED, COMPUTE, PRECISION,
        )  # fmt: skip
        if IN_MEMORY:
            for t in range(iterations):
                if t == half:
                    keep_middle(memory, SIZE, STEP)
                advance(memory, L, SIZE, STEP, PRECISION)
        else:
            advance_all(memory, history, iterations, SIZE, COMPUTE, PARTS)
        if NEED_VALUES:
            for column in tl.range(0, E, STEP, disable_licm=True):
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
            if IN_MEMORY:
                for t in range(iterations - 1, -1, -1):
                    late = t >= half
                    restart(memory, s, late, SIZE, STEP)
                    for _ in range(tl.where(late, t - half, t)):
                        advance(memory, L, SIZE, STEP, PRECISION)
                    differentiate(memory, L, SIZE, STEP, PRECISION)
            else:
                differentiate_all(memory, history, iterations, SIZE, COMPUTE, PARTS)
            end_gradient(memory, scale, SIZE, STEP, COMPUTE)
            for column in tl.range(0, D, STEP, disable_licm=True):
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
    pairs, heads, landmarks = _sizes(q_marks)
    inputs = (q_marks, k_marks, values, *_counts(q_counts, k_counts, values), out)
    strides = (
        *token_strides(q_marks), *token_strides(k_marks), *token_strides(values),
        *mask_strides(q_counts), *mask_strides(k_counts), *token_strides(out),
    )  # fmt: skip
    meta = dict(Q_MASKED=q_counts is not None, K_MASKED=k_counts is not None, **_meta(config, q_marks, values))
    if _in_registers(config, landmarks, iterations):
        meta["PARTS"] = _parts(config, q_marks)
        launch(
            pinv_forward_registers_kernel, (pairs,), *inputs, *strides, heads, landmarks, iterations, scale, **meta,
        )  # fmt: skip
    else:
        programs = _programs(config, pairs)
        memory = values.new_empty(programs * FORWARD.value * padded(landmarks) ** 2)
        launch(
            pinv_forward_kernel, (programs,), *inputs, memory, *strides, pairs, heads, landmarks, iterations, scale, **meta,
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
    pairs, heads, landmarks = _sizes(q_marks)
    meta = _meta(config, q_marks, values)
    programs, size, parts = _programs(config, pairs), padded(landmarks) ** 2, _parts(config, q_marks)
    in_memory = not _in_registers(config, landmarks, iterations)
    memory = values.new_empty(programs * BACKWARD.value * size)
    history = values.new_empty(0 if in_memory else programs * iterations * size, dtype=torch.float16 if parts == 1 else None)
    launch(
        pinv_backward_kernel,
        (programs,),
        dout, q_marks, k_marks, values, *_counts(q_counts, k_counts, values), dq, dk, dvalues, memory, history,
        *token_strides(dout), *token_strides(q_marks), *token_strides(k_marks), *token_strides(values),
        *mask_strides(q_counts), *mask_strides(k_counts),
        *output_strides(dq), *output_strides(dk), *output_strides(dvalues), pairs, heads, landmarks, iterations, scale,
        Q_MASKED=q_counts is not None, K_MASKED=k_counts is not None, NEED_Q=need_q, NEED_K=need_k, NEED_VALUES=need_values,
        PARTS=parts, IN_MEMORY=in_memory, **meta,
    )  # fmt: skip
    return dq, dk, dvalues


def _in_registers(config: LaunchConfig, landmarks: int, iterations: int) -> bool:
    return padded(landmarks) <= config.tile.slots and iterations <= REGISTER_ITERATIONS


def _parts(config: LaunchConfig, q_marks: Tensor) -> int:
    """Return the number of float16 parts of each operand, or 0 if the products are computed in float64."""
    if q_marks.dtype == torch.float64:
        return 0
    return 1 if q_marks.element_size() == 2 or config.precision == "tf32" else 2


def _programs(config: LaunchConfig, pairs: int) -> int:
    return min(pairs, max(1, config.multiprocessors * WARPS_A_MULTIPROCESSOR // config.tile.num_warps))


def _meta(config: LaunchConfig, q_marks: Tensor, values: Tensor) -> dict[str, Any]:
    """Return the constexprs and launch options that all kernels share."""
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

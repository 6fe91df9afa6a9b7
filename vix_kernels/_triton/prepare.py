"""Compute the per-slot inputs of the gradient kernels of `aggregate` and `linear_aggregate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import unit_last_stride
from .launch import cdiv, launch, padded, slot_strides, triton_dtype
from .tiles import LOG2E, cast, right_products, split_parts


@triton.jit(do_not_specialize=["M", "d_b", "d_h", "dnumber_b", "dnumber_h"])
def aggregate_prepare_kernel(
    dvalues, dnumber, values, total, delta, size, unit,
    d_b, d_h, d_m, dnumber_b, dnumber_h, dnumber_m, H, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    SOFTMAX: tl.constexpr, NUMBERS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute size, unit and delta for the gradient kernels.

    If SOFTMAX, the gradient of a logit is (size <unit, v> - delta) exp(logit - largest logit). If not SOFTMAX
    (linear_aggregate), the exponential is replaced by the derivative of the feature map at the logit.

    size * unit is dvalues / total, and unit has the tokens' dtype. dvalues is a sum over all tokens, so in float16 it can
    overflow even if dk and dv do not. Therefore, size includes a power of two that keeps unit within [-1, 1]. bfloat16 has the
    range of float32. Therefore, with bfloat16 and SOFTMAX, size is 1, and unit is dvalues / total.

    If SOFTMAX, delta = (<dvalues, values> - dnumber / ln 2) / total, where dnumber is the gradient of lse. <dvalues, values> is
    computed in the same way as <unit, v> in the gradient kernels, so these products cancel exactly if a slot attends to only
    one token. If not SOFTMAX, delta = -dnumber, and total is replaced by 1.
    """
    FOLD: tl.constexpr = SOFTMAX and unit.dtype.element_ty == tl.bfloat16
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    rows = i_bh * M + o_m
    at = o_m.to(tl.int64)
    d = tl.load(dvalues + i_b * d_b + i_h * d_h + at[:, None] * d_m + o_e[None, :], mask=inside, other=0.0).to(COMPUTE)
    largest = tl.max(tl.abs(d), 1)
    # size is limited to the range of normal float32 numbers, so that 1 / size is finite. If all values of a row are below this
    # range, they are not scaled up to 1. Infinite rows stay infinite.
    exponent = tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0)))
    b_size = tl.exp2(tl.minimum(tl.maximum(exponent, -126.0), 126.0))
    inverse = tl.full((BLOCK_M,), 1.0, COMPUTE)
    if SOFTMAX:
        b_total = tl.load(total + rows, mask=o_m < M, other=1.0)
        inverse = 1.0 / tl.where(b_total == 0, 1.0, b_total)
    if FOLD:
        d *= inverse[:, None]
        b_size = tl.full((BLOCK_M,), 1.0, COMPUTE)
    b_unit = cast(d / b_size[:, None], unit.dtype.element_ty)
    b_delta = tl.zeros((BLOCK_M,), COMPUTE)
    if not FOLD:
        b_size *= inverse
    if SOFTMAX:
        b_values = tl.load(values + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
        WIDE: tl.constexpr = b_values.dtype != b_unit.dtype
        high, low = split_parts(b_values, b_unit.dtype, WIDE)
        products = right_products(b_unit, high, low, tl.zeros((BLOCK_M, BLOCK_M), COMPUTE), WIDE, PRECISION)
        own = tl.arange(0, BLOCK_M)
        b_delta += tl.sum(tl.where(own[:, None] == own[None, :], products, 0.0), 1) * b_size
    if NUMBERS:
        b_number = tl.load(dnumber + i_b * dnumber_b + i_h * dnumber_h + at * dnumber_m, mask=o_m < M, other=0.0)
        b_delta -= b_number * inverse * LOG2E if SOFTMAX else b_number
    tl.store(delta + rows, b_delta, mask=o_m < M)
    tl.store(size + rows, b_size, mask=o_m < M)
    tl.store(unit + rows[:, None] * E + o_e[None, :], b_unit, mask=inside)


def prepare(
    dvalues: Tensor, dnumber: Tensor | None, values: Tensor | None, total: Tensor | None, dtype: torch.dtype, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return delta, size and unit, which aggregate_prepare_kernel computes.

    Args:
        dvalues: gradient of values or sums, (batch, heads, M, E).
        dnumber: gradient of lse or norms, (batch, heads, M), or None if it is 0.
        values, total: results of aggregate_forward, or None in the backward pass of linear_aggregate, which has no softmax.
        dtype: dtype of the tokens.
        precision: precision of float32 products.

    Returns:
        delta and size (batch, heads, M), and unit (batch, heads, M, E) in `dtype`.
    """
    batch, num_heads, num_slots, width = dvalues.shape
    dvalues = unit_last_stride(dvalues)
    delta, size = (dvalues.new_empty(dvalues.shape[:3]) for _ in range(2))
    unit = dvalues.new_empty(dvalues.shape, dtype=dtype)
    block = 16
    warps = 8 if dtype == torch.float32 and width > 64 else 4  # with 4 warps, the kernel would spill registers
    launch(
        aggregate_prepare_kernel,
        (batch * num_heads * cdiv(num_slots, block),),
        dvalues, *(dvalues if x is None else x for x in (dnumber, values, total)), delta, size, unit,
        *slot_strides(dvalues), *((0, 0, 0) if dnumber is None else dnumber.stride()), num_heads, num_slots,
        E=width, BLOCK_E=padded(width), BLOCK_M=block, SOFTMAX=total is not None, NUMBERS=dnumber is not None,
        COMPUTE=triton_dtype(dvalues.dtype), PRECISION=precision,
        num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return delta, size, unit

"""One result from those of the chunks that the tokens were split into."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import triton_dtype
from .launch import launch
from .launch_arguments import padded


@triton.jit(do_not_specialize=["chunks", "M"])
def merge_softmax_kernel(
    parts, part_tops, part_totals, values, lse, tops, totals, chunks, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The mean of the chunks' values with weights total exp2(top), and the top, total and lse of all chunks."""
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    part_rows = i_bh * chunks * M + o_m

    b_top = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
    for i in range(chunks):
        b_total = tl.load(part_totals + part_rows + i * M, mask=o_m < M, other=0.0)
        b_part_top = tl.load(part_tops + part_rows + i * M, mask=o_m < M, other=float("-inf"))
        b_top = tl.maximum(b_top, tl.where(b_total == 0, float("-inf"), b_part_top))  # a chunk without keys has no top
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.zeros((BLOCK_M,), COMPUTE)
    b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for i in range(chunks):
        rows = part_rows + i * M
        b_total = tl.load(part_totals + rows, mask=o_m < M, other=0.0)
        b_part_top = tl.load(part_tops + rows, mask=o_m < M, other=float("-inf"))
        weight = tl.where(b_total == 0, 0.0, b_total * tl.exp2(b_part_top - b_top))
        b_part = tl.load(parts + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
        b_sum += weight
        b_values += b_part * weight[:, None]
    b_values = b_values / tl.where(b_sum == 0, 1.0, b_sum)[:, None]

    rows = i_bh * M + o_m
    tl.store(values + rows[:, None] * E + o_e[None, :], b_values, mask=inside)
    tl.store(lse + rows, b_top + tl.log2(b_sum), mask=o_m < M)
    tl.store(tops + rows, b_top, mask=o_m < M)
    tl.store(totals + rows, b_sum, mask=o_m < M)


@triton.jit(do_not_specialize=["chunks", "M"])
def merge_sums_kernel(
    parts, part_numbers, sums, numbers, chunks, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of the chunks' rows and numbers."""
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    part_rows = i_bh * chunks * M + o_m
    b_number = tl.zeros((BLOCK_M,), COMPUTE)
    b_sums = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for i in range(chunks):
        rows = part_rows + i * M
        b_number += tl.load(part_numbers + rows, mask=o_m < M, other=0.0)
        b_sums += tl.load(parts + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
    rows = i_bh * M + o_m
    tl.store(numbers + rows, b_number, mask=o_m < M)
    tl.store(sums + rows[:, None] * E + o_e[None, :], b_sums, mask=inside)


def merge_softmax(parts: Tensor, lse: Tensor, tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(batch, heads, chunks, M, E) and three of (batch, heads, chunks, M) without their chunks; no launch for a single one."""
    if parts.shape[2] == 1:
        return parts.squeeze(2), lse.squeeze(2), tops.squeeze(2), totals.squeeze(2)
    return _merge(merge_softmax_kernel, parts, (tops, totals), outputs=3)


def merge_sums(parts: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, heads, chunks, M, E) and (batch, heads, chunks, M) summed over chunks; no launch for a single one."""
    if parts.shape[2] == 1:
        return parts.squeeze(2), numbers.squeeze(2)
    return _merge(merge_sums_kernel, parts, (numbers,), outputs=1)


def _merge(kernel: Any, parts: Tensor, numbers: tuple[Tensor, ...], *, outputs: int) -> tuple[Tensor, ...]:
    batch, num_heads, chunks, num_slots, width = parts.shape
    merged = parts.new_empty(batch, num_heads, num_slots, width)
    results = [parts.new_empty(batch, num_heads, num_slots) for _ in range(outputs)]
    block, num_warps = (8 if padded(width) >= 128 else 16), (4 if padded(width) <= 32 else 8)  # four numbers a thread or more
    launch(
        kernel,
        (batch * num_heads * triton.cdiv(num_slots, block),),
        parts, *numbers, merged, *results, chunks, num_slots,
        E=width, BLOCK_E=padded(width), BLOCK_M=block,
        COMPUTE=triton_dtype(parts.dtype),
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return merged, *results


def empty_slots(slots: Tensor, batch: int, num_heads: int, chunks: int, dtype: torch.dtype) -> Tensor:
    """Where a kernel writes gradients of `slots`, (batch, heads, chunks, M, D): in `dtype`, unless nothing is left to sum."""
    alone = chunks == 1 and slots.shape[:2] == (batch, num_heads)
    return slots.new_empty(batch, num_heads, chunks, *slots.shape[2:], dtype=slots.dtype if alone else dtype)


def sum_slots(parts: Tensor, slots: Tensor) -> Tensor:
    """The gradient of `slots` from those of `empty_slots`, in one reduction also over shared samples and heads."""
    batch, num_heads, num_slots, width = slots.shape
    return parts.sum_to_size(batch, num_heads, 1, num_slots, width).view(slots.shape).to(slots.dtype)

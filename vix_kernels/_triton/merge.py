"""Merge the partial results of token chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, merge_arguments


@triton.jit(do_not_specialize=["chunks", "M"])
def merge_sums_kernel(
    parts, part_numbers, sums, numbers, chunks, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sum `parts` and `part_numbers` over the chunks, for a tile of slots."""
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


def merge_sums(parts: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of `parts` (batch, heads, chunks, M, E) and `numbers` (batch, heads, chunks, M) over the chunks.

    If there is only one chunk, no kernel is launched.
    """
    _, _, chunks, num_slots, _ = parts.shape
    if chunks == 1:
        return parts.squeeze(2), numbers.squeeze(2)
    grid, results, meta = merge_arguments(parts, outputs=1)
    launch(merge_sums_kernel, grid, parts, numbers, *results, chunks, num_slots, **meta)
    return results


@triton.jit(do_not_specialize=["chunks", "M"])
def merge_softmax_kernel(
    parts, part_row_max, part_totals, values, lse, row_max, totals, chunks, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of a softmax, for a tile of slots.

    The merged values are the average of the chunks' values, weighted by total * exp2(row_max). The kernel also computes
    row_max, total and lse over all tokens.
    """
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    part_rows = i_bh * chunks * M + o_m

    b_row_max = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
    for i in range(chunks):
        b_total = tl.load(part_totals + part_rows + i * M, mask=o_m < M, other=0.0)
        b_part_row_max = tl.load(part_row_max + part_rows + i * M, mask=o_m < M, other=float("-inf"))
        # The row_max of a chunk without valid keys is ignored.
        b_row_max = tl.maximum(b_row_max, tl.where(b_total == 0, float("-inf"), b_part_row_max))
    b_row_max = tl.where(b_row_max == float("-inf"), 0.0, b_row_max)
    b_sum = tl.zeros((BLOCK_M,), COMPUTE)
    b_values = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for i in range(chunks):
        rows = part_rows + i * M
        b_total = tl.load(part_totals + rows, mask=o_m < M, other=0.0)
        b_part_row_max = tl.load(part_row_max + rows, mask=o_m < M, other=float("-inf"))
        weight = tl.where(b_total == 0, 0.0, b_total * tl.exp2(b_part_row_max - b_row_max))
        b_part = tl.load(parts + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
        b_sum += weight
        b_values += b_part * weight[:, None]
    b_values = b_values / tl.where(b_sum == 0, 1.0, b_sum)[:, None]

    rows = i_bh * M + o_m
    tl.store(values + rows[:, None] * E + o_e[None, :], b_values, mask=inside)
    tl.store(lse + rows, b_row_max + tl.log2(b_sum), mask=o_m < M)
    tl.store(row_max + rows, b_row_max, mask=o_m < M)
    tl.store(totals + rows, b_sum, mask=o_m < M)


def empty_slots(slots: Tensor, batch: int, num_heads: int, chunks: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor (batch, heads, chunks, M, D) for each chunk's contribution to the gradient of `slots`.

    Its dtype is `slots.dtype` if each element of the gradient has only one contribution. Otherwise, its dtype is `dtype`.
    """
    alone = chunks == 1 and slots.shape[:2] == (batch, num_heads)
    return slots.new_empty(batch, num_heads, chunks, *slots.shape[2:], dtype=slots.dtype if alone else dtype)


def sum_slots(parts: Tensor, slots: Tensor) -> Tensor:
    """Return the gradient of `slots`: the sum of `parts` over the chunks, and over the samples and heads that share slots."""
    batch, num_heads, num_slots, width = slots.shape
    return parts.sum_to_size(batch, num_heads, 1, num_slots, width).view(slots.shape).to(slots.dtype)

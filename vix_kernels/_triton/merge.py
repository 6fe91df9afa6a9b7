"""One result from those of the chunks that the tokens were split into."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import triton_dtype
from .launch import launch
from .layout import padded


@triton.jit(do_not_specialize=["chunks", "M"])
def merge_kernel(
    parts, part_levels, state, levels, chunks, M,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, SOFTMAX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """SOFTMAX: the mean of the chunks' values with weights exp2(lse), and their lse. Else sums of both."""
    i_bh = (tl.program_id(0) // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    o_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, BLOCK_E)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    part_rows = i_bh * chunks * M + o_m

    if SOFTMAX:
        shift = tl.full((BLOCK_M,), float("-inf"), COMPUTE)
        for i in range(chunks):
            shift = tl.maximum(shift, tl.load(part_levels + part_rows + i * M, mask=o_m < M, other=float("-inf")))
        shift = tl.where(shift == float("-inf"), 0.0, shift)
    level = tl.zeros((BLOCK_M,), COMPUTE)
    total = tl.zeros((BLOCK_M, BLOCK_E), COMPUTE)
    for i in range(chunks):
        rows = part_rows + i * M
        b_level = tl.load(part_levels + rows, mask=o_m < M, other=0.0)
        b_state = tl.load(parts + rows[:, None] * E + o_e[None, :], mask=inside, other=0.0)
        if SOFTMAX:
            b_level = tl.exp2(b_level - shift)
            b_state *= b_level[:, None]
        level += b_level
        total += b_state
    if SOFTMAX:
        total = total / tl.where(level == 0, 1.0, level)[:, None]
        level = shift + tl.log2(level)

    rows = i_bh * M + o_m
    tl.store(levels + rows, level, mask=o_m < M)
    tl.store(state + rows[:, None] * E + o_e[None, :], total, mask=inside)


def merge(parts: Tensor, part_levels: Tensor, *, softmax: bool) -> tuple[Tensor, Tensor]:
    """(batch, heads, chunks, M, E) and (batch, heads, chunks, M) without their chunks; no launch for a single one."""
    batch, num_heads, chunks, num_slots, width = parts.shape
    if chunks == 1:
        return parts.squeeze(2), part_levels.squeeze(2)
    state = parts.new_empty(batch, num_heads, num_slots, width)
    levels = parts.new_empty(batch, num_heads, num_slots)
    block = 16
    launch(
        merge_kernel,
        (batch * num_heads * triton.cdiv(num_slots, block),),
        parts, part_levels, state, levels, chunks, num_slots,
        E=width, BLOCK_E=padded(width), BLOCK_M=block, SOFTMAX=softmax,
        COMPUTE=triton_dtype(parts.dtype),
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return state, levels


def empty_slots(slots: Tensor, batch: int, num_heads: int, chunks: int, dtype: torch.dtype) -> Tensor:
    """Where a kernel writes gradients of `slots`, (batch, heads, chunks, M, D): in `dtype`, unless nothing is left to sum."""
    alone = chunks == 1 and slots.shape[:2] == (batch, num_heads)
    return slots.new_empty(batch, num_heads, chunks, *slots.shape[2:], dtype=slots.dtype if alone else dtype)


def sum_slots(parts: Tensor, slots: Tensor) -> Tensor:
    """The gradient of `slots` from those of `empty_slots`, in one reduction also over shared samples and heads."""
    batch, num_heads, num_slots, width = slots.shape
    return parts.sum_to_size(batch, num_heads, 1, num_slots, width).view(slots.shape).to(slots.dtype)

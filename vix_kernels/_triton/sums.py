"""Two-stage sums over many items. With only one program per result, most of the device would be idle.

In the first stage, the items, for example (sample, head) pairs, are split into chunks. Different programs process different
chunks and write partial sums. In the second stage, the kernel in this file adds the partial sums of all chunks. In both stages,
the order of summation depends only on the sizes and the device, so repeated calls return bit-identical results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import conditions
from .launch import LaunchConfig, cdiv, launch
from .tiles import cast

PROGRAMS_A_MULTIPROCESSOR = 8  # the loop of a program waits for memory, so other programs must run in the meantime
LEAST_ITEMS = 4  # minimum number of items per chunk; with fewer, partial sums would cause as much memory traffic as the items


@triton.jit
def sum_block(parts, sums, chunks, size, blocks, BLOCK: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum a block of elements over the chunks, STEP chunks at a time, so that many loads are in flight."""
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    parts += outer * chunks * size
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, chunks, STEP):
        i = start + tl.arange(0, STEP)
        inside = (i < chunks)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(parts + i.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0), 0)
    tl.store(sums + outer * size + at, cast(total, sums.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["chunks", "blocks"])
def sum_chunks_kernel(
    parts, sums, more_parts, more_sums, chunks, size, more_size, blocks,
    BLOCK: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sum a block of `parts` (program_id(1) = 0) or of `more_parts` (program_id(1) = 1) over the chunks."""
    if tl.program_id(1) == 0:
        sum_block(parts, sums, chunks, size, blocks, BLOCK, STEP, COMPUTE)
    else:
        sum_block(more_parts, more_sums, chunks, more_size, blocks, BLOCK, STEP, COMPUTE)


def split_items(config: LaunchConfig, programs: int, items: int) -> tuple[int, int]:
    """Return the number of items per chunk and the number of chunks, for a launch with `programs` programs per chunk."""
    if not conditions.current.split:
        return items, 1
    if config.multiprocessors:
        wanted, least = PROGRAMS_A_MULTIPROCESSOR * config.multiprocessors // max(1, programs), LEAST_ITEMS
    else:
        wanted, least = items, 2  # the interpreter always splits, so that the second stage runs even for small inputs
    size = max(least, cdiv(items, max(1, wanted)))
    return size, max(1, cdiv(items, size))


def sum_chunks(config: LaunchConfig, outer: int, chunks: int, *pairs: tuple[Tensor, Tensor]) -> None:
    """Sum `parts` (outer, chunks, ...) over the chunks and store the result in `sums` (outer, ...).

    `pairs` contains one or two pairs (parts, sums).
    """
    sizes = [sums.numel() // max(1, outer) for _, sums in pairs]
    (parts, sums), (more_parts, more_sums) = pairs[0], pairs[-1]
    block = 128
    blocks = cdiv(max(sizes), block)
    launch(
        sum_chunks_kernel,
        (outer * blocks, len(pairs)),
        parts, sums, more_parts, more_sums, chunks, sizes[0], sizes[-1], blocks,
        BLOCK=block, STEP=16, COMPUTE=config.triton_compute, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip

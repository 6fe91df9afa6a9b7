"""Depthwise convolution over tokens in plain PyTorch, computed as products of a banded Toeplitz matrix and windows of tokens.

A block of BLOCK consecutive output tokens depends on a window of BLOCK + taps - 1 input tokens. One batched product with the
Toeplitz matrix computes all blocks of one head, for as many samples as fit in the caches. Products and sums are computed in
float32 (float64 for float64 inputs).

Shapes: v (B, H, N, E); weight (H, 1, taps, 1) with an odd number of taps; mask bool (B, N). Outputs have the same memory layout
as v.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout import Needs, accumulator, empty_like_tokens

BLOCK = 32  # with larger blocks, the banded matrix has more zeros; with smaller ones, more tokens are read twice
ROOM = 2**18  # number of elements that are processed together

# A slice of samples and the index of a head. The selected tokens are processed together.
Group = tuple[slice, int]


def token_conv_forward(v: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return out_t = sum_u w_u v_{t + u - taps // 2}, where masked tokens and padding are 0."""
    out = empty_like_tokens(v, v.shape[3])
    for group, rows in _convolved(v, weight, mask):
        out[group] = rows
    return out


def token_conv_add(out: Tensor, v: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    """Add the convolution to `out` (B, H, N, E), in place."""
    for group, rows in _convolved(v, weight, mask):
        out[group] += rows


def token_conv_backward(
    dout: Tensor,
    v: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    dv_other: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor]:
    """Return the sum dv + dv_other, set to 0 for masked tokens, and dweight.

    If dv_other is None, it counts as 0. Gradients that `needs` does not request are empty.

    dv_s = sum_u w_{taps - 1 - u} dout_{s + u - taps // 2}    dw_{taps - 1 - u} = sum_s v_s . dout_{s + u - taps // 2}
    """
    need_v, need_weight = needs
    dv = empty_like_tokens(v, v.shape[3]) if need_v else v.new_empty(0)
    if need_v:
        for group, rows in _convolved(dout, weight.flip(2), None):
            dv[group] = rows if dv_other is None else rows.add_(dv_other[group])
        if mask is not None:
            dv.masked_fill_(~mask[:, None, :, None], 0)
    return dv, _weight_gradient(dout, v, weight, mask) if need_weight else weight.new_empty(0)


def _convolved(x: Tensor, weight: Tensor, mask: Tensor | None) -> Iterator[tuple[Group, Tensor]]:
    """Yield each group and its convolution (samples, N, E). The next convolution overwrites the previous one."""
    rows = _Rows(x, weight.shape[2])
    bands = _bands(weight.to(rows.memory.dtype))
    memory = torch.empty_like(rows.blocks)
    for group in rows.groups():
        used = rows.fill(x, group, mask)
        product = torch.bmm(bands[group[1]].expand(used, -1, -1), rows.windows[:used], out=memory[:used])
        yield group, rows.tokens_of(product)


def _weight_gradient(dout: Tensor, v: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    taps = weight.shape[2]
    rows, others = _Rows(v, taps), _Rows(dout, taps)
    # products[h, i, j] is the dot product of token i in a block of v and token j in the corresponding window of dout, summed
    # over all blocks of head h. The diagonal j - i = u belongs to tap number taps - 1 - u.
    memory = rows.memory.new_empty(len(rows.blocks), BLOCK, BLOCK + taps - 1)
    products = memory.new_zeros(v.shape[1], BLOCK, BLOCK + taps - 1)
    for group in rows.groups():
        used = rows.fill(v, group, mask)
        others.fill(dout, group, None)
        products[group[1]] += torch.bmm(rows.blocks[:used], others.windows[:used].mT, out=memory[:used]).sum(0)
    head, row, column = products.stride()
    diagonals = products.as_strided((len(products), taps, BLOCK), (head, column, row + column))
    return diagonals.sum(2).flip(1).view(weight.shape).to(weight.dtype)


def _bands(weight: Tensor) -> Tensor:
    """Return the Toeplitz matrices (H, BLOCK, BLOCK + taps - 1) of all heads, with w_u in column i + u of row i."""
    num_heads, _, taps, _ = weight.shape
    bands = weight.new_zeros(num_heads, BLOCK, BLOCK + taps - 1)
    head, row, column = bands.stride()
    bands.as_strided((num_heads, BLOCK, taps), (head, row + column, column)).copy_(weight.view(num_heads, 1, taps))
    return bands


class _Rows:
    """Buffer for the tokens of one head in a group of samples. The samples are stored one after another, separated by zeros.

    Attributes:
        blocks: (blocks, BLOCK, E), the tokens and the zeros between samples.
        windows: (blocks, BLOCK + taps - 1, E), a view of the same memory. Each window starts taps // 2 tokens before
            its block.
    """

    def __init__(self, x: Tensor, taps: int) -> None:
        self.batch, self.heads, self.tokens, width = x.shape
        reach = taps // 2
        self.count = -(-self.tokens // BLOCK) + -(-reach // BLOCK)  # blocks per sample
        self.samples = min(max(1, self.batch), max(1, ROOM // (self.count * BLOCK * width)))
        total = self.samples * self.count
        self.memory = x.new_zeros(total * BLOCK + 2 * reach, width, dtype=accumulator(x.dtype))
        self.blocks = self.memory[reach : reach + total * BLOCK].view(total, BLOCK, width)
        self.windows = self.memory.as_strided((total, BLOCK + 2 * reach, width), (BLOCK * width, width, 1))

    def groups(self) -> Iterator[Group]:
        for head in range(self.heads):
            for first in range(0, self.batch, self.samples):
                yield slice(first, first + self.samples), head

    def tokens_of(self, blocks: Tensor) -> Tensor:
        """Return the tokens (samples, N, E) in `blocks` without the padding. `blocks` contains all blocks of each sample."""
        return blocks.view(-1, self.count * BLOCK, blocks.shape[2])[:, : self.tokens]

    def fill(self, x: Tensor, group: Group, mask: Tensor | None) -> int:
        """Copy a group of x (B, H, N, E) to the buffer with masked tokens set to 0, and return the number of blocks used."""
        part = x[group]
        used = len(part) * self.count
        rows = self.tokens_of(self.blocks[:used]).copy_(part)
        if mask is not None:
            rows.masked_fill_(~mask[group[0], :, None], 0)
        return used

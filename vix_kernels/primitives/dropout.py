"""dropout: with cheap random numbers on a CPU, where torch spends more time on them than on the products around.

    y = x kept / (1 - p),    kept 1 with probability 1 - p, else 0

p is rounded to a multiple of 2^-16, and one byte an element is kept for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16  # of the random number that decides on an element


def dropout(x: Tensor, p: float) -> Tensor:
    """Drop elements of x (any shape, on the CPU) with probability p, scale up the others. Differentiable in x, twice too."""
    return _Dropout.apply(x, p)


def draw_kept(kept: Tensor, p: float) -> Tensor:
    """Fill `kept` (uint8, contiguous, on the CPU): each element is 1 with probability 1 - p, else 0."""
    if p == 1:
        return kept.zero_()
    four = torch.empty(-(-kept.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = four.view(torch.int16)[: kept.numel()].view(kept.shape)
    # Comparisons are slow, and so is bool in arithmetic: 0 and 1 come by clamping.
    dropped = max(round(p * 2**BITS), 1) - 2 ** (BITS - 1) - 1
    return kept.copy_(numbers.clamp_(dropped, dropped + 1).sub_(dropped))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        kept = draw_kept(torch.empty(x.shape, dtype=torch.uint8), p)
        ctx.save_for_backward(kept)
        ctx.scale = scale_of_kept(p)
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(dy.dtype).mul_(dy).mul_(ctx.scale), None  # autograd can differentiate it


def scale_of_kept(p: float) -> float:
    """What keeps the mean."""
    return 1 / (1 - p) if p < 1 else 0.0

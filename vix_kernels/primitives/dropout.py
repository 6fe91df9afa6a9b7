"""dropout: dropout with fast random number generation on a CPU.

On a CPU, PyTorch's dropout can take longer than the matrix products before and after it.

    y = x kept / (1 - p),    kept = 1 with probability 1 - p, else 0

If 0 < p < 1, the probability of kept = 0 is p, rounded to a multiple of 2^-16. This probability is at least 2^-16 and at
most 1 - 2^-16. The factor 1 / (1 - p) uses p without rounding, but is at most 2^16. If p is 1, y is 0. One byte per element is
saved for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch.dropout import draw_kept, kept_scale


def dropout(x: Tensor, p: float) -> Tensor:
    """Return a copy of x in which each element is 0 with probability p, and multiplied by 1 / (1 - p) otherwise.

    x can have any shape, and must be on the CPU. The result is twice differentiable in x.
    """
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        kept = draw_kept(torch.empty(x.shape, dtype=torch.uint8), p)
        ctx.save_for_backward(kept)
        ctx.scale = kept_scale(p)
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(dy.dtype).mul_(dy).mul_(ctx.scale), None  # autograd can differentiate these operations

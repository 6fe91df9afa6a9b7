"""Fast random numbers for dropout on a CPU (see primitives/dropout.py for the equation)."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16  # bits of the random number for each element
HIGHEST = 1 - 2.0**-BITS  # the highest rate below 1


def draw_kept(kept: Tensor, p: float) -> Tensor:
    """Set each element of `kept` (uint8, contiguous, on the CPU) to 1 with probability 1 - p, else to 0. Return `kept`."""
    if p in (0, 1):
        return kept.fill_(1 - p)
    four = torch.empty(-(-kept.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = four.view(torch.int16)[: kept.numel()].view(kept.shape)
    # Map the numbers to 0 and 1 by clamping, because comparisons and arithmetic with bool are slow.
    dropped = max(round(min(p, HIGHEST) * 2**BITS), 1) - 2 ** (BITS - 1) - 1
    return kept.copy_(numbers.clamp_(dropped, dropped + 1).sub_(dropped))


def kept_scale(p: float) -> float:
    """Return the factor by which kept elements are multiplied to preserve the mean."""
    return 1 / (1 - min(p, HIGHEST)) if p < 1 else 0.0

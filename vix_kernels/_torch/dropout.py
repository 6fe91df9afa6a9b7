"""Random numbers of dropout, cheap on a CPU (primitives/dropout.py states the equation)."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16  # of the random number that decides on an element


def draw_kept(kept: Tensor, p: float) -> Tensor:
    """Fill `kept` (uint8, contiguous, on the CPU): each element is 1 with probability 1 - p, else 0."""
    if p == 1:
        return kept.zero_()
    four = torch.empty(-(-kept.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = four.view(torch.int16)[: kept.numel()].view(kept.shape)
    # Comparisons are slow, and so is bool in arithmetic: 0 and 1 come by clamping.
    dropped = max(round(p * 2**BITS), 1) - 2 ** (BITS - 1) - 1
    return kept.copy_(numbers.clamp_(dropped, dropped + 1).sub_(dropped))


def scale_of_kept(p: float) -> float:
    """What keeps the mean."""
    return 1 / (1 - p) if p < 1 else 0.0

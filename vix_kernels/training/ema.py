"""An exponential moving average of a model's weights, which is often better than the last ones."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class Ema:
    """`model` is the average, always in eval mode.

    After n updates the share of the newest weights is 1 - min(decay, (1 + n) / (10 + n)): young averages forget fast what a
    model started from. Buffers, such as the statistics of batch norm and random features, are copied: an average of random
    directions is none.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        newest = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), newest)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1

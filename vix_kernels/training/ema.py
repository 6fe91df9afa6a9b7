"""Exponential moving average of a model's weights. A model with averaged weights is often more accurate."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class Ema:
    """A copy of a model, in evaluation mode, whose weights are an exponential moving average of the model's weights.

    After n updates, the factor of the newest weights in the next update is 1 - min(decay, (1 + n) / (10 + n)). The first
    updates have larger factors, so that the average quickly forgets the initial weights. Buffers are copied instead of
    averaged. They include batch-norm statistics, which are averages already, and random features, which must not be averaged
    because their average would have a smaller variance.

    Attributes:
        model: the averaged model.
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

"""Exponential moving average of a model's weights. It is often more accurate than the last weights."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class Ema:
    """Moving average of a model's weights, as a copy of the model in eval mode.

    After n updates, the newest weights enter with the factor 1 - min(decay, (1 + n) / (10 + n)). A young average thus forgets
    the initial weights quickly. Buffers, such as batch-norm statistics and random features, are copied: averages of random
    features are not random features.

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

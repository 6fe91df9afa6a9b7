"""The schedule of the learning rate, and the losses of the steps that train all weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..integrations.speed import call
from .batches import output_of

WARMUP = 10  # steps


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine down to 0."""
    warmup = min(WARMUP, steps)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def distilled(distill: str) -> Callable[[nn.Module, Any], Tensor]:
    """Return a function (model, batch) that computes what is distilled."""

    def features(model: nn.Module, batch: Any) -> Tensor:
        if not hasattr(model, "forward_features"):
            raise ValueError("distill: expected 'soft' for a model without forward_features, got 'features'")
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return model.forward_features(x.to(next(model.parameters()).device)).float()

    return features if distill == "features" else lambda model, batch: output_of(call(model, batch)).float()

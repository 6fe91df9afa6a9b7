"""The learning-rate schedule, and the outputs that distillation compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..integrations.speed import LABELS, call, tensors
from .batches import output_of

WARMUP = 10  # steps


def schedule(step: int, steps: int) -> float:
    """Return the learning-rate multiplier for a step: a linear warm-up, then a half-cosine decay toward 0."""
    warmup = min(WARMUP, steps)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def distilled(distill: str) -> Callable[[nn.Module, Any], Tensor]:
    """Return a function that maps a model and a batch to the output that distillation compares, in float32.

    For "soft", this is the output of the model. For "features", it is the result of forward_features.
    """

    def features(model: nn.Module, batch: Any) -> Tensor:
        inputs = {name: x for name, x in batch.items() if name not in LABELS} if isinstance(batch, Mapping) else batch
        return model.forward_features(tensors(inputs)[0].to(next(model.parameters()).device)).float()

    return features if distill == "features" else lambda model, batch: output_of(call(model, batch)).float()


def has_classes(model: nn.Module, out: Tensor) -> bool:
    """Return whether `out`, the output of a model, contains logits of at least two classes.

    If model.num_classes is 0, `out` contains features.
    """
    return out.dim() == 2 and out.shape[1] > 1 and getattr(model, "num_classes", 1) != 0

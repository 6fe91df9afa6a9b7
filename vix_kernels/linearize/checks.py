"""Check the arguments of `linearize` before it changes the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..integrations.hosts import check_model
from ..ops.checks import check_integer, check_number
from .batches import Batches


def check_arguments(
    model: nn.Module, eval_batches: Batches | None, steps: int, finetune_steps: int, eval_samples: int, seed: int,
    max_error: float | None, distill: str, finetune_lr: float, options: dict[str, Any],
) -> None:  # fmt: skip
    check_model(model)
    for name, value in (("steps", steps), ("finetune_steps", finetune_steps), ("eval_samples", eval_samples)):
        check_integer(name, value, 1 if name == "eval_samples" else 0)
    if check_integer("seed", seed, 0) >= 2**63:
        raise ValueError(f"seed: expected less than 2**63, got {seed}")
    if max_error is not None:
        check_number("max_error", max_error)
    if distill not in ("soft", "features"):
        raise ValueError(f"distill: expected 'soft' or 'features', got {distill!r}")
    check_number("finetune_lr", finetune_lr)
    if eval_batches is not None and not callable(eval_batches):
        raise TypeError(f"eval_batches: expected a function that returns a fresh iterator, got {type(eval_batches).__name__}")
    if options.get("residual_conv_kernel"):
        raise ValueError("residual_conv_kernel: expected 0, because a convolution would have to be trained")
    if finetune_steps:
        _check_finetuning(model, finetune_steps, distill)


def _check_finetuning(model: nn.Module, steps: int, distill: str) -> None:
    if any(x.is_inference() for x in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"finetune_steps: expected 0 for weights created in torch.inference_mode, which cannot be trained, got {steps}"
        )
    low = {x.dtype for x in model.parameters() if x.requires_grad and x.dtype in (torch.float16, torch.bfloat16)}
    if low:
        raise ValueError(
            f"finetune_steps: expected 0 for {low.pop()} weights, in which small changes are rounded away, got {steps}"
        )
    if distill == "features" and not hasattr(model, "forward_features"):
        raise ValueError("distill: expected 'soft' for a model without forward_features, got 'features'")

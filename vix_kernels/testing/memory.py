"""Measure the memory that autograd saves for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_for_backward(function: Callable, inputs: tuple[Tensor, ...]) -> int:
    """Return the number of bytes that autograd saves for the backward pass of function(*inputs).

    Inputs, outputs and parameters are not counted.
    """
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    for x in (*inputs, *outputs):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())

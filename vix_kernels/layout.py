"""Memory layouts that operators and their fake kernels must agree on."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_last_stride(x: Tensor) -> Tensor:
    """`x`, copied only if neighbouring channels are not neighbours in memory (an expanded gradient, for example)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_like_tokens(x: Tensor, width: int) -> Tensor:
    """An empty (batch, heads, tokens, width) whose heads and tokens follow each other in memory as they do in `x`.

    So what is made of the views of a linear map's result goes into the next one as a view.
    """
    batch, heads, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):  # not a transposed view: autograd refuses to change views of a function's output in place
        return x.new_empty_strided((batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1))
    return x.new_empty(batch, heads, tokens, width)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums for tokens of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""What an operator, its fake kernel and its implementations agree on: memory layouts, and the rotation of tokens."""

from __future__ import annotations

from typing import NamedTuple

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


class Rotary(NamedTuple):
    """The rotation of every token (ops/rope.py), as primitives and their implementations take it.

    Attributes:
        cos, sin: float32 (heads or 1, tokens, R / 2), of the first R channels; float64 for float64 tokens.
        interleaved: the pairs are channels (2i, 2i + 1), else (i, i + R / 2).
        angles: what cos and sin are of, where it takes a gradient.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True
    angles: Tensor | None = None


def flattened(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """cos, sin, angles and interleaved, for an `autograd.Function`, which looks for tensors among its arguments only."""
    return (None, None, None, True) if rotary is None else (rotary.cos, rotary.sin, rotary.angles, rotary.interleaved)


def joined(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    return None if cos is None or sin is None else Rotary(cos, sin, interleaved)

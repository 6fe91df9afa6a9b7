"""Memory layouts and argument groups that operators, fake kernels and implementations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def unit_last_stride(x: Tensor) -> Tensor:
    """Return `x` with unit stride along the channels. Copies only if needed, for example for an expanded gradient."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_like_tokens(x: Tensor, width: int) -> Tensor:
    """Return an empty (batch, heads, tokens, width) tensor with the memory order of heads and tokens in `x`.

    If `x` is a view of a linear layer's output, the result can be viewed as the input of the next linear layer.
    """
    batch, heads, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):  # not a transposed view: autograd forbids in-place changes of views that a function returns
        return x.new_empty_strided((batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1))
    return x.new_empty(batch, heads, tokens, width)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, statistics and sums for tokens of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Needs = Sequence[bool]  # which gradients a backward operator computes; it returns empty tensors for the others


class Rotary(NamedTuple):
    """Rotary embedding of every token (ops/rope.py), as an argument of the primitives.

    Attributes:
        cos, sin: float32 (heads or 1, tokens, R / 2), for the first R channels; float64 for float64 tokens.
        interleaved: whether channels (2i, 2i + 1) form a pair. Otherwise (i, i + R / 2) do.
        angles: the angles of cos and sin if they require a gradient, else None.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True
    angles: Tensor | None = None

    SCHEMA = "Tensor cos, Tensor sin, bool interleaved"


class Pool(NamedTuple):
    """The tokens that each landmark averages (primitives/landmarks.py).

    Attributes:
        prefix: number of leading tokens, each of which is a landmark.
        rows: rows of the grid of the other tokens. 1 for a plain sequence.
        mark_rows, mark_columns: size of the grid of landmarks.
        adaptive: whether windows are those of adaptive pooling. Otherwise they are segments.
    """

    prefix: int
    rows: int
    mark_rows: int
    mark_columns: int
    adaptive: bool

    SCHEMA = "SymInt prefix, SymInt rows, SymInt mark_rows, SymInt mark_columns, bool adaptive"


class Statistics(NamedTuple):
    """Softmax statistics of each row: the largest logit, in base 2, and the sum of exp2(logit - row_max)."""

    row_max: Tensor
    total: Tensor

    SCHEMA = "Tensor row_max, Tensor total"


class LandmarkGradients(NamedTuple):
    """Terms of the gradients of tokens. The operator adds them in one kernel, which saves memory traffic.

    Attributes:
        dq_other, dk_other: gradients of the tokens from other passes, or None for 0.
        dq_marks, dq_marks_2, dk_marks, dk_marks_2: gradients of the landmarks, each of which may have two terms.
    """

    dq_other: Tensor | None = None
    dk_other: Tensor | None = None
    dq_marks: Tensor | None = None
    dq_marks_2: Tensor | None = None
    dk_marks: Tensor | None = None
    dk_marks_2: Tensor | None = None

    SCHEMA = "Tensor? dq_other, Tensor? dk_other, Tensor? dq_marks, Tensor? dq_marks_2, Tensor? dk_marks, Tensor? dk_marks_2"


def flattened(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """Return cos, sin, angles and interleaved. An `autograd.Function` only tracks tensors that are direct arguments."""
    return (None, None, None, True) if rotary is None else (rotary.cos, rotary.sin, rotary.angles, rotary.interleaved)


def joined(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    return None if cos is None or sin is None else Rotary(cos, sin, interleaved)

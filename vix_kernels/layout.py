"""Memory layouts and argument groups, shared by operators, fake kernels and implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def unit_last_stride(x: Tensor) -> Tensor:
    """Return `x`, or a contiguous copy if neither the stride nor the size of the last dimension is 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_like_tokens(x: Tensor, width: int) -> Tensor:
    """Return an empty (batch, heads, tokens, width) tensor whose heads and tokens have the same memory order as in `x`.

    If `x` is a view of a linear layer's output, the result can be reshaped for the next linear layer without a copy.
    """
    batch, heads, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        # Do not return a transposed view: autograd forbids in-place changes to views that an `autograd.Function` returns.
        return x.new_empty_strided((batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1))
    return x.new_empty(batch, heads, tokens, width)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits, statistics and sums are computed for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# For each gradient, whether a backward operator computes it. If not, the operator returns an empty tensor in its place.
Needs = Sequence[bool]


class Rotary(NamedTuple):
    """Tables of the rotary embedding for all tokens (ops/rope.py), in the form that the primitives expect.

    Attributes:
        cos, sin: (heads or 1, tokens, R / 2), for the first R channels. float32 (for float64 inputs, float64 is also valid).
        interleaved: whether channels (2i, 2i + 1) form a pair. If not, channels (i, i + R / 2) do.
        angles: the angles from which cos and sin were computed, or None if the angles do not require a gradient.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True
    angles: Tensor | None = None

    SCHEMA = "Tensor cos, Tensor sin, bool interleaved"


class Pool(NamedTuple):
    """The windows of tokens whose means are the landmarks (see primitives/landmarks.py).

    Attributes:
        prefix: number of leading tokens that are landmarks themselves.
        rows: number of rows of the grid that the other tokens form, or 1 if they form a plain sequence.
        mark_rows, mark_columns: numbers of rows and columns of the grid of landmarks.
        adaptive: whether to use the windows of adaptive pooling. If not, the windows are consecutive segments without overlap.
    """

    prefix: int
    rows: int
    mark_rows: int
    mark_columns: int
    adaptive: bool

    SCHEMA = "SymInt prefix, SymInt rows, SymInt mark_rows, SymInt mark_columns, bool adaptive"


class Statistics(NamedTuple):
    """Softmax statistics of each row of logits: row_max = log2(e) max(logits) and total = sum(exp2(log2(e) logits - row_max)).

    `broadcast` stores 1 / total in place of total.
    """

    row_max: Tensor
    total: Tensor

    SCHEMA = "Tensor row_max, Tensor total"


class LandmarkGradients(NamedTuple):
    """Terms of the gradients of q and k in landmarks_backward. One kernel adds all terms, to save memory traffic.

    Attributes:
        dq_other, dk_other: gradients of q and k that do not flow through the landmarks, or None if there are none.
        dq_marks, dq_marks_2, dk_marks, dk_marks_2: the two terms of the gradients of the landmarks. The second terms are
            optional.
    """

    dq_other: Tensor | None = None
    dk_other: Tensor | None = None
    dq_marks: Tensor | None = None
    dq_marks_2: Tensor | None = None
    dk_marks: Tensor | None = None
    dk_marks_2: Tensor | None = None

    SCHEMA = "Tensor? dq_other, Tensor? dk_other, Tensor? dq_marks, Tensor? dq_marks_2, Tensor? dk_marks, Tensor? dk_marks_2"


def flattened(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """Return cos, sin, angles and interleaved separately, because an `autograd.Function` ignores tensors inside tuples."""
    return (None, None, None, True) if rotary is None else (rotary.cos, rotary.sin, rotary.angles, rotary.interleaved)


def joined(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    """Return Rotary(cos, sin, interleaved), or None if cos or sin is None."""
    return None if cos is None or sin is None else Rotary(cos, sin, interleaved)

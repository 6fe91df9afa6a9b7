"""Landmark means and their gradient in plain PyTorch, one axis of the grid at a time.

The functions do not use autograd. Sums are computed in float32 (float64 for float64 inputs). 16-bit inputs are cast a few heads
at a time. Segments (see primitives/landmarks.py) are summed after a reshape, and overlapping windows after a gather. Nothing is
multiplied by zero, so a NaN affects only the windows that contain it.

Shapes: q (B, H, Nq, D); k (B, H, Nk, D); marks (B, H, L, D); masks bool (B, N); counts float32 (B, L); cos, sin float32 or
float64 (1 or H, N, R / 2). Gradients of tokens have the same memory layout as the tokens. Other tensors are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from ..layout import LandmarkGradients, Needs, Pool, Rotary, accumulator, empty_like_tokens
from .tiles import Rotation, Scratch, groups, read, valid_tokens


def landmarks_forward(
    q: Tensor,
    k: Tensor | None,
    q_mask: Tensor | None,
    k_mask: Tensor | None,
    rotary: Rotary | None,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q_marks, k_marks (both in q's dtype), q_counts and k_counts. If k is None, k_marks and k_counts are empty."""
    rope = Rotation(rotary, accumulator(q.dtype))
    q_marks, q_counts = _means(q, q_mask, rope, pool)
    if k is None:
        return q_marks, q_marks.new_empty(0), q_counts, q_counts.new_empty(0)
    k_marks, k_counts = _means(k, k_mask, rope, pool)
    return q_marks, k_marks, q_counts, k_counts


def landmarks_backward(
    gradients: LandmarkGradients,
    q: Tensor,
    k: Tensor | None,
    q_mask: Tensor | None,
    k_mask: Tensor | None,
    rotary: Rotary | None,
    pool: Pool,
    q_counts: Tensor,
    k_counts: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor]:
    """Return dq and dk. Gradients that `needs` does not request are empty.

    For x = q and x = k, with the terms in `gradients`:
    dx_n = dx_other_n + sum of (dx_marks + dx_marks_2)_j / counts_j over all windows j that contain token n

    With RoPE, the sum is rotated back. For a masked token, dx_n = dx_other_n.
    """
    rope, (need_q, need_k) = Rotation(rotary, accumulator(q.dtype)), needs
    dq_other, dk_other, *parts = gradients
    dq = _token_gradient(dq_other, *parts[:2], q, q_mask, q_counts, rope, pool) if need_q else q.new_empty(0)
    dk = _token_gradient(dk_other, *parts[2:], k, k_mask, k_counts, rope, pool) if need_k else q.new_empty(0)
    return dq, dk


def cached_on_cpu(function: Callable) -> Callable:
    """Cache the results of `function` if its last argument, a device, is a CPU.

    On a GPU, cached tensors could be allocated during the capture of a CUDA graph, or read by another stream too early.
    """
    cached = lru_cache(maxsize=64)(torch.inference_mode(False)(function))

    @wraps(function)
    def call(*args: Any) -> Any:
        return cached(*args) if args[-1].type == "cpu" else function(*args)

    return call


def _sums(x: Tensor, pool: Pool) -> Tensor:
    """Return the sums (..., L, D) of tokens (..., N, D) over each window."""
    grid = _window_sums(_window_sums(_lines(x, pool), -2, pool.mark_columns, pool.adaptive), -3, pool.mark_rows, pool.adaptive)
    return torch.cat([x[..., : pool.prefix, :], grid.flatten(-3, -2)], -2)


def _spread_marks(marks: Tensor, other: Tensor | None, x: Tensor, pool: Pool) -> None:
    """Set each token of x (..., N, D) to the sum of the rows of `marks` (..., L, D) whose windows contain it.

    If `other` (..., N, D) is given, add it to the result. Without `other`, this is the transpose of _sums.
    """
    prefix, rest = (None, None) if other is None else (other[..., : pool.prefix, :], _lines(other, pool))
    _plus(marks[..., : pool.prefix, :], prefix, x[..., : pool.prefix, :])
    coarse = marks[..., pool.prefix :, :].unflatten(-2, (pool.mark_rows, -1))
    lines = coarse
    if pool.rows != pool.mark_rows:
        lines = coarse.new_empty(*coarse.shape[:-3], pool.rows, *coarse.shape[-2:])
        _spread(coarse, -3, pool.adaptive, None, lines)
    _spread(lines, -2, pool.adaptive, rest, _lines(x, pool))


def _lines(x: Tensor, pool: Pool) -> Tensor:
    """View the tokens of x (..., N, D) after the prefix as a grid (..., rows, columns, D)."""
    return x[..., pool.prefix :, :].unflatten(-2, (pool.rows, -1))


def _window_sums(x: Tensor, axis: int, count: int, adaptive: bool) -> Tensor:
    """Return the sums of x over `count` windows along `axis`, a negative index."""
    size = x.shape[axis]
    if size == count:
        return x
    short, longer = divmod(size, count)
    if adaptive and longer:
        common, last, is_short = _overlapping_windows(size, count, x.device)
        sums = x.index_select(axis, common).unflatten(axis, (count, short + 1)).sum(axis)
        return sums.add_(x.index_select(axis, last).masked_fill_(is_short.view(-1, *[1] * (-1 - axis)), 0))
    split = (count - longer) * short
    sums = x.narrow(axis, 0, split).unflatten(axis, (-1, short)).sum(axis)
    if not longer:
        return sums
    return torch.cat([sums, x.narrow(axis, split, size - split).unflatten(axis, (-1, short + 1)).sum(axis)], axis)


@cached_on_cpu
def _overlapping_windows(size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token indices and a mask for windows of n or n + 1 tokens, where n = size // count + 1.

    The results are the indices of the first n tokens of all windows, the index of the last token of each window, and a mask
    that is True for windows of n tokens.
    """
    window = torch.arange(count, device=device)
    first, last = window * size // count, ((window + 1) * size - 1) // count
    common = first[:, None] + torch.arange(size // count + 1, device=device)
    return common.flatten(), last, last < first + size // count + 1


def _spread(marks: Tensor, axis: int, adaptive: bool, other: Tensor | None, out: Tensor) -> None:
    """Set each token of `out` to the sum of the rows of `marks` whose windows contain it, plus `other` (if any).

    `axis`, a negative index, is the dimension of the windows in `marks` and of the tokens in `out`.
    """
    size, count = out.shape[axis], marks.shape[axis]
    short, longer = divmod(size, count)
    if adaptive and longer:
        # Write the mark of each token's last window. Then, for each token in two windows, add the mark of its first window.
        token, window = (torch.arange(each, device=marks.device) for each in (size, count))
        _plus(marks.index_select(axis, ((token + 1) * count - 1) // size), other, out)
        end = ((window + 1) * size - 1) // count
        single = (((end + 1) * count - 1) // size == window).view(-1, *[1] * (-1 - axis))
        out.index_add_(axis, end, marks.masked_fill(single, 0))
        return
    split = (count - longer) * short
    for start, length, windows in (
        (0, short, marks.narrow(axis, 0, count - longer)),
        (split, short + 1, marks.narrow(axis, count - longer, longer)),
    ):
        number = windows.shape[axis]
        parts = (None if x is None else _windows(x, axis, start, number, length) for x in (other, out))
        _plus(windows.unsqueeze(axis), *parts)


def _windows(x: Tensor, axis: int, start: int, number: int, length: int) -> Tensor:
    return x.narrow(axis, start, number * length).unflatten(axis, (number, length))


def _plus(x: Tensor, other: Tensor | None, out: Tensor) -> None:
    """Write x + other, or x if other is None, to out in one pass over memory."""
    out.copy_(x) if other is None else torch.add(x, other, out=out)


def _means(x: Tensor, mask: Tensor | None, rope: Rotation, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return the landmarks of x, and the number of valid tokens in each window."""
    if mask is None:
        counts = _sizes(x.shape[2], pool, x.device).repeat(len(x), 1)
    else:
        counts = _sums(mask.float()[..., None], pool).squeeze(-1)
    divisor = counts.clamp(min=1)[:, None, :, None]
    marks = x.new_empty(*x.shape[:2], counts.shape[1], x.shape[3])
    for group, _ in groups(x, x.shape[3]):
        part = marks[group]
        part.copy_(_sums(read(x, group, mask, rope), pool).view(part.shape).div_(divisor[group[0]]))
    return marks, counts


@cached_on_cpu
def _sizes(tokens: int, pool: Pool, device: torch.device) -> Tensor:
    """Return the number of tokens in each window, (1, L)."""
    return _sums(torch.ones(1, tokens, 1, device=device), pool).squeeze(-1)


def _token_gradient(
    other: Tensor | None, dmarks: Tensor, dmarks_2: Tensor | None, x: Tensor, mask: Tensor | None, counts: Tensor,
    rope: Rotation, pool: Pool,
) -> Tensor:  # fmt: skip
    """Return the gradient of tokens x through their landmarks, plus `other`."""
    scaled = dmarks.to(accumulator(x.dtype))
    scaled = (scaled if dmarks_2 is None else scaled + dmarks_2) / counts.clamp(min=1)[:, None, :, None]
    dx = empty_like_tokens(x, x.shape[3])
    buffer, rotated = Scratch(scaled), rope.cos is not None
    direct = other is not None and not rotated and mask is None
    for group, _ in groups(x, x.shape[3]):
        part, marks = dx[group], scaled[group]
        wide = dx.dtype == scaled.dtype  # if so, sums can be computed in dx directly
        rows = part if wide and not rotated else buffer(*part.shape)
        _spread_marks(marks, other[group] if direct else None, rows, pool)
        if rotated:
            rows = rope(rows, group, inverse=True, out=part if wide else None)
        if mask is not None:
            rows.masked_fill_(~valid_tokens(mask, group)[..., None], 0)
        if other is not None and not direct:
            rows += other[group]
        if not wide:
            part.copy_(rows)
    return dx

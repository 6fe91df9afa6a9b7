"""landmarks: means of windows of tokens, for Nystrom and agent attention.

    marks_j = 1 / counts_j  sum_{valid n in window j} x_n            counts_j = number of valid tokens in window j

Each of the first `prefix` tokens is a landmark. The other tokens form a grid in raster order, and so do their landmarks. A
window consists of all tokens in a range of rows and a range of columns. There are two ways to choose `count` ranges along an
axis of `size` tokens:

    segments    The first count - size % count ranges have size // count tokens, and the other ranges have one more. Ranges
                do not overlap.
    adaptive    Range j is [floor(j size / count), ceil((j + 1) size / count)), as in torch's adaptive pooling. Neighboring
                ranges may share a token if count does not divide size.

A masked token is treated as 0, even if it is NaN. A landmark without valid tokens is 0. With RoPE, tokens are rotated first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import LandmarkGradients, Pool, Rotary, accumulator, empty_like_tokens, flattened, joined, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register
from .rotate import angle_gradient, rotate_reference

_PROBLEM = "Tensor q, Tensor? k, Tensor? q_mask, Tensor? k_mask, Rotary? rotary, Pool pool"


def landmarks(
    q: Tensor,
    k: Tensor | None = None,
    *,
    prefix: int = 0,
    rows: int = 1,
    mark_rows: int = 1,
    mark_columns: int,
    adaptive: bool = False,
    q_mask: Tensor | None = None,
    k_mask: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> tuple[Tensor, ...]:
    """Return the landmarks of q and, if k is given, of k. With Triton, one kernel launch computes both.

    Args:
        q: (batch, heads, N, D). Views with last stride 1 are not copied.
        k: (batch, heads, N', D) in q's dtype, or None. N' may differ from N only if rows = 1 and rotary is None.
        prefix: number of leading tokens that are landmarks themselves.
        rows: number of rows of the grid that the other tokens form, or 1 if they form a plain sequence.
        mark_rows, mark_columns: size of the grid of landmarks, at most the size of the grid of tokens.
        adaptive: whether to use the windows of adaptive pooling. If not, windows are segments.
        q_mask, k_mask: bool (batch, N) and (batch, N'), True = valid.
        rotary: rotary embedding of q and k.
        backend: "torch" or "triton".

    Returns:
        (q_marks, q_counts), or (q_marks, k_marks, q_counts, k_counts) if k is given. Marks are the landmarks, (batch, heads, L,
        D) in q's dtype with L = prefix + mark_rows * mark_columns. They are differentiable in q, k and rotary.angles. Counts
        are float32 (batch, L).
    """
    q, k = unit_last_stride(q), None if k is None else unit_last_stride(k)
    inputs, pool = (q, k, q_mask, k_mask, *flattened(rotary)), Pool(prefix, rows, mark_rows, mark_columns, adaptive)
    if needs_autograd(inputs):
        return _Landmarks.apply(*inputs, pool, backend)
    q_marks, k_marks, q_counts, k_counts = landmarks_forward(q, k, q_mask, k_mask, rotary, pool, backend)
    return (q_marks, q_counts) if k is None else (q_marks, k_marks, q_counts, k_counts)


def landmarks_reference(
    q: Tensor,
    k: Tensor | None = None,
    *,
    prefix: int = 0,
    rows: int = 1,
    mark_rows: int = 1,
    mark_columns: int,
    adaptive: bool = False,
    q_mask: Tensor | None = None,
    k_mask: Tensor | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, ...]:
    """Return the same results as `landmarks`, computed in plain PyTorch.

    The function gathers the tokens of each window, sums them, and divides by the counts. Slicing each window separately would
    add hundreds of nodes to an exported graph. With a dynamic number of tokens, that graph would be correct only for the length
    of the example input. A product with a matrix of windows would multiply the tokens outside a window by 0. The result would
    be NaN if such a token were not finite.
    """

    def window_sums(x: Tensor, axis: int, count: int) -> Tensor:
        """Return the sums of x over `count` windows along `axis`, a negative index."""
        size, window = x.shape[axis], torch.arange(count + 1, device=x.device)
        starts = window * (size // count) + (window - count + size % count).clamp(min=0)
        starts, ends = starts[:-1], starts[1:]
        if adaptive:
            starts, ends = window[:-1] * size // count, (window[1:] * size + count - 1) // count
        at = starts[:, None] + torch.arange(size // count + 2, device=x.device)  # no window has more tokens
        at = torch.where(at < ends[:, None], at, size)
        padded = torch.cat([x, torch.zeros_like(x.narrow(axis, 0, 1))], axis)
        return padded.index_select(axis, at.flatten()).unflatten(axis, at.shape).sum(axis)

    def sums(x: Tensor) -> Tensor:
        """Return the sums (..., L, width) of tokens (..., N, width) over each window."""
        grid = x[..., prefix:, :].unflatten(-2, (rows, (x.shape[-2] - prefix) // rows))
        grid = window_sums(grid, -2, mark_columns)
        if rows > mark_rows:
            grid = window_sums(grid, -3, mark_rows)
        return torch.cat([x[..., :prefix, :], grid.flatten(-3, -2)], -2)

    def means(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        valid = x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
        x = torch.where(valid[:, None, :, None], x, 0.0)
        if rotary is not None:
            x = rotate_reference(x, rotary)
        counts = sums(valid.float()[..., None]).squeeze(-1)
        total = sums(x.to(accumulator(x.dtype)))  # do not round the sums along one axis before they are summed along the other
        return (total / counts.clamp(min=1)[:, None, :, None]).to(x.dtype), counts

    q_marks, q_counts = means(q, q_mask)
    if k is None:
        return q_marks, q_counts
    k_marks, k_counts = means(k, k_mask)
    return q_marks, k_marks, q_counts, k_counts


class _Landmarks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_mask, k_mask, cos, sin, angles, interleaved, pool, backend):
        ctx.interleaved, ctx.pool, ctx.backend = interleaved, pool, backend
        rotary = joined(cos, sin, interleaved)
        q_marks, k_marks, q_counts, k_counts = landmarks_forward(q, k, q_mask, k_mask, rotary, pool, backend)
        ctx.save_for_backward(q, k, q_mask, k_mask, cos, sin, angles, q_counts, k_counts)
        ctx.mark_non_differentiable(q_counts, k_counts)
        ctx.set_materialize_grads(False)
        return (q_marks, q_counts) if k is None else (q_marks, k_marks, q_counts, k_counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dq_marks, dk_marks, *_):
        q, k, q_mask, k_mask, cos, sin, _, q_counts, k_counts = saved
        need_q, need_k, _, _, _, _, need_angles, *_ = ctx.needs_input_grad
        need_q = dq_marks is not None and (need_q or need_angles)  # dq_marks is None if the loss does not use q_marks
        need_k = k is not None and dk_marks is not None and (need_k or need_angles)
        dq, dk = landmarks_backward(
            LandmarkGradients(dq_marks=dq_marks, dk_marks=dk_marks), q, k, q_mask, k_mask,
            joined(cos, sin, ctx.interleaved), ctx.pool, q_counts, k_counts, (need_q, need_k), ctx.backend,
        )  # fmt: skip
        dangles = None
        if need_angles:
            rotated = [(q, dq)] * need_q + [(k, dk)] * need_k
            dangles = sum(angle_gradient(*each, cos, ctx.interleaved, ctx.backend) for each in rotated)
        return dq if need_q else None, dk if need_k else None, None, None, None, None, dangles, None, None, None


def _fake_forward(q, k, q_mask, k_mask, rotary, pool, backend):
    batch, heads, _, width = q.shape
    num_marks = pool.prefix + pool.mark_rows * pool.mark_columns
    marks = [q.new_empty(batch, heads, num_marks, width) if x is not None else q.new_empty(0) for x in (q, k)]
    counts = [q.new_empty((batch, num_marks) if x is not None else (0,), dtype=torch.float32) for x in (q, k)]
    return *marks, *counts


def _fake_backward(gradients, q, k, q_mask, k_mask, rotary, pool, q_counts, k_counts, needs, backend):
    return tuple(empty_like_tokens(x, x.shape[3]) if need else q.new_empty(0) for x, need in zip((q, k), needs, strict=True))


landmarks_forward = register(
    f"landmarks_forward({_PROBLEM}, str backend) -> (Tensor q_marks, Tensor k_marks, Tensor q_counts, Tensor k_counts)",
    module="landmarks",
    fake=_fake_forward,
)
landmarks_backward = register(
    f"landmarks_backward(LandmarkGradients gradients, {_PROBLEM}, Tensor q_counts, Tensor? k_counts, bool[] needs, "
    "str backend) -> (Tensor dq, Tensor dk)",
    module="landmarks",
    fake=_fake_backward,
)

"""Definitions of every public op in float64, written from the papers. They share no code with the library.

The definitions materialize all matrices of attention weights. Masks are bool and True for valid tokens. Masked tokens must
be finite, so callers fill them with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INFINITY = float("inf")


@dataclass(frozen=True)
class How:
    """Changes to a definition, for estimating the effect of rounding errors.

    Attributes:
        fixed_totals: whether to treat the denominators of all normalizations as constants. This does not change outputs, but
            the gradient formulas then contain no subtractions. The gradients show the size of the terms that otherwise cancel.
        stored: function applied to rotated tokens, landmarks and projected keys, which the library stores in the dtype of q.
        logits: function applied to the logits of each softmax, because the library rounds each logit.
        products: function applied to the matrix products in the pseudo-inverse iterations.
        sums: function applied to the column sums of the attention matrix between the landmarks. The pseudo-inverse iterations
            start from the transpose of this matrix divided by the largest sum, so the gradient is discontinuous where the two
            largest sums are equal.
    """

    fixed_totals: bool = False
    stored: Callable[[Tensor], Tensor] = lambda x: x
    logits: Callable[[Tensor], Tensor] = lambda x: x
    products: Callable[[Tensor], Tensor] = lambda x: x
    sums: Callable[[Tensor], Tensor] = lambda x: x


EXACT = How()


def normalized(log_weights: Tensor, valid: Tensor | None = None, *, how: How, log_extra: float = -INFINITY) -> Tensor:
    """Normalize exp(log_weights) along the last dimension. Rows without a valid entry become 0.

    The denominator is the sum of exp(log_weights) over the valid entries, plus exp(log_extra).
    """
    log_weights = how.logits(log_weights)
    if valid is not None:
        log_weights = log_weights.masked_fill(~valid, -INFINITY)
    largest = log_weights.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -INFINITY, 0.0)
    weights = (log_weights - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if log_extra > -INFINITY:
        total = total + (log_extra - largest).exp()
    if how.fixed_totals:
        total = total.detach()
    return weights / total.masked_fill(total == 0, 1.0)


def pairs(valid: Tensor | None) -> Tensor | None:
    """Reshape a mask (batch, keys) so that it broadcasts over weights (batch, heads, queries, keys)."""
    return None if valid is None else valid[:, None, None, :]


# Rotary embedding


def angles_1d(tokens: int, dim: int, base: float) -> Tensor:
    """Return the angles theta_{t,i} = t base^(-2i / dim) in a tensor (1, tokens, dim / 2)."""
    return torch.tensor([[[t * base ** (-2 * i / dim) for i in range(dim // 2)] for t in range(tokens)]], dtype=torch.float64)


def angles_axial(height: int, width: int, dim: int, base: float) -> Tensor:
    """Return the angles of axial RoPE in a tensor (1, height * width, dim / 2).

    The column index determines the angles of the first half of the channel pairs, and the row index those of the second half.
    """
    frequencies = [base ** (-4 * i / dim) for i in range(dim // 4)]
    rows = [[x * f for f in frequencies] + [y * f for f in frequencies] for y in range(height) for x in range(width)]
    return torch.tensor([rows], dtype=torch.float64)


def angles_mixed(height: int, width: int, frequencies: Tensor) -> Tensor:
    """Return the angles theta_{h,t,i} = x w^x_{h,i} + y w^y_{h,i} in a tensor (heads, height * width, R / 2).

    R is the number of rotated channels. `frequencies` (2, heads, R / 2) contains w^x and w^y.
    """
    x = torch.tensor([float(x) for _ in range(height) for x in range(width)], dtype=torch.float64)
    y = torch.tensor([float(y) for y in range(height) for _ in range(width)], dtype=torch.float64)
    return torch.einsum("t,hi->hti", x, frequencies[0]) + torch.einsum("t,hi->hti", y, frequencies[1])


def rotated(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate the last tokens of x with the tables cos and sin of shape (heads or 1, tokens, R / 2).

    Earlier tokens, and the channels from R upward, are not rotated.
    """
    before, half = x.shape[2] - cos.shape[1], cos.shape[2]
    firsts = [2 * i if layout == "interleaved" else i for i in range(half)]
    seconds = [2 * i + 1 if layout == "interleaved" else i + half for i in range(half)]
    others = [i for i in range(x.shape[3]) if i >= 2 * half]
    u, v, rest = (x[:, :, before:, channels] for channels in (firsts, seconds, others))
    turned = torch.cat([u * cos - v * sin, u * sin + v * cos, rest], -1)
    order = torch.tensor([*firsts, *seconds, *others]).argsort()
    return torch.cat([x[:, :, :before], turned[..., order]], 2)


# Attention ops. Their inputs are q (batch, heads, queries, D), k (batch, heads, keys, D) and v (batch, heads, keys, E). Their
# output has the shape (batch, heads, queries, E).


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, valid: Tensor | None = None, how=EXACT):
    return normalized(scale * q @ k.mT, pairs(valid), how=how) @ v


def performer_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, scale: float, valid=None, how=EXACT) -> Tensor:
    """FAVOR+ attention, which replaces exp(scale q k) with an estimate that uses random vectors w_j.

    Up to a constant factor, the estimate is sum_j exp(c w_j q - c^2 |q|^2 / 2) exp(c w_j k - c^2 |k|^2 / 2), where c^2 = scale.
    """
    c = math.sqrt(scale)
    of_queries = c * q @ w.mT - c**2 / 2 * (q * q).sum(-1, keepdim=True)
    of_keys = c * k @ w.mT - c**2 / 2 * (k * k).sum(-1, keepdim=True)
    log_kernel = torch.logsumexp(of_queries[:, :, :, None] + of_keys[:, :, None], -1)
    return normalized(log_kernel, pairs(valid), how=how) @ v


def feature_attention(
    q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, b: Tensor, *, scale: float, gaussian: float, valid=None, how=EXACT
) -> Tensor:  # fmt: skip
    """Attention that replaces exp(scale q k) with a sum over the learned features wq_j and wk_j.

    The sum is sum_j exp(c wq_j q + b_j) exp(c wk_j k - gaussian c^2 |k|^2 / 2), where c^2 = scale.
    """
    c = math.sqrt(scale)
    of_queries = c * q @ wq.mT + b[..., None, :]
    of_keys = c * k @ wk.mT - gaussian * c**2 / 2 * (k * k).sum(-1, keepdim=True)
    log_kernel = torch.logsumexp(of_queries[:, :, :, None] + of_keys[:, :, None], -1)
    return normalized(log_kernel, pairs(valid), how=how) @ v


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor | None = None, *, feature_map: str, eps: float, valid=None, how=EXACT
) -> Tensor:
    """Attention with the weights phi(q) phi(k), divided by their sum plus eps.

    If w is given, q and k are first replaced by D^(-1/4) w q and D^(-1/4) w k, where D is the head dimension.
    """
    if w is not None:
        q, k = (x.shape[-1] ** -0.25 * x @ w.mT for x in (q, k))
    if feature_map == "relu":
        weights = q.clamp(min=0) @ k.clamp(min=0).mT
        if valid is not None:
            weights = weights * pairs(valid)
        total = weights.sum(-1, keepdim=True) + eps
        if how.fixed_totals:
            total = total.detach()
        return weights / total.masked_fill(total == 0, 1.0) @ v
    # For x < 0, elu(x) + 1 equals exp(x), which may underflow, so the features are computed in log space.
    log_q, log_k = (torch.where(x > 0, x.clamp(min=0).log1p(), x) for x in (q, k))
    log_kernel = torch.logsumexp(log_q[:, :, :, None] + log_k[:, :, None], -1)
    log_eps = math.log(eps) if eps else -INFINITY
    return normalized(log_kernel, pairs(valid), how=how, log_extra=log_eps) @ v


def linformer_attention(q, k, v, e: Tensor, f: Tensor | None = None, *, scale: float, valid=None, how=EXACT) -> Tensor:
    """Softmax attention over the keys E^T k and the values F^T v. E and F have the shape ([heads,] tokens or more, K)."""
    if valid is not None:
        k, v = k * valid[:, None, :, None], v * valid[:, None, :, None]
    e, f = (x[..., : k.shape[2], :] for x in (e, e if f is None else f))
    return softmax_attention(q, how.stored(e.mT @ k), f.mT @ v, scale=scale, how=how)


def agent_attention(q, k, v, agents, *, scale: float, valid=None, agents_valid=None, agents_k=None, how=EXACT):
    """Attention in two steps: agents attend to the keys, then queries attend to the agents."""
    values = softmax_attention(agents, k, v, scale=scale, valid=valid, how=how)
    return softmax_attention(q, agents, values, scale=scale, valid=agents_valid, how=how)


def segments(tokens: int, count: int) -> list[range]:
    """Split the tokens into `count` windows of `tokens // count` tokens. The last `tokens % count` windows have one more."""
    windows, start = [], 0
    for j in range(count):
        end = start + tokens // count + (j >= count - tokens % count)
        windows.append(range(start, end))
        start = end
    return windows


def adaptive(size: int, count: int) -> list[range]:
    """Return the `count` windows of adaptive average pooling over `size` positions."""
    return [range(j * size // count, -((-(j + 1) * size) // count)) for j in range(count)]


def nearest_grid(count: int, rows: int, columns: int) -> tuple[int, int] | None:
    """Divide the grid into `count` cells that are as square as possible. Return the numbers of cell rows and cell columns.

    Return None if there is no such division.
    """
    fits = [(a, count // a) for a in range(1, rows + 1) if count % a == 0 and count // a <= columns]
    return min(fits, key=lambda fit: abs(math.log((rows / fit[0]) / (columns / fit[1]))), default=None)


def windows_of(tokens: int, count: int, *, prefix: int = 0, grid: tuple[int, int] | None = None) -> list[list[int]]:
    """For each landmark, return the indices of the tokens in its window."""
    singles = [[t] for t in range(prefix)]
    if grid is None:
        return singles + [[prefix + t for t in window] for window in segments(tokens - prefix, count)]
    rows, columns = grid
    up, along = nearest_grid(count, rows, columns)
    return singles + [
        [prefix + y * columns + x for y in window_y for x in window_x]
        for window_y in adaptive(rows, up)
        for window_x in adaptive(columns, along)
    ]


def averages(x: Tensor, windows: list[list[int]], valid: Tensor | None) -> Tensor:
    """Average one sample (heads, tokens, D) over the valid tokens in each window. Windows without valid tokens are skipped."""
    kept = [[t for t in window if valid is None or valid[t]] for window in windows]
    means = [x[:, window].mean(1) for window in kept if window]
    return torch.stack(means, 1) if means else x[:, :0]


def nystrom_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None, *, scale: float, count: int, iterations: int = 6,
    start: str = "exact", landmarks: str = "segment", grid=None, prefix: int = 0, valid=None, how=EXACT,
) -> Tensor:  # fmt: skip
    """Compute softmax(q k~) Z softmax(q~ k) v plus a convolution of v.

    Here q~ and k~ are the landmarks, and Z is the pseudo-inverse of softmax(q~ k~), computed iteratively. Landmarks without a
    valid token are dropped. With landmarks="pad_front", zero tokens are prepended. They count as keys unless there is a mask.
    """
    queries = q.shape[2]
    if landmarks == "pad_front":
        q, k, v = (torch.nn.functional.pad(x, (0, 0, -x.shape[2] % count, 0)) for x in (q, k, v))
        if valid is not None:
            valid = torch.nn.functional.pad(valid, (-valid.shape[1] % count, 0), value=False)
    of_queries = windows_of(q.shape[2], count, prefix=prefix, grid=grid)
    of_keys = windows_of(k.shape[2], count, prefix=prefix, grid=grid)
    shared = valid is not None and q.shape[2] == k.shape[2]
    samples = []
    for b in range(q.shape[0]):
        mask = None if valid is None else valid[b]
        q_landmarks = how.stored(averages(q[b], of_queries, mask if shared else None))
        k_landmarks = how.stored(averages(k[b], of_keys, mask))
        a = normalized(scale * q_landmarks @ k_landmarks.mT, how=how) if k_landmarks.shape[1] else None
        samples.append((q_landmarks, k_landmarks, a))
    sums = [how.sums(a.sum(-2)).amax(-1) for *_, a in samples if a is not None]
    outputs = []
    for b, (q_landmarks, k_landmarks, a) in enumerate(samples):
        mask = None if valid is None else valid[b]
        if a is None:
            outputs.append(q[b] @ k[b].mT @ v[b] * 0)
            continue
        largest = torch.cat(sums).amax().expand(a.shape[0]) if start == "original" else how.sums(a.sum(-2)).amax(-1)
        z = a.mT / largest[:, None, None]
        one = torch.eye(a.shape[1], dtype=torch.float64)
        for _ in range(iterations):
            x = how.products(a @ z)
            y = how.products(x @ (15 * one - how.products(x @ (7 * one - x))))
            z = how.products(z @ (13 * one - y)) / 4
        first = normalized(scale * q[b] @ k_landmarks.mT, how=how)
        last = normalized(scale * q_landmarks @ k[b].mT, mask, how=how)
        outputs.append(first @ (z @ (last @ v[b])))
    out = torch.stack(outputs) if outputs else q[..., :1].expand(*q.shape[:3], v.shape[3])
    if weight is not None:
        if valid is not None:
            v = v * valid[:, None, :, None]
        taps = weight.shape[2]
        for u in range(taps):
            shift = u - taps // 2  # out_t += w_u v_{t + shift}
            shifted = torch.zeros_like(v)
            low, high = max(0, -shift), min(v.shape[2], v.shape[2] - shift)
            if low < high:
                shifted = torch.nn.functional.pad(v[:, :, low + shift : high + shift], (0, 0, low, v.shape[2] - high))
            out = out + weight[None, :, 0, u, 0, None, None] * shifted
    return out[:, :, out.shape[2] - queries :]


def fourier_mixing(x: Tensor, *, norm: str | None) -> Tensor:
    """Compute y_ab = sum_nd x_nd cos(2 pi (a n / N + b d / D)), divided by sqrt(N D) if norm="ortho"."""

    def tables(size: int) -> tuple[Tensor, Tensor]:
        angles = [[2 * math.pi * (a * n % size) / size for n in range(size)] for a in range(size)]
        angles = torch.tensor(angles, dtype=torch.float64)
        return angles.cos(), angles.sin()

    (cos_n, sin_n), (cos_d, sin_d) = tables(x.shape[1]), tables(x.shape[2])
    y = cos_n @ x @ cos_d - sin_n @ x @ sin_d
    return y / math.sqrt(x.shape[1] * x.shape[2]) if norm == "ortho" else y

"""The pseudo-inverse with batched matrix products, on any device (see primitives/pinv.py for the equations).

An iteration is computed without identity matrices, as W = X X - 7 X, Y = 15 X + X W and Z' = 1/4 (13 Z - Z Y).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Needs, accumulator


def pinv_forward(
    q_marks: Tensor,
    k_marks: Tensor,
    values: Tensor,
    q_counts: Tensor | None,
    k_counts: Tensor | None,
    scale: float,
    iterations: int,
    init: str,
) -> Tensor:
    a = _attention(read(q_marks, q_counts), read(k_marks, k_counts), q_counts, k_counts, scale)
    z = _start(a, init)[0]
    for _ in range(iterations):
        z = _advance(z, _polynomial(a, z)[2])
    return _split(torch.bmm(z, read(values, q_counts)), values)


def pinv_backward(
    dout: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    values: Tensor,
    q_counts: Tensor | None,
    k_counts: Tensor | None,
    scale: float,
    iterations: int,
    init: str,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_marks, dk_marks and dvalues. Gradients that `needs` does not request are empty.

        G = dZ'    dY = -1/4 Z^T G    dW = X^T dY    dX = 15 dY - 7 dW + dY W^T + dW X^T + X^T dW
        dA += dX Z^T    dZ = 1/4 (13 G - G Y^T) + A^T dX

    X, W and Y are symmetric only up to rounding, so the code keeps the transposes in these equations.
    """
    need_q, need_k, need_values = needs
    q, k, contents = read(q_marks, q_counts), read(k_marks, k_counts), read(values, q_counts)
    a = _attention(q, k, q_counts, k_counts, scale)
    z, s, sums = _start(a, init)
    dresult = read(dout, k_counts)
    history = []
    for _ in range(iterations):
        history.append((z, *_polynomial(a, z)))
        z = _advance(z, history[-1][3])
    dvalues = _split(torch.bmm(z.mT, dresult), values) if need_values else values.new_empty(0)
    if not (need_q or need_k):
        return q_marks.new_empty(0), k_marks.new_empty(0), dvalues

    dz, da = torch.bmm(dresult, contents.mT), torch.zeros_like(a)
    while history:
        z, x, w, y = history.pop()
        dy = torch.bmm(z.mT, dz).mul_(-1 / 4)
        dw = torch.bmm(x.mT, dy)
        dx = torch.baddbmm(dy, dy, w.mT, beta=15).sub_(dw, alpha=7).baddbmm_(dw, x.mT).baddbmm_(x.mT, dw)
        dz = torch.baddbmm(dz, dz, y.mT, beta=13 / 4, alpha=-1 / 4).baddbmm_(a.mT, dx)
        da.baddbmm_(dx, z.mT)
    da.addcdiv_(dz.mT, s)
    ds = (dz * a.mT).sum((1, 2), keepdim=True).div_(-s * s)
    largest = (sums == s).to(a.dtype)  # if several columns have the largest sum, each receives an equal part of the gradient
    if init == "original":
        ds, count = ds.sum(0, keepdim=True), largest.sum()
    else:
        count = largest.sum(-1, keepdim=True)
    da.addcmul_(ds, largest / count.clamp_(min=1))
    dlogits = da.sub_((da * a).sum(-1, keepdim=True)).mul_(a).mul_(scale)
    dq = _split(torch.bmm(dlogits, k), q_marks) if need_q else q_marks.new_empty(0)
    dk = _split(torch.bmm(dlogits.mT, q), k_marks) if need_k else k_marks.new_empty(0)
    return dq, dk, dvalues


def _attention(q: Tensor, k: Tensor, q_counts: Tensor | None, k_counts: Tensor | None, scale: float) -> Tensor:
    """Return A (batch * heads, L, L) for landmarks (batch * heads, L, D). Masked rows and columns are 0."""
    a = torch.bmm(q, k.mT).mul_(scale)
    if k_counts is not None:
        hidden = _masked(k_counts, len(a)).unsqueeze(1)
        a = a.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(hidden, 0)  # softmax is NaN if no column is valid
    else:
        a = a.softmax(-1)
    return a if q_counts is None else a.masked_fill_(_masked(q_counts, len(a)).unsqueeze(2), 0)


def _start(a: Tensor, init: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return Z_0 = A^T / s, the divisor s, and the column sums of A (batch * heads, 1, L).

    s is (batch * heads, 1, 1), or one number if init is "original".
    """
    sums = a.sum(1, keepdim=True)
    s = sums.amax() if init == "original" and len(a) else sums.amax(-1, keepdim=True)
    s = s.masked_fill(s == 0, 1)  # s is 0 if no landmark is valid
    return a.mT / s, s, sums


def _polynomial(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return X, W and Y for one iteration."""
    x = torch.bmm(a, z)
    w = torch.baddbmm(x, x, x, beta=-7)
    return x, w, torch.baddbmm(x, x, w, beta=15)


def _advance(z: Tensor, y: Tensor) -> Tensor:
    return torch.baddbmm(z, z, y, beta=13 / 4, alpha=-1 / 4)


def _masked(counts: Tensor, pairs: int) -> Tensor:
    """Return a mask (batch * heads, L) that is True for masked landmarks."""
    return (counts <= 0).repeat_interleave(pairs // max(1, len(counts)), 0)


def read(x: Tensor, counts: Tensor | None) -> Tensor:
    """Return x (batch, heads, L, width) as (batch * heads, L, width) in the accumulator's dtype. Masked rows are 0."""
    x = x.to(accumulator(x.dtype))
    return (x if counts is None else x.masked_fill((counts <= 0)[:, None, :, None], 0)).flatten(0, 1)


def _split(x: Tensor, like: Tensor) -> Tensor:
    """Return x (batch * heads, L, width) as (batch, heads, L, width) in the dtype of `like`."""
    return x.view(like.shape).to(like.dtype)

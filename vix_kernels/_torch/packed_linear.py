"""A linear layer with three outputs (see primitives/packed_linear.py for the equations)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 3


def packed_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    if dtype is None:  # autocast is off
        return F.linear(x, weight, bias).chunk(PARTS, -1)
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).chunk(PARTS, -1)


def packed_linear_backward(
    dparts: tuple[Tensor, ...], x: Tensor, weight: Tensor, dtype: torch.dtype | None,
    need_x: bool, need_weight: bool, need_bias: bool, *, differentiable: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, weight and bias, or None for those that are not needed.

    If `differentiable`, autograd can differentiate the results again.
    """
    dtypes = x.dtype, weight.dtype
    x, weight = (each if dtype is None else each.to(dtype) for each in (x, weight))
    tokens, dx, dweight, dbias = x.flatten(0, -2), None, None, None
    flat = [part.flatten(0, -2) for part in dparts]
    with torch.autocast("cpu", enabled=False):
        if need_x:
            first, *others = weight.chunk(PARTS)
            dx = flat[0] @ first
            for part, rows in zip(flat[1:], others, strict=True):
                dx.addmm_(part, rows)
            dx = dx.view(x.shape).to(dtypes[0])
        if need_weight and differentiable:
            dweight = torch.cat([part.T @ tokens for part in flat]).to(dtypes[1])
        elif need_weight:
            dweight = torch.empty_like(weight)
            for part, rows in zip(flat, dweight.chunk(PARTS), strict=True):
                torch.mm(part.T, tokens, out=rows)
            dweight = dweight.to(dtypes[1])
        if need_bias:
            dbias = torch.cat([part.sum(0, dtype=dtypes[1]) for part in flat])
    return dx, dweight, dbias

"""packed_linear: one linear map in three parts, whose gradients are multiplied where they are.

    y_i = x W_i^T + b_i        dx = sum_i dy_i W_i        dW_i = dy_i^T x        db_i = sum_n dy_i

PyTorch would first copy the gradients of the parts side by side, which costs a CPU as much as the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 3


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The three parts of x W^T + b, as views of it.

    Args:
        x: (..., C), on the CPU.
        weight, bias: (3 * width, C) and (3 * width).
        dtype: of the products, that of autocast; None: that of x.

    Returns:
        three tensors (..., width). Differentiable in x, weight and bias, twice too.
    """
    return _PackedLinear.apply(x, weight, bias, dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.dtype = bias is not None, dtype
        x, weight = (each if dtype is None else each.to(dtype) for each in (x, weight))
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, weight, bias if bias is None else bias.to(x.dtype)).chunk(PARTS, -1)

    @staticmethod
    def backward(ctx, *dparts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtypes = x.dtype, weight.dtype
        x, weight = (each if ctx.dtype is None else each.to(ctx.dtype) for each in (x, weight))
        tokens, dx, dweight, dbias = x.flatten(0, -2), None, None, None
        flat = [part.flatten(0, -2) for part in dparts]
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                first, *others = weight.chunk(PARTS)
                dx = flat[0] @ first
                for part, rows in zip(flat[1:], others, strict=True):
                    dx.addmm_(part, rows)
                dx = dx.view(x.shape).to(dtypes[0])
            if ctx.needs_input_grad[1] and torch.is_grad_enabled():  # for second derivatives
                dweight = torch.cat([part.T @ tokens for part in flat]).to(dtypes[1])
            elif ctx.needs_input_grad[1]:
                dweight = torch.empty_like(weight)
                for part, rows in zip(flat, dweight.chunk(PARTS), strict=True):
                    torch.mm(part.T, tokens, out=rows)
                dweight = dweight.to(dtypes[1])
            if ctx.has_bias:
                dbias = torch.cat([part.sum(0, dtype=dtypes[1]) for part in flat])
        return dx, dweight, dbias, None

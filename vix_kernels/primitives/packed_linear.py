"""packed_linear: a linear layer with three outputs, for example q, k and v.

    y_i = x W_i^T + b_i        dx = sum_i dy_i W_i        dW_i = dy_i^T x        db_i = sum_n dy_i

Autograd would concatenate the gradients of the outputs before the matrix products. On a CPU, this concatenation takes as long
as the products. Therefore, the backward pass here computes separate products for each output. This function is only for CPUs:
on a GPU, memory traffic is the bottleneck, and separate products would not reduce it. If x and each y_i have X bytes, the
concatenation and two products move 14 X bytes, and so do six products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch.packed_linear import packed_linear_backward, packed_linear_forward


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Return the three parts of x W^T + b as views of one tensor.

    Args:
        x: (..., C), on the CPU.
        weight, bias: (3 * width, C) and (3 * width,).
        dtype: dtype of the matrix products, as set by autocast. If None, x's dtype is used.

    Returns:
        Three tensors (..., width). Twice differentiable in x, weight and bias.
    """
    if torch.is_grad_enabled():
        return _PackedLinear.apply(x, weight, bias, dtype)
    return packed_linear_forward(x, weight, bias, dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.dtype = bias is not None, dtype
        return packed_linear_forward(x, weight, bias, dtype)

    @staticmethod
    def backward(ctx, *dparts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = *ctx.needs_input_grad[:2], ctx.has_bias
        return *packed_linear_backward(dparts, x, weight, ctx.dtype, *needs, differentiable=torch.is_grad_enabled()), None

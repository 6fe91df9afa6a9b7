"""pinv: the pseudo-inverse in Nystrom attention, multiplied by the values of the landmarks.

    A = softmax(scale q~ k~^T)        Z_0 = A^T / s        out = Z_T values
    X_t = A Z_t        Z_{t+1} = 1/4 Z_t (13 I - X_t (15 I - X_t (7 I - X_t)))

q~ and k~ are the landmarks of queries and keys. A landmark without valid tokens is treated as 0, even if it is NaN. Its row of
A (for q~) or column of A (for k~) is 0. The corresponding column or row of Z is 0 in every iteration, so the rest of Z is
the same as without this landmark.

s is the largest column sum of A. It is an upper bound on the square of A's spectral norm, because no row of A sums to more
than 1. The iteration converges cubically. The number of iterations T is part of the model: directions with singular values
far below sqrt(s 3.25^-T) are not inverted, which keeps Z small. Gradients flow through all iterations, s and the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register

INITS = ("exact", "original")
MOST_LANDMARKS = 128  # the largest number of landmarks that the kernels support

_PROBLEM = (
    "Tensor q_marks, Tensor k_marks, Tensor values, Tensor? q_counts, Tensor? k_counts, "
    "float scale, SymInt iterations, str init"
)


def pinv(
    q_marks: Tensor,
    k_marks: Tensor,
    values: Tensor,
    *,
    scale: float,
    q_counts: Tensor | None = None,
    k_counts: Tensor | None = None,
    iterations: int = 6,
    init: str = "exact",
    backend: str = "torch",
) -> Tensor:
    """Multiply values by the pseudo-inverse of the landmarks' attention matrix, approximated iteratively.

    Args:
        q_marks: (batch, heads, L, D), landmarks of the queries. Views with last stride 1 are not copied.
        k_marks: (batch, heads, L, D), landmarks of the keys, in q_marks' dtype.
        values: (batch, heads, L, E), float32 (float64 for float64 landmarks), one row for each landmark of the queries.
        scale: scaling factor of the logits.
        q_counts, k_counts: float32 (batch, L), number of valid tokens of each landmark. If None, all landmarks are valid.
        iterations: number of iterations T.
        init: "exact": s is the largest column sum of each matrix. "original": s is the largest column sum over all samples and
            heads, as in Nystromformer's published code. The result of a sample then depends on the rest of the batch.
        backend: "torch" or "triton". The kernels support "exact" with at most 128 landmarks. In other cases, both backends use
            batched matrix products.

    Returns:
        (batch, heads, L, E), one row for each landmark of the keys, in values' dtype. Differentiable in q_marks, k_marks and
        values.
    """
    q_marks, k_marks, values = unit_last_stride(q_marks), unit_last_stride(k_marks), unit_last_stride(values)
    inputs = q_marks, k_marks, values, q_counts, k_counts
    call = _Pinv.apply if needs_autograd(inputs) else pinv_forward
    return call(*inputs, scale, iterations, init, backend)


def pinv_reference(
    q_marks: Tensor,
    k_marks: Tensor,
    values: Tensor,
    *,
    scale: float,
    q_counts: Tensor | None = None,
    k_counts: Tensor | None = None,
    iterations: int = 6,
    init: str = "exact",
) -> Tensor:
    """Return the result of `pinv`, computed in plain PyTorch, in the dtype of `values`."""
    batch, _, landmarks, _ = q_marks.shape
    all_valid = torch.ones(batch, landmarks, dtype=torch.bool, device=values.device)
    rows = (all_valid if q_counts is None else q_counts > 0)[:, None, :, None]
    columns = (all_valid if k_counts is None else k_counts > 0)[:, None, :, None]
    q, values = (torch.where(rows, x, 0.0).to(values.dtype) for x in (q_marks, values))
    k = torch.where(columns, k_marks, 0.0).to(values.dtype)
    valid = rows & columns.mT
    logits = torch.where(columns.mT | ~columns.any(-2, keepdim=True), scale * q @ k.mT, float("-inf"))
    a = torch.where(valid, logits.softmax(-1), 0.0)
    sums = a.sum(-2, keepdim=True)
    s = sums.amax((0, 1, 2, 3) if init == "original" and batch else -1, keepdim=True)
    return inverse_reference(a, a.mT / torch.where(s == 0, 1.0, s), iterations) @ values


def inverse_reference(a: Tensor, z: Tensor, iterations: int) -> Tensor:
    """Return Z_T for A = a and Z_0 = z, both (..., L, L)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        x = a @ z
        z = z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x))) / 4
    return z


class _Pinv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init, backend):
        ctx.save_for_backward(q_marks, k_marks, values, q_counts, k_counts)
        ctx.options, ctx.backend = (scale, iterations, init), backend
        return pinv_forward(q_marks, k_marks, values, q_counts, k_counts, *ctx.options, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        needs = ctx.needs_input_grad[:3]
        grads = pinv_backward(unit_last_stride(dout), *saved, *ctx.options, needs, ctx.backend)
        return *(x if need else None for x, need in zip(grads, needs, strict=True)), None, None, None, None, None, None


def _fake_forward(q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init, backend):
    return values.new_empty(values.shape)


def _fake_backward(dout, q_marks, k_marks, values, q_counts, k_counts, scale, iterations, init, needs, backend):
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((q_marks, k_marks, values), needs, strict=True))


def _has_kernel(q_marks: Tensor, init: str) -> bool:
    return init == "exact" and q_marks.shape[2] <= MOST_LANDMARKS


pinv_forward = register(
    f"pinv_forward({_PROBLEM}, str backend) -> Tensor",
    module="pinv",
    fake=_fake_forward,
    has_kernel=lambda *inputs: _has_kernel(inputs[0], inputs[7]),
)
pinv_backward = register(
    f"pinv_backward(Tensor dout, {_PROBLEM}, bool[] needs, str backend) -> (Tensor dq_marks, Tensor dk_marks, Tensor dvalues)",
    module="pinv",
    fake=_fake_backward,
    has_kernel=lambda *inputs: _has_kernel(inputs[1], inputs[8]),
)

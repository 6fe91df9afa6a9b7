"""dft: the real part of the discrete Fourier transform over tokens and channels.

    y_ab = sum_nd x_nd cos(2 pi (an / N + bd / D))

The matrix of this linear map is symmetric, so the backward pass applies the same map and needs no saved tensor. Half of the
result is redundant, because y(-a, -b) = y(a, b), with indices modulo N and D. Half of the input is also redundant, because y
depends only on the sums x(n, d) + x(-n, -d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register

# The kernels are used if the number of floating-point operations per element of x, tokens / 2 + channels, is at most MOST_WORK
# for the bit width of x's dtype. Otherwise, fast Fourier transforms are used. The limits are computed, not measured: at the
# limit, matrix products at half of an H100's peak rate take about as long as the additional memory traffic of the FFTs (32 to
# 34 bytes per element) at full bandwidth. The limits also keep products of indices within 32 bits.
MOST_WORK = {16: 4096, 32: 768, 64: 768}


def dft(x: Tensor, *, ortho: bool = False, backend: str = "torch") -> Tensor:
    """Return the real part of the Fourier transform of every sample.

    Args:
        x: (batch, N, D). Views with last stride 1 are not copied.
        ortho: whether to divide by sqrt(N D).
        backend: "torch" or "triton".

    Returns:
        y (batch, N, D) in x's dtype, contiguous. Differentiable in x.
    """
    x = unit_last_stride(x)
    return _DFT.apply(x, ortho, backend) if needs_autograd((x,)) else dft_forward(x, ortho, backend)


class _DFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ortho, backend):
        ctx.options = ortho, backend
        return dft_forward(x, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        return dft_forward(unit_last_stride(dy), *ctx.options), None, None


def _has_kernel(x: Tensor, ortho: bool) -> bool:
    return x.shape[1] // 2 + x.shape[2] <= MOST_WORK[8 * x.element_size()]


dft_forward = register(
    "dft(Tensor x, bool ortho, str backend) -> Tensor y",
    module="dft",
    fake=lambda x, ortho, backend: x.new_empty(x.shape),
    has_kernel=_has_kernel,
)

"""dft: the real part of the discrete Fourier transform over tokens and channels.

    y_ab = sum_nd x_nd cos(2 pi (an / N + bd / D))

The matrix of this map is symmetric, so its gradient is the map itself and nothing is kept for it. Half of the result is
redundant, y at (-a, -b) equals y at (a, b), indices modulo N and D; and so is half of the input: only x_nd + x at (-n, -d)
counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register

# Floating-point operations an element of x, tokens / 2 + channels, up to which the products are taken; beyond, fast Fourier
# transforms. Counted, not measured: what those move more (32 to 34 bytes an element) takes as long as the products on an H100
# at half of its peak rates. It also keeps the products of indices within 32 bits.
MOST_WORK = {16: 4096, 32: 768, 64: 768}


def dft(x: Tensor, *, ortho: bool = False, backend: str = "torch") -> Tensor:
    """Transform every sample.

    Args:
        x: (batch, N, D). Any strides with a unit last one.
        ortho: divide by sqrt(N D).
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

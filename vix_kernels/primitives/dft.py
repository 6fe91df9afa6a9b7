"""dft: the real part of the discrete Fourier transform over tokens and channels.

    y_ab = sum_nd x_nd cos(2 pi (an / N + bd / D))

The matrix of this map is symmetric, so its gradient is the map itself and nothing is kept for it. Half of the result is
redundant, y at (-a, -b) equals y at (a, b), indices modulo N and D; and so is half of the input: only x_nd + x at (-n, -d)
counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import once_differentiable
from .layout import accumulator, unit_last_stride
from .registry import refuse_transforms, register

GROUP_CPU = 1 << 19  # elements that are transformed together: they and what is made of them stay in a cache


def dft(x: Tensor, *, ortho: bool = False, backend: str = "torch") -> Tensor:
    """Transform every sample.

    Args:
        x: (batch, N, D). Any strides with a unit last one.
        ortho: divide by sqrt(N D).
        backend: "torch" or "triton".

    Returns:
        y (batch, N, D) in x's dtype, contiguous. Differentiable in x.
    """
    refuse_transforms()
    return _DFT.apply(x, ortho, backend)


class _DFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ortho, backend):
        ctx.options = ortho, backend
        return dft_forward(unit_last_stride(x), *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dy):
        return dft_forward(unit_last_stride(dy), *ctx.options), None, None


def fft(x: Tensor, ortho: bool) -> Tensor:
    """By fast Fourier transforms, a quarter of the complex one of all x, in float32 for 16-bit inputs.

    w_nd = x_nd + x at (-n, -d) is its own mirror image: its transform over the channels is Hermitian in n, and that over the
    tokens then real. So half of the rows of w suffice for the one, and half of the columns for the other.
    """
    batch, tokens, width = x.shape
    rows, columns = tokens // 2 + 1, width // 2 + 1
    scale = 0.5 * (tokens * width) ** -0.5 if ortho else 0.5
    y = x.new_empty(x.shape)
    group = max(1, GROUP_CPU // (tokens * width) if x.device.type == "cpu" else batch)
    for first in range(0, batch, group):
        part, out = x[first : first + group].to(accumulator(x.dtype)), y[first : first + group]
        mirror = part[:, tokens - rows + 1 :]  # tokens -n of n = rows - 1 to 1
        w = part.new_empty(len(part), rows, width)
        torch.mul(part[:, 0, 0], 2, out=w[:, 0, 0])
        torch.add(part[:, 0, 1:], part[:, 0, 1:].flip(1), out=w[:, 0, 1:])
        torch.add(part[:, 1:rows, 0], mirror[:, :, 0].flip(1), out=w[:, 1:, 0])
        torch.add(part[:, 1:rows, 1:], mirror[:, :, 1:].flip(1, 2), out=w[:, 1:, 1:])
        half = torch.fft.rfft(w, dim=2)
        half.imag.neg_()  # in place, where hfft would copy
        # One row a column and sample: a single sample is transformed as several are, to the same bits.
        half = torch.fft.irfft(half.mT.contiguous().flatten(0, 1), n=tokens, norm="forward")
        half = half.t().contiguous().unflatten(1, (-1, columns)).transpose(0, 1)  # transposing is fast in two dimensions only
        torch.mul(half, scale, out=out[:, :, :columns])
        mirror = out[:, :, 1 : width - columns + 1]  # channels -b of b = width - 1 to columns
        out[:, 0, columns:] = mirror[:, 0].flip(1)
        out[:, 1:, columns:] = mirror[:, 1:].flip(1, 2)
    return y


dft_forward = register(
    "dft(Tensor x, bool ortho, str backend) -> Tensor y",
    tiled=fft,
    triton="dft.dft",
    fake=lambda x, ortho, backend: x.new_empty(x.shape),
)

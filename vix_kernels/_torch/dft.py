"""Fourier mixing with fast Fourier transforms (see primitives/dft.py for the equation)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import accumulator

GROUP_CPU = 1 << 19  # number of elements to transform at a time, so that they and all intermediate results fit in the cache


def dft(x: Tensor, ortho: bool) -> Tensor:
    """Return y, computed with a quarter of the work of a complex FFT. 16-bit inputs are transformed in float32.

    y is 0.5 times the 2D Fourier transform of w(n, d) = x(n, d) + x(-n, -d). Because w(n, d) = w(-n, -d), the transform of w
    over the channels is Hermitian in n, and the subsequent transform over the tokens is real. The first transform needs only
    half of the rows, and the second transform needs only half of the columns.
    """
    batch, tokens, width = x.shape
    rows, columns = tokens // 2 + 1, width // 2 + 1
    scale = 0.5 * (tokens * width) ** -0.5 if ortho else 0.5
    y = x.new_empty(x.shape)
    group = max(1, GROUP_CPU // (tokens * width) if x.device.type == "cpu" else batch)
    for first in range(0, batch, group):
        part, out = x[first : first + group].to(accumulator(x.dtype)), y[first : first + group]
        mirror = part[:, tokens - rows + 1 :]  # the tokens -n for n = rows - 1 to 1
        w = part.new_empty(len(part), rows, width)
        torch.mul(part[:, 0, 0], 2, out=w[:, 0, 0])
        torch.add(part[:, 0, 1:], part[:, 0, 1:].flip(1), out=w[:, 0, 1:])
        torch.add(part[:, 1:rows, 0], mirror[:, :, 0].flip(1), out=w[:, 1:, 0])
        torch.add(part[:, 1:rows, 1:], mirror[:, :, 1:].flip(1, 2), out=w[:, 1:, 1:])
        half = torch.fft.rfft(w, dim=2)
        half.imag.neg_()  # in place; hfft would copy
        # Each row of the transposed matrix is one column of one sample, so the result of a sample is bit-identical for any
        # batch size.
        half = torch.fft.irfft(half.mT.contiguous().flatten(0, 1), n=tokens, norm="forward")
        half = half.t().contiguous().unflatten(1, (-1, columns)).transpose(0, 1)  # only 2D transposes are fast
        torch.mul(half, scale, out=out[:, :, :columns])
        mirror = out[:, :, 1 : width - columns + 1]  # the channels -b for b = width - 1 down to columns
        out[:, 0, columns:] = mirror[:, 0].flip(1)
        out[:, 1:, columns:] = mirror[:, 1:].flip(1, 2)
    return y

"""The transform by fast Fourier transforms (primitives/dft.py states the equation)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import accumulator

GROUP_CPU = 1 << 19  # elements that are transformed together: they and what is made of them stay in a cache


def dft(x: Tensor, ortho: bool) -> Tensor:
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

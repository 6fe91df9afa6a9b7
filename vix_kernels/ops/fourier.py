"""Fourier mixing (Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms, arXiv 2105.03824).

    y = Re(F_tokens(F_channels(x)))                                                       equation 3 of the paper
    y_ab = sum_nd x_nd cos(2 pi (an / N + bd / D))

with the discrete Fourier transform F and no parameters. The complex transforms cost four times what this sum needs: x is
real, and of the result only the real part counts. Fast transforms of folded halves, or their products with cosines and sines,
give the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import backends
from ..primitives import dft
from .checks import autocast, check_floating, check_tensor

NORMS = (None, "ortho")


def fourier_mixing(x: Tensor, *, norm: Literal["ortho"] | None = None, backend: str = "auto") -> Tensor:
    """Real part of the Fourier transform over tokens and channels, which mixes both.

    Args:
        x: (batch, tokens, channels), float16, bfloat16, float32 or float64. Any strides with a unit last one.
        norm: None, the plain sums, as torch.fft's "backward"; or "ortho", divided by sqrt(tokens * channels).
        backend: "auto", "triton", "torch" or "reference". Where tokens and channels are so many that a fast Fourier
            transform needs less time than matrix products, "triton" too calls torch.fft; see
            vix_kernels.primitives.dft.MOST_WORK.

    Returns:
        (batch, tokens, channels) in x's dtype. Differentiable in x; nothing is kept for backward.

    Plain sums grow: by sqrt(tokens * channels) where x is noise, by tokens * channels where it has a mean. float16 overflows
    at the zero frequency, y[:, 0, 0] = x.sum((1, 2)), beyond 65504: take norm="ortho", or bfloat16. For the same reason x
    is not cast under autocast to float16. Padding tokens cannot be masked: zeros add nothing, but the length is part of
    every frequency.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        RuntimeError: backend="triton" cannot run here; the message lists every reason.
    """
    check_tokens(x)
    check_norm(norm)
    (cast,) = autocast(x)
    x = x if cast.dtype == torch.float16 else cast
    backend = backends.resolve(backend, x, backends.TRITON_WIDTHS[0])  # no head width: any number of channels is served
    if backend == "reference":
        return fourier_mixing_reference(x, norm=norm)
    return dft(x, ortho=norm == "ortho", backend=backend)


def fourier_mixing_reference(x: Tensor, *, norm: str | None = None) -> Tensor:
    """The complex transform of all of x, in plain PyTorch; any device, any transform."""
    if x.shape[0] == 0:  # torch.fft refuses it
        return x.clone()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.fft2(wide, norm=norm).real.to(x.dtype)


def check_tokens(x: Tensor) -> None:
    """x (B, N, D), floating."""
    check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 dimensions (batch, tokens, channels), got shape {tuple(x.shape)}")
    check_floating("x", x)
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x: expected at least one token and channel, got shape {tuple(x.shape)}")


def check_norm(norm: str | None) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm: expected None or 'ortho', got {norm!r}")

"""Fourier mixing (Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms, arXiv 2105.03824).

    y = Re(F_tokens(F_channels(x)))                                                       equation 3 of the paper
    y_ab = sum_nd x_nd cos(2 pi (an / N + bd / D))

F is the discrete Fourier transform. There are no parameters. The complex transforms in the first equation cost four times as
much as necessary, because x is real and only the real part of the result is used. See primitives/dft.py for the symmetries that
reduce the cost.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import backends
from ..plans import planned
from ..primitives import dft
from .checks import autocast, check_floating, check_tensor

NORMS = (None, "ortho")


@planned
def fourier_mixing(x: Tensor, *, norm: Literal["ortho"] | None = None, backend: str = "auto") -> Tensor:
    """Return the real part of the discrete Fourier transform over tokens and channels.

    Args:
        x: (batch, tokens, channels), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        norm: None for plain sums, as with norm="backward" in torch.fft, or "ortho" for sums divided by sqrt(tokens * channels).
        backend: "auto", "triton", "torch" or "reference". For sizes at which a fast Fourier transform is expected to be
            faster than the matrix products in the kernels, even "triton" calls torch.fft. See MOST_WORK in primitives/dft.py.

    Returns:
        (batch, tokens, channels) in x's dtype. Differentiable in x. No tensor is saved for the backward pass.

    Plain sums are about sqrt(tokens * channels) times as large as x if x is noise with zero mean, and up to tokens * channels
    times as large otherwise. In float16, the zero frequency of the output, x.sum((1, 2)), overflows if its magnitude exceeds
    65504. To avoid overflow, use norm="ortho" or bfloat16. For the same reason, autocast to float16 does not cast x. Padded
    tokens cannot be masked: setting them to 0 removes them from the sums, but every frequency also depends on the number of
    tokens.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    check_tokens(x)
    check_norm(norm)
    (cast,) = autocast(x)
    x = x if cast.dtype == torch.float16 else cast
    backend = backends.resolve(backend, x, backends.TRITON_WIDTHS[0])  # any number of channels is supported
    if backend == "reference":
        return fourier_mixing_reference(x, norm=norm)
    return dft(x, ortho=norm == "ortho", backend=backend)


def fourier_mixing_reference(x: Tensor, *, norm: str | None = None) -> Tensor:
    """Return the result of `fourier_mixing`, computed with torch.fft.fft2.

    Supports all devices and torch.func transforms.
    """
    if x.shape[0] == 0:  # torch.fft does not support empty batches
        return x.clone()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.fft2(wide, norm=norm).real.to(x.dtype)


def check_tokens(x: Tensor) -> None:
    """Check that x is a floating-point tensor (B, N, D)."""
    check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 dimensions (batch, tokens, channels), got shape {tuple(x.shape)}")
    check_floating("x", x)
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x: expected at least one token and channel, got shape {tuple(x.shape)}")


def check_norm(norm: str | None) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm: expected None or 'ortho', got {norm!r}")

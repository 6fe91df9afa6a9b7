"""fourier_mixing against torch.fft.fftn: B 2, D 256, float32."""

from __future__ import annotations

import torch

from vix_kernels import fourier_mixing
from vix_kernels.testing import kept_for_backward

BATCH, TOKENS, WIDTH = 2, 4096, 256


def theirs(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fftn(x, dim=(1, 2)).real


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(BATCH, TOKENS, WIDTH, generator=generator) for _ in range(2))
    assert (fourier_mixing(x) - theirs(x)).norm() <= 1e-5 * theirs(x).norm()
    return x, dy


def test_forward(against) -> None:
    x, _ = problem()
    with torch.no_grad():
        against(lambda: fourier_mixing(x), lambda: theirs(x), budget=0.6)


def test_forward_and_backward(against) -> None:
    x, dy = problem()
    x.requires_grad_()
    against(
        lambda: torch.autograd.grad(fourier_mixing(x), x, dy),
        lambda: torch.autograd.grad(theirs(x), x, dy),
        budget=0.6,
    )


def test_nothing_is_kept_for_backward() -> None:
    x, _ = problem()
    assert kept_for_backward(fourier_mixing, (x.requires_grad_(),)) == 0

"""Tests specific to the convolution over tokens. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from conftest import BACKENDS, DEVICE
from vix_kernels._torch.token_conv import token_conv_add
from vix_kernels.primitives.token_conv import token_conv, token_conv_backward, token_conv_reference


def problem(taps: int, tokens: int = 70, *, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    v, dout = torch.randn(2, 2, 3, tokens, 16, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(3, 1, taps, 1, generator=generator).to(DEVICE)
    return v.requires_grad_(), weight.requires_grad_(), dout


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("taps", [1, 33, 65])
def test_equals_conv2d(backend: str, taps: int) -> None:
    """Compare outputs and gradients with a Conv2d. The original Nystrom attention adds the result of this Conv2d to its output.

    Some filters have more taps than a tile has tokens. The Conv2d runs in float64, because on CPUs oneDNN computes wrong
    float32 gradients for long filters.
    """
    v, weight, dout = problem(taps)
    conv = torch.nn.Conv2d(3, 3, (taps, 1), padding=(taps // 2, 0), groups=3, bias=False, dtype=torch.float64, device=DEVICE)
    conv.weight.data.copy_(weight)
    wide = v.detach().double().requires_grad_()
    expected = conv(wide)
    expected = [expected, *torch.autograd.grad(expected, (wide, conv.weight), dout.double())]
    out = token_conv_reference(v, weight) if backend == "reference" else token_conv(v, weight, backend=backend)
    for x, truth in zip((out, *torch.autograd.grad(out, (v, weight), dout)), expected, strict=True):
        torch.testing.assert_close(x.double(), truth, atol=1e-5 * truth.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_gradient_is_added(backend: str, dtype: torch.dtype) -> None:
    """The backward pass can add a given gradient to dv. The sum is rounded only once. Masked tokens have a gradient of 0."""
    v, weight, dout = (x.detach() for x in problem(33, dtype=dtype))
    other = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.3
    masked = ~mask[:, None, :, None]
    v, other = v.masked_fill(masked, float("nan")), other.masked_fill(masked, float("inf"))
    dv, dweight = token_conv_backward(dout, v, weight, mask, other, (True, True), backend)
    flipped = weight.to(dtype if backend == "triton" else torch.float64).double().flip(2)
    exact = F.conv2d(dout.double(), flipped, padding=(16, 0), groups=3) + other.double()
    torch.testing.assert_close(dv.double(), exact.masked_fill(masked, 0), atol=1e-4, rtol=torch.finfo(dtype).eps)
    alone = token_conv_backward(dout, v, weight, mask, None, (False, True), backend)[1]
    assert torch.equal(alone, dweight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_token_conv_add_adds_in_place(dtype: torch.dtype) -> None:
    v, weight, out = (x.detach() for x in problem(33, dtype=dtype))
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.3
    expected = out + token_conv(v, weight, mask=mask).double()
    token_conv_add(out, v.masked_fill(~mask[:, None, :, None], float("nan")), weight, mask)
    torch.testing.assert_close(out.double(), expected, atol=2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_sample_and_head(backend: str) -> None:
    """Samples and heads are adjacent in memory, so a tile could read values from the adjacent sample or head by mistake."""
    v, weight, _ = (x.detach() for x in problem(65))
    expected = token_conv(v, weight, backend=backend)
    for token in (0, -1):
        poisoned = v.clone()
        poisoned[1, 1, token] = float("nan")
        out = token_conv(poisoned, weight, backend=backend)
        assert out[1, 1, token].isnan().all()
        out[1, 1] = expected[1, 1]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(3, 1, 4, 1), (2, 1, 3, 1), (3, 2, 3, 1), (3, 1, 1, 3), (3, 1, 0, 1), (3, 3)], ids=str)
def test_filters_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \(3, 1, taps, 1\) with an odd number of taps, got"):
        token_conv(torch.randn(2, 3, 8, 16), torch.randn(shape))

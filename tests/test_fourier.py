"""Tests specific to Fourier mixing. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from conftest import DEVICE
from vix_kernels import apply_rope, conditions, fourier_mixing, rope_axial
from vix_kernels._triton import dft
from vix_kernels.nn import FourierMixing
from vix_kernels.primitives.dft import MOST_WORK
from vix_kernels.testing import kept_for_backward


def complex_transform(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fftn(x, dim=(1, 2)).real


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE, dtype)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


@pytest.mark.parametrize(
    "backend, shape",
    [("torch", shape) for shape in ((2, 4096, 256), (5, 700, 300), (5, 197, 63), (70, 16, 1), (2, 1, 9), (1, 2, 2))]
    + [("triton", shape) for shape in ((1, 130, 100), (2, 33, 79), (2, 2, 2), (1, 1, 1))],
)
def test_mixing_equals_the_complex_transform(backend: str, shape: tuple[int, ...]) -> None:
    x = draw(*shape).requires_grad_()
    dy = torch.cos(torch.arange(x.numel(), device=DEVICE, dtype=torch.float32)).view(shape)
    actual, expected = fourier_mixing(x, backend=backend), complex_transform(x)
    assert distance(actual, expected) < 1e-6
    assert distance(*(torch.autograd.grad(y, x, dy)[0] for y in (actual, expected))) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mixing_twice_gives_the_even_part(backend: str) -> None:
    x = draw(2, 21, 10)
    twice = fourier_mixing(fourier_mixing(x, norm="ortho", backend=backend), norm="ortho", backend=backend)
    mirror = x.flip(1, 2).roll((1, 1), (1, 2))  # contains x[-n, -d] at [n, d]
    torch.testing.assert_close(twice, (x + mirror) / 2, rtol=0, atol=1e-5)


@triton.jit
def turn_kernel(index, cos, sin, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    c, s = dft.turn(tl.load(index + at, mask=inside, other=0), length, tl.float32)
    tl.store(cos + at, c, mask=inside)
    tl.store(sin + at, s, mask=inside)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 4096, 100_003])
def test_cosines_and_sines_are_exact_for_any_length(length: int) -> None:
    """Errors are at most eps, because the range reduction of the angles uses integers and is exact."""
    index = torch.arange(length, dtype=torch.int32, device=DEVICE)
    cos, sin = torch.empty(2, length, device=DEVICE).unbind()
    turn_kernel[(triton.cdiv(length, 4096),)](index, cos, sin, length, BLOCK=4096)
    angle = index.double() * (2 * torch.pi / length)
    assert (cos - angle.cos()).abs().max() < 1.2e-7
    assert (sin - angle.sin()).abs().max() < 1.2e-7


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float16_overflows_only_where_the_result_does(backend: str) -> None:
    """Test the zero frequency of tokens whose mean is not 0, and intermediate sums near the largest float16 number."""
    x = draw(2, 64, 48, dtype=torch.float16) + 30
    assert torch.isinf(fourier_mixing(x, backend=backend)).nonzero().tolist() == [[0, 0, 0], [1, 0, 0]]
    assert fourier_mixing(x, norm="ortho", backend=backend).isfinite().all()
    large = 60000 * torch.sign(draw(2, 64, 48)).half()
    exact = complex_transform(large.double()) / (64 * 48) ** 0.5
    large = fourier_mixing(large, norm="ortho", backend=backend).double()
    fits = exact.abs() < 60000
    assert fits.float().mean() > 0.6
    assert distance(large[fits], exact[fits]) < 2e-3


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_in_its_sample(backend: str) -> None:
    x = draw(2, 20, 12)
    x[0, 3, 4] = float("nan")
    y = fourier_mixing(x, backend=backend)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_triton_uses_fast_transforms_for_long_products() -> None:
    def observe(*made: object) -> None:
        raise AssertionError("a kernel was launched")

    x = draw(1, 2 * MOST_WORK[32], 2)
    with conditions.under(observer=observe):
        assert torch.equal(fourier_mixing(x, backend="triton"), fourier_mixing(x, backend="torch"))


def test_autocast_casts_to_bfloat16_but_not_to_float16() -> None:
    x = draw(2, 10, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = fourier_mixing(x)
    assert torch.equal(y, fourier_mixing(x.bfloat16()))
    with torch.autocast(DEVICE, torch.float16):
        y = fourier_mixing(x)
    assert torch.equal(y, fourier_mixing(x))


def test_meta_tensors_keep_their_shape() -> None:
    assert fourier_mixing(torch.empty(2, 5, 3, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_kept_for_backward(backend: str) -> None:
    x = draw(2, 12, 10).requires_grad_()
    assert kept_for_backward(lambda x: fourier_mixing(x, backend=backend), (x,)) == 0


def test_the_module_replaces_an_attention_of_timm() -> None:
    module = FourierMixing(
        16, num_heads=4, qkv_bias=True, qk_norm=True, proj_bias=True, attn_drop=0.0, proj_drop=0.5,
        norm_layer=torch.nn.LayerNorm, norm="ortho",
    )  # fmt: skip
    x = draw(2, 9, 16)
    assert not module.state_dict() and not list(module.parameters())
    assert (module(x) == 0).any()  # proj_drop is applied
    assert torch.equal(module.eval()(x, attn_mask=None, is_causal=False), fourier_mixing(x, norm="ortho"))


def test_the_module_rotates_the_heads_of_its_tokens() -> None:
    x, rope = draw(2, 9, 16), rope_axial(3, 3, 4)
    heads = x.view(2, 9, 4, 4).transpose(1, 2)
    rotated = apply_rope(heads, heads, rope)[0].transpose(1, 2).flatten(2)
    assert not torch.equal(rotated, x)
    torch.testing.assert_close(FourierMixing(16, num_heads=4)(x, rope=rope), fourier_mixing(rotated))


@pytest.mark.parametrize(
    "refused, message",
    [
        ({"attn_mask": torch.zeros(9, 9)}, "attn_mask: expected None"),
        ({"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_padding_mask: expected None"),
        ({"is_causal": True}, "is_causal: expected False"),
    ],
)
def test_the_module_refuses_masks(refused: dict, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        FourierMixing(16)(draw(2, 9, 16), **refused)

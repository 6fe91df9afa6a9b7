"""Tests of the pseudo-inverse in Nystrom attention.

A is the matrix of softmax weights between query landmarks and key landmarks, and Z is its pseudo-inverse.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from conftest import DEVICE
from vix_kernels import conditions
from vix_kernels.primitives import pinv
from vix_kernels.primitives.pinv import pinv_reference

SCALE = 0.25


def problem(landmarks: int, *, batch: int = 2, heads: int = 2, seed: int = 0, dtype=torch.float64) -> list[Tensor]:
    """Return query landmarks, key landmarks and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, landmarks, 16
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def attention(q: Tensor, k: Tensor) -> Tensor:
    return (SCALE * q @ k.mT).softmax(-1)


def gradients(function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the output of a function, and the gradients of `tensors` for a fixed gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


def test_convergence_to_the_inverse_is_cubic() -> None:
    """An iteration reduces the error along a singular direction from x to x^3 (3 + x) / 4."""
    q = problem(8)[0]  # each landmark attends mostly to itself, so the softmax matrix is well conditioned
    a, eye = attention(q, q), torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8)
    inverses = [pinv(q, q, eye, scale=SCALE, iterations=t) for t in range(1, 13)]
    errors = [torch.linalg.matrix_norm(eye - a @ z, 2) for z in inverses]
    for before, after in zip(errors[:-1], errors[1:], strict=True):
        torch.testing.assert_close(after, before**3 * (3 + before) / 4, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(inverses[-1], torch.linalg.pinv(a), rtol=1e-11, atol=1e-11)


def test_pinv_filters_singular_values(backend: str) -> None:
    """Compare the output with Z @ `values`, where Z = V diag(x_T / sigma) U^T and A = U diag(sigma) V^T.

    x_0 = sigma^2 / s, where s is the largest column sum of A. Each of the T steps maps x to x (13 - x (15 - x (7 - x))) / 4.
    """
    q, k, values = problem(20)
    a = attention(q, k)
    u, sigma, vt = torch.linalg.svd(a)
    x = sigma**2 / a.sum(-2).amax(-1)[..., None]
    for _ in range(6):
        x = x * (13 - x * (15 - x * (7 - x))) / 4
    expected = vt.mT @ ((x / sigma)[..., None] * (u.mT @ values))
    dtypes = (torch.float32,) if backend == "triton" and DEVICE == "cuda" else (torch.float64, torch.float32)
    for dtype in dtypes:
        out = pinv(*(each.to(DEVICE, dtype) for each in (q, k, values)), scale=SCALE, backend=backend)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("which", ["rows", "columns", "both"])
def test_empty_landmarks_are_ignored(which: str, backend: str) -> None:
    """Query landmarks without tokens have no row in A, and such key landmarks have no column, so A need not be square."""
    landmarks, keep = 12, torch.arange(12) % 3 != 1
    all_valid = torch.ones(landmarks, dtype=torch.bool)
    rows, columns = keep if which != "columns" else all_valid, keep.roll(1) if which != "rows" else all_valid
    tensors = [x.to(DEVICE, torch.float32) for x in problem(landmarks, batch=1)]
    counts = [None if each is all_valid else each[None].to(DEVICE, torch.float32) * 3 for each in (rows, columns)]
    out, dq, dk, dvalues = gradients(
        partial(pinv, scale=SCALE, q_counts=counts[0], k_counts=counts[1], iterations=3, backend=backend), tensors
    )
    rows, columns = rows.to(DEVICE), columns.to(DEVICE)
    exact = [x.double() for x in tensors]

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = attention(q[:, :, rows], k[:, :, columns])
        z, eye = a.mT / a.sum(-2).amax(-1)[..., None, None], torch.eye(a.shape[-2], dtype=a.dtype, device=DEVICE)
        for _ in range(3):
            x = a @ z
            z = z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x))) / 4
        full = torch.zeros_like(v)
        full[:, :, columns] = z @ v[:, :, rows]
        return full

    for x, expected in zip((out, dq, dk, dvalues), gradients(dropped, exact), strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    for x, valid in ((out, columns), (dq, rows), (dk, columns), (dvalues, rows)):
        assert (x[:, :, ~valid] == 0).all()


def test_original_init_matches_nystrom_attention(backend: str) -> None:
    """Compare outputs and gradients with nystrom-attention 0.0.14, whose initial matrix depends on the whole batch."""
    peer = pytest.importorskip("nystrom_attention.nystrom_attention", reason="nystrom-attention is not installed")
    tensors = [x.to(DEVICE, torch.float32) for x in problem(20)]
    actual = gradients(lambda q, k, v: pinv(q, k, v, scale=SCALE, init="original", backend=backend), tensors)
    peer_results = gradients(lambda q, k, v: peer.moore_penrose_iter_pinv(attention(q, k)) @ v, tensors)
    for x, expected in zip(actual, peer_results, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_only_the_original_init_depends_on_the_batch(backend: str) -> None:
    q, k, values = (x.to(DEVICE, torch.float32) for x in problem(20))
    q[1] *= 0.01  # the column sums of sample 1 become about 1, far below the column sums of sample 0

    def change(init: str) -> float:
        function = partial(pinv, scale=SCALE, init=init, backend=backend)
        together, alone = function(q, k, values)[1], function(q[1:], k[1:], values[1:])[0]
        return ((together - alone).norm() / alone.norm()).item()

    assert change("exact") < 1e-6
    assert change("original") > 0.1


def test_nan_in_one_head_does_not_reach_the_next(backend: str) -> None:
    """A kernel program processes heads one after another in the same memory, so NaN from one head could reach the next."""
    tensors = [x.to(DEVICE, torch.float32) for x in problem(20, batch=1)]
    function = partial(pinv, scale=SCALE, iterations=2, backend=backend)
    expected = gradients(function, tensors)
    for each in tensors:
        each[:, 0] = float("nan")
    for x, clean in zip(gradients(function, tensors), expected, strict=True):
        assert x[:, 0].isnan().all() and torch.equal(x[:, 1], clean[:, 1])


@pytest.mark.parametrize("init", ["exact", "original"])
def test_equal_columns_share_the_gradient_of_the_init(init: str, backend: str) -> None:
    """Two columns of A are equal and have the largest sum, because all queries attend most to two keys that are equal."""
    q, k, values = (x.to(DEVICE, torch.float32) for x in problem(6))
    q[..., 0], k[..., :2, :] = 2.0, 0.0
    k[..., :2, 0] = 4.0
    tensors = [q, k, values]
    options = dict(scale=SCALE, init=init, iterations=3)
    actual = gradients(lambda *x: pinv(*x, **options, backend=backend), tensors)
    expected = gradients(lambda *x: pinv_reference(*x, **options), [x.double() for x in tensors])
    for x, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


def test_without_valid_tokens_results_and_gradients_are_zero(backend: str) -> None:
    """If all landmarks are empty, the result and the gradients are 0, even if all inputs are NaN."""
    tensors = [torch.full((1, 1, 5, 16), float("nan"), device=DEVICE) for _ in range(3)]
    counts = torch.zeros(1, 5, device=DEVICE)
    function = partial(pinv, scale=SCALE, q_counts=counts, k_counts=counts, backend=backend)
    for x in gradients(function, tensors):
        assert (x == 0).all()


@pytest.mark.parametrize("landmarks", [128, 130])
def test_many_landmarks(landmarks: int, backend: str) -> None:
    """The kernels support at most 128 landmarks. With 130 landmarks, batched matrix products are used instead."""
    tensors = [x.to(DEVICE, torch.float32) for x in problem(landmarks, batch=1, heads=1)]
    options = dict(scale=SCALE, iterations=1)
    actual = gradients(lambda *x: pinv(*x, **options, backend=backend), tensors)
    expected = gradients(lambda *x: pinv_reference(*x, **options), [x.double() for x in tensors])
    for x, truth in zip(actual, expected, strict=True):
        assert ((x - truth).norm() / truth.norm()).item() < 2e-6


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20], ids=lambda scale: f"{scale:g}")
@pytest.mark.parametrize("landmarks", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_kernels_in_registers(dtype: torch.dtype, landmarks: int, scale: float) -> None:
    """Test the kernels that keep matrices in registers. They multiply in float16, yet gradients of any scale are accurate."""
    launch_table = pytest.importorskip("vix_kernels._triton.launch_table", reason="Triton is not installed here")
    keys = [(f"pinv_{kernel}", bits, size) for kernel in ("forward", "backward") for bits in (16, 32) for size in (16, 64)]
    tiles = {} if DEVICE == "cuda" else dict.fromkeys(keys, launch_table.Tile(64, 16, 1, 1))
    q, k, values = (x.to(DEVICE, dtype) for x in problem(landmarks, batch=1, heads=1))
    tensors = [q, k, values.float() * scale]
    with conditions.under(tiles=tiles):
        actual = gradients(lambda *x: pinv(*x, scale=SCALE, backend="triton"), tensors)
    expected = gradients(lambda *x: pinv_reference(*x, scale=SCALE), [x.double() for x in tensors])
    for x, truth in zip(actual, expected, strict=True):
        assert ((x - truth).norm() / truth.norm()).item() < (2e-6 if dtype == torch.float32 else 4e-3)


def test_many_iterations_do_not_overflow(backend: str) -> None:
    """Equal queries make A singular, so each iteration multiplies some components of the rounding error of Z by 13 / 4."""
    q, k, values = (x.to(DEVICE, torch.float32) for x in problem(12, batch=1))
    tensors = [q[:, :, :1].expand_as(q).contiguous(), k, values]
    for x in gradients(partial(pinv, scale=SCALE, iterations=20, backend=backend), tensors):
        assert x.isfinite().all()

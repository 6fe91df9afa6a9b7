"""Tests specific to Performer attention and its features. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import BACKENDS, DEVICE, NO_TRITON
from vix_kernels import orthogonal_projection, performer_attention, rope_1d
from vix_kernels.nn import Attention, PerformerAttention


def favor(q, k, v, w):
    """Evaluate equation 5 of arXiv 2009.14794 in float64, with explicit features."""

    def features(x):
        x = x.double() * x.shape[-1] ** -0.25
        return torch.exp(x @ w.double().mT - x.square().sum(-1, keepdim=True) / 2)

    phi_q, phi_k = features(q), features(k)
    return phi_q @ (phi_k.mT @ v.double()) / (phi_q @ phi_k.sum(-2)[..., None])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_paper(backend: str) -> None:
    q, k, v = (torch.randn(2, 3, 21, 16, device=DEVICE) for _ in range(3))
    w = orthogonal_projection(44, 16, seed=0).to(DEVICE)
    torch.testing.assert_close(
        performer_attention(q, k, v, w, backend=backend).double(), favor(q, k, v, w), atol=1e-5, rtol=1e-5
    )


def test_approaches_softmax_attention() -> None:
    """The error is inversely proportional to the square root of the number of features."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16) * s for s in (0.5, 0.5, 1.0))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = [
        (performer_attention(q, k, v, orthogonal_projection(m, 16, seed=1)) - exact).norm() / exact.norm() for m in (64, 4096)
    ]
    assert errors[1] < errors[0] / 4 and errors[1] < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_never_underflows(backend: str) -> None:
    """The keys and queries are so large that all features would underflow to 0 if they were computed as in the paper."""
    q, k, v = (torch.randn(1, 1, 20, 64, device=DEVICE) * s for s in (12, 12, 1))
    w = orthogonal_projection(64, 64, seed=0).to(DEVICE)
    x = k * 64**-0.25
    assert (torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) == 0).all()
    out = performer_attention(q, k, v, w, backend=backend)
    exact = performer_attention(q.double(), k.double(), v.double(), w.double(), backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gradients_of_many_tokens_stay_finite(backend: str, dtype: torch.dtype) -> None:
    """In the backward pass, an intermediate sum over tokens overflows float16, but the gradients of q, k and v do not."""
    q, k, v = (torch.randn(1, 1, 300, 16, device=DEVICE).to(dtype).requires_grad_() for _ in range(3))
    w = orthogonal_projection(2, 16, seed=0).to(DEVICE)
    dout = torch.full((1, 1, 300, 16), 500.0, device=DEVICE, dtype=dtype)
    out = performer_attention(q, k, v, w, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(performer_attention(*leaves, w.double(), backend="reference"), leaves, dout.double())
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[2].double(), exact[2], rtol=0.03, atol=0.03 * exact[2].abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_only_the_inputs(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 20, 16, device=DEVICE) for _ in range(3))
    w = orthogonal_projection(24, 16, seed=0).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = performer_attention(q, k, v, w, backend=backend)
    expected = performer_attention(*(x.bfloat16() for x in (q, k, v)), w, backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_only_dependent_results(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 20, 16, device=DEVICE) for _ in range(3))
    q[0, 1, 7, 3] = k[1, 0, 4, 2] = float("nan")
    out = performer_attention(q, k, v, orthogonal_projection(24, 16, seed=0).to(DEVICE), backend=backend)
    hit = out.isnan().any(-1)
    assert hit[0, 1].nonzero().flatten().tolist() == [7]  # a query affects only one row of the output
    assert hit[1, 0].all()  # a key affects all queries in its head
    assert not hit[0, 0].any() and not hit[1, 1].any()


@NO_TRITON
def test_offsets_may_exceed_32_bits() -> None:
    """The stride between tokens is 2^30 elements, so 32-bit offsets would overflow. Most of the memory is never accessed."""
    code = """
import torch
from vix_kernels import orthogonal_projection, performer_attention
tokens, width = 4, 16
buffer = torch.empty(tokens * 2**30, dtype=torch.float16)
far = buffer.as_strided((1, 1, tokens, width), (1, 1, 2**30, 1))
near = torch.randn(1, 1, tokens, width).half()
far.copy_(near)
w = orthogonal_projection(8, width, seed=0)
results = []
for x in (near, far):
    leaf = x.detach().requires_grad_()
    out = performer_attention(leaf, leaf, leaf, w, backend="triton")
    results.append((out, *torch.autograd.grad(out.float().square().sum(), leaf)))
assert all(torch.equal(a, b) for a, b in zip(*results))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_does_not_round_the_projection(backend: str, dtype: torch.dtype) -> None:
    """q, k and v are exactly representable in 16 bits, so a large error could come only from rounding the projection."""
    torch.manual_seed(0)
    q, k, v = ((torch.randn(1, 2, 50, 64, device=DEVICE) * 8).to(dtype) for _ in range(3))
    w = orthogonal_projection(32, 64, seed=0).to(DEVICE)
    exact, rounded = (
        performer_attention(q.double(), k.double(), v.double(), x.double(), backend="reference") for x in (w, w.to(dtype))
    )
    out = performer_attention(q, k, v, w, backend=backend).double()
    assert (out - exact).norm() < (rounded - exact).norm() / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, float("inf")])
def test_gradients_of_any_size(backend: str, size: float) -> None:
    """dv scales with dout, however small or large dout is. An infinite channel of dout does not affect other channels."""
    q, k, v = (torch.randn(1, 1, 20, 16, device=DEVICE).requires_grad_() for _ in range(3))
    w = orthogonal_projection(8, 16, seed=0).to(DEVICE)
    dout = torch.zeros(1, 1, 20, 16, device=DEVICE)
    dout[..., 3] = size
    (dv,) = torch.autograd.grad(performer_attention(q, k, v, w, backend=backend), v, dout)
    assert (dv[..., :3] == 0).all() and (dv[..., 4:] == 0).all()
    assert dv[..., 3].isfinite().all() == (size != float("inf"))
    if size in (1e-30, 1e30):
        (unit,) = torch.autograd.grad(performer_attention(q, k, v, w, backend=backend), v, dout / size)
        torch.testing.assert_close(dv / size, unit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_get_no_gradient_even_if_valid_keys_hold_nan(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 8, 16, device=DEVICE) for _ in range(3))
    k[0, 0, 1] = float("nan")
    mask = torch.arange(8, device=DEVICE)[None] < 6
    leaves = [x.requires_grad_() for x in (k, v)]
    out = performer_attention(q, k, v, orthogonal_projection(8, 16, seed=0).to(DEVICE), key_padding_mask=mask, backend=backend)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert (grad[:, :, 6:] == 0).all() and grad[:, :, 1].isnan().any()


def test_projection_blocks_are_orthogonal_with_requested_lengths() -> None:
    w = orthogonal_projection(20, 8, seed=0, scaling="sqrt")
    assert w.shape == (20, 8) and w.dtype == torch.float32
    for block in w.split(8):
        torch.testing.assert_close(block @ block.T, 8 * torch.eye(len(block)), atol=1e-5, rtol=0)
    lengths = orthogonal_projection(64_000, 8, seed=0).norm(dim=-1)
    assert abs(lengths.square().mean().item() - 8) < 0.1 and abs(lengths.square().var().item() - 16) < 0.6  # chi-squared


def test_projection_is_uniform_over_rotations() -> None:
    """Every entry must have mean 0. With a plain QR decomposition, some diagonal entries would have negative means."""
    first = torch.stack([orthogonal_projection(4, 4, seed=seed, scaling="sqrt") for seed in range(2000)])
    assert (first.mean(0).abs() < 4 * 1 / math.sqrt(2000)).all()  # entries have variance 1


def test_projection_depends_only_on_its_seed() -> None:
    a, b = (orthogonal_projection(10, 8, seed=3, num_heads=2) for _ in range(2))
    assert a.shape == (2, 10, 8) and torch.equal(a, b) and not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], orthogonal_projection(10, 8, seed=4, num_heads=2)[0])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    orthogonal_projection(10, 8, seed=3)
    assert torch.equal(before, torch.get_rng_state())  # the global random generator is not used


class TestModule:
    def test_is_performer_attention_between_linear_maps(self) -> None:
        module, x = PerformerAttention(48, 3, qkv_bias=True, seed=5), torch.randn(2, 10, 48)
        q, k, v = module.qkv(x).view(2, 10, 3, 3, 16).permute(2, 0, 3, 1, 4)
        expected = module.proj(performer_attention(q, k, v, module.projection).transpose(1, 2).reshape(2, 10, 48))
        torch.testing.assert_close(module(x), expected)

    def test_projection_stays_float32_and_is_in_the_state_dict(self) -> None:
        module = PerformerAttention(48, 3, seed=1).to(torch.bfloat16)
        assert module.qkv.weight.dtype == torch.bfloat16 and module.projection.dtype == torch.float32
        assert torch.equal(module.projection, PerformerAttention(48, 3, seed=1).projection)
        other = PerformerAttention(48, 3, seed=2)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.projection, module.projection)
        assert module(torch.randn(1, 5, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_redraws_are_explicit_and_deterministic(self) -> None:
        module, twin = PerformerAttention(48, 3, seed=1), PerformerAttention(48, 3, seed=1)
        before = module.projection.clone()
        module(torch.randn(1, 5, 48))
        assert torch.equal(before, module.projection)
        module.redraw_projection()
        twin.redraw_projection()
        assert not torch.equal(before, module.projection) and torch.equal(module.projection, twin.projection)
        resumed = PerformerAttention(48, 3, seed=1)
        resumed.load_state_dict(module.state_dict())
        resumed.redraw_projection()
        module.redraw_projection()
        assert torch.equal(resumed.projection, module.projection)

    def test_extra_state_is_a_tensor_and_earlier_formats_load(self) -> None:
        module = PerformerAttention(48, 3)
        for _ in range(3):
            module.redraw_projection()
        with torch.device("meta"):
            state = module.get_extra_state()
        assert isinstance(state, torch.Tensor) and not state.is_meta and int(state) == 3
        for extra in ({"redraws": 3}, state, state.half(), state * 0.9999 + state * 0.0001):
            other = PerformerAttention(48, 3)
            other.load_state_dict(module.state_dict() | {"_extra_state": extra})
            assert other.redraws == 3
        shapes = {key: value.to("meta") for key, value in module.state_dict().items()}
        other.load_state_dict(shapes, assign=True)
        assert other.redraws == 3
        assert copy.deepcopy(module).half().redraws == 3

    def test_layers_with_different_seeds_have_different_features(self) -> None:
        assert not torch.equal(PerformerAttention(48, 3, seed=0).projection, PerformerAttention(48, 3, seed=1).projection)

    @pytest.mark.parametrize("kind", [Attention, PerformerAttention])
    def test_padding_tokens_change_nothing(self, kind) -> None:
        module, x = kind(48, 3), torch.randn(2, 10, 48)
        padded = torch.cat([x, torch.full((2, 4, 48), 1e4)], 1)
        mask = torch.arange(14).expand(2, -1) < 10
        torch.testing.assert_close(module(padded, key_padding_mask=mask)[:, :10], module(x), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("kind", [Attention, PerformerAttention])
    def test_compiles_with_rope(self, kind) -> None:
        module, x, rope = kind(48, 3, qk_norm=True), torch.randn(2, 10, 48), rope_1d(9, 16, prefix_tokens=1)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, rope=rope), module(x, rope=rope))

    @pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on a CPU")
    def test_trains_through_inductor(self) -> None:
        module, x, rope = PerformerAttention(48, 3), torch.randn(2, 10, 48), rope_1d(10, 16)
        compiled = torch.compile(module, fullgraph=True)

        def gradients(function) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(function(x, rope=rope).square().sum(), tuple(module.parameters()))

        for a, b in zip(gradients(compiled), gradients(module), strict=True):
            torch.testing.assert_close(a, b)

"""Tests specific to linear attention. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import pytest
import torch

from conftest import BACKENDS, DEVICE
from vix_kernels import linear_attention, orthogonal_projection
from vix_kernels.nn import LinearAttention


def exact(tensors, dout=None, **options):
    """Return the output of the float64 reference, and its gradients if `dout` is given."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out = linear_attention(*leaves, backend="reference", **options)
    return out, None if dout is None else torch.autograd.grad(out, leaves, dout.double())


def error(x, truth) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("feature_map", ["relu", "elu"])
def test_equals_the_paper(backend: str, feature_map: str) -> None:
    """Compare the output with equations 4 and 5 of arXiv 2006.16236, with eps added to the denominator."""
    q, k, v = (torch.randn(2, 3, 21, 16, device=DEVICE) for _ in range(3))
    phi = torch.relu if feature_map == "relu" else lambda x: torch.nn.functional.elu(x) + 1
    phi_q, phi_k = phi(q.double()), phi(k.double())
    expected = phi_q @ (phi_k.mT @ v.double()) / (phi_q @ phi_k.sum(-2)[..., None] + 0.3)
    out = linear_attention(q, k, v, feature_map=feature_map, eps=0.3, backend=backend)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_empty_channels_stay_accurate(backend: str, dtype: torch.dtype) -> None:
    """In half of the channels, the features of the keys are almost zero, so the denominators of some queries are almost zero.

    Outputs and gradients must be close to the float64 reference, and gradients must be finite.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, device=DEVICE) for _ in range(3))
    k[..., 8:] = -k[..., 8:].abs()
    k[:, :, 5, 8:] = 1e-4
    q[:, :, 0, :8], q[:, :, 1] = -1.0, -1.0  # query 0 uses only channels 8 to 15, and query 1 uses none
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, torch.randn_like(v)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*leaves, backend=backend)
    truth, gradients = exact(leaves, dout)
    assert (out[:, :, 1] == 0).all() and error(out, truth) < 0.01
    plain = torch.autograd.grad(linear_attention(*leaves, backend="reference"), leaves, dout)
    for name, grad, expected, other in zip(
        "qkv", torch.autograd.grad(out, leaves, dout), gradients, plain, strict=True
    ):  # key 5 is 1e-4 in some channels, so its gradient amplifies rounding errors by 1e4 in any implementation
        assert grad.isfinite().all() and error(grad, expected) < max(0.02, 2 * error(other, expected)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size, tokens", [(400.0, 16), (1.0, 3000)])
def test_means_stay_in_range_where_sums_do_not(backend: str, size: float, tokens: int) -> None:
    """The sum of features times values over all keys overflows float16, but the output does not."""
    q = k = v = torch.full((1, 1, tokens, 16), size, device=DEVICE, dtype=torch.float16) * 40 ** (size == 1)
    out = linear_attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("feature_map", ["relu", "elu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_of_values_does_not_degrade_query_gradients(backend: str, feature_map: str) -> None:
    """dq depends on <dout, values> - <dout, out>. These terms nearly cancel, so plain PyTorch has an error of at least 20%."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 100, 16, device=DEVICE).bfloat16() for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v + 5)]
    out = linear_attention(*leaves, feature_map=feature_map, backend=backend)
    dq = torch.autograd.grad(out, leaves, dout)[0]
    # The kernels compute the means from rounded features, so the error of dq is larger.
    assert error(dq, exact(leaves, dout, feature_map=feature_map)[1][0]) < (0.01 if backend == "torch" else 0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_only_dependent_results(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 20, 16, device=DEVICE) for _ in range(3))
    q[0, 1, 7, 3] = k[1, 0, 4, 2] = float("nan")
    hit = linear_attention(q, k, v, feature_map="elu", backend=backend).isnan().any(-1)
    assert hit[0, 1].nonzero().flatten().tolist() == [7] and hit[1, 0].all() and not hit[0, 0].any() and not hit[1, 1].any()


def test_module_is_linear_attention_between_linear_maps() -> None:
    module, x = LinearAttention(48, 3, feature_map="elu", eps=1e-3), torch.randn(2, 10, 48)
    q, k, v = module.qkv(x).view(2, 10, 3, 3, 16).permute(2, 0, 3, 1, 4)
    out = linear_attention(q, k, v, feature_map="elu", eps=1e-3).transpose(1, 2).reshape(2, 10, 48)
    torch.testing.assert_close(module(x), module.proj(out))


def test_projected_features_are_scaled_by_the_fourth_root_of_head_dim() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, dtype=torch.float64) for _ in range(3))
    w = orthogonal_projection(12, 16, seed=0).double()
    plain = linear_attention(q @ w.mT / 2, k @ w.mT / 2, v)
    torch.testing.assert_close(linear_attention(q, k, v, projection=w), plain)

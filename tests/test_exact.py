"""Tests specific to exact rows (queries that use softmax attention), and to attention with learned features.

The tests in test_ops.py cover all operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import DEVICE
from vix_kernels import (
    agent_attention,
    attention_weights,
    feature_attention,
    linformer_attention,
    nystrom_attention,
    orthogonal_projection,
    performer_attention,
)
from vix_kernels.integrations.drop_in import DropIn
from vix_kernels.integrations.sdpa import replace_sdpa
from vix_kernels.integrations.torch_nn import replace_mha
from vix_kernels.models import create_model
from vix_kernels.nn.core import CORES, Site
from vix_kernels.nn.module import make_module

PROJECTION = orthogonal_projection(12, 16, seed=0)
OPS: dict[str, Callable[..., Tensor]] = {
    "performer": lambda q, k, v, **options: performer_attention(q, k, v, PROJECTION.to(q.device), **options),
    "feature": lambda q, k, v, **options: feature_attention(
        q, k, v, PROJECTION.to(q.device), PROJECTION.flip(0).to(q.device), torch.linspace(-1, 1, 12, device=q.device), **options
    ),
    "nystrom": partial(nystrom_attention, num_landmarks=5),
    "convolution": lambda q, k, v, **options: nystrom_attention(
        q, k, v, num_landmarks=5, conv_weight=torch.linspace(-1, 1, 10, device=q.device).view(2, 1, 5, 1), **options
    ),
    "linformer": lambda q, k, v, **options: linformer_attention(
        q, k, v, torch.linspace(-1, 1, 30 * 4, device=q.device).sin().view(30, 4), **options
    ),
    "agent": lambda q, k, v, **options: agent_attention(q, k, v, q[:, :, ::5].contiguous(), **options),
}


def qkv(tokens: int = 30, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 2, tokens, 16, generator=generator).to(DEVICE, dtype) for _ in range(3))


@pytest.mark.parametrize("op", OPS)
def test_the_first_rows_are_softmax_and_the_others_do_not_change(op: str, backend: str) -> None:
    q, k, v = qkv()
    approximate, exact = (OPS[op](q, k, v, exact_rows=count, backend=backend) for count in (0, 3))
    rows = F.scaled_dot_product_attention(q[:, :, :3], k, v)
    if op == "convolution":
        rows = rows + approximate[:, :, :3] - OPS["nystrom"](q, k, v, backend=backend)[:, :, :3]
    torch.testing.assert_close(exact[:, :, :3], rows, atol=2e-5, rtol=2e-5)
    assert torch.equal(exact[:, :, 3:], approximate[:, :, 3:]) and not torch.allclose(exact, approximate, atol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_all_rows_may_be_exact(op: str, backend: str) -> None:
    q, k, v = qkv(tokens=30)
    if op != "convolution":
        out = OPS[op](q, k, v, exact_rows=30, backend=backend)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-5, rtol=2e-5)


def test_weights_of_an_exact_row_are_those_of_softmax() -> None:
    q, k, _ = qkv()
    weights = attention_weights(performer_attention, q, k, PROJECTION.to(DEVICE), token=1, exact_rows=2)
    torch.testing.assert_close(weights, (q[:, :, 1:2] @ k.mT / 4).softmax(-1)[:, :, 0])


@pytest.mark.parametrize("op", OPS)
def test_exact_rows_compile(op: str) -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in qkv()]
    call = partial(OPS[op], exact_rows=2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    outs = compiled(*inputs), call(*inputs)
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("count, error", [(31, "at most q's 30 queries, got 31"), (-1, "an integer >= 0"), (1.0, "an integer")])
def test_wrong_counts_are_refused(count: Any, error: str) -> None:
    for op in OPS.values():
        with pytest.raises((ValueError, TypeError), match=f"exact_rows: expected {error}"):
            op(*qkv(), exact_rows=count)
    with pytest.raises(ValueError, match="exact_rows: expected 0 for landmarks='pad_front', got 1"):
        nystrom_attention(*qkv(), num_landmarks=4, landmarks="pad_front", exact_rows=1)


def test_features_without_training_are_performer_attention(backend: str) -> None:
    q, k, v = qkv()
    w = PROJECTION.to(DEVICE)
    expected = performer_attention(q, k, v, w, backend=backend)
    assert torch.equal(feature_attention(q, k, v, w, w, backend=backend), expected)
    # b_j multiplies the weight of feature j by exp(b_j), so adding the same bias to all features has no effect.
    bias = torch.full((12,), 3.0, device=DEVICE)
    torch.testing.assert_close(feature_attention(q, k, v, w, w, bias, backend=backend), expected)


@pytest.mark.parametrize("gaussian", [False, True, 0.5, 0])
def test_the_factor_of_the_gaussian_term(gaussian: float, backend: str) -> None:
    q, k, v = qkv()
    w = PROJECTION.to(DEVICE)
    phi = torch.exp(k @ w.mT / 2 - float(gaussian) * k.square().sum(-1, keepdim=True) / 8)
    psi = torch.exp(q @ w.mT / 2)
    expected = psi @ (phi.mT @ v) / (psi @ phi.sum(2)[..., None])
    torch.testing.assert_close(
        feature_attention(q, k, v, w, w, gaussian=gaussian, backend=backend), expected, atol=1e-5, rtol=1e-5
    )


def test_wrong_features_are_refused() -> None:
    q, k, v = qkv()
    w = PROJECTION.to(DEVICE)
    for arguments, options, error in (
        ((w.half(), w), {}, "query_features: expected float32"),
        ((w, w[:3]), {}, r"key_features: expected query_features' shape \(12, 16\), got \(3, 16\)"),
        ((w, w[:, :8]), {}, "key_features: expected 16 columns to match q's head_dim, got 8"),
        ((w, w, torch.zeros(11, device=DEVICE)), {}, r"feature_bias: expected shape \(12,\), got \(11,\)"),
        ((w, w, torch.zeros(12, device=DEVICE).half()), {}, "feature_bias: expected float32"),
        ((w, w), dict(gaussian=-1.0), "gaussian: expected a finite number >= 0, got -1"),
        ((w, w), dict(gaussian="yes"), "gaussian: expected a finite number >= 0, got 'yes'"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            feature_attention(q, k, v, *arguments, **options)


# Cores


@pytest.mark.parametrize("name", ["performer", "feature", "nystrom", "linformer", "agent"])
def test_exact_prefix_of_a_core(name: str) -> None:
    """By default, models of this library have no exact rows. With exact_prefix, the rows of all prefix tokens are exact."""
    torch.manual_seed(0)
    options = {"nystrom": dict(num_landmarks=4), "agent": dict(num_agents=4)}.get(name, {})
    site = Site(8, 2, grid_size=(3, 4), prefix_tokens=2, num_tokens=14)
    cores = (CORES[name].made("zoo", **options, exact_prefix=value) for value in (False, True))
    plain, exact = (make_module(core, 16, num_heads=2, site=site) for core in cores)
    assert exact.core.exact_prefix == 2 and CORES[name].made("zoo").exact_prefix is False
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(1, 14, 16)
    heads = exact.heads(x)
    rows = exact.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))[:, :2]
    if name == "nystrom":  # its residual convolution is added to exact rows, too
        rows = exact(x)[:, :2]
    torch.testing.assert_close(exact(x)[:, :2], rows)
    torch.testing.assert_close(exact(x)[:, 2:], plain(x)[:, 2:])
    assert not torch.allclose(exact(x)[:, :2], plain(x)[:, :2], atol=1e-3)
    with pytest.raises(ValueError, match="exact_prefix: expected an integer >= 0, got -1"):
        CORES[name].made("zoo", exact_prefix=-1)


def test_only_self_attention_has_exact_rows() -> None:
    q, k, v = qkv()
    exact = DropIn("nystrom", num_landmarks=5, exact_prefix=2)
    rows = F.scaled_dot_product_attention(q[:, :, :2], k, v)
    torch.testing.assert_close(exact(q, k, v)[:, :, :2], rows)
    # Cross-attention has no prefix tokens, so none of its rows are exact.
    cross = exact(q, k, v, self_attention=False)
    assert torch.equal(cross, DropIn("nystrom", num_landmarks=5)(q, k, v)) and not torch.allclose(cross[:, :, :2], rows)


def test_features_need_a_module() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="expected attention without parameters, got Feature"):
        DropIn("feature", retrain=True)(q, k, v)
    with pytest.raises(ValueError, match="expected attention without parameters, got Feature"):
        replace_sdpa("feature", retrain=True)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 2)
    report = replace_mha(model, "feature", retrain=True, num_features=8)
    assert report.attentions["layers.1.self_attn"] == "feature, 8 learned features"
    x = torch.randn(2, 16, 32)
    model(x).square().sum().backward()
    learned = {name: p for name, p in model.named_parameters() if ".vix." in name}
    assert len(learned) == 6 and all(p.grad.any() for p in learned.values())
    other = [model.layers[i].self_attn.vix.query_features for i in range(2)]
    assert not torch.equal(*other)  # layers start with different features
    model.eval().to(torch.bfloat16)(x.bfloat16())


def test_a_model_with_learned_features() -> None:
    model = create_model("hybrid_vit", mixer="feature", img_size=16, num_features=8, exact_prefix=True)
    out = model(torch.randn(2, 3, 16, 16))
    out.square().sum().backward()
    assert model.blocks[0].attn.query_features.shape == (4, 8, 32) and model.blocks[0].attn.core.exact_prefix == 1
    assert model.blocks[0].attn.feature_bias.grad.any()

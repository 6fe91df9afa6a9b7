"""Tests specific to Nystrom attention. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import BACKENDS, DEVICE
from vix_kernels import attention_weights, nystrom_attention, rope_1d, rope_mixed
from vix_kernels.nn import AgentAttention, NystromAttention
from vix_kernels.primitives.broadcast import broadcast, broadcast_reference

BATCH, HEADS, WIDTH = 2, 3, 16
COMPAT = dict(landmarks="pad_front", pinv_init="original")


def tokens(count: int, *, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(BATCH, HEADS, count, WIDTH, generator=generator) for _ in range(3))
    return [(x * s).to(DEVICE).requires_grad_() for x, s in ((q, spread), (k, spread), (v, 1.0))]


def peer(num_landmarks: int, **options) -> nn.Module:
    """Return nystrom-attention's module without its linear layers. The input is the concatenation of q, k and v."""
    package = pytest.importorskip("nystrom_attention", reason="nystrom-attention is not installed (extra: test)")
    module = package.NystromAttention(HEADS * WIDTH, dim_head=WIDTH, heads=HEADS, num_landmarks=num_landmarks, **options).to(
        DEVICE
    )
    module.to_qkv, module.to_out = nn.Identity(), nn.Identity()
    return module


def concatenated(*qkv: Tensor) -> Tensor:
    return torch.cat([x.transpose(1, 2).flatten(2) for x in qkv], -1)


def split_heads(out: Tensor) -> Tensor:
    return out.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)


def error(x: Tensor, truth: Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("count", [40, 37, 33])
def test_equals_nystrom_attention(count: int, backend: str) -> None:
    """Compare outputs and gradients with the nystrom-attention package.

    37 and 33 tokens are padded to a multiple of the number of landmarks. 40 tokens need no padding.
    """
    module, qkv = peer(8, residual=True, residual_conv_kernel=33), tokens(count)
    weight = module.res_conv.weight
    dout = torch.randn(BATCH, HEADS, count, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = split_heads(module(concatenated(*qkv)))
    out = nystrom_attention(*qkv, num_landmarks=8, conv_weight=weight, **COMPAT, backend=backend)
    assert error(out, expected) < 1e-5
    leaves = [*qkv, weight]
    for name, x, truth in zip(
        ("q", "k", "v", "conv_weight"),
        torch.autograd.grad(out, leaves, dout),
        torch.autograd.grad(expected, leaves, dout),
        strict=True,
    ):
        assert error(x, truth) < 1e-5, name


def paper(q: Tensor, k: Tensor, v: Tensor, q_marks: Tensor, k_marks: Tensor) -> Tensor:
    """Evaluate equation 13 of arXiv 2102.03902. Iterate equation 11 from A^T / s, where s is the largest column sum of A."""
    scale = q.shape[-1] ** -0.5
    f, a, b = ((scale * x @ y.mT).softmax(-1) for x, y in ((q, k_marks), (q_marks, k_marks), (q_marks, k)))
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(6):
        x = a @ z
        z = z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x))) / 4
    return f @ z @ b @ v


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("landmarks", ["segment", "grid"])
def test_equals_the_paper(landmarks: str, backend: str) -> None:
    """The segment case has fewer queries than keys. In the grid case, adaptive_avg_pool2d computes the expected landmarks."""
    q, k, v = tokens(35)
    if landmarks == "grid":  # 5 rows and 7 columns
        options = dict(grid_size=(5, 7))
        marks = [nn.functional.adaptive_avg_pool2d(x.double().mT.unflatten(3, (5, 7)).flatten(0, 1), (2, 3)) for x in (q, k)]
        marks = [x.unflatten(0, (BATCH, HEADS)).flatten(3).mT for x in marks]
    else:
        options, q = {}, q[:, :, :18]
        marks = [
            q.double().unflatten(2, (6, 3)).mean(3),
            torch.stack([x.mean(2) for x in k.double().split([5] + 5 * [6], 2)], 2),
        ]
    expected = paper(*(x.double() for x in (q, k, v)), *marks)
    out = nystrom_attention(q, k, v, num_landmarks=6, landmarks=landmarks, backend=backend, **options)
    assert error(out.double(), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_nystrom_attention_under_a_mask(backend: str) -> None:
    """Every landmark has at least one valid token. Outputs of masked queries are not compared."""
    module, qkv = peer(8, residual=False), tokens(40)
    mask = torch.rand(BATCH, 40, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[:, ::5] = True
    mask = mask.to(DEVICE)
    expected = split_heads(module(concatenated(*qkv), mask=mask))
    out = nystrom_attention(*qkv, num_landmarks=8, key_padding_mask=mask, **COMPAT, backend=backend)
    rows = mask[:, None, :, None]
    assert error(out * rows, expected * rows) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_independent_only_with_exact_pinv_init(backend: str) -> None:
    qkv = tokens(24, spread=2.0)
    for init, same in (("exact", True), ("original", False)):
        together, alone = (
            nystrom_attention(*(x[:size] for x in qkv), num_landmarks=6, pinv_init=init, backend=backend) for size in (2, 1)
        )
        other = nystrom_attention(*(x[1:] for x in qkv), num_landmarks=6, pinv_init=init, backend=backend)
        both = max(error(together[:1], alone), error(together[1:], other))
        assert (both < 1e-6) == same


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_landmarks_as_tokens_give_softmax_attention(backend: str) -> None:
    """With one landmark per token, the iteration converges to the inverse of the full attention matrix."""
    q, k, v = tokens(12, spread=1.5)
    exact = nn.functional.scaled_dot_product_attention(q, k, v)
    out = nystrom_attention(q, k, v, num_landmarks=12, pinv_iterations=30, backend=backend)
    assert error(out, exact) < 1e-3
    assert error(nystrom_attention(q, k, v, num_landmarks=12, backend=backend), exact) > 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_no_influence(backend: str) -> None:
    """Padded keys and queries change neither the landmarks nor the outputs of valid queries.

    Landmarks without a valid token are ignored.
    """
    qkv, mask = tokens(30), torch.ones(BATCH, 30, dtype=torch.bool, device=DEVICE)
    mask[0, 22:] = False  # the last segment of five tokens has no valid token, and the segment before it has two
    mask[1] = False
    weight = torch.randn(HEADS, 1, 5, 1, device=DEVICE)
    options = dict(num_landmarks=6, conv_weight=weight, key_padding_mask=mask, backend=backend)
    out = nystrom_attention(*qkv, **options)
    fillings = 50.0, float("nan"), float("inf")  # q stays finite, because outputs are computed for padded queries, too
    hostile = [
        x.detach().masked_fill(~mask[:, None, :, None], fill).requires_grad_() for x, fill in zip(qkv, fillings, strict=True)
    ]
    again = nystrom_attention(*hostile, **options)
    valid = mask[:, None, :, None].expand_as(out)
    assert torch.equal(out[valid], again[valid]) and (out[1] == 0).all()
    dout = torch.randn_like(out) * valid
    for x, y in zip(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(again, hostile, dout), strict=True):
        assert torch.equal(x[valid], y[valid]) and (y[~valid] == 0).all() and (y[1] == 0).all()

    # The first 25 tokens are the five segments of five tokens that contain a valid token.
    fewer = [x[:1, :, :25] for x in qkv]
    short = nystrom_attention(*fewer, **options | dict(num_landmarks=5, key_padding_mask=mask[:1, :25]))
    assert error(out[:1, :, :22], short[:, :, :22]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_slots_equals_a_bias(backend: str, dtype: torch.dtype) -> None:
    """`broadcast` accepts a mask of shape (batch, slots) instead of a bias. In sample 1, no slot is valid."""
    q, slots, values = (torch.randn(2, 3, n, 16, device=DEVICE, requires_grad=True) for n in (40, 9, 9))
    mask = torch.rand(2, 9, device=DEVICE) * (torch.arange(9, device=DEVICE) % 3 > 0) * 5
    mask[1] = 0
    bias = torch.where(mask > 0, 0.0, float("-inf"))[:, None].expand(-1, 3, -1)
    results = []
    for slot_bias in (mask.to(dtype), bias):
        out = broadcast(q, slots, values, slot_bias, scale=0.3, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, slots, values), out.detach().cos())))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    torch.testing.assert_close(results[0][0], broadcast_reference(q, slots, values, mask, scale=0.3))
    assert (results[0][0][1] == 0).all() and (results[0][0][0] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_only_dependent_results(backend: str) -> None:
    q, k, v = (x.detach() for x in tokens(24))
    v[0, 1, 5, 3] = float("nan")
    hit = nystrom_attention(q, k, v, num_landmarks=4, backend=backend).isnan()
    assert hit[0, 1, :, 3].all() and hit.sum() == 24  # NaN stays in one channel of one head


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float16_and_bfloat16_inputs(backend: str, dtype: torch.dtype) -> None:
    """The pseudo-inverse is computed in float32, so the error of the output is close to the rounding error of the dtype.

    The nystrom-attention package raises an error for these dtypes.
    """
    qkv = [x.detach() for x in tokens(64)]
    exact = nystrom_attention(*(x.to(dtype).double() for x in qkv), num_landmarks=8, backend="reference")
    out = nystrom_attention(*(x.to(dtype) for x in qkv), num_landmarks=8, backend=backend)
    assert out.dtype == dtype and error(out.double(), exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_learned_angles(backend: str) -> None:
    """The angles receive gradients both from the tokens and from the landmarks."""
    q, k, v = tokens(21)
    frequencies = (torch.randn(2, HEADS, WIDTH // 2) * 0.3).to(DEVICE).requires_grad_()

    def gradients(*leaves: Tensor, **how) -> tuple[Tensor, ...]:
        *qkv, w = leaves
        out = nystrom_attention(*qkv, num_landmarks=6, prefix_tokens=1, rope=rope_mixed(4, 5, w, prefix_tokens=1), **how)
        return torch.autograd.grad(out.square().sum(), leaves)

    exact = gradients(*(x.detach().double().requires_grad_() for x in (q, k, v, frequencies)), backend="reference")
    for x, truth in zip(gradients(q, k, v, frequencies, backend=backend), exact, strict=True):
        assert error(x.double(), truth) < 1e-4


@pytest.mark.parametrize("landmarks", ["segment", "pad_front"])
def test_attention_weights_of_all_tokens_give_the_output(landmarks: str) -> None:
    """The attention weights of all tokens form the matrix that maps v to the output."""
    q, k, v = (x.detach() for x in tokens(22))
    options = dict(num_landmarks=6, landmarks=landmarks, rope=rope_1d(22, WIDTH, device=DEVICE))
    rows = torch.stack([attention_weights(nystrom_attention, q, k, token=i, **options) for i in range(22)], 2)
    torch.testing.assert_close(rows @ v, nystrom_attention(q, k, v, **options), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="token: expected -22 to 21, got 22"):
        attention_weights(nystrom_attention, q, k, token=22, **options)


def test_attention_weights_of_one_token_need_no_quadratic_memory() -> None:
    """The attention weights between all pairs of 20,000 tokens would take 1.6 GB."""
    q, k = torch.randn(2, 1, 1, 20_000, 8).unbind()
    weights = attention_weights(nystrom_attention, q, k, num_landmarks=16)
    assert weights.shape == (1, 1, 20_000) and abs(weights.sum().item() - 1) < 0.1


class TestModule:
    def test_loads_the_weights_of_nystrom_attention(self) -> None:
        package = pytest.importorskip("nystrom_attention", reason="nystrom-attention is not installed (extra: test)")
        original = package.NystromAttention(48, dim_head=16, heads=3, num_landmarks=8)
        module = NystromAttention(48, 3, num_landmarks=8, **COMPAT)
        state = original.state_dict()
        module.load_state_dict(
            {"qkv.weight": state["to_qkv.weight"], "proj.weight": state["to_out.0.weight"],
             "proj.bias": state["to_out.0.bias"], "res_conv.weight": state["res_conv.weight"]}
        )  # fmt: skip
        x = torch.randn(2, 30, 48)
        assert error(module(x), original(x)) < 1e-5

    @pytest.mark.parametrize("kind", [NystromAttention, AgentAttention])
    def test_fewer_tokens_than_landmarks(self, kind) -> None:
        assert kind(48, 3)(torch.randn(2, 10, 48)).shape == (2, 10, 48)

    @pytest.mark.parametrize("kind", [NystromAttention, AgentAttention])
    @pytest.mark.parametrize("options", [{}, {"grid_size": (4, 6), "prefix_tokens": 1}])
    def test_padding_tokens_change_nothing(self, kind, options) -> None:
        if kind is NystromAttention and options:
            options = options | {"landmarks": "grid", "num_landmarks": 6}
        elif options:
            options = options | {"num_agents": 6}
        module, x = kind(48, 3, **options), torch.randn(2, 25, 48)
        mask = torch.arange(25).expand(2, -1) < 19
        noisy = x.masked_fill(~mask[..., None], 1e4)
        torch.testing.assert_close(
            module(noisy, key_padding_mask=mask)[:, :19], module(x, key_padding_mask=mask)[:, :19], atol=1e-5, rtol=1e-5
        )

    def test_agents_are_pooled_queries(self) -> None:
        from vix_kernels import agent_attention

        module, x = AgentAttention(48, 3, num_agents=6, grid_size=(4, 6)), torch.randn(2, 24, 48)
        q, k, v = module.qkv(x).view(2, 24, 3, 3, 16).permute(2, 0, 3, 1, 4)
        cells = nn.functional.adaptive_avg_pool2d(q.reshape(6, 4, 6, 16).permute(0, 3, 1, 2), (2, 3))
        agents = cells.flatten(2).mT.reshape(2, 3, 6, 16)
        expected = module.proj(agent_attention(q, k, v, agents).transpose(1, 2).reshape(2, 24, 48))
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)

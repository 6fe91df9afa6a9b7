"""Tests specific to Linformer and agent attention. The tests in test_ops.py cover all operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import BACKENDS, DEVICE, NO_TRITON
from vix_kernels import agent_attention, linformer_attention, rope_1d
from vix_kernels.nn import LinformerAttention
from vix_kernels.nn.linformer import Linformer
from vix_kernels.testing import SPECS, Case


def problem(*sizes: int, slots: int = 12) -> list[Tensor]:
    """Return q, k and v of shape (batch, heads, tokens, width), and both projections. All tensors require gradients."""
    torch.manual_seed(0)
    qkv = [torch.randn(sizes, device=DEVICE) for _ in range(3)]
    projections = [(torch.rand(sizes[2], slots, device=DEVICE) * 2 - 1) * slots**-0.5 for _ in range(2)]
    return [x.requires_grad_() for x in (*qkv, *projections)]


def close(actual: Tensor, expected: Tensor) -> None:
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5


def peer_module(share_kv: bool, tokens: int = 20):
    """Return a `LinformerAttention` and a linformer module with equal weights and 12 slots, for up to `tokens` tokens."""
    package = pytest.importorskip("linformer", reason="linformer is not installed (extra: test)")
    torch.manual_seed(0)
    peer = package.LinformerSelfAttention(48, tokens, k=12, heads=3, share_kv=share_kv).to(DEVICE)
    module = LinformerAttention(48, 3, seq_len=tokens, num_landmarks=12, share_kv=share_kv).to(DEVICE)
    maps = peer.to_q, peer.to_k, peer.to_k if share_kv else peer.to_v
    state = {
        "qkv.weight": torch.cat([each.weight for each in maps]),
        "proj.weight": peer.to_out.weight,
        "proj.bias": peer.to_out.bias,
        "key_projection": peer.proj_k,
    } | ({} if share_kv else {"value_projection": peer.proj_v})
    module.load_state_dict(state)
    return module, peer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [20, 9])
def test_equals_linformer(backend: str, queries: int) -> None:
    """Compare outputs and gradients with the linformer package.

    The test replaces the linear layers of the package with identities, so the keys and the values are the same tensor.
    """
    _, peer = peer_module(share_kv=False)
    peer.to_q = peer.to_k = peer.to_v = peer.to_out = torch.nn.Identity()
    x, context = (torch.randn(2, n, 48, device=DEVICE, requires_grad=True) for n in (queries, 17))
    q, k = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in (x, context))
    out = linformer_attention(q, k, k, peer.proj_k, peer.proj_v, backend=backend).transpose(1, 2).flatten(2)
    expected = peer(x, context)
    close(out, expected)
    leaves, dout = (x, context, peer.proj_k, peer.proj_v), torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        close(a, b)


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("tokens", [20, 7])
def test_module_equals_linformer_module(share_kv: bool, tokens: int) -> None:
    module, peer = peer_module(share_kv)
    x = torch.randn(2, tokens, 48, device=DEVICE, requires_grad=True)
    out, expected = module(x), peer(x)
    close(out, expected)
    dout = torch.randn_like(out)
    maps = [peer.to_q.weight, peer.to_k.weight] + ([] if share_kv else [peer.to_v.weight, peer.proj_v])
    dx, dqkv, de, *df = torch.autograd.grad(
        out, [x, module.qkv.weight, module.key_projection] + ([] if share_kv else [module.value_projection]), dout
    )
    peer_dx, peer_de, dq, dk, *dv = torch.autograd.grad(expected, [x, peer.proj_k, *maps], dout)
    close(dx, peer_dx)
    close(de, peer_de)
    parts = dqkv.chunk(3)
    close(parts[0], dq)
    if share_kv:  # keys and values share one linear layer
        close(parts[1] + parts[2], dk)
    else:
        for a, b in zip((*parts[1:], *df), (dk, *dv), strict=True):
            close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masking_the_last_tokens_equals_cutting_them(backend: str) -> None:
    leaves = q, k, v, e, f = problem(2, 2, 21, 16)
    mask = torch.arange(21, device=DEVICE) < 13
    masked = linformer_attention(*leaves, key_padding_mask=mask.expand(2, 21), backend=backend)
    cut = linformer_attention(q, k[:, :, :13], v[:, :, :13], e, f, backend=backend)
    close(masked, cut)
    dout = torch.randn_like(cut)
    for a, b in zip(torch.autograd.grad(masked, leaves, dout), torch.autograd.grad(cut, leaves, dout), strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_projection_serves_keys_and_values(backend: str) -> None:
    q, k, v, e, _ = problem(1, 2, 18, 16)
    one, two = (linformer_attention(q, k, v, *each, backend=backend) for each in ((e,), (e, e)))
    assert torch.equal(one, two)
    dout = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, (k, v, e), dout), torch.autograd.grad(two, (k, v, e), dout), strict=True):
        close(a, b)


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reassociation_changes_nothing(share_kv: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, the module does not compute a key for each token. Compare the results with and without this optimization.

    In the masked case, one sample is fully masked.
    """
    torch.manual_seed(0)
    module = LinformerAttention(48, 3, qkv_bias=True, seq_len=30, num_landmarks=40, share_kv=share_kv)
    x, mask = torch.randn(3, 25, 48, requires_grad=True), None
    if masked:
        mask = torch.rand(3, 25) > 0.4
        mask[-1] = False
    leaves = [x, *module.parameters()]

    def run() -> list[Tensor]:
        out = module(x, key_padding_mask=mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    direct = run()
    monkeypatch.setattr(Linformer, "attend_tokens", lambda *args, **options: None)
    for a, b in zip(direct, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_module_calls_the_function_for_rotated_keys() -> None:
    """With rotated or normalized keys, or with per-head projections, the module calls `linformer_attention`."""
    torch.manual_seed(0)
    module = LinformerAttention(48, 3, qk_norm=True, seq_len=12, num_landmarks=5, per_head=True)
    x, rope = torch.randn(2, 10, 48), rope_1d(10, 16)
    q, k, v = module.qkv(x).view(2, 10, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    out = linformer_attention(q, k, v, module.key_projection, module.value_projection, rope=rope, backend="reference")
    torch.testing.assert_close(module(x, rope=rope), module.proj(out.transpose(1, 2).flatten(2)))
    assert module.key_projection.shape == (3, 12, 5) and module.key_projection.abs().max() <= 5**-0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_agents_have_no_influence(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 19, 16, device=DEVICE) for _ in range(3))
    agents = torch.randn(2, 2, 7, 16, device=DEVICE)
    mask = torch.arange(7, device=DEVICE) < 4
    masked = agent_attention(q, k, v, agents, agent_mask=mask.expand(2, 7), backend=backend)
    close(masked, agent_attention(q, k, v, agents[:, :, :4], backend=backend))
    values = torch.nn.functional.scaled_dot_product_attention(agents, k, v)
    plain = agent_attention(q, k, v, agents, backend=backend)
    close(plain, torch.nn.functional.scaled_dot_product_attention(q, agents, values))


@NO_TRITON
@pytest.mark.skipif(DEVICE != "cpu", reason="traffic is counted in the interpreter")
def test_forward_traffic_is_near_the_minimum() -> None:
    """Measure the traffic for sm_90, including partial sums of chunks."""
    from vix_kernels.measure.traffic import measure

    spec = SPECS["linformer_attention"]
    case = Case("traffic", batch=4, heads=4, tokens=4096, width=32, features=64)
    tensors = list(spec.problem(case, dtype=torch.float16).tensors.values())  # same traffic as bfloat16, but faster to run
    traffic = measure(linformer_attention, *tensors, backend="triton")
    assert 1 <= traffic.forward.ratio <= 1.2, f"\n{traffic.forward}"

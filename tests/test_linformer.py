"""What is particular to Linformer and agent attention; the registry's suite covers the rest."""

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
    """q, k, v of (batch, heads, tokens, width) and both projections, which all take gradients."""
    torch.manual_seed(0)
    qkv = [torch.randn(sizes, device=DEVICE) for _ in range(3)]
    projections = [(torch.rand(sizes[2], slots, device=DEVICE) * 2 - 1) * slots**-0.5 for _ in range(2)]
    return [x.requires_grad_() for x in (*qkv, *projections)]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def peer_module(share_kv: bool, tokens: int = 20):
    """linformer's attention of 20 tokens at most and 12 slots, and ours with its weights."""
    peer = pytest.importorskip("linformer", reason="linformer is not installed (extra: test)")
    torch.manual_seed(0)
    theirs = peer.LinformerSelfAttention(48, tokens, k=12, heads=3, share_kv=share_kv).to(DEVICE)
    ours = LinformerAttention(48, 3, seq_len=tokens, num_landmarks=12, share_kv=share_kv).to(DEVICE)
    maps = theirs.to_q, theirs.to_k, theirs.to_k if share_kv else theirs.to_v
    state = {
        "qkv.weight": torch.cat([each.weight for each in maps]),
        "proj.weight": theirs.to_out.weight,
        "proj.bias": theirs.to_out.bias,
        "key_projection": theirs.proj_k,
    } | ({} if share_kv else {"value_projection": theirs.proj_v})
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [20, 9])
def test_equals_linformer(backend: str, queries: int) -> None:
    """Outputs and gradients of its attention, its linear maps taken out: its values are its keys then."""
    _, theirs = peer_module(share_kv=False)
    theirs.to_q = theirs.to_k = theirs.to_v = theirs.to_out = torch.nn.Identity()
    x, context = (torch.randn(2, n, 48, device=DEVICE, requires_grad=True) for n in (queries, 17))
    q, k = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in (x, context))
    out = linformer_attention(q, k, k, theirs.proj_k, theirs.proj_v, backend=backend).transpose(1, 2).flatten(2)
    expected = theirs(x, context)
    close(out, expected)
    leaves, dout = (x, context, theirs.proj_k, theirs.proj_v), torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        close(a, b)


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("tokens", [20, 7])
def test_module_equals_linformers(share_kv: bool, tokens: int) -> None:
    ours, theirs = peer_module(share_kv)
    x = torch.randn(2, tokens, 48, device=DEVICE, requires_grad=True)
    out, expected = ours(x), theirs(x)
    close(out, expected)
    dout = torch.randn_like(out)
    maps = [theirs.to_q.weight, theirs.to_k.weight] + ([] if share_kv else [theirs.to_v.weight, theirs.proj_v])
    dx, dqkv, de, *df = torch.autograd.grad(
        out, [x, ours.qkv.weight, ours.key_projection] + ([] if share_kv else [ours.value_projection]), dout
    )
    their_dx, their_de, dq, dk, *dv = torch.autograd.grad(expected, [x, theirs.proj_k, *maps], dout)
    close(dx, their_dx)
    close(de, their_de)
    parts = dqkv.chunk(3)
    close(parts[0], dq)
    if share_kv:  # the map of keys is that of values too
        close(parts[1] + parts[2], dk)
    else:
        for a, b in zip((*parts[1:], *df), (dk, *dv), strict=True):
            close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_cuts_the_sequence(backend: str) -> None:
    leaves = q, k, v, e, f = problem(2, 2, 21, 16)
    mask = torch.arange(21, device=DEVICE) < 13
    masked = linformer_attention(*leaves, key_padding_mask=mask.expand(2, 21), backend=backend)
    cut = linformer_attention(q, k[:, :, :13], v[:, :, :13], e, f, backend=backend)
    close(masked, cut)
    dout = torch.randn_like(cut)
    for a, b in zip(torch.autograd.grad(masked, leaves, dout), torch.autograd.grad(cut, leaves, dout), strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_projection_is_both(backend: str) -> None:
    q, k, v, e, _ = problem(1, 2, 18, 16)
    one, two = (linformer_attention(q, k, v, *each, backend=backend) for each in ((e,), (e, e)))
    assert torch.equal(one, two)
    dout = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, (k, v, e), dout), torch.autograd.grad(two, (k, v, e), dout), strict=True):
        close(a, b)


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reassociation_changes_nothing(share_kv: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module as it is, without keys of the tokens, and by way of them; one sample has no token that takes part."""
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


def test_module_through_keys() -> None:
    """Rotated or normalised keys, and projections of each head, go through the function."""
    torch.manual_seed(0)
    module = LinformerAttention(48, 3, qk_norm=True, seq_len=12, num_landmarks=5, per_head=True)
    x, rope = torch.randn(2, 10, 48), rope_1d(10, 16)
    q, k, v = module.qkv(x).view(2, 10, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    out = linformer_attention(q, k, v, module.key_projection, module.value_projection, rope=rope, backend="reference")
    torch.testing.assert_close(module(x, rope=rope), module.proj(out.transpose(1, 2).flatten(2)))
    assert module.key_projection.shape == (3, 12, 5) and module.key_projection.abs().max() <= 5**-0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_agents_that_take_no_part_might_as_well_be_missing(backend: str) -> None:
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
def test_traffic_of_a_forward() -> None:
    """As launched on sm_90, its chunks and their sum included; more slots or wider heads have fewer chunks."""
    from vix_kernels.measure.traffic import measure

    spec = SPECS["linformer_attention"]
    case = Case("traffic", batch=4, heads=4, tokens=4096, width=32, features=64)
    tensors = list(spec.problem(case, dtype=torch.float16).tensors.values())  # moves what bfloat16 does, interpreted faster
    traffic = measure(linformer_attention, *tensors, backend="triton")
    assert 1 <= traffic.forward.ratio <= 1.2, f"\n{traffic.forward}"

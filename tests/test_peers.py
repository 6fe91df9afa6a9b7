"""Tests of the replacements for modules in performer-pytorch, nystrom-attention and linformer.

The replaced modules are called peers here. Each replacement has the same arguments, weights, outputs and gradients as its
peer.
"""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import BACKENDS, DEVICE
from vix_kernels import performer_attention
from vix_kernels.integrations.linformer import LinformerSelfAttention
from vix_kernels.integrations.nystrom_attention import NystromAttention
from vix_kernels.integrations.performer_pytorch import FastAttention
from vix_kernels.testing.memory import kept_for_backward

REPLACEMENTS = {
    "performer_pytorch": FastAttention,
    "nystrom_attention": NystromAttention,
    "linformer": LinformerSelfAttention,
}
FAST = dict(dim_heads=16, nb_features=24)
KINDS = [{}, dict(compat=False), dict(generalized_attention=True, kernel_fn=nn.Softplus()), dict(no_projection=True)]
NYSTROM = dict(dim=20, dim_head=16, heads=2, num_landmarks=8, residual_conv_kernel=5)
LINFORMER = dict(dim=32, seq_len=40, k=12, heads=4)


def peer_class(package: str) -> type[nn.Module]:
    return getattr(pytest.importorskip(package, reason=f"{package} is not installed"), REPLACEMENTS[package].__name__)


def pair(package: str, options: dict[str, Any], dtype: torch.dtype = torch.float64, **new: Any) -> tuple[nn.Module, nn.Module]:
    """Return a replacement and its peer, both with the same weights."""
    torch.manual_seed(0)
    peer = peer_class(package)(**options).to(DEVICE, dtype)
    replacement = REPLACEMENTS[package](**options, **new).to(DEVICE, dtype)
    replacement.load_state_dict(peer.state_dict())
    return replacement, peer


def normal(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).mul_(scale).requires_grad_()


def up_to(*lengths: int, tokens: int) -> Tensor:
    return torch.arange(tokens, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def qkv(queries: int, tokens: int, **options: Any) -> list[Tensor]:
    return [normal(2, 3, n, 16, **options) for n in (queries, tokens, tokens)]


def noise(*shape: int) -> Tensor:
    """Return normally distributed noise. Calls with the same shape always return the same noise."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def results(
    module: nn.Module, inputs: list[Tensor], *args: Any, dout: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return a dict with the output of a module and the gradients of all inputs and parameters.

    The keys are "out", the index of each input ("0", "1", ...) and the name of each parameter.
    """
    out = module(*inputs, *args, **options)
    out = out[0] if isinstance(out, tuple) else out
    leaves = {str(i): x for i, x in enumerate(inputs)} | dict(module.named_parameters())
    grads = torch.autograd.grad(out, list(leaves.values()), noise(*out.shape).to(out) if dout is None else dout)
    return {"out": out, **dict(zip(leaves, grads, strict=True))}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    size = expected.abs().max()
    assert size > 0 and (actual - expected).abs().max() <= tolerance * size


def same_results(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], tolerance)


# Signatures, state dicts and imports


@pytest.mark.parametrize("package", REPLACEMENTS)
def test_signatures_match_the_peers(package: str) -> None:
    def described(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        kept = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return [(p.name, type(p.default) if isinstance(p.default, nn.Module) else p.default) for p in kept]

    peer = peer_class(package)
    for method in ("__init__", "forward"):
        assert described(getattr(REPLACEMENTS[package], method)) == described(getattr(peer, method))


@pytest.mark.parametrize(
    "package,options",
    [
        ("performer_pytorch", dict(dim_heads=16)),
        ("performer_pytorch", FAST | dict(generalized_attention=True, kernel_fn=nn.PReLU(), ortho_scaling=1)),
        ("performer_pytorch", FAST | dict(no_projection=True)),
        ("nystrom_attention", dict(dim=20)),
        ("nystrom_attention", NYSTROM | dict(residual=False, dropout=0.1)),
        ("linformer", dict(dim=32, seq_len=10)),
        ("linformer", LINFORMER | dict(dim_head=5, one_kv_head=True)),
        ("linformer", LINFORMER | dict(share_kv=True, dropout=0.1)),
    ],
)
def test_state_dicts_load_in_both_directions(package: str, options: dict[str, Any]) -> None:
    peer, replacement = peer_class(package)(**options), REPLACEMENTS[package](**options)
    shapes = [[(name, x.shape, x.dtype) for name, x in module.state_dict().items()] for module in (replacement, peer)]
    assert sorted(shapes[0], key=str) == sorted(shapes[1], key=str) and shapes[0]
    replacement.load_state_dict(peer.state_dict())
    peer.load_state_dict(replacement.state_dict())


def test_the_peers_are_not_imported() -> None:
    code = f"import sys\nfor name in {list(REPLACEMENTS)}: __import__('vix_kernels.integrations.' + name)\n"
    code += f"print([name for name in {list(REPLACEMENTS)} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


# performer-pytorch


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("scale", [0.3, 1, 3])
@pytest.mark.parametrize("queries,tokens", [(45, 37), (9, 2), (11, 30)])
def test_fast_attention_matches_the_peer(queries: int, tokens: int, scale: float, backend: str) -> None:
    replacement, peer = pair("performer_pytorch", FAST, backend=backend)
    inputs = qkv(queries, tokens, scale=scale)
    same_results(results(replacement, inputs), results(peer, inputs), 1e-9)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("scale", [1, 3])
def test_fast_attention_in_float32(scale: float, backend: str) -> None:
    replacement, peer = pair("performer_pytorch", FAST, backend=backend)
    inputs = qkv(45, 37, scale=scale)
    exact = results(peer, inputs)
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    actual, peer_results = results(replacement.float(), inputs), results(peer.float(), inputs)
    for name, x in exact.items():
        # If eps dominates the denominator, the gradient of q is a small difference between large numbers. The replacement and
        # the peer then both have large rounding errors.
        error, peer_error = ((each[name] - x).abs().max() / x.abs().max() for each in (actual, peer_results))
        assert error <= max(1e-5, 4 * peer_error) and peer_error < 0.1


@pytest.mark.parametrize(
    "options",
    [
        dict(generalized_attention=True),
        dict(generalized_attention=True, kernel_fn=nn.Softplus()),
        dict(no_projection=True),
        dict(no_projection=True, generalized_attention=True),
        dict(ortho_scaling=1),
    ],
    ids=str,
)
def test_fast_attention_with_other_features(options: dict[str, Any]) -> None:
    replacement, peer = pair("performer_pytorch", FAST | options)
    inputs = qkv(45, 37)
    same_results(results(replacement, inputs), results(peer, inputs))


def test_fast_attention_shares_keys_of_one_sample() -> None:
    replacement, peer = pair("performer_pytorch", FAST)
    inputs = [normal(batch, 3, tokens, 16) for batch, tokens in ((2, 45), (1, 37), (1, 37))]
    same_results(results(replacement, inputs), results(peer, inputs))


def test_fast_attention_with_a_learned_projection() -> None:
    replacement, peer = pair("performer_pytorch", FAST)
    for module in (replacement, peer):
        module.projection_matrix.requires_grad_()
    inputs = qkv(45, 37)
    dout = torch.randn_like(inputs[0])
    grads = [torch.autograd.grad(module(*inputs), module.projection_matrix, dout)[0] for module in (replacement, peer)]
    close(*grads)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_fast_attention_with_a_mask(options: dict[str, Any], backend: str) -> None:
    """Padding does not change the results of a sample, and the output of a fully masked sample is 0.

    The gradients of padding are 0, even if the padding contains NaN.
    """
    torch.manual_seed(0)
    module = FastAttention(**FAST, **options, backend=backend).double().to(DEVICE)
    module.projection_matrix.abs_()
    inputs, mask = qkv(45, 37), up_to(37, 20, tokens=37)
    with torch.no_grad():
        inputs[1].abs_().neg_()  # all logits of valid keys become negative, so zeros in the padding would be the maximum
        for x in inputs[1:]:
            x[1, :, 20:] = float("nan")
    padded = results(module, inputs, key_padding_mask=mask)
    assert all(padded[name][1, :, 20:].eq(0).all() for name in "12")
    for sample, length in ((0, 37), (1, 20)):
        ends = dict(zip(("out", "0", "1", "2"), (45, 45, length, length), strict=True))
        cut = [x[[sample], :, :end].detach().requires_grad_() for x, end in zip(inputs, (45, length, length), strict=True)]
        valid = {name: padded[name][[sample], :, :end] for name, end in ends.items()}
        same_results(valid, results(module, cut, dout=noise(2, 3, 45, 16)[[sample]]))

    mask[1] = False
    masked = results(module, inputs, key_padding_mask=mask)
    assert all(x[1].eq(0).all() and x[0].ne(0).any() for x in masked.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_attention_without_compat_is_performer_attention(backend: str) -> None:
    module = FastAttention(**FAST, compat=False, backend=backend).to(DEVICE)
    inputs, mask = qkv(45, 37, dtype=torch.float32), torch.rand(2, 37, device=DEVICE) < 0.7
    expected = performer_attention(*inputs, module.projection_matrix, key_padding_mask=mask, backend=backend)
    assert torch.equal(module(*inputs, key_padding_mask=mask), expected)
    assert not torch.allclose(FastAttention(**FAST)(*(x.cpu() for x in inputs)), expected.cpu(), rtol=1e-3)


def test_fast_attention_stores_no_features() -> None:
    replacement, peer = pair("performer_pytorch", FAST, torch.float32)
    inputs = tuple(qkv(4096, 4096, dtype=torch.float32))
    features = 2 * 3 * 4096 * 24 * 4
    assert kept_for_backward(peer, inputs) > 4 * features
    assert kept_for_backward(replacement, inputs) < features


def test_features_are_drawn_from_the_global_seed() -> None:
    def lengths(x: Tensor) -> Tensor:
        return x.norm(dim=1)

    torch.manual_seed(3)
    first, second = FastAttention(**FAST), FastAttention(**FAST, ortho_scaling=1)
    torch.manual_seed(3)
    assert torch.equal(FastAttention(**FAST).projection_matrix, first.projection_matrix)
    before = first.projection_matrix.clone()
    first.redraw_projection_matrix("cpu")
    assert not torch.equal(first.projection_matrix, before)
    torch.testing.assert_close(lengths(second.projection_matrix), torch.full((24,), 4.0))
    block = before[:16] / lengths(before[:16])[:, None]
    torch.testing.assert_close(block @ block.T, torch.eye(16))
    assert FastAttention(64).projection_matrix.shape == (266, 64)


# nystrom-attention


def make_mask(kind: str, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    torch.manual_seed(1)
    mask = torch.rand(2, tokens, device=DEVICE) < 0.6
    if kind == "padded":  # some landmarks have no valid token
        mask = up_to(tokens, tokens // 2, tokens=tokens)
    if kind == "all masked":
        mask[1] = False
    return mask


@pytest.mark.parametrize("mask", ["none", "random", "padded", "all masked"])
@pytest.mark.parametrize("tokens", [48, 45, 5])
@pytest.mark.parametrize("options", [{}, dict(residual=False), dict(pinv_iterations=3, eps=0.1)], ids=str)
def test_nystrom_matches_the_peer(options: dict[str, Any], tokens: int, mask: str) -> None:
    replacement, peer = pair("nystrom_attention", NYSTROM | options)
    inputs, mask = [normal(2, tokens, 20)], make_mask(mask, tokens)
    expected = results(peer, inputs, mask)
    same_results(results(replacement, inputs, mask), expected, 1e-9)
    matrices, peer_matrices = replacement(*inputs, mask, return_attn=True)[1], peer(*inputs, mask, return_attn=True)[1]
    close(matrices, peer_matrices, 1e-9)
    for options in (dict(return_attn=True), dict(return_attn_matrices=True)):
        same_results(results(replacement, inputs, mask, **options), expected, 1e-9)
    factors, peer_factors = (each(*inputs, mask, False, True)[1] for each in (replacement, peer))
    assert len(factors) == 3
    for a, b in zip(factors, peer_factors, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("length", [None, 20])
def test_nystrom_dropout_matches_the_peer(length: int | None) -> None:
    replacement, peer = pair("nystrom_attention", NYSTROM | dict(dropout=0.5))
    replacement.to_out[1] = peer.to_out[1]  # both must draw the same random numbers
    x, outs = normal(2, 45, 20), []
    mask = None if length is None else up_to(length, tokens=45)  # one mask for both samples
    for module in (replacement, peer):
        torch.manual_seed(5)
        outs.append(results(module, [x], mask))
    same_results(*outs, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nystrom_in_float32(backend: str) -> None:
    replacement, peer = pair("nystrom_attention", NYSTROM, backend=backend)
    x = normal(2, 45, 20)
    exact = {name: each.float() for name, each in results(peer, [x]).items()}
    same_results(results(replacement.float(), [x.detach().float().requires_grad_()]), exact, 1e-4)


@pytest.mark.parametrize("tokens", [48, 45])
@pytest.mark.parametrize("plain", [False, True])
def test_nystrom_without_compat_ignores_padding(tokens: int, plain: bool) -> None:
    """Padding does not change the results of a sample. Segments without valid tokens have no landmark."""
    torch.manual_seed(0)
    full, fewer = (
        NystromAttention(**NYSTROM | dict(num_landmarks=landmarks), compat=False).double().to(DEVICE) for landmarks in (8, 5)
    )
    fewer.load_state_dict(full.state_dict())
    length = tokens - 3 * 6  # the last three segments of six tokens are padding
    x, mask, dout = normal(2, tokens, 20), up_to(tokens, length, tokens=tokens), noise(2, tokens, 20)
    dout[0], dout[1, length:] = 0, 0
    with torch.no_grad():
        x[1, length:] = float("nan")
    padded = results(full, [x], mask, plain, dout=dout)
    assert padded["0"][0].eq(0).all() and padded["0"][1, length:].eq(0).all()
    close(padded["out"][:1], full(x[:1]), 1e-9)
    valid = padded | {name: padded[name][1:, :length] for name in ("out", "0")}
    cut = x[1:, :length].detach().requires_grad_()
    same_results(valid, results(fewer, [cut], dout=dout[1:, :length]), 1e-9)

    masked = results(full, [x], torch.zeros_like(mask), plain)
    close(masked["out"], full.to_out[0].bias.expand(2, tokens, -1))
    assert masked["0"].eq(0).all() and masked["to_qkv.weight"].eq(0).all()


def test_nystrom_attention_matrices_exclude_padding() -> None:
    module = NystromAttention(**NYSTROM, compat=False).double()
    x, mask = normal(2, 45, 20).cpu(), torch.rand(2, 45) < 0.6
    out, attention = module(x, mask, return_attn=True)
    v = module.to_qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 16)).transpose(1, 2) * mask[:, None, :, None]
    mixed = attention[..., 3:, 3:] @ v + module.res_conv(v)
    close(module.to_out(mixed.transpose(1, 2).flatten(2)), out)
    assert attention[..., :3].eq(0).all() and attention[..., 3:].transpose(2, 3)[~mask[:, None].expand(2, 2, 45)].eq(0).all()


# linformer


@pytest.mark.parametrize("context", [None, 40, 17])
@pytest.mark.parametrize("tokens", [40, 23, 7])
@pytest.mark.parametrize(
    "options",
    [{}, dict(one_kv_head=True), dict(share_kv=True), dict(one_kv_head=True, share_kv=True, dim_head=6), dict(k=60)],
    ids=str,
)
def test_linformer_matches_the_peer(options: dict[str, Any], tokens: int, context: int | None) -> None:
    replacement, peer = pair("linformer", LINFORMER | options)
    inputs = [normal(2, tokens, 32)] + ([] if context is None else [normal(2, context, 32)])
    same_results(results(replacement, inputs), results(peer, inputs))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_linformer_in_float32(one_kv_head: bool, backend: str) -> None:
    replacement, peer = pair("linformer", LINFORMER | dict(one_kv_head=one_kv_head), torch.float32, backend=backend)
    inputs = [normal(2, 40, 32, dtype=torch.float32)]
    same_results(results(replacement, inputs), results(peer, inputs), 1e-5)


@pytest.mark.parametrize("tokens", [40, 7])
def test_linformer_dropout_matches_the_peer(tokens: int) -> None:
    replacement, peer = pair("linformer", LINFORMER | dict(dropout=0.5))
    replacement.dropout = peer.dropout  # both must draw the same random numbers
    x, outs = normal(2, tokens, 32), []
    for module in (replacement, peer):
        torch.manual_seed(5)
        outs.append(results(module, [x]))
    same_results(*outs)
    assert not torch.equal(outs[0]["out"], replacement.eval()(x))
    same_results(results(replacement, [x]), results(peer.eval(), [x]))


@pytest.mark.parametrize("options", [{}, dict(share_kv=True), dict(k=60)], ids=str)
def test_linformer_with_a_mask(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LinformerSelfAttention(**LINFORMER | options).double().to(DEVICE)
    x, context = normal(1, 30, 32), normal(1, 30, 32)
    cut = [x, context[:, :20].detach().requires_grad_()]
    with torch.no_grad():
        context[:, 20:] = float("nan")
    padded = results(module, [x, context], key_padding_mask=up_to(20, tokens=30))
    assert padded["1"][:, 20:].eq(0).all()
    same_results(padded | {"1": padded["1"][:, :20]}, results(module, cut))

    short = module(x[:, :20])
    with torch.no_grad():
        x[:, 20:] = float("nan")
    close(module(x, key_padding_mask=up_to(20, tokens=30))[:, :20], short)


# All packages


@pytest.mark.parametrize("tokens", [20, 45])
@pytest.mark.parametrize(
    "package,options",
    [
        *(("performer_pytorch", FAST | kind) for kind in KINDS),
        ("nystrom_attention", NYSTROM),
        ("nystrom_attention", NYSTROM | dict(compat=False)),
        ("linformer", LINFORMER | dict(seq_len=45)),
    ],
    ids=str,
)
def test_in_bfloat16(package: str, options: dict[str, Any], tokens: int) -> None:
    """The outputs under autocast and those of a bfloat16 module are close to the float32 outputs, with and without a mask."""
    torch.manual_seed(0)
    module = REPLACEMENTS[package](**options).to(DEVICE)
    performer = package == "performer_pytorch"
    inputs = qkv(tokens, tokens, dtype=torch.float32) if performer else [normal(2, tokens, options["dim"], dtype=torch.float32)]
    name = "mask" if package == "nystrom_attention" else "key_padding_mask"
    for masks in ({}, {name: up_to(tokens, 11, tokens=tokens)}):
        exact = module(*inputs, **masks)
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = module(*inputs, **masks)
        narrow = copy.deepcopy(module).bfloat16()(*(x.bfloat16() for x in inputs), **masks)
        for out in (mixed, narrow):
            close(out, exact.bfloat16(), 0.05)


# Errors


@pytest.mark.parametrize(
    "package,options,error,message",
    [
        ("performer_pytorch", FAST | dict(causal=True), NotImplementedError, "causal: expected False"),
        ("performer_pytorch", FAST | dict(ortho_scaling=2), ValueError, "ortho_scaling: expected 0 or 1, got 2"),
        ("performer_pytorch", FAST | dict(nb_features=0), ValueError, "num_features: expected an integer >= 1, got 0"),
        (
            "performer_pytorch",
            FAST | dict(no_projection=True, backend="triton"),
            NotImplementedError,
            "backend: .* no kernels, got 'triton'",
        ),
        ("nystrom_attention", NYSTROM | dict(residual_conv_kernel=4), ValueError, "residual_conv_kernel: expected an odd .* 4"),
        ("linformer", LINFORMER | dict(heads=5), ValueError, "heads: expected a divisor of dim 32, got 5"),
        *((package, dict(dim=8), TypeError, "argument") for package in ("performer_pytorch", "linformer")),
        *(
            (package, options | dict(backend="fast"), ValueError, "backend: expected one of .*, got 'fast'")
            for package, options in (("performer_pytorch", FAST), ("nystrom_attention", NYSTROM), ("linformer", LINFORMER))
        ),
    ],
)
def test_arguments_that_are_refused(package: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        REPLACEMENTS[package](**options)


def test_inputs_that_are_refused() -> None:
    q = torch.zeros(2, 3, 5, 16)
    x = torch.zeros(2, 41, 32)
    with pytest.raises(ValueError, match="k: expected q's head_dim 16, got 8"):
        FastAttention(**FAST)(q, q[..., :8], q)
    with pytest.raises(TypeError, match="k: expected a Tensor, got NoneType"):
        FastAttention(**FAST)(q, None, q)
    with pytest.raises(ValueError, match="key_padding_mask: expected shape"):
        FastAttention(**FAST)(q, q, q, key_padding_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 9\) .* got torch.float32 \(2, 9\)"):
        NystromAttention(**NYSTROM)(torch.zeros(2, 9, 20), torch.ones(2, 9))
    with pytest.raises(ValueError, match="x: expected at most seq_len = 40 tokens, got 41"):
        LinformerSelfAttention(**LINFORMER)(x)
    with pytest.raises(ValueError, match="context: expected at most seq_len = 40 tokens, got 41"):
        LinformerSelfAttention(**LINFORMER)(x[:, :3], x)
    with pytest.raises(TypeError, match="key_padding_mask: expected dtype bool"):
        LinformerSelfAttention(**LINFORMER)(x[:, :3], key_padding_mask=torch.ones(2, 3))
    with pytest.raises(TypeError, match="mask"):
        LinformerSelfAttention(**LINFORMER)(x[:, :3], mask=None)

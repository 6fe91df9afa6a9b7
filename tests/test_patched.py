"""Tests of `patch` for performer-pytorch, nystrom-attention and linformer models.

A patched model has the same weights, outputs and gradients as the original model.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import BACKENDS, DEVICE
from vix_kernels.integrations import linformer as linformer_integration
from vix_kernels.integrations import nystrom_attention as nystrom_integration
from vix_kernels.integrations import performer_pytorch as performer_integration
from vix_kernels.testing.memory import kept_for_backward

INTEGRATIONS = {
    "performer_pytorch": performer_integration,
    "nystrom_attention": nystrom_integration,
    "linformer": linformer_integration,
}
TOKENS, DIM, VOCABULARY = 50, 32, 20
PERFORMER = dict(dim=DIM, depth=2, heads=4, dim_head=16, nb_features=24)
SIZES: dict[str, dict[str, Any]] = {
    "Performer": PERFORMER,
    "PerformerLM": PERFORMER | dict(num_tokens=VOCABULARY, max_seq_len=64),
    "SelfAttention": dict(dim=DIM, heads=4, dim_head=8),
    "CrossAttention": dict(dim=DIM, heads=4, dim_head=8),
    "Nystromformer": dict(dim=DIM, depth=2, dim_head=16, heads=2, num_landmarks=8, attn_values_residual_conv_kernel=5),
    "Linformer": dict(dim=DIM, seq_len=TOKENS, depth=2, k=12, heads=4),
    "LinformerLM": dict(num_tokens=VOCABULARY, dim=DIM, seq_len=TOKENS, depth=2, k=12, heads=4),
}
PACKAGES = {name: "performer_pytorch" for name in ("Performer", "PerformerLM", "SelfAttention", "CrossAttention")} | {
    "Nystromformer": "nystrom_attention",
    "Linformer": "linformer",
    "LinformerLM": "linformer",
}
MODELS = ("PerformerLM", "Nystromformer", "Linformer")  # one model from each package


def built(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    package = pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    return getattr(package, name)(**SIZES[name] | options).to(DEVICE)


def integration_of(name: str) -> ModuleType:
    return INTEGRATIONS[PACKAGES[name]]


def patched_copy(model: nn.Module, name: str, **options: Any) -> nn.Module:
    patched = copy.deepcopy(model)
    integration_of(name).patch(patched, **options)
    return patched


def tokens_for(name: str, tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name.endswith("LM"):
        return torch.randint(VOCABULARY, (2, tokens), generator=generator).to(DEVICE)
    return torch.randn(2, tokens, DIM, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def mask_of(*lengths: int, tokens: int = TOKENS) -> Tensor:
    return torch.arange(tokens, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def results(model: nn.Module, x: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Return a dict with the output ("out"), and the gradients of `x` ("x") and of the parameters (by name).

    Dropout is the same in each call.
    """
    torch.manual_seed(2)
    model.zero_grad()
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        x = leaves["x"] = x.detach().requires_grad_()
    out = model(x, **inputs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(actual) > 1
    largest = max(x.abs().max().item() for x in expected.values())  # some gradients, such as those of key biases, can be 0
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-9, atol=1e-12 * largest)


def worst(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max(((actual[name] - x).abs().max() / x.abs().max()).item() for name, x in exact.items())


# The same outputs and gradients

LOCAL = dict(local_attn_heads=2, local_window_size=8)
DROPOUT = dict(attn_dropout=0.2, ff_dropout=0.2)
LENGTHS = (TOKENS, 31)  # the number of valid tokens in each of the two samples


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name,options,lengths",
    [
        ("PerformerLM", {}, ()),
        ("PerformerLM", dict(use_scalenorm=True, qkv_bias=True, tie_embed=True), LENGTHS),
        ("PerformerLM", dict(use_rezero=True, ff_glu=True, shift_tokens=True), (TOKENS, 0)),
        ("PerformerLM", LOCAL | DROPOUT, LENGTHS),
        ("PerformerLM", LOCAL | dict(local_attn_heads=(4, 1)), (TOKENS, 0)),
        ("PerformerLM", dict(generalized_attention=True), LENGTHS),
        ("PerformerLM", dict(generalized_attention=True, kernel_fn=nn.Softplus()), ()),
        ("PerformerLM", dict(no_projection=True), LENGTHS),
        ("PerformerLM", dict(rotary_position_emb=False, heads=8, dim_head=7, nb_features=13), ()),
        ("PerformerLM", dict(rotary_position_emb=False, axial_position_emb=True, axial_position_shape=(8, 8)), ()),
        ("PerformerLM", dict(reversible=True), LENGTHS),
        ("PerformerLM", DROPOUT | LOCAL | dict(reversible=True), ()),
        ("Performer", dict(nb_features=None, dim_head=64), LENGTHS),
        ("SelfAttention", dict(dropout=0.3), LENGTHS),
        ("Nystromformer", {}, ()),
        ("Nystromformer", {}, LENGTHS),
        ("Nystromformer", dict(num_landmarks=5), (TOKENS, 0)),  # without padding
        ("Nystromformer", DROPOUT, LENGTHS),
        ("Nystromformer", DROPOUT | dict(attn_values_residual=False), ()),
        ("Nystromformer", dict(num_landmarks=64, pinv_iterations=3, heads=1, dim_head=7), (31,)),
        ("Linformer", {}, ()),
        ("Linformer", dict(one_kv_head=True, dim_head=5), ()),
        ("Linformer", dict(share_kv=True, k=60), ()),
        ("Linformer", dict(dropout=0.3, seq_len=80), ()),
        ("Linformer", dict(reversible=True, dropout=0.3), ()),
        ("LinformerLM", dict(one_kv_head=True, share_kv=True), ()),
    ],
    ids=str,
)
def test_patched_models_match_the_package(name: str, options: dict[str, Any], lengths: tuple[int, ...], training: bool) -> None:
    """With two lengths, the two samples have different masks. With one length, they share a mask."""
    host = built(name, **options).double().train(training)
    patched, x, inputs = patched_copy(host, name), tokens_for(name), dict(mask=mask_of(*lengths)) if lengths else {}
    if options.get("reversible") and not training:  # in evaluation mode, the original reversible models have no backward pass
        with torch.no_grad():
            torch.testing.assert_close(patched(x, **inputs), host(x, **inputs), rtol=1e-9, atol=1e-12)
    else:
        same(results(patched, x, **inputs), results(host, x, **inputs))


@pytest.mark.parametrize("case", ["no mask", "masks", "shared context"])
@pytest.mark.parametrize(
    "name,options",
    [
        ("PerformerLM", dict(cross_attend=True)),
        ("PerformerLM", dict(cross_attend=True, reversible=True)),
        ("PerformerLM", dict(cross_attend=True, generalized_attention=True)),
        ("CrossAttention", dict(dropout=0.3)),
    ],
    ids=str,
)
def test_cross_attention_matches_the_package(name: str, options: dict[str, Any], case: str) -> None:
    host, x = built(name, **options).double(), tokens_for(name)
    context, mask = tokens_for("Performer", 37), mask_of(0, 11, tokens=37)
    inputs = {
        "no mask": dict(context=context),
        "masks": dict(context=context, context_mask=mask, mask=mask_of(*LENGTHS), return_encodings=True),
        "shared context": dict(context=context[:1], context_mask=mask[1:]),
    }[case]
    same(*(results(model, x, **inputs) for model in (patched_copy(host, name), host)))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_patched_models_in_float32(name: str, backend: str) -> None:
    host = built(name, depth=1)
    exact = results(copy.deepcopy(host).double(), tokens_for(name))
    x = tokens_for(name, dtype=torch.float32)
    error = worst(results(patched_copy(host, name, backend=backend), x), exact)
    assert error <= max(1e-5, 4 * worst(results(host, x), exact))


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_in_bfloat16(name: str) -> None:
    """Outputs under autocast, and outputs of a bfloat16 model, are close to float32 outputs.

    The original Nystromformer fails in bfloat16.
    """
    host = built(name).eval()
    patched, x = patched_copy(host, name), tokens_for(name, dtype=torch.float32)
    with torch.no_grad():
        exact = host(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = patched(x)
        narrow = patched.bfloat16()(x.bfloat16() if x.is_floating_point() else x)
    for out in (mixed, narrow):
        assert (out - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("name", MODELS)
def test_patched_models_with_extreme_logits(name: str, scale: float) -> None:
    host = built(name).double()
    with torch.no_grad():
        for key, p in host.named_parameters():
            if any(layer in key for layer in ("to_q.", "to_k.", "to_qkv.")):
                p.mul_(scale)
    x = tokens_for(name)
    actual, expected = (results(model, x) for model in (patched_copy(host, name), host))
    torch.testing.assert_close(actual["out"], expected["out"], rtol=1e-9, atol=1e-9)
    assert all(each.isfinite().all() for each in actual.values())


def test_patched_performers_store_no_features() -> None:
    host = built("Performer", depth=1)
    x = (torch.randn(1, 2048, DIM, device=DEVICE, requires_grad=True),)
    features = 4 * 2048 * 24 * 4
    assert kept_for_backward(host, x) - kept_for_backward(patched_copy(host, "Performer"), x) > 4 * features


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_compile_without_graph_breaks(name: str) -> None:
    host = built(name, depth=1)
    if name == "PerformerLM":
        host.fix_projection_matrices_()  # otherwise, ProjectionUpdater would read a counter and break the graph
    patched, x = patched_copy(host, name), tokens_for(name, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="eager", fullgraph=True)
    actual = {key.removeprefix("_orig_mod."): grad for key, grad in results(compiled, x).items()}
    assert worst(actual, results(host, x)) < 1e-5


# State


@pytest.mark.parametrize("name", SIZES)
def test_patch_changes_only_classes(name: str) -> None:
    model, integration = built(name), integration_of(name)
    host, before = copy.deepcopy(model), {key: copy.copy(vars(m)) for key, m in model.named_modules()}
    report = integration.patch(model)
    assert report.replaced and not report.refused and all(f"{key}: " in str(report) for key in report.replaced)
    for key, module in model.named_modules():
        assert vars(module).keys() == before[key].keys() and all(vars(module)[n] is x for n, x in before[key].items())
        assert isinstance(module, type(host.get_submodule(key)))
    assert list(model.state_dict()) == list(host.state_dict())
    model.load_state_dict(host.state_dict())
    host.load_state_dict(model.state_dict())

    again = integration.patch(model, backend="reference")
    assert again.attentions == report.attentions
    found = [model.get_submodule(key) if key != "(the model itself)" else model for key in report.replaced]
    assert {module.backend for module in found} == {"reference"}
    assert integration.unpatch(model) == report.replaced
    assert [type(m) for m in model.modules()] == [type(m) for m in host.modules()]
    with pytest.raises(ValueError, match="model: expected a patched model, got one without patched modules"):
        integration.unpatch(model)


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_can_be_copied_and_saved(name: str) -> None:
    model = patched_copy(built(name), name).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = tokens_for(name, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(other(x), expected)


# Refusals


def test_causal_layers_of_an_encoder_decoder_model_are_not_patched() -> None:
    package = pytest.importorskip("performer_pytorch", reason="performer_pytorch is not installed")
    sizes = dict(num_tokens=VOCABULARY, max_seq_len=64, depth=1, heads=2, dim_head=8)
    both = {f"{part}_{key}": value for part in ("enc", "dec") for key, value in sizes.items()}
    host = package.PerformerEncDec(dim=DIM, **both).to(DEVICE).double()
    patched, ids = copy.deepcopy(host), tokens_for("PerformerLM")
    report = performer_integration.patch(patched)
    causal = "dec.net.performer.net.layers.0.0.fn.fast_attention"
    assert report.refused == {causal: "causal: expected False; causal attention is not supported"}
    assert len(report.replaced) == 2 and type(patched.get_submodule(causal)) is package.FastAttention
    mask = mask_of(*LENGTHS)
    torch.testing.assert_close(patched(ids, ids, enc_mask=mask), host(ids, ids, enc_mask=mask), rtol=1e-9, atol=1e-12)


def refusals() -> list[tuple[str, Callable[[ModuleType], nn.Module], dict[str, Any], str]]:
    lm = SIZES["PerformerLM"]

    def biased(package: ModuleType) -> nn.Module:
        model = package.LinformerSelfAttention(DIM, TOKENS)
        model.to_k = nn.Linear(DIM, DIM)
        return model

    def wrapped(package: ModuleType) -> nn.Module:
        model = package.NystromAttention(DIM)
        model.to_qkv = nn.Sequential(model.to_qkv)
        return model

    def derived(package: ModuleType) -> nn.Module:
        return type("Mine", (package.FastAttention,), {})(8)

    no_kernels, linear = "got 2 times backend 'triton' has no kernels", "expected a torch.nn.Linear without bias, got"
    even = dict(residual_conv_kernel=4)
    return [
        ("performer_pytorch", lambda p: p.PerformerLM(**lm | dict(causal=True)), {}, "FastAttention, got 2 times causal"),
        ("performer_pytorch", lambda p: p.PerformerLM(**lm | dict(no_projection=True)), dict(backend="triton"), no_kernels),
        ("performer_pytorch", lambda p: p.Performer(**PERFORMER), dict(backend="fast"), "backend: expected one of .* 'fast'"),
        ("performer_pytorch", derived, {}, "Mine, which is not performer_pytorch.performer_pytorch.FastAttention"),
        ("performer_pytorch", lambda p: performer_integration.FastAttention(8), {}, "vix_kernels.*which is not performer"),
        ("performer_pytorch", lambda p: nn.Linear(2, 2), {}, "model: expected performer_pytorch.*got a model without any"),
        ("nystrom_attention", lambda p: p.NystromAttention(DIM, **even), {}, "residual_conv_kernel: expected an odd .* got 4"),
        ("nystrom_attention", wrapped, {}, f"to_qkv: {linear} Sequential"),
        ("linformer", biased, {}, f"to_k: {linear} one with a bias"),
    ]


@pytest.mark.parametrize("package,build,options,message", refusals())
def test_models_that_are_refused(package: str, build: Callable, options: dict[str, Any], message: str) -> None:
    model = build(pytest.importorskip(package, reason=f"{package} is not installed"))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        INTEGRATIONS[package].patch(model, **options)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("package", INTEGRATIONS)
def test_arguments_that_are_not_models(package: str) -> None:
    for function in (INTEGRATIONS[package].patch, INTEGRATIONS[package].unpatch):
        for model in (None, "model", torch.zeros(2), nn.Linear):
            with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got"):
                function(model)


def test_copies_of_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projects such as scBERT include an older copy of performer_pytorch, whose outputs differ."""
    pytest.importorskip("performer_pytorch", reason="performer_pytorch is not installed")
    kind = type("FastAttention", (nn.Module,), {"__module__": __name__})
    monkeypatch.setitem(sys.modules, "performer_pytorch", SimpleNamespace(FastAttention=kind))
    with pytest.raises(ImportError, match="performer-pytorch: expected the package installed in .*, got a copy of it, .*test"):
        performer_integration.patch(kind())


def test_patched_linformers_reject_arguments_that_the_package_ignores() -> None:
    model, x = built("Linformer"), tokens_for("Linformer", dtype=torch.float32)
    attention = model.net.layers[0][0].fn
    attention(x, mask=None)
    linformer_integration.patch(model)
    with pytest.raises(TypeError, match="mask"):
        attention(x, mask=None)

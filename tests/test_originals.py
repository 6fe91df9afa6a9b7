"""Tests that compare models from `from_original` with golden outputs, and with the vision_xformer wheel if it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import DEVICE
from vix_kernels.models import from_original

SOURCE = Path(__file__).parents[2] / "shared" / "golden"
NAMES = sorted(json.loads(golden.CONDENSED.read_text())["models"])
BACKENDS = ("reference", "auto")
VIX = dict(image_size=8, patch_size=2, num_classes=5, dim=32, depth=2, mlp_dim=24)
WHEEL: dict[str, list[dict[str, Any]]] = {
    "ViN": [
        VIX | dict(heads=2, dim_head=16, num_landmarks=4),
        VIX | dict(heads=2, num_landmarks=17, pool="mean"),
        VIX | dict(heads=1, dim_head=8),  # more landmarks than tokens
    ],
    "ViP": [VIX | dict(heads=2, dim_head=16, channels=1)],
    "ViL": [
        VIX | dict(heads=2, dim_head=16, k=6),
        VIX | dict(heads=2, k=6, one_kv_head=False),
        VIX | dict(heads=2, k=6, share_kv=False),
        VIX | dict(heads=2, k=6, one_kv_head=False, share_kv=False),
    ],
    "FNet": [VIX, VIX | dict(image_size=(8, 12))],
    "FNet2D": [dict(num_classes=5, dim=8, depth=2, mlp_dim=12, dropout=0.5)],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_original(name: str, backend: str) -> None:
    expected = golden.load(name)
    model = from_original(name, expected.config, expected.state, backend=backend).eval()
    logits = model(expected.x)
    (logits * expected.cotangent).sum().backward()
    with torch.no_grad():
        alone = model(expected.x[:1])
    assert (logits - expected.logits).abs().max() <= expected.tolerance
    assert (alone - expected.alone).abs().max() <= expected.tolerance

    used = {key: norm for key, norm in expected.norms.items() if norm is not None}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == used.keys()
    unused = sum(expected.state[key].numel() for key in expected.norms.keys() - used.keys())
    assert sum(p.numel() for p in parameters.values()) + unused == expected.parameters
    norms = {key: p.grad.norm().item() for key, p in parameters.items()}
    assert norms.pop("classifier.attention_pool.bias", 0.0) < 1e-4  # softmax ignores a constant, so this is almost 0
    assert norms == pytest.approx({key: used[key] for key in norms}, rel=1e-3)


# Two numbers that were measured on each original model for one image: the multiply-adds in millions (excluding Fourier
# transforms), and the size in MiB of the tensors kept for the backward pass (excluding parameters).
WORK = {
    "ViT": (1614, 96.7),
    "HybridViT": (1708, 89.1),
    "ViL": (504, 25.8),
    "HybridViL": (700, 29.2),
    "ViP": (771, 61.5),
    "ViN": (889, 60.2),
    "FNet": (269, 16.6),
    "FNet2D": (413, 25.3),
    "CCT": (1994, 228.6),
    "CCN": (1242, 64.5),
    "LeViP": (865, 58.3),
    "CvN": (1164, 65.5),
}


@pytest.mark.parametrize("name", WORK)
def test_the_reference_backend_does_as_much_work_as_the_original(name: str) -> None:
    """The reference backend does as much work as the original models, so it can replace them as a speed baseline."""
    expected = golden.load(name)
    model = from_original(name, expected.config, expected.state, backend="reference")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(expected.x)
    mib = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in parameters) / 2**20
    assert len(out) == len(expected.x)  # this use of `out` keeps the graph and its saved tensors alive until here
    assert (round(counter.get_total_flops() / 2 / len(expected.x) / 1e6), round(mib / len(expected.x), 1)) == WORK[name]


def test_the_condensed_golden_files_are_up_to_date() -> None:
    if not SOURCE.is_dir():
        pytest.skip(f"the full golden files are not at {SOURCE}")
    assert golden.condense(SOURCE) == json.loads(golden.CONDENSED.read_text())


def images(config: dict[str, Any]) -> Tensor:
    size = config.get("image_size", 8)
    return torch.randn(3, config.get("channels", 3), *(size if isinstance(size, tuple) else (size, size)))


@torch.no_grad()
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("name,config", [(name, config) for name, configs in WHEEL.items() for config in configs])
def test_equals_the_wheel(name: str, config: dict[str, Any], backend: str) -> None:
    wheel = pytest.importorskip("vision_xformer")
    torch.manual_seed(0)
    published = getattr(wheel, name)(**config).to(DEVICE).eval()
    actual = from_original(f"wheel_{name}", config, published.state_dict(), backend=backend).to(DEVICE).eval()
    x = images(config).to(DEVICE)
    expected = published(x)
    assert (actual(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert actual.state_dict().keys() == published.state_dict().keys()
    dropouts = [
        {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p} for model in (actual, published)
    ]
    assert dropouts[0] == dropouts[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT", "FNet2D", "CCT", "wheel_ViL"])
def test_dropout_is_active_only_in_training(name: str) -> None:
    expected = golden.load(name)
    model = from_original(name, expected.config, expected.state)
    assert model.training
    torch.manual_seed(0)
    first, second = model(expected.x), model(expected.x)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(expected.x), model(expected.x))


def test_attention_dropout_is_the_same_in_both_backends() -> None:
    expected = golden.load("wheel_ViL")
    outs = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        outs.append(from_original("wheel_ViL", expected.config, expected.state, backend=backend)(expected.x))
    assert torch.equal(*outs)


def test_derived_and_unused_entries_are_optional() -> None:
    expected = golden.load("ViLRoPE")
    model = from_original("ViLRoPE", expected.config, expected.state)
    saved = model.state_dict()
    assert "layer_pos_emb.emb" in saved and "pos_embedding" not in saved
    again = from_original("ViLRoPE", expected.config, saved).state_dict()
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)


def test_a_state_dict_that_does_not_fit_is_refused_with_all_mismatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: pytest.fail("loaded"))
    vit = golden.load("ViTRoPE")
    state = vit.state | {"extra": torch.zeros(1), "cls_token": torch.zeros(1, 1, 64), "layer_pos_emb.emb": torch.zeros(9, 32)}
    del state["mlp_head.0.bias"], state["transformer.layers.3.0.fn.to_qkv.weight"]
    with pytest.raises(ValueError) as error:
        from_original("ViTRoPE", vit.config, state)
    assert str(error.value) == (
        "state_dict: does not fit the original 'ViTRoPE' of this config; "
        "missing: transformer.layers.3.0.fn.to_qkv.weight, mlp_head.0.bias; unexpected: extra; "
        "wrong shape: cls_token (expected (1, 1, 128), got (1, 1, 64)), layer_pos_emb.emb (expected (1025, 32), got (9, 32))"
    )
    learned = golden.load("ViT")
    del learned.state["pos_embedding"]
    with pytest.raises(ValueError, match="; missing: pos_embedding$"):
        from_original("ViT", learned.config, learned.state)


@pytest.mark.parametrize(
    "name,changes,message",
    [
        (
            "ViT",
            dict(dims=128),
            r"config: original 'ViT' has no argument 'dims' \(did you mean 'dim'\?\); it takes",
        ),
        ("ViT", dict(rotary_position_emb=True), "has no argument 'rotary_position_emb'"),
        ("ViT", dict(dim=None, heads=None), "config: original 'ViT' needs dim, heads$"),
        ("ViT", dict(patch_size=5), r"image_size: expected multiples of patch_size \(5, 5\), got \(32, 32\)"),
        ("ViT", dict(pool="max"), r"pool: expected one of \('cls', 'mean'\), got 'max'"),
        ("ViTRoPE", dict(rotary_position_emb=False), "rotary_position_emb: expected True, .* got False"),
        ("ViTRoPE", dict(image_size=33), "image_size: expected at most the 1025 tokens of the rotary table, got 1090"),
        ("ViL", dict(image_size=16), "image_size: expected 1024 patches, .* got 256"),
        ("HybridViT", dict(patch_size=2), "patch_size: expected 1, .* got"),
        ("CCT", dict(stride=[2]), "stride: expected one stride per convolution, n_conv_layers = 3, got"),
        ("CCT", dict(positional_embedding="sine"), "positional_embedding: expected 'learnable', as published, got 'sine'"),
        ("LeViN", dict(stages=None), "stages: expected 1, as published, got 3"),
    ],
)
def test_unsupported_configs_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    expected = golden.load(name)
    config = {key: value for key, value in (expected.config | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_original(name, config, expected.state)


@pytest.mark.parametrize(
    "name,ignored",
    [
        ("ViN", dict(heads=8)),
        ("FNet", dict(heads=8, dim_head=7)),
        ("HybridViP", dict(channels=1)),
        ("CCN", dict(mlp_radio=9.0, stochastic_depth=0.5)),
        ("CCP", dict(num_heads=8)),
        ("LeViN", dict(heads=8, image_size=7, dim_key=1, dim_value=1)),
        ("CvN", dict(s1_heads=8, s2_proj_kernel=9, s3_kv_proj_stride=5)),
        ("FNet2D", dict(image_size=7)),
    ],
)
@torch.no_grad()
def test_ignored_arguments_have_no_effect(name: str, ignored: dict[str, Any]) -> None:
    expected = golden.load(name)
    model = from_original(name, expected.config | ignored, expected.state).eval()
    assert (model(expected.x) - expected.logits).abs().max() <= expected.tolerance


def test_unknown_names_and_backends_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown original 'wheel_VIP' \(did you mean 'wheel_ViP' or .*\?\); the originals are ViT, "
    ):
        from_original("wheel_VIP", {}, {})
    with pytest.raises(ValueError, match="backend: expected one of"):
        from_original("ViP", {}, {}, backend="fast")


def test_images_of_another_size_are_refused() -> None:
    expected = golden.load("ViT")
    model = from_original("ViT", expected.config, expected.state)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, channels, 32, 32\), got \(1, 3, 16, 16\)"):
        model(torch.zeros(1, 3, 16, 16))

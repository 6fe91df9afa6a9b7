"""Every model in the registry, on images small enough to be quick."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import vix_kernels
from vix_kernels.models import create_model, list_models

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
POSITIONS = ("learned", "rope_1d", "rope_axial", "rope_mixed", "none")
every_model = pytest.mark.parametrize("name", list_models())
every_model_and_position = pytest.mark.parametrize(
    "name, position",
    [(name, position) for name in list_models() for position in POSITIONS if not ("fnet" in name and "rope" in position)],
)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@every_model_and_position
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_every_parameter_gets_a_gradient(name: str, position: str, global_pool: str) -> None:
    model = create_model(name, **SMALL, position=position, global_pool=global_pool, class_token=global_pool == "token")
    logits = model(images(3, 3, 8, 8))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@every_model_and_position
def test_state_dict_round_trip(name: str, position: str) -> None:
    first, second = (create_model(name, **SMALL, position=position).eval() for _ in range(2))
    x = images(2, 3, 8, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert [key for key in first.state_dict() if "rope" in key] == ["rope.frequencies"] * (position == "rope_mixed")


@every_model_and_position
@pytest.mark.parametrize(
    ("img_size", "patch_size"), [(6, 3), ((4, 10), 2), ((8, 12), (8, 4)), (14, 14), (16, 8), (5, 1), (12, 6)]
)
def test_any_image_and_patch_size(name: str, position: str, img_size: object, patch_size: object) -> None:
    model = create_model(name, **SMALL | {"img_size": img_size, "patch_size": patch_size, "position": position}).eval()
    height, width = model.img_size
    tokens = 1 + height // model.patch_size[0] * (width // model.patch_size[1])
    assert model.forward_features(images(2, 3, height, width)).shape == (2, tokens, 16)


@every_model
def test_timm_contract(name: str) -> None:
    model = create_model(name, **SMALL, in_chans=1, drop_rate=0.1).eval()
    assert (model.num_classes, model.num_features, model.embed_dim) == (5, 16, 16)
    x = images(2, 1, 8, 8)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}
    model.reset_classifier(7, global_pool="avg")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)


@every_model_and_position
def test_gradient_checkpointing_changes_nothing(name: str, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(name, **SMALL, position=position)
    x = images(2, 3, 8, 8)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    calls = []
    module = sys.modules[type(model).__module__]
    checkpoint = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *args, **kwargs: calls.append(args) or checkpoint(*args, **kwargs))
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == len(model.blocks)


def test_heads_and_features_are_honoured() -> None:
    x = images(2, 3, 8, 8)
    for overrides in ({"num_heads": 4}, {"num_features": 8}):
        first, second = (create_model("vip", **SMALL | extra).eval() for extra in ({}, overrides))
        weights = {key: value for key, value in first.state_dict().items() if value is not None and "attn." not in key}
        second.load_state_dict(weights, strict=False)
        for one, other in zip(first.blocks, second.blocks, strict=True):
            other.attn.qkv.load_state_dict(one.attn.qkv.state_dict())
            other.attn.proj.load_state_dict(one.attn.proj.state_dict())
        assert not torch.equal(first(x), second(x))


def test_every_layer_draws_its_own_features() -> None:
    first, second = create_model("vip", **SMALL).blocks
    assert not torch.equal(first.attn.projection, second.attn.projection)


def test_rotary_table_stays_exact() -> None:
    expected = vix_kernels.rope_1d(16, 8, prefix_tokens=1)
    model = create_model("hybrid_vip", **SMALL, position="rope_1d").to(torch.bfloat16)
    assert torch.equal(model.rope.cos, expected.cos)
    assert model(images(2, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        model = create_model("hybrid_vip", **SMALL, position="rope_1d")
    assert torch.equal(model.to_empty(device="cpu").rope.sin, expected.sin)


def test_axial_and_mixed_positions_know_the_grid() -> None:
    model = create_model("vip", **SMALL | {"img_size": (8, 16)}, position="rope_axial")
    assert torch.equal(model.rope.cos, vix_kernels.rope_axial(4, 8, 8, prefix_tokens=1).cos)
    model = create_model("vip", **SMALL | {"img_size": (8, 16)}, position="rope_mixed")
    assert model.rope.frequencies.shape == (2, 2, 2, 4) and "rope.frequencies" in model.no_weight_decay()
    assert model.bfloat16().rope.frequencies.dtype == torch.float32
    first, second = model.rope(0), model.rope(1)
    assert first.tokens == 33 and first.heads == 2 and not torch.equal(first.cos, second.cos)


def test_published_configuration() -> None:
    # originals: ViT and ViP, learned parameters of the published CIFAR-10 scripts
    assert sum(p.numel() for p in create_model("vit").parameters()) == 661_770
    assert sum(p.numel() for p in create_model("vip").parameters()) == 663_306


def test_list_models() -> None:
    assert {"vit", "vip", "hybrid_vit", "hybrid_vip"} <= set(list_models())
    assert list_models("hybrid_*") == [name for name in list_models() if name.startswith("hybrid_")]
    assert list_models("nothing") == []


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("hybrid_vop", {}, ["hybrid_vop", "did you mean 'hybrid_vip'"]),
        ("vit", {"num_head": 2}, ["num_head", "did you mean 'num_heads'", "embed_dim"]),
        ("vit", {"num_features": 8}, ["num_features"]),
        ("hybrid_vip", {"stem": None}, ["stem"]),
        ("vip", {"img_size": 30, "patch_size": 4}, ["img_size", "(4, 4)", "(30, 30)"]),
        ("vip", {"img_size": "32"}, ["img_size", "'32'"]),
        ("vip", {"img_size": (32, 0)}, ["img_size", "(32, 0)"]),
        ("vip", {"embed_dim": 30}, ["embed_dim", "num_heads 4", "30"]),
        ("vip", {"embed_dim": 12, "position": "rope_1d"}, ["embed_dim", "multiple of 2", "3"]),
        ("vip", {"embed_dim": 12, "position": "rope_axial"}, ["embed_dim", "multiple of 4", "3"]),
        ("vip", {"position": "rope_2d"}, ["position", "rope_1d", "rope_2d"]),
        ("vip", {"global_pool": "max"}, ["global_pool", "avg", "max"]),
        ("vip", {"global_pool": ""}, ["global_pool", "''"]),
        ("vip", {"global_pool": None}, ["global_pool", "None"]),
        ("vip", {"class_token": "false"}, ["class_token", "'false'"]),
        ("vip", {"qkv_bias": "false"}, ["qkv_bias", "'false'"]),
        ("vip", {"num_features": 2.5}, ["num_features", "2.5"]),
        ("vip", {"mlp_ratio": 0}, ["mlp_ratio", "0"]),
        ("vip", {"mlp_ratio": "x"}, ["mlp_ratio", "'x'"]),
        ("vip", {"drop_rate": 2}, ["drop_rate", "2"]),
        ("vip", {"proj_drop_rate": "a"}, ["proj_drop_rate", "'a'"]),
        ("vip", {"class_token": False}, ["global_pool", "class_token=False"]),
        ("vip", {"depth": 0}, ["depth", "0"]),
        ("vip", {"num_classes": -1}, ["num_classes", "-1"]),
        ("vip", {"backend": "cuda"}, ["backend", "cuda"]),
    ],
)
def test_bad_arguments_are_named(name: str, overrides: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        create_model(name, **overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_images_are_named() -> None:
    model = create_model("vit", **SMALL)
    for shape in [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 9)]:
        with pytest.raises(ValueError, match=r"x: expected shape \(batch, 3, 8, 8\)"):
            model(torch.zeros(shape))


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [("vix_kernels", root / "vix_kernels"), ("vix_kernels.models", root / "models")]
    found = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in folders
        for path in folder.rglob("__init__.py")
    }
    assert set(listed) == found

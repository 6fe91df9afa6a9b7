"""Tests of every registered model, on small images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import vix_kernels
from vix_kernels.models import create_model, list_models
from vix_kernels.models.positions import POSITIONS
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.nn.core import CORES
from vix_kernels.testing.models import small_model

SIZES = ("tiny", "small", "base")
BACKBONES = ("vit", "hybrid_vit", "levit", "cvt", "cct")
every_model = pytest.mark.parametrize("name", PUBLISHED)
one_of_each_family = pytest.mark.parametrize("name", ["vip", "hybrid_vin", "levit", "cvp", "ccn", "fnet_2d"])


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def without_gradient(model: torch.nn.Module, x: torch.Tensor) -> list[str]:
    logits = model(x)
    assert logits.shape == (len(x), model.num_classes) and logits.isfinite().all()
    logits.square().sum().backward()
    return [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@every_model
def test_every_parameter_gets_a_gradient(name: str) -> None:
    assert not without_gradient(create_model(name, **small_model(name)), images(3, 3, 8, 8))


@pytest.mark.parametrize("mixer", CORES)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_with_every_mixer_and_position(name: str, mixer: str) -> None:
    x = images(2, 3, 8, 8)
    for position in POSITIONS:
        torch.manual_seed(0)
        model = create_model(name, **small_model(name, depth=1), mixer=mixer, position=position)
        assert model.forward_features(x).shape[1] == 16 + model.num_prefix_tokens
        assert not without_gradient(model, x), position
        rotary = [key for key in model.state_dict() if "rope" in key]
        assert all(key.endswith("rope.frequencies") for key in rotary)
        assert bool(rotary) == (position == "rope_mixed")
        assert any(key.endswith("pos_embed") for key in model.state_dict()) == (position == "learned")


@every_model
def test_state_dict_round_trip(name: str) -> None:
    first, second = (create_model(name, **small_model(name)).eval() for _ in range(2))
    x = images(2, 3, 8, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@every_model
@pytest.mark.parametrize(
    ("img_size", "patch_size"), [((4, 10), 2), ((8, 12), (8, 4)), (14, 14), (16, 8), (5, 1), (12, 6), (11, None)]
)
def test_image_and_patch_sizes_set_the_number_of_tokens(name: str, img_size: object, patch_size: object) -> None:
    arguments = small_model(name, img_size=img_size)
    if "patch_size" not in arguments:
        patch_size = None
    elif patch_size is None:
        return  # 11 pixels cannot be divided into whole patches
    else:
        arguments |= {"patch_size": patch_size}
    model = create_model(name, **arguments).eval()
    height, width = model.img_size
    tokens = model.forward_features(images(2, 3, height, width)).shape[1] - model.num_prefix_tokens
    if patch_size is None:
        assert tokens == -(-height // 2) * -(-width // 2)
    else:
        assert tokens == height // model.patch_size[0] * (width // model.patch_size[1])


@every_model
def test_timm_contract(name: str) -> None:
    model = create_model(name, **small_model(name), in_chans=1, drop_rate=0.1).eval()
    assert (model.num_classes, model.num_features, model.embed_dim) == (5, 16, 16)
    x = images(2, 1, 8, 8)
    features = model.forward_features(x)
    assert features.shape == (2, 16 + model.num_prefix_tokens, 16)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}
    model.reset_classifier(7, global_pool="avg")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    model.reset_classifier(5, global_pool=model.pools[0])
    assert model(x).shape == (2, 5)


@every_model
def test_samples_do_not_depend_on_their_batch_mates(name: str) -> None:
    model = create_model(name, **small_model(name)).eval()
    x = images(3, 3, 8, 8)
    other = torch.cat([x[:1], 30 * images(5, 3, 8, 8)])
    torch.testing.assert_close(model(x)[0], model(other)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x)[0], model(x[:1])[0], rtol=1e-5, atol=1e-5)


@every_model
def test_bf16_autocast(name: str) -> None:
    model = create_model(name, **small_model(name))
    x = images(4, 3, 8, 8)
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert not torch.equal(logits.float(), full)
    torch.testing.assert_close(logits.float(), full, rtol=0.05, atol=0.05 * full.abs().max().item())
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_gradient_checkpointing_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(name, **small_model(name, drop_path_rate=0.5))
    x = images(2, 3, 8, 8)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    calls = []
    module = sys.modules["vix_kernels.models.layers"]
    checkpoint = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *args, **kwargs: calls.append(args) or checkpoint(*args, **kwargs))
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "name",
    ["vil", "vip", "vit agent", "vit feature", "vit linear", "hybrid_vin", "hybrid_fnet", "levip", "cvt", "ccn", "fnet_2d"],
)
def test_compiles_without_graph_breaks(name: str) -> None:
    """The tested models cover every backbone and every mixer."""
    name, _, mixer = name.partition(" ")
    torch.compiler.reset()
    model = create_model(name, **small_model(name, depth=1), **({"mixer": mixer} if mixer else {}))
    x = images(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@one_of_each_family
def test_exports_with_a_dynamic_batch_and_runs_compiled(name: str) -> None:
    torch.compiler.reset()
    model = create_model(name, **small_model(name)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2, 3, 8, 8),), dynamic_shapes={"x": {0: batch}})
    x = images(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [name for name in list_models() if name.endswith(("vip_base", "levin_base", "cvp_base", "ccn_base", "fnet_2d_base"))],
)
def test_base_models_run_on_224_pixels(name: str) -> None:
    model = create_model(name, depth=1).eval()
    with torch.no_grad():
        assert model(images(1, 3, 224, 224)).shape == (1, 1000)


def test_sizes_set_images_classes_and_parameter_counts() -> None:
    for name in PUBLISHED:
        with torch.device("meta"):
            models = [create_model(f"{name}_{size}") for size in SIZES]
        assert [model.img_size[0] for model in models] == [32, 64, 224]
        assert [model.num_classes for model in models] == [10, 200, 1000]
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        assert counts[0] < counts[1] < counts[2]


def test_num_heads_and_num_features_change_the_output() -> None:
    x = images(2, 3, 8, 8)
    for overrides in ({"num_heads": 4}, {"num_features": 8}):
        first, second = (create_model("vip", **small_model("vip") | extra).eval() for extra in ({}, overrides))
        weights = {key: value for key, value in first.state_dict().items() if value is not None and "attn." not in key}
        second.load_state_dict(weights, strict=False)
        for one, other in zip(first.blocks, second.blocks, strict=True):
            other.attn.qkv.load_state_dict(one.attn.qkv.state_dict())
            other.attn.proj.load_state_dict(one.attn.proj.state_dict())
        assert not torch.equal(first(x), second(x))


def test_layers_draw_different_features() -> None:
    for name in ("vip", "cvp", "levip_tiny"):
        model = create_model(name, **small_model(name) if name != "levip_tiny" else {})
        drawn = [module.projection for module in model.modules() if hasattr(module, "projection")]
        assert len(drawn) > 1 and len({each.double().sum().item() for each in drawn}) == len(drawn)


def test_rotary_table_survives_casts_and_meta_devices() -> None:
    expected = vix_kernels.rope_1d(16, 8, prefix_tokens=1)
    model = create_model("hybrid_vip", **small_model("vip"), position="rope_1d").to(torch.bfloat16)
    assert torch.equal(model.rope.cos, expected.cos)
    assert model(images(2, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        model = create_model("hybrid_vip", **small_model("vip"), position="rope_1d")
    assert torch.equal(model.to_empty(device="cpu").rope.sin, expected.sin)


def test_axial_and_mixed_positions_use_the_grid() -> None:
    model = create_model("vip", **small_model("vip", img_size=(8, 16)), position="rope_axial")
    assert torch.equal(model.rope.cos, vix_kernels.rope_axial(4, 8, 8, prefix_tokens=1).cos)
    model = create_model("vip", **small_model("vip", img_size=(8, 16)), position="rope_mixed")
    assert model.rope.frequencies.shape == (2, 2, 2, 4) and "rope.frequencies" in model.no_weight_decay()
    assert model.bfloat16().rope.frequencies.dtype == torch.float32
    first, second = model.rope(0), model.rope(1)
    assert first.tokens == 33 and first.heads == 2 and not torch.equal(first.cos, second.cos)
    model = create_model("cvp", **small_model("cvp", img_size=(8, 16), embed_stride=(2, 2)), position="rope_axial")
    assert [stage.rope.cos.shape for stage in model.stages] == [(1, 32, 4), (1, 8, 4)]


def test_attention_bias_follows_distance() -> None:
    model = create_model("levit", **small_model("levit", img_size=(4, 6)), qkv_bias=True).eval()
    attention = model.stages[0].blocks[0].attn
    x = images(1, 6, 16)
    unbiased = attention(x)
    with torch.no_grad():
        attention.attention_bias[:, 0] = 100.0  # the bias for distance 0; every token attends only to itself
    v = attention.attention.qkv(x)[..., 32:]
    torch.testing.assert_close(attention(x), attention.attention.proj(v))
    assert not torch.allclose(attention(x), unbiased)
    with torch.device("meta"):
        moved = create_model("levit", **small_model("levit", img_size=(4, 6))).to_empty(device="cpu")
    assert torch.equal(moved.stages[0].blocks[0].attn.distance, attention.distance)
    # Mixers without attention weights use RoPE instead.
    assert create_model("levip", **small_model("levip")).stages[0].rope is not None


def test_published_configuration() -> None:
    # Parameter counts of models in the published scripts. Models whose count was changed by fixes in this library are omitted.
    published = {"vit": 661_770, "vip": 663_306, "vin": 662_298, "fnet": 399_114}
    for name, count in published.items():
        assert sum(p.numel() for p in create_model(name).parameters()) == count
    model = create_model("hybrid_vin_imagenet", depth=1)
    assert model.grid == (14, 14) and model.blocks[0].attn.num_heads == 12 and model.blocks[0].attn.core.num_landmarks == 32


def test_list_models() -> None:
    named = "vit vil vip vin fnet fnet_2d hybrid_vit hybrid_vil hybrid_vip hybrid_vin hybrid_fnet levit levin levip cvt cvn cvp"
    assert {*named.split(), "cct", "ccn", "ccp", "hybrid_vin_imagenet"} <= set(list_models())
    assert list_models("hybrid_*") == [name for name in list_models() if name.startswith("hybrid_")]
    assert list_models("nothing") == []


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("hybrid_vop", {}, ["hybrid_vop", "did you mean 'hybrid_vip'"]),
        ("vip", {"mixer": "performers"}, ["mixer", "'performer'", "'performers'"]),
        ("fnet_2d", {"backend": "triton"}, ["backend", "triton"]),
        ("vip", {"img_size": 30, "patch_size": 4}, ["img_size", "(4, 4)", "(30, 30)"]),
        ("vip", {"img_size": "32"}, ["img_size", "'32'"]),
        ("vip", {"img_size": (32, 0)}, ["img_size", "(32, 0)"]),
        ("vip", {"embed_dim": 30}, ["embed_dim", "num_heads 4", "30"]),
        ("vip", {"embed_dim": 12, "position": "rope_1d"}, ["embed_dim", "multiple of 2", "3"]),
        ("vip", {"embed_dim": 12, "position": "rope_axial"}, ["embed_dim", "multiple of 4", "3"]),
        ("vip", {"position": "rope_2d"}, ["position", "rope_1d", "rope_2d"]),
        ("cvt", {"position": "rope_2d"}, ["position", "rope_1d", "rope_2d"]),
        ("vip", {"global_pool": "map"}, ["global_pool", "avg", "map"]),
        ("cct", {"global_pool": "token"}, ["global_pool", "seq", "token"]),
        ("vip", {"global_pool": None}, ["global_pool", "None"]),
        ("vip", {"class_token": "false"}, ["class_token", "'false'"]),
        ("vip", {"qkv_bias": "false"}, ["qkv_bias", "'false'"]),
        ("vip", {"num_features": 2.5}, ["num_features", "2.5"]),
        ("vip", {"mlp_ratio": 0}, ["mlp_ratio", "0"]),
        ("vip", {"mlp_ratio": "x"}, ["mlp_ratio", "'x'"]),
        ("vip", {"drop_rate": 2}, ["drop_rate", "2"]),
        ("vip", {"proj_drop_rate": "a"}, ["proj_drop_rate", "'a'"]),
        ("vip", {"drop_path_rate": -1}, ["drop_path_rate", "-1"]),
        ("vip", {"class_token": False}, ["global_pool", "class_token=False"]),
        ("vip", {"depth": 0}, ["depth", "0"]),
        ("vip", {"num_classes": -1}, ["num_classes", "-1"]),
        ("vip", {"backend": "cuda"}, ["backend", "cuda"]),
        ("levit", {"depth": (1, 2)}, ["depth", "1 stages", "(1, 2)"]),
        ("levit", {"stages": 2, "embed_dim": (16, 0)}, ["embed_dim", "0"]),
        ("cvt", {"embed_kernel": 4}, ["embed_kernel", "odd", "4"]),
        ("cvt", {"embed_stride": 2}, ["embed_stride", "2"]),
        ("cct", {"kernel_size": 2}, ["kernel_size", "odd", "2"]),
        ("cct", {"strides": ()}, ["strides", "()"]),
    ],
)
def test_errors_name_bad_arguments(name: str, overrides: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        create_model(name, **overrides)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("vit", {"num_head": 2}, ["num_head", "did you mean 'num_heads'", "embed_dim"]),
        ("vit", {"num_features": 8}, ["num_features"]),
        ("fnet_2d", {"mixer": "performer"}, ["mixer", "fnet_2d"]),
        ("hybrid_vip", {"stem": None}, ["stem"]),
    ],
)
def test_unknown_arguments_are_refused(name: str, overrides: dict, words: list[str]) -> None:
    with pytest.raises(TypeError) as error:
        create_model(name, **overrides)
    assert all(word in str(error.value) for word in words), error.value


@every_model
def test_device_and_dtype(name: str) -> None:
    model = create_model(name, **small_model(name), device="meta", dtype=torch.bfloat16)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(images(2, 3, 8, 8).to("meta", torch.bfloat16)).dtype == torch.bfloat16
    assert model.config["arguments"].keys() == small_model(name).keys()


@every_model
def test_images_of_wrong_shapes_are_refused(name: str) -> None:
    model = create_model(name, **small_model(name))
    for shape in [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 9)]:
        with pytest.raises(ValueError, match=r"x: expected shape \(batch, 3, 8, 8\)"):
            model(torch.zeros(shape))


def test_pyproject_lists_every_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for path in (root / "vix_kernels").rglob("__init__.py")]
    found = {".".join(folder.relative_to(root).parts) for folder in folders}
    models = {path.parent.relative_to(root / "models") for path in (root / "models").rglob("__init__.py")}
    assert set(listed) == found | {".".join(("vix_kernels", "models", *path.parts)) for path in models}

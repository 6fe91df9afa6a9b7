"""Tests of load_linearized on folders from save_linearized, and of errors for changed or damaged files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import converting
import pytest
import torch
from torch import nn

from vix_kernels.__main__ import main
from vix_kernels.integrations import linearized
from vix_kernels.integrations.linearized import check_folder, reason_against_creating
from vix_kernels.integrations.swap import replace_attention
from vix_kernels.linearize import load_linearized, save_linearized
from vix_kernels.models import create_model, save_model
from vix_kernels.training.hosts import make_model

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def replaced(model: nn.Module, **options: Any) -> nn.Module:
    replace_attention(model, "performer", retrain=True, num_features=8, **options)
    return model.eval()


def small_timm(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    """Return a small timm model for images of 32 x 32 pixels. The model stores its arguments, as in `vix train`."""
    sizes = dict(img_size=32, patch_size=4, embed_dim=64, num_heads=2, depth=2, num_classes=7)
    return make_model({"model": f"timm:{name}"}, sizes | arguments).host


def small_vit(**arguments: Any) -> nn.Module:
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=4)
    return transformers.ViTModel(transformers.ViTConfig(**sizes | arguments))


def layer(**arguments: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 64, 0.0, batch_first=True, **arguments)


def two_attentions(heads: int) -> nn.Module:
    return nn.Sequential(nn.MultiheadAttention(64, 4), nn.MultiheadAttention(64, heads))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a saved timm model."""
    save_linearized(replaced(small_timm()), tmp_path / "saved")
    return tmp_path / "saved"


def change(folder: Path, change: Callable[[dict], Any]) -> None:
    """Apply `change` to the contents of linearized.json in `folder`."""
    path = folder / "linearized.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_models_with_drop_path_are_loaded(tmp_path: Path) -> None:
    model, x = replaced(small_timm(drop_path_rate=0.1, proj_drop_rate=0.1)), torch.randn(2, 3, 32, 32)
    save_linearized(model, tmp_path)
    for loaded in (load_linearized(tmp_path), load_linearized(tmp_path, small_timm())):
        assert torch.equal(loaded(x), model(x))


def test_the_digest_of_earlier_versions_is_accepted(saved: Path) -> None:
    earlier = linearized._earlier_structure(load_linearized(saved))
    change(saved, lambda config: config.update(structure=earlier))
    load_linearized(saved)
    with pytest.raises(ValueError, match="expected the architecture that .* describes, got another one"):
        load_linearized(saved, small_timm(act_layer="relu"))


@pytest.mark.parametrize(
    "build, first, second, options",
    [
        (small_timm, dict(global_pool="avg", pool_include_prefix=True), dict(global_pool="avg"), {}),
        (
            small_timm,
            dict(name="vit_small_patch16_dinov3", rope_temperature=20.0),
            dict(name="vit_small_patch16_dinov3"),
            {},
        ),
        (layer, dict(norm_first=True), {}, {}),
        (layer, dict(activation="gelu"), {}, {}),
        (two_attentions, dict(heads=4), dict(heads=8), dict(layers=["0"])),
        (small_vit, dict(hidden_act="relu"), {}, {}),
    ],
)
def test_other_settings_are_refused(
    build: Callable[..., nn.Module], first: dict[str, Any], second: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """The models have the same parameters, but compute different functions."""
    save_linearized(replaced(build(**first), **options), tmp_path)
    load_linearized(tmp_path, build(**first))
    with pytest.raises(ValueError, match="model: expected the architecture that .* describes, got another one"):
        load_linearized(tmp_path, build(**second))


def test_another_image_size_is_accepted(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3"  # has no position embedding whose shape depends on the image size
    save_linearized(replaced(small_timm(name)), tmp_path)
    load_linearized(tmp_path, small_timm(name, img_size=64))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(init_values=1e-3),
        dict(act_layer="relu", qk_norm=True),
        dict(no_embed_class=True, reg_tokens=2),
        dict(patch_size=(4, 8)),
        dict(global_pool="avg", pool_include_prefix=True, pre_norm=True),
        dict(name="vit_small_patch16_dinov3", rope_temperature=20.0),
    ],
)
def test_arguments_of_timm_models_are_saved(arguments: dict[str, Any], tmp_path: Path) -> None:
    model, x = replaced(small_timm(**arguments)), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_linearized(model, tmp_path)
    assert torch.equal(load_linearized(tmp_path)(x), model(x))


def test_a_model_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    """`reason_against_creating` returns the same reason before and after the attention is replaced.

    It returns no reason for models with nn.MultiheadAttention, although load_linearized cannot create them.
    """
    model = small_timm(act_layer=nn.ReLU)
    before = reason_against_creating(model)
    assert "expected the architecture that linearized.json describes, got another one" in before
    replaced(model)
    with pytest.warns(UserWarning, match=f"load_linearized needs a new model as `model`, as it cannot create one: {before}"):
        save_linearized(model, tmp_path)
    load_linearized(tmp_path, small_timm(act_layer=nn.ReLU))
    assert not reason_against_creating(replaced(layer()))


@pytest.mark.parametrize("build", [small_timm, small_vit, converting.small_model])
@pytest.mark.parametrize("op", ["feature", "nystrom", "performer", "linear", "agent"])
def test_models_that_can_be_created_are_not_reported(build: Callable[[], nn.Module], op: str, tmp_path: Path) -> None:
    model = build()
    assert not reason_against_creating(model)
    replace_attention(model, op, retrain=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_linearized(model, tmp_path)
    state = load_linearized(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_an_interrupted_call_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt one call before it writes the first file, and another call before it writes the second file."""
    model, replace, calls = replaced(layer()), os.replace, []
    for last in (0, 1):
        folder = tmp_path / str(last)

        def interrupted(*paths: Any, last: int = last) -> None:
            calls.append(paths)
            if len(calls) > last:
                raise KeyboardInterrupt
            replace(*paths)

        calls.clear()
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_linearized(model, folder)
        monkeypatch.undo()
        assert len(list(folder.iterdir())) == last
        save_linearized(model, folder)
        load_linearized(folder, layer())


def test_a_pruned_model_is_saved_and_loaded_into_another(tmp_path: Path) -> None:
    """A pruned model has no config, so load_linearized cannot create it."""

    def pruned() -> nn.Module:
        model = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=3)
        model.prune_intermediate_layers([1])
        return model.eval()

    model, x = replaced(pruned()), torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="cannot create one: .*expected the name of a known model, got None"):
        save_linearized(model, tmp_path)
    assert torch.equal(load_linearized(tmp_path, pruned())(x), model(x))


def test_a_folder_with_an_unfinished_conversion_is_accepted(tmp_path: Path) -> None:
    model = replaced(converting.small_model())
    (tmp_path / "model.safetensors").write_bytes(b"")  # earlier versions wrote this file first
    with pytest.raises(ValueError, match="folder: expected a new folder, got .*, which contains another model"):
        check_folder(tmp_path)
    (tmp_path / "linearize.pt").write_bytes(b"")
    assert check_folder(str(tmp_path)) == tmp_path
    save_linearized(model, tmp_path)
    load_linearized(tmp_path)
    save_model(converting.small_model(), tmp_path / "softmax")
    (tmp_path / "softmax" / "linearize.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="folder: expected a new folder, got .*softmax, which contains another model"):
        save_linearized(model, tmp_path / "softmax", overwrite=True)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(num_heads=0), "cannot create the model that it describes .*num_heads=0.*: ZeroDivisionError"),
        (dict(global_pool="zzz"), "cannot create the model that it describes .*global_pool='zzz'.*: AssertionError"),
        (dict(img_size=[]), r"cannot create the model that it describes .*img_size=\[\]"),
        (dict(checkpoint_path="file.pth"), "host: arguments: expected .*, got checkpoint_path='file.pth'"),
        (dict(act_layer=["os", {}]), "host: arguments: expected .*, got act_layer="),
    ],
)
def test_damaged_arguments_are_refused(
    arguments: dict[str, Any], error: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file and the argument."""
    change(saved, lambda config: config["host"]["arguments"].update(arguments))
    with pytest.raises(ValueError, match=f"linearized.json: {error}"):
        load_linearized(saved)
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(saved), "--dataset", "digits"])
    assert "linearized.json: " in capsys.readouterr().err


@pytest.mark.parametrize("build", [small_timm, converting.small_model])
@pytest.mark.parametrize("wrong", [dict(backend="cuda"), dict(backend=3), dict(options={"num_features": 0})])
def test_damaged_layers_are_refused(build: Callable[[], nn.Module], wrong: dict[str, Any], tmp_path: Path) -> None:
    save_linearized(replaced(build()), tmp_path)
    change(tmp_path, lambda config: config["layers"]["blocks.0.attn"].update(wrong))
    name = next(iter(wrong)) if "backend" in wrong else "num_features"
    with pytest.raises(ValueError, match=f"linearized.json: layers: cannot replace 'blocks.0.attn': {name}: expected"):
        load_linearized(tmp_path)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    model, file, folder = replaced(layer()), tmp_path / "file", tmp_path / "saved"
    file.touch()
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        save_linearized(3, folder)
    with pytest.raises(ValueError, match="folder: expected a folder, got .*file, which is a file"):
        save_linearized(model, file)
    with pytest.raises(TypeError, match=r"data: expected a dict, got \['cat'\]"):
        save_linearized(model, folder, data=["cat"])
    assert not folder.exists()
    save_linearized(model, folder)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        load_linearized(folder, 3)
    with torch.inference_mode():
        other = layer()
    with pytest.raises(
        ValueError, match="model: expected a model created outside torch.inference_mode, got one created inside$"
    ):
        load_linearized(folder, other)

"""Tests of saving, loading and converting models."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import images

from vix_kernels.__main__ import main
from vix_kernels.models import create_model, from_original, list_models, load_model, save_model
from vix_kernels.models.commands import _read
from vix_kernels.models.positions import resample_tokens
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.testing.models import small_model


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = create_model(name, **small_model(name)).eval()
    save_model(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again = load_model(tmp_path)
    x = images(2, 3, 8, 8)
    assert torch.equal(again(x), model(x)) and not again.training
    assert again.config == json.loads(json.dumps(model.config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_new_head_is_saved(name: str, tmp_path: Path) -> None:
    model = create_model(name, **small_model(name)).eval()
    model.reset_classifier(3, global_pool=model.pools[-1])
    save_model(model, tmp_path)
    x = images(2, 3, 8, 8)
    assert torch.equal(load_model(tmp_path)(x), model(x))


def test_the_number_of_redraws_is_saved(tmp_path: Path) -> None:
    model = create_model("vip", **small_model("vip"))
    attention = model.blocks[0].attn
    attention.redraw_projection()
    save_model(model, tmp_path)
    again = load_model(tmp_path).blocks[0].attn
    assert again.redraws == 1 and torch.equal(again.projection, attention.projection)
    attention.redraw_projection()
    again.redraw_projection()
    assert torch.equal(again.projection, attention.projection)


def test_weights_of_earlier_commits_load(tmp_path: Path) -> None:
    """Files written by earlier commits store the number of redraws as JSON in their metadata."""
    save_model(create_model("vip", **small_model("vip")), tmp_path)
    tensors = {key: x for key, x in load_file(tmp_path / "model.safetensors").items() if not key.endswith("_extra_state")}
    keys = [key for key in load_file(tmp_path / "model.safetensors") if key.endswith("_extra_state")]
    save_file(tensors, tmp_path / "model.safetensors", metadata={key: '{"redraws": 2}' for key in keys})
    assert keys and load_model(tmp_path).blocks[0].attn.redraws == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [("vip", {}), ("hybrid_vil", {"share_kv": False}), ("cct", {}), ("levit", {}), ("cvp", {"position": "learned"})],
)
def test_weights_load_at_another_image_size(name: str, options: dict, tmp_path: Path) -> None:
    model = create_model(name, **small_model(name), **options).eval()
    save_model(model, tmp_path)
    larger = load_model(tmp_path, img_size=(16, 12))
    assert larger.img_size == (16, 12) and larger(images(2, 3, 16, 12)).shape == (2, 5)
    before, after = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (model, larger))
    saved = before.keys() & model.state_dict().keys()
    kept = {key for key in saved if before[key].shape == after[key].shape}
    assert kept < saved
    assert all(torch.equal(before[key], after[key]) for key in kept)
    same = load_model(tmp_path, img_size=8)
    x = images(2, 3, 8, 8)
    assert torch.equal(same(x), model(x))


def test_resampling_keeps_the_prefix_and_a_smooth_map() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 6), indexing="ij")
    table = torch.cat([torch.full((1, 2), 9.0), torch.stack([rows, columns], -1).flatten(0, 1)])[None]
    finer = resample_tokens(table, 1, (8, 6), (16, 12), 1)
    assert finer.shape == (1, 1 + 16 * 12, 2) and torch.equal(finer[0, 0], table[0, 0])
    rows, columns = finer[0, 1:].view(16, 12, 2).unbind(-1)
    assert (rows.diff(dim=0)[2:-2] > 0).all() and rows.std(dim=1).max() < 1e-5
    assert (columns.diff(dim=1)[:, 2:-2] > 0).all()


def test_weights_load_with_another_head_and_other_channels(tmp_path: Path) -> None:
    model = create_model("cct", **small_model("cct")).eval()
    save_model(model, tmp_path)
    other = load_model(tmp_path, num_classes=7, in_chans=1, global_pool="avg")
    assert other(images(2, 1, 8, 8)).shape == (2, 7)
    gray = images(2, 1, 8, 8)
    colors = model.forward_features(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other.forward_features(gray), colors, rtol=1e-4, atol=1e-5)
    more = load_model(tmp_path, in_chans=6)
    twice = more.forward_features(images(2, 3, 8, 8).repeat(1, 2, 1, 1))
    torch.testing.assert_close(twice, model.forward_features(images(2, 3, 8, 8)), rtol=1e-4, atol=1e-5)


def test_all_mismatches_are_listed(tmp_path: Path) -> None:
    save_model(create_model("vit", **small_model("vit")), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["norm.bias"], state["cls_token"]
    state |= {"surplus": torch.zeros(1), "head.weight": torch.zeros(5, 3)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    for words in ("missing: cls_token, norm.bias", "unexpected: surplus", "head.weight (expected (5, 16), got (5, 3))"):
        assert words in str(error.value)


def test_errors_name_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder: expected a folder written by save_model, got 'nope', which is not"):
        load_model("nope")
    for wrong, message in (
        (lambda: load_model(3), "folder: expected a path, got 3"),
        (lambda: save_model(torch.nn.Linear(1, 1), tmp_path / "new"), "model: expected a model from .*, got Linear"),
        (lambda: create_model(3), "name: expected the name of a known model, got 3"),
        (lambda: list_models(3), "pattern: expected text such as 'hybrid_.', got 3"),
        (lambda: from_original(["ViP"], {}, {}), "name: expected the name of a known original"),
        (lambda: from_original("ViP", 3, {}), "config: expected a mapping of constructor arguments, got int"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong()
    assert not (tmp_path / "new").exists()


def test_unknown_arguments_in_a_file_are_named(tmp_path: Path) -> None:
    save_model(create_model("vip", **small_model("vip")), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_heads"', '"num_head{"'))
    with pytest.raises(ValueError, match="config.json: expected arguments of 'vip', got num_head{$"):
        load_model(tmp_path)
    with pytest.raises(TypeError, match="model 'vip' has no argument 'depths'"):
        save_model(create_model("vip", **small_model("vip")), tmp_path)
        load_model(tmp_path, depths=2)


def test_an_existing_card_is_not_overwritten(tmp_path: Path) -> None:
    model = create_model("vin", **small_model("vin"))
    save_model(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "create_model('vin', img_size=8" in card and f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    (tmp_path / "README.md").write_text("mine")
    save_model(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_hub_models_use_the_same_files(tmp_path: Path) -> None:
    hub = pytest.importorskip("vix_kernels.models.hub", reason="huggingface_hub is not installed (extra: hub)")
    model = create_model("vip", **small_model("vip")).eval()
    hub.HubModel(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "vip"
    x = images(2, 3, 8, 8)
    assert torch.equal(hub.HubModel.from_pretrained(str(tmp_path))(x), model(x))
    assert hub.HubModel.from_pretrained(str(tmp_path), num_classes=3)(x).shape == (2, 3)


def test_an_original_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = golden.load("ViP")
    torch.save({"state_dict": {f"module.{key}": value for key, value in expected.state.items()}}, tmp_path / "vip.pth")
    config = [f"{key}={value!r}" for key, value in expected.config.items()]
    command = ["convert", str(tmp_path / "vip.pth"), str(tmp_path / "out"), "--original"]
    assert main([*command, "ViP", "--config", *config]) == 0
    assert "parameters" in capsys.readouterr().out
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        assert (model(expected.x) - expected.logits).abs().max() <= expected.tolerance

    for arguments, words in {
        ("ViP", "--config", *config): "which is neither",
        ("Vip", "--config", *config): "did you mean",
        ("ViT", "--config", *config): "missing: transformer.layers.0.0.fn.to_qkv.weight",
        ("ViP",): "needs image_size",
    }.items():
        if words != "which is neither":
            command[2] = str(tmp_path / "other")
        with pytest.raises(SystemExit):
            main([*command, *arguments])
        assert words in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("old", [False, True])
def test_both_torch_formats_are_converted(old: bool, tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    assert torch.equal(_read(tmp_path / "a.pth")["a"], torch.ones(2))


def test_converting_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(print))
    for name in ("evil.pth", "none.pth"):
        with pytest.raises(SystemExit):
            main(["convert", str(tmp_path / name), str(tmp_path / "out"), "--original", "ViP"])
        assert name in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({1: 2}), pickle.dumps([[]]), b"PK\x03\x04" + bytes(50), None])
def test_invalid_files_are_not_converted(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "junk.pth"
    torch.save({1: torch.zeros(2)}, path) if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(path), str(tmp_path / "out"), "--original", "ViP"])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and str(path) in printed and not (tmp_path / "out").exists()


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(OSError, match="cannot write .*model.safetensors"):
            save_model(create_model("vip", **small_model("vip")), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_sizes_of_zero_are_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = golden.load("ViP")
    torch.save(expected.state, tmp_path / "vip.pth")
    config = [f"{key}={value!r}" for key, value in (expected.config | {"patch_size": 0}).items()]
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "vip.pth"), str(tmp_path / "out"), "--original", "ViP", "--config", *config])
    assert stop.value.code == 2 and "patch_size: expected a positive integer" in capsys.readouterr().err


def test_the_model_table_has_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "v[ip][tp]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "image", "tokens", "parameters", "MACs"]
    # The original model has 661,770 parameters and 1614 million multiply-adds.
    assert lines[2].split() == ["vit", "32", "x", "32", "1,025", "661,770", "1,614", "M"]


def test_a_model_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    save_model(create_model("vit", **small_model("vit")), tmp_path)
    with pytest.raises(ValueError, match="folder: expected a model that fits in memory, got .*'embed_dim': 2000000000000"):
        load_model(tmp_path, embed_dim=2 * 10**12, depth=1)

"""Tests of `vix linearize` for timm and transformers models: their weights, class names and normalization."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vix_kernels.__main__ import main
from vix_kernels.training.config import UserError
from vix_kernels.training.trained import load_host, load_trained

transformers = pytest.importorskip("transformers")
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4)


def hf_vit(**options: object) -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_channels=1, **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_vit(num_labels=10).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs `vix linearize` and returns the error. The function checks that the error is one line."""

    def refused(*argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["linearize", *map(str, argv), "--dataset", "digits", "--output", str(tmp_path / "out")])
        error = capsys.readouterr().err
        line = error[error.rindex("vix linearize: error: ") :]
        assert stop.value.code == 2 and line.count("\n") == 1 and not (tmp_path / "out").exists()
        return line

    return refused


def test_flags_for_weights_are_refused_with_folders_of_transformers(folder: Path, refused: Callable[..., str]) -> None:
    error = "--checkpoint: expected none with --model hf:FOLDER, which has weights, got 'none.pth'"
    assert error in refused("--model", f"hf:{folder}", "--checkpoint", "none.pth")
    assert f"--pretrained: expected --model timm:NAME, got hf:{folder}" in refused("--model", f"hf:{folder}", "--pretrained")


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ('{"image_mean": [0.25], "image_std": [0.5]}', 0.25, 0.5),
        ('{"image_mean": [0.25], "image_std": [0.5], "do_normalize": false}', 0, 1),
        ('{"image_mean": null}', None, None),
    ],
)
def test_the_normalization_of_a_folder_is_used(settings: str, mean: float | None, std: float | None, folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(settings)
    trained = load_host(f"hf:{folder}", None, False, torch.device("cpu"))
    assert (trained.mean, trained.std) == (mean, std)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ("{", "expected JSON, as transformers saves it, got Expecting property name"),
        ("[]", "expected a mapping, as transformers saves it, got []"),
        ('{"image_mean": [0.5]}', "image_std: expected a number for each of 1 channels, got None"),
        ('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1]}', "image_mean: expected a number for each of 1 channels, got [0.5"),
    ],
)
def test_a_damaged_normalization_is_refused(settings: str, error: str, folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(settings)
    with pytest.raises(UserError, match=re.escape(f"--model: {folder / 'preprocessor_config.json'}: {error}")):
        load_host(f"hf:{folder}", None, False, torch.device("cpu"))


def test_damaged_weights_of_a_folder_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"text")
    with pytest.raises(UserError, match=f"--model: cannot load {re.escape(str(folder))}: "):
        load_host(f"hf:{folder}", None, False, torch.device("cpu"))


def test_class_names_of_a_folder_are_kept(tmp_path: Path) -> None:
    """The model's class names are kept, in the order of the outputs, if the dataset has a different number of classes.

    If the numbers are equal, the dataset's names replace default names (LABEL_0, ...). They also replace the model's names if
    none of the model's names is a class name in the dataset.
    """
    pytest.importorskip("sklearn", reason="the digits are from scikit-learn")
    options = ("--dataset", "digits", "--steps", "2", "--images", "16", "--eval-images", "16", "--no-progress")
    for kind, names in {
        "others": map("c{}".format, range(1, 13)),
        "digits": map(str, range(10)),
        "default": (),
        "words": "abcdefghij",
    }.items():
        labels = dict(enumerate(names)) or {n: f"LABEL_{n}" for n in range(10)}
        folder = tmp_path / kind
        hf_vit(id2label=labels, label2id={name: label for label, name in labels.items()}).save_pretrained(folder)
        assert main(["linearize", "--model", f"hf:{folder}", *options, "--output", str(folder / "linear")]) == 0
        expected = tuple(labels.values()) if kind == "others" else tuple(map(str, range(10)))
        assert load_trained(folder / "linear", torch.device("cpu")).classes == expected


def test_weights_that_do_not_fit_a_model_of_timm_are_described(refused: Callable[..., str], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_vit").state_dict()
    torch.save({name: x for name, x in state.items() if "norm" not in name} | {"cls_token": torch.zeros(3)}, tmp_path / "x.pth")
    line = refused("--model", "timm:test_vit", "--checkpoint", tmp_path / "x.pth")
    assert f"--checkpoint: the weights in {tmp_path / 'x.pth'} do not fit timm:test_vit; missing: " in line
    assert ", ...; wrong shape: cls_token (expected (1, 1, 64), got (3,))" in line

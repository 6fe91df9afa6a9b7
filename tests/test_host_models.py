"""Tests of `vix linearize` for models of timm and transformers: their weights, class names and normalization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from vix_kernels.__main__ import main

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
    """Return a function that runs `vix linearize`, checks that it fails with a one-line error, and returns that line."""

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

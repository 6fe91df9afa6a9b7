"""Tests of `vix linearize`: the output folder, interruptions, and rejected options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits are from scikit-learn")
pytest.importorskip("safetensors")

from vix_kernels.__main__ import main
from vix_kernels.linearize import state
from vix_kernels.models import create_model, save_model
from vix_kernels.training.lock import locked


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    model = create_model("hybrid_vit", img_size=8, in_chans=1, patch_size=2, depth=1, num_classes=10)
    save_model(model, tmp_path / "model")
    words = ["linearize", "--checkpoint", str(tmp_path / "model"), "--dataset", "digits", "--output", str(tmp_path / "out")]
    return [*words, "--num-features", "4", "--steps", "6", "--images", "32", "--eval-images", "16", "--no-progress"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(words)
    return capsys.readouterr().err.splitlines()[-1]


def interrupt(monkeypatch: pytest.MonkeyPatch, words: list[str], after: int) -> int:
    """Run the command, interrupt it after the given number of steps, and return the exit code."""
    written, steps = state.Progress.after_step, []

    def after_step(self: state.Progress, *arguments: Any) -> None:
        written(self, *arguments)
        steps.append(1)
        if len(steps) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(state, "INTERVAL", 2)
        patched.setattr(state.Progress, "after_step", after_step)
        return main(words)


def test_an_interrupted_command_continues(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command) == 0
    expected = (out / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["linearized.json", "model.safetensors", "report.png", "report.txt"]
    assert refused(command, capsys).endswith(f"or --overwrite, got {out}, which contains a converted model")
    assert interrupt(monkeypatch, [*command, "--overwrite"], after=4) == 130
    assert f"interrupted, repeat the command without --overwrite to continue in {out}" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == expected
    assert "contains a conversion with different num_features" not in refused([*command, "--num-features", "8"], capsys)
    error = refused([*command, "--images", "48"], capsys)
    assert "batches: expected the same batches as before the interruption, got others" in error
    assert main(command) == 0
    assert (out / "model.safetensors").read_bytes() == expected and not (out / state.PROGRESS).exists()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # all files have the same permissions
    (out / ".linearize.pt.1.tmp").write_text("")  # from a process that was killed
    assert interrupt(monkeypatch, [*command, "--overwrite"], after=1) == 130  # before the first checkpoint
    assert not (out / ".linearize.pt.1.tmp").exists()
    assert f"interrupted, repeat the command to continue in {out}" in capsys.readouterr().err


def test_half_of_a_saved_model_is_replaced(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linearized.json").write_text("{}")  # the weights were not written
    assert main(command) == 0


def test_folders_with_other_files_are_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.txt").write_text("mine")
    for words in (command, [*command, "--overwrite"]):
        assert refused(words, capsys).endswith(f"--output: expected a new folder, got {out}, which contains other files")
    assert [path.name for path in out.iterdir()] == ["report.txt"] and (out / "report.txt").read_text() == "mine"


def test_two_commands_cannot_write_to_one_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert f"is writing to {tmp_path / 'out'}: wait until it ends" in refused(command, capsys)


def test_a_refused_conversion_leaves_no_folder(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "layers: expected names of attention layers" in refused([*command, "--layers", "none"], capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    refused([*command, "--layers", "none"], capsys)
    assert (tmp_path / "out").is_dir()  # only new folders are removed
    (tmp_path / "file").write_text("")
    assert "--output: expected a folder, got" in refused([*command, "--output", str(tmp_path / "file")], capsys)
    assert "--output: cannot create" in refused([*command, "--output", str(tmp_path / "file" / "out")], capsys)


def test_random_weights_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linearize", "--model", "timm:vit_tiny_patch16_224", "--dataset", "digits", "--output", "out"]
    expected = "--model: expected --pretrained or --checkpoint with timm:vit_tiny_patch16_224, whose weights would be random"
    assert refused(words, capsys).endswith(expected)

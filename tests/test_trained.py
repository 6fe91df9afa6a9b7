"""Tests of `vix validate` and `vix predict`."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vix_kernels import Rope, attention_weights
from vix_kernels.__main__ import main
from vix_kernels.models import create_model, load_model, save_model
from vix_kernels.nn.core import SdpaArgs, Tokens
from vix_kernels.training import commands
from vix_kernels.training.checkpoint import load_checkpoint
from vix_kernels.training.data import load_dataset
from vix_kernels.training.report import draw_attention, draw_confusion, draw_learning_curve, draw_mistakes
from vix_kernels.training.trained import Evaluation, evaluate_trained, load_trained

CPU = torch.device("cpu")


def trained_run(folder: Path, model: str, *words: str) -> Path:
    kwargs = ["embed_dim=32", "depth=2", "num_heads=2", *words]
    argv = [
        "train",
        "--model",
        model,
        "--epochs",
        "3",
        "--warmup-epochs",
        "1",
        "-b",
        "64",
        "--lr",
        "0.01",
        "--output",
        str(folder),
    ]
    assert main([*argv, "--model-ema", "--model-kwargs", *kwargs]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("run"), "vin")


def test_evaluation_reproduces_the_results_of_the_run(run: Path) -> None:
    row = load_checkpoint(run / "best.pt")["history"][-1]
    evaluation = evaluate_trained(load_trained(run, CPU), load_dataset("digits"))
    assert evaluation.top1 == pytest.approx(row["eval_top1"]) and evaluation.top5 == pytest.approx(row["eval_top5"])
    assert evaluation.loss == pytest.approx(row["eval_loss"], rel=1e-5)
    labels = load_dataset("digits").test.labels
    assert torch.equal(evaluation.confusion.sum(1), labels.bincount())
    wrong = int(evaluation.confusion.sum() - evaluation.confusion.diag().sum())
    assert len(evaluation.mistakes) == min(24, wrong) > 0
    assert (evaluation.labels != evaluation.predicted).all()
    assert torch.equal(evaluation.probability, evaluation.probability.sort(descending=True).values)
    pairs = evaluation.worst_pairs(3)
    assert all(evaluation.confusion[label, predicted] == images for images, label, predicted in pairs)


def test_validate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top1 = load_checkpoint(run / "best.pt")["history"][-1]["eval_top1"]
    assert main(["validate", "--checkpoint", str(run), "--output", str(tmp_path / "pictures")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"top-1 {top1:.2f} %") and " predicted as " in lines[0]
    for name in ("confusion.png", "mistakes.png"):
        assert Image.open(tmp_path / "pictures" / name).width > 500


def test_names_with_dollar_signs_are_drawn(tmp_path: Path) -> None:
    """Without escaping, matplotlib would parse the names as formulas and fail."""
    title, classes = r"model on $\prices$", ("$1_$", r"$\2$")
    row = {"epoch": 1, "train_loss": 1.0, "eval_loss": 1.0, "eval_top1": 50.0}
    draw_learning_curve(tmp_path / "curve.png", [row], row, title)
    draw_confusion(tmp_path / "confusion.png", torch.ones(2, 2, dtype=torch.long), classes, title)
    image, one = torch.zeros(3, 8, 8), torch.ones(1, dtype=torch.long)
    mistakes = Evaluation(1.0, 50.0, 100.0, torch.ones(2, 2), image[None].byte(), one, 0 * one, one / 2)
    draw_mistakes(tmp_path / "mistakes.png", mistakes, classes, 255, title)
    draw_attention(tmp_path / "attention.png", image, torch.rand(2, 2), title)
    assert all(Image.open(path).width > 500 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 4


def test_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = load_dataset("digits")
    image, label = digits.test.images[0, 0], int(digits.test.labels[0])
    Image.fromarray((image.numpy() * 255.0 / 16).round().astype(np.uint8)).save(tmp_path / "digit.png")
    (tmp_path / "broken.png").write_text("no image")
    argv = ["predict", "--checkpoint", str(run), "--topk", "3", "--attention", str(tmp_path / "maps")]
    assert main([*argv, str(tmp_path / "digit.png"), str(tmp_path / "broken.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and captured.out.count(" %") == 3 and "digit.png: " in captured.out
    assert "broken.png: cannot be decoded" in captured.err and captured.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["digit.png"]
    trained = load_trained(run, CPU)
    logits = trained.model(trained.inputs(image[None].float() / 16)[None])[0]
    assert f"{trained.classes[int(logits.argmax())]} {100 * logits.softmax(0).max():.0f}"[:3] in captured.out
    assert trained.classes[label] == str(label)


def test_saved_models_validate_and_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A saved model has the class names, mean and std of its run.

    A model with a new head has no class names. A model with a different number of channels has no mean and std.
    """
    save_model(load_trained(run, CPU).model, tmp_path / "saved")
    Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
    outputs = []
    for folder in (run, tmp_path / "saved"):
        assert main(["validate", "--checkpoint", str(folder), "--dataset", "digits", "--output", str(tmp_path / "drawn")]) == 0
        assert main(["predict", "--checkpoint", str(folder), str(tmp_path / "image.png")]) == 0
        captured = capsys.readouterr()
        assert not captured.err
        outputs.append([re.sub(r", [\d,]+ images/s", "", line) for line in captured.out.splitlines()])
    assert outputs[0] == outputs[1]
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(tmp_path / "saved")])
    assert "--dataset: expected a name" in capsys.readouterr().err
    assert load_model(tmp_path / "saved", num_classes=3).config["data"].keys() == {"mean", "std"}
    assert load_model(tmp_path / "saved", in_chans=3).config["data"].keys() == {"classes"}
    model = load_model(tmp_path / "saved")
    model.reset_classifier(3)
    assert model.config["data"].keys() == {"mean", "std"}


def test_a_saved_model_without_mean_and_std_prints_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(create_model("vip", img_size=8, in_chans=1, patch_size=4, embed_dim=16, depth=1, num_heads=2), tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    assert main(["predict", "--checkpoint", str(tmp_path), "--topk", "10", str(tmp_path / "image.png")]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"note: {tmp_path} has no mean and std: images are not normalized\n"
    assert re.search(r"image.png: \d \d+.\d %, ", captured.out)
    assert main(["validate", "--checkpoint", str(tmp_path), "--dataset", "digits"]) == 0
    assert capsys.readouterr().err == f"note: {tmp_path} has no mean and std: using those of digits\n"


@pytest.mark.parametrize("command", ["predict", "export"])
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", None, "model.safetensors is damaged"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("config.json", b"", "config.json: expected JSON"),
        ("config.json", b"\xff\xfe\x00", "config.json: expected JSON"),
        ("config.json", b"[]", "config.json: expected the name and the arguments of a model"),
        ("config.json", b'{"name": "vip", "arguments": {"img_size": "x"}}', "img_size: expected"),
        ("config.json", b'{"name": "nope", "arguments": {}}', "unknown model 'nope'"),
        ("config.json", b'{"original": "FNet2D", "arguments": {}}', "needs num_classes"),
    ],
)
def test_damaged_model_files_are_refused_in_one_line(
    command: str, file: str, content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(create_model("vip", img_size=8, in_chans=1, patch_size=4, embed_dim=16, depth=1, num_heads=2), tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    more = ["image.png"] if command == "predict" else ["--output", str(tmp_path / "model.onnx")]
    with pytest.raises(SystemExit) as stop:
        main([command, "--checkpoint", str(tmp_path), *more])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and str(tmp_path) in printed and words in printed


def test_existing_outputs_are_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    for path in (tmp_path / "model.onnx", tmp_path / "maps" / "image.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("the old one")
    predict = ["predict", "--checkpoint", str(run), "--attention", str(tmp_path / "maps"), str(tmp_path / "image.png")]
    for argv in (predict, ["export", "--checkpoint", str(run), "--output", str(tmp_path / "model.onnx")]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and "exists: name another" in captured.err and captured.err.count("\n") == 1
        assert not captured.out
    assert (tmp_path / "model.onnx").read_text() == (tmp_path / "maps" / "image.png").read_text() == "the old one"
    assert main([*predict, "--overwrite"]) == 0
    assert Image.open(tmp_path / "maps" / "image.png").width > 500


def test_pictures_of_images_with_equal_names_get_different_names() -> None:
    images = [Path("a.png"), Path("a-2.png"), Path("b/a.png"), Path("c/a.jpg")]
    names = [path.name for path in commands._pictures(images, Path("/tmp"), overwrite=True)]
    assert names == ["a.png", "a-2.png", "a-3.png", "a-4.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system")
def test_undecodable_file_names_are_printed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (tmp_path / os.fsdecode(name) for name in (b"d\xffg.png", b"\xfe.png"))
    Image.new("L", (8, 8)).save(good)
    bad.write_text("no image")
    out, err = io.BytesIO(), io.BytesIO()
    for name, stream in (("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, "utf-8", errors="strict", write_through=True))
    argv = ["predict", "--checkpoint", run, "--attention", tmp_path / "maps", good, bad]
    assert main([*map(str, argv)]) == 2
    assert out.getvalue().count(b"\n") == 1 and rb"d\udcffg.png: " in out.getvalue()
    assert err.getvalue().count(b"\n") == 1 and rb"\udcfe.png: cannot be decoded" in err.getvalue()
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [os.fsdecode(b"d\xffg.png")]


@pytest.mark.parametrize("mixer", ["vit", "vip", "vin", "vil"])
def test_the_attention_map_is_the_row_of_the_class_token(mixer: str) -> None:
    """`attention_of` returns the same attention weights as `attention_weights`.

    For softmax attention, they equal the first row of softmax(q k^T / sqrt(D)). The product of the weights and v equals the
    attention output for the class token, without the residual convolution.
    """
    torch.manual_seed(0)
    model = create_model(mixer, img_size=8, in_chans=1, patch_size=2, embed_dim=32, depth=1, num_heads=2).eval()
    module, x = model.blocks[0].attn, torch.randn(2, 17, 32)
    weights = module.attention_of(x, 0)
    assert weights.shape == (2, 2, 17)
    q, k, v = module.heads(x)
    if mixer == "vit":
        torch.testing.assert_close(weights, ((q @ k.mT) * 16**-0.5).softmax(-1)[:, :, 0])
    residual = getattr(module, "res_conv", None)
    assert (residual is not None) == (mixer == "vin")
    if residual is not None:
        module.res_conv = None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
        options = dict(scale=16**-0.5, rope=rope, tokens=Tokens(mask), sdpa=SdpaArgs(), backend="auto")
        return module.core.attend(module, q, k, v, **options)

    torch.testing.assert_close(torch.einsum("bhn,bhnd->bhd", weights, v), attend(q, k, v, None, None)[:, :, 0])
    torch.testing.assert_close(weights, attention_weights(attend, q, k, None, None))


def test_models_without_an_attention_map_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    pooled = ["--model-kwargs", "class_token=False", "global_pool=avg"]
    for model, words, missing in (("vip", pooled, "class token"), ("fnet", [], "attention")):
        folder = tmp_path / model
        assert main(["train", "--model", model, "--epochs", "1", "--output", str(folder), *words]) == 0
        with pytest.raises(SystemExit) as stop:
            main(["predict", "--checkpoint", str(folder), "--attention", str(tmp_path / "maps"), str(tmp_path / "image.png")])
        assert stop.value.code == 2 and f"has no {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_bad_checkpoints_are_refused_in_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.pt").write_text("nothing")
    more = ["image.png"] if command == "predict" else []
    for path, words in ((tmp_path, "is damaged"), (tmp_path / "nowhere", "no checkpoint at")):
        with pytest.raises(SystemExit) as stop:
            main([command, "--checkpoint", str(path), *more])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and printed.count("\n") == 1 and "--checkpoint: " in printed and words in printed


def test_images_of_another_shape_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for name in "0123456789":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (12, 12)).save(tmp_path / part / name / "1.png")
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(run), "--dataset", str(tmp_path)])
    assert "expected images of the model's shape (1, 8, 8)" in capsys.readouterr().err


def test_other_classes_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "1.png")
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(run), "--dataset", str(tmp_path)])
    assert "expected the model's 10 classes (0, 1, 2, ...)" in capsys.readouterr().err

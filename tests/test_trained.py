"""`vix validate` and `vix predict`: what a trained model says, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vix_kernels import attention_weights
from vix_kernels.__main__ import main
from vix_kernels.training.checkpoint import load_checkpoint
from vix_kernels.training.data import load_dataset
from vix_kernels.training.report import draw_attention, draw_confusion, draw_learning_curve, draw_mistakes
from vix_kernels.training.trained import Judgement, judge, load_trained

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


def test_the_judgement_is_that_of_the_run(run: Path) -> None:
    row = load_checkpoint(run / "best.pt")["history"][-1]
    judgement = judge(load_trained(run, CPU), load_dataset("digits"))
    assert judgement.top1 == pytest.approx(row["eval_top1"]) and judgement.top5 == pytest.approx(row["eval_top5"])
    assert judgement.loss == pytest.approx(row["eval_loss"], rel=1e-5)
    labels = load_dataset("digits").test.labels
    assert torch.equal(judgement.confusion.sum(1), labels.bincount())
    wrong = int(judgement.confusion.sum() - judgement.confusion.diag().sum())
    assert len(judgement.mistakes) == min(24, wrong) > 0
    assert (judgement.labels != judgement.said).all()
    assert torch.equal(judgement.probability, judgement.probability.sort(descending=True).values)
    pairs = judgement.worst_pairs(3)
    assert all(judgement.confusion[label, said] == images for images, label, said in pairs)


def test_validate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top1 = load_checkpoint(run / "best.pt")["history"][-1]["eval_top1"]
    assert main(["validate", "--checkpoint", str(run), "--output", str(tmp_path / "pictures")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"top-1 {top1:.2f} %") and " taken for " in lines[0]
    for name in ("confusion.png", "mistakes.png"):
        assert Image.open(tmp_path / "pictures" / name).width > 500


def test_names_with_dollars_are_drawn(tmp_path: Path) -> None:
    """They are no formulas of matplotlib's, which cannot parse these."""
    title, classes = r"model on $\prices$", ("$1_$", r"$\2$")
    row = {"epoch": 1, "train_loss": 1.0, "eval_loss": 1.0, "eval_top1": 50.0}
    draw_learning_curve(tmp_path / "curve.png", [row], row, title)
    draw_confusion(tmp_path / "confusion.png", torch.ones(2, 2, dtype=torch.long), classes, title)
    image, one = torch.zeros(3, 8, 8), torch.ones(1, dtype=torch.long)
    mistakes = Judgement(1.0, 50.0, 100.0, torch.ones(2, 2), image[None].byte(), one, 0 * one, one / 2)
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
    said = trained.model(trained.inputs(image[None].float() / 16)[None])[0]
    assert f"{trained.classes[int(said.argmax())]} {100 * said.softmax(0).max():.0f}"[:3] in captured.out
    assert trained.classes[label] == str(label)


@pytest.mark.parametrize("mixer", ["vit", "vip", "vin", "vil"])
def test_the_map_is_the_row_of_the_class_token(mixer: str) -> None:
    """Against the plain equation of softmax attention; for the others, what the op itself says of a token's share."""
    from vix_kernels.models import create_model

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
    torch.testing.assert_close(torch.einsum("bhn,bhnd->bhd", weights, v), module.attend(q, k, v, None, None)[:, :, 0])
    torch.testing.assert_close(weights, attention_weights(module.attend, q, k, None, None))


def test_what_has_no_map_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    pooled = ["--model-kwargs", "class_token=False", "global_pool=avg"]
    for model, words, missing in (("vip", pooled, "a class token"), ("fnet", [], "attention")):
        folder = tmp_path / model
        assert main(["train", "--model", model, "--epochs", "1", "--output", str(folder), *words]) == 0
        with pytest.raises(SystemExit) as stop:
            main(["predict", "--checkpoint", str(folder), "--attention", str(tmp_path / "maps"), str(tmp_path / "image.png")])
        assert stop.value.code == 2 and f"has no {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_bad_checkpoints_are_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.pt").write_text("nothing")
    more = ["image.png"] if command == "predict" else []
    for path, words in ((tmp_path, "is damaged"), (tmp_path / "nowhere", "no checkpoint at")):
        with pytest.raises(SystemExit) as stop:
            main([command, "--checkpoint", str(path), *more])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and "--checkpoint: " in said and words in said


def test_images_of_another_shape_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for name in "0123456789":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (12, 12)).save(tmp_path / part / name / "1.png")
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(run), "--dataset", str(tmp_path)])
    assert "reads images of shape (1, 8, 8)" in capsys.readouterr().err


def test_other_classes_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "1.png")
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(run), "--dataset", str(tmp_path)])
    assert "the model knows 10 classes (0, 1, 2, ...)" in capsys.readouterr().err

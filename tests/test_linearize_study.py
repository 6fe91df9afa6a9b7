"""Tests of the scripts that `make linearize` runs, with tiny images and models."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import image_folder, linearize, linearize_time
from vix_kernels.__main__ import main as vix
from vix_kernels.training.data import load_dataset

TINY = ["--model-kwargs", "patch_size=4", "depth=2", "embed_dim=16", "num_heads=2", "--epochs", "1", "-b", "8"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.png")
    return tmp_path / "data"


def test_the_study(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Train a model with 17 tokens, and fine-tune it with 65 tokens on some of the images.

    Run the study on the fine-tuned model with 16 slots. A rerun with 16 and 36 slots adds only the rows with 36 slots.
    """
    short, long, images, output = (tmp_path / name for name in ("short", "long", "images", "study"))
    train = ["train", "--model", "hybrid_vit", *TINY]
    assert vix([*train, "--dataset", str(data), "--output", str(short)]) == 0
    words = ["--dataset", str(data), "--output", str(images), "--train", "12", "--test", "6"]
    assert image_folder.main(words) == 0
    whole, part = load_dataset(str(data)), load_dataset(str(images))
    assert part.classes == whole.classes and part.train.images.shape == (12, 3, 16, 16)
    for count, parts in ((12, (whole.train, part.train)), (6, (whole.test, part.test))):
        known, found = ({x.numpy().tobytes(): int(y) for x, y in zip(each.images, each.labels, strict=True)} for each in parts)
        assert found.items() <= known.items() and len(found) == count
        assert len(set(found.values())) == 2
    with pytest.raises(SystemExit):
        image_folder.main(words)
    assert "--output: expected a new folder, got" in capsys.readouterr().err

    more = ["--dataset", str(images), "--img-size", "32", "--initial-checkpoint", str(short), "--output", str(long)]
    assert vix([*train, *more]) == 0
    monkeypatch.setattr(linearize, "IMAGES", 8)
    assert linearize_time.main(["--output", str(output), "--sides", "8", "9", "--rounds", "1", "--depth", "1"]) == 0
    methods = {(row["method"], row["slots"]) for row in rows(output / linearize_time.FILE)}
    assert len(methods) == 2 + len(linearize_time.METHODS) * len(linearize_time.COUNTS)
    assert {row["tokens"] for row in rows(output / linearize_time.FILE)} == {"65", "82"}
    words = ["--teacher", str(long), "--output", str(output), "--seeds", "0", "--steps", "2"]
    words += ["--methods", "learned", "Nystrom, grid"]
    linearize.main([*words, "--counts", "16"])
    teacher, *converted = rows(output / linearize.FILE)
    assert (teacher["method"], teacher["agreement"], teacher["tokens"], teacher["images"]) == (
        linearize.TEACHER,
        "100",
        "65",
        "6",
    )
    expected = [(method, "16", exact) for method in ("learned features", "Nystrom, grid") for exact in ("False", "True")]
    assert [(row["method"], row["slots"], row["exact"]) for row in converted] == expected
    assert all(0 <= float(row["agreement"]) <= 100 and float(row["kl"]) > -1e-6 and row["commit"] for row in converted)
    assert (output / "linearize.png").read_bytes().startswith(b"\x89PNG")
    linearize.main([*words, "--counts", "16", "36"])
    assert rows(output / linearize.FILE)[:5] == [teacher, *converted] and len(rows(output / linearize.FILE)) == 7
    with pytest.raises(SystemExit):
        linearize.main(["--teacher", str(short), "--output", str(output)])
    assert "--output: expected rows of a teacher with 17 tokens, got 65" in capsys.readouterr().err


def test_times_of_a_timm_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    small = partial(timm.create_model, depth=1)
    monkeypatch.setattr(timm, "create_model", small)
    words = ["--timm", "vit_tiny_patch16_224", "--sides", "8", "--rounds", "1"]
    assert linearize_time.main(["--output", str(tmp_path), *words]) == 0
    found = rows(tmp_path / "vit_tiny_patch16_224-time.csv")
    assert len(found) == 2 + len(linearize_time.METHODS) * len(linearize_time.COUNTS)
    assert found[0]["method"] == "softmax" and {row["tokens"] for row in found} == {"65"}
    without = [model for (method, _), model in linearize_time.models(lambda: small("test_vit")) if method == "no attention"]
    assert [type(block.attn) for block in without[0].blocks] == [linearize_time.NoAttention]


def test_more_images_than_the_dataset_has_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        image_folder.main(["--dataset", str(data), "--output", str(tmp_path / "images"), "--train", "17", "--test", "1"])
    message = "bench.image_folder: error: --train: expected at most the 16 images of the dataset, got 17\n"
    assert capsys.readouterr().err == message and not (tmp_path / "images").exists()

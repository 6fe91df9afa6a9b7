"""Tests of the datasets for `vix train`: reading, augmentation, and errors for unreadable files."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vix_kernels.__main__ import main
from vix_kernels.training.augment import random_affine, random_flip_crop
from vix_kernels.training.checkpoint import load_checkpoint
from vix_kernels.training.data import load_dataset, open_dataset, pixel_statistics
from vix_kernels.training.data.dataset import suited_patch_size
from vix_kernels.training.data.images import decode
from vix_kernels.training.draws import Draws

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10_jpeg.npz"
TINY_WORDS = ["embed_dim=16", "depth=1", "num_heads=2"]


def pictures() -> list[Image.Image]:
    """Return 48 images of 16 x 16 pixels with stripes in two colors. The last image is grayscale.

    The stripes are horizontal, vertical and diagonal in turn.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    images = []
    for i in range(48):
        wave = np.sin((y, x, x + y)[i % 3] + rng.uniform(0, 6))[..., None]
        pixels = rng.uniform(40, 215, 3) + 40 * wave * rng.uniform(-1, 1, 3)
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return [*images[:-1], images[-1].convert("L")]


def jpeg(image: Image.Image) -> bytes:
    image.save(file := BytesIO(), "JPEG", quality=90)
    return file.getvalue()


def arrays_of(files: list[bytes]) -> dict[str, np.ndarray]:
    """Return the arrays of a pack (an .npz dataset) with three classes. Every fourth image is held out."""
    starts = [file.index(b"\xff\xda") for file in files]  # JPEG marker for the start of the scan
    heads = [file[:start] for file, start in zip(files, starts, strict=True)]
    headers = sorted(set(heads))
    scans = [file[start:] for file, start in zip(files, starts, strict=True)]
    return {
        "headers": np.frombuffer(b"".join(headers), np.uint8),
        "header_offsets": np.cumsum([0, *map(len, headers)]),
        "header_id": np.array([headers.index(head) for head in heads], np.uint16),
        "scans": np.frombuffer(b"".join(scans), np.uint8),
        "offsets": np.cumsum([0, *map(len, scans)]),
        "labels": np.arange(len(files), dtype=np.uint8) % 3,
        "split": (np.arange(len(files)) % 4 == 3).astype(np.uint8),
        "classes": np.array(["lies", "stands", "leans"]),
    }


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    np.savez(tmp_path / "stripes.npz", **arrays_of([jpeg(image) for image in pictures()]))
    return tmp_path / "stripes.npz"


def test_held_out_digits_are_fixed_and_stratified() -> None:
    data = load_dataset("digits")
    assert (len(data.train.labels), len(data.test.labels)) == (1437, 360)
    held_out = data.test.images.numpy().tobytes() + data.test.labels.numpy().tobytes()
    assert hashlib.sha256(held_out).hexdigest()[:16] == "3ea49a6c5c1f0810"
    for digit in range(10):
        of_class = int((data.train.labels == digit).sum()), int((data.test.labels == digit).sum())
        assert abs(of_class[1] - 0.2 * sum(of_class)) < 1


def test_a_pack_returns_the_packed_images(pack: Path) -> None:
    data = load_dataset(str(pack))
    files = [Image.open(BytesIO(jpeg(image))).convert("RGB") for image in pictures()]
    images = torch.from_numpy(np.stack(files)).permute(0, 3, 1, 2)
    held_out = torch.arange(48) % 4 == 3
    assert data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images, images[~held_out])
    assert torch.equal(data.test.images, images[held_out])
    assert torch.equal(data.train.labels, (torch.arange(48) % 3)[~held_out])
    assert torch.equal(data.test.labels, (torch.arange(48) % 3)[held_out])
    assert (data.name, data.classes) == ("stripes", ("lies", "stands", "leans"))
    assert data.model_kwargs == {"patch_size": 2}  # results in 8 x 8 tokens


def test_inputs_are_normalized(pack: Path) -> None:
    for data in load_dataset("digits"), load_dataset(str(pack)):
        x = data.inputs(data.train.images)
        std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_value", [16, 255])
def test_a_constant_channel_has_deviation_1(max_value: int) -> None:
    values = torch.arange(max_value + 1, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, -1, 4, 4)
    mean, std = pixel_statistics(values, max_value=max_value)
    torch.testing.assert_close(mean.flatten(), torch.arange(max_value + 1) / max_value)
    assert torch.equal(std, torch.ones_like(std))
    values = torch.cat([values, values[:1].clip(max=max_value - 1)])  # the last channel now has two different values
    std = pixel_statistics(values, max_value=max_value)[1].flatten()
    assert torch.equal(std[:-1], torch.ones(max_value)) and std[-1] == pytest.approx(3**0.5 / 4 / max_value)


@pytest.mark.parametrize("size, limit", [((24, 24), 2), ((8, 8), 2), ((12, 6), 2), ((7, 13), 20)])
def test_packs_are_resized_like_folders(pack: Path, tmp_path: Path, size: tuple[int, int], limit: int) -> None:
    """Pixel values differ by rounding errors, and by more if the size of the center crop is not a whole number of pixels."""
    data = load_dataset(str(pack), size)
    assert data.train.shape == (3, *size) and data.model_kwargs == {"patch_size": suited_patch_size((3, *size))}
    assert open_dataset(str(pack), size).shape == (3, *size)
    ((pixels, _),) = data.train.batches([torch.arange(len(data.train))])
    files = [image for i, image in enumerate(pictures()) if i % 4 != 3]
    for i, image in enumerate(files[:6]):
        (tmp_path / "image.jpg").write_bytes(jpeg(image))
        expected = torch.from_numpy(decode(tmp_path / "image.jpg", size).copy())
        assert pixels.dtype == torch.uint8 and (pixels[i].int() - expected.int()).abs().max() <= limit
        assert torch.equal(pixels[i], next(data.train.batches([torch.tensor([i])]))[0][0])
    assert next(data.test.batches([torch.arange(0)]))[0].shape == (0, 3, *size)


@pytest.mark.parametrize("size", [0, -1, True, (4,), "8"])
def test_invalid_image_sizes_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match="img_size: expected a positive integer or a pair of positive integers"):
        load_dataset("digits", size)


def test_a_run_resizes_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]) -> None:
    """Resumed runs and evaluations use the image size of the original run."""
    digits = load_dataset("digits", 12)
    ((pixels, _),) = digits.train.batches([torch.arange(99)])
    assert pixels.shape == (99, 1, 12, 12) and pixels.max() == digits.max_value == 16
    run = str(tmp_path / "run")
    words = ["--dataset", "digits", "--img-size", "12", "--epochs", "1", "-b", "512", "--model", "vip", "--output", run]
    assert main(["train", *words, "--model-kwargs", *TINY_WORDS]) == 0
    assert main(["train", "--resume", run, "--epochs", "2"]) == 0
    checkpoint = load_checkpoint(run)
    assert checkpoint["model_kwargs"]["img_size"] == (12, 12) and checkpoint["data"]["shape"] == [1, 12, 12]
    assert "model_kwargs" in refused("--resume", run, "--epochs", "3", "--img-size", "16")
    capsys.readouterr()
    for options in [], ["--dataset", "digits"]:
        assert main(["validate", "--checkpoint", run, *options]) == 0
        assert f"top-1 {max(row['eval_top1'] for row in checkpoint['history']):.2f} %" in capsys.readouterr().out


def test_a_run_resumes_only_with_its_image_size(tmp_path: Path, refused: Callable[..., str]) -> None:
    """The image size is checked even for a convolutional network, whose constructor arguments do not include the size."""
    pytest.importorskip("timm")
    words = ["--model", "timm:resnet18", "--model-kwargs", "layers=(1,1,1,1)", "channels=(8,8,8,8)", "-b", "512"]
    assert main(["train", *words, "--img-size", "16", "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    line = refused("--resume", tmp_path / "run", "--epochs", "2", "--img-size", "8")
    assert "--resume: the checkpoint has images of shape [1, 16, 16], this run has [1, 8, 8]: set --img-size" in line


def test_a_pack_is_checked_before_it_is_decoded(pack: Path, refused: Callable[..., str]) -> None:
    arrays = dict(np.load(pack))
    np.savez(pack, **arrays | {"scans": arrays["scans"][:-20]})  # truncates the last image
    assert "--stream: stripes is read into memory" in refused("--dataset", pack, "--stream")
    assert "mixer: expected" in refused("--dataset", pack, "--model-kwargs", "mixer=none")


def test_affine_augmentation_of_zero_strength_is_the_identity() -> None:
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(random_affine(x, Draws(0, images=4), degrees=0, scale=0, shift=0), x)
    assert not torch.allclose(random_affine(x, Draws(0, images=4), degrees=15, scale=0, shift=0), x)


def test_flip_and_crop_draw_every_window_of_the_padded_image() -> None:
    image = torch.rand(1, 3, 8, 12)
    padded = torch.nn.functional.pad(image, (3, 3, 2, 2), mode="reflect")[0]  # pad by a quarter of the width and height
    crops = [padded[:, y : y + 8, x : x + 12] for y in range(5) for x in range(7)]
    windows = {window.numpy().tobytes() for crop in crops for window in (crop, crop.flip(2))}
    drawn = [
        one.numpy().tobytes() for one in random_flip_crop(image.expand(2000, -1, -1, -1), Draws(0, images=2000), shift=0.25)
    ]
    assert len(windows) == 70
    assert set(drawn) == windows


def test_a_run_on_a_pack_resumes_from_any_folder(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dataset", "stripes.npz", "--epochs", "1", "--model-kwargs", *TINY_WORDS]) == 0
    run = tmp_path / "runs" / "hybrid_vip-stripes"
    assert yaml.safe_load((run / "args.yaml").read_text())["dataset"] == str(pack)
    assert load_checkpoint(run)["data"]["classes"] == ["lies", "stands", "leans"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0
    moved = pack.rename(tmp_path / "moved.npz")
    assert "stripes.npz" in refused("--resume", run, "--epochs", "3")
    assert main(["train", "--resume", str(run), "--epochs", "3", "--dataset", os.path.relpath(moved)]) == 0
    assert [row["epoch"] for row in load_checkpoint(run)["history"]] == [1, 2, 3]
    arrays = dict(np.load(moved))
    np.savez(moved, **arrays | {"classes": np.array(["a", "b", "c"])})
    assert "classes" in refused("--resume", run, "--epochs", "4")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda a: a.pop("scans"), ["scans"]),
        (lambda a: a.update(labels=a["labels"] + 1), ["labels", "3"]),
        (lambda a: a.update(labels=a["labels"] * 1.0), ["expected labels that are integers, got float64"]),
        (lambda a: a.update(labels=a["labels"] * 0, classes=a["classes"][:1]), ["expected 2 classes or more, got lies"]),
        (lambda a: a.update(labels=a["labels"][:-1]), ["labels"]),
        (lambda a: a.update(split=a["split"] * 0), ["split", "[0]"]),
        (lambda a: a.update(split=a["split"] * 2), ["split", "[0, 2]"]),
        (lambda a: a.update(scans=a["scans"][:-20]), ["image 47"]),
        (lambda a: a.update(headers=a["headers"][::-1]), ["image 0"]),
        (lambda a: a.update(header_id=a["header_id"] + 9), ["IndexError"]),
        (lambda a: a.update(labels=np.array([{}] * 48)), ["Object arrays"]),
        (lambda a: a.update(arrays_of([jpeg(i.resize((8 + 8 * (n < 5), 16))) for n, i in enumerate(pictures())])), ["image 5"]),
        (lambda a: a.update({name: values[:0] for name, values in a.items()} | {"offsets": np.zeros(1, int)}), ["split", "[]"]),
    ],
)
def test_a_damaged_pack_is_refused(
    change: Callable[[dict[str, Any]], object], parts: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    arrays = arrays_of([jpeg(image) for image in pictures()])
    change(arrays)
    path = tmp_path / "damaged.npz"
    np.savez(path, **arrays)
    line = refused("--dataset", path, "--output", tmp_path / "run")
    assert all(part in line for part in [str(path), *parts]), line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no pack", b"half", b"array"])
def test_an_unrelated_or_truncated_file_is_refused(
    content: bytes, pack: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content == b"half":
        content = pack.read_bytes()[: pack.stat().st_size // 2]
    elif content == b"array":
        np.save(file := BytesIO(), np.zeros(3))
        content = file.getvalue()
    pack.write_bytes(content)
    assert str(pack) in refused("--dataset", pack, "--output", tmp_path / "run")
    assert list(tmp_path.iterdir()) == [pack]


def test_damaged_or_missing_digits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def damaged(**kwargs: Any) -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("sklearn.datasets.load_digits", damaged)
    assert "damaged" in refused("--output", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "sklearn" in refused("--output", tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"{CIFAR10} is absent")
def test_cifar10_is_complete() -> None:
    data = load_dataset(str(CIFAR10))
    assert data.train.images.shape == (50_000, 3, 32, 32) and data.test.images.shape == (10_000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    assert (data.classes[0], data.classes[9]) == ("airplane", "truck")
    published = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])  # mean and std of the original images
    torch.testing.assert_close(torch.stack([data.mean.flatten(), data.std.flatten()]), published, rtol=0, atol=3e-3)

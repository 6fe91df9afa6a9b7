"""Tests of the formats that `vix train --dataset FOLDER` reads, on tiny datasets, and of the errors for damaged files."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vix_kernels.__main__ import main
from vix_kernels.training import UserError
from vix_kernels.training.checkpoint import load_checkpoint
from vix_kernels.training.data import Dataset, folders, load_dataset
from vix_kernels.training.data.images import decode
from vix_kernels.training.unpickle import Unpickler

TINY = ["depth=1", "embed_dim=16", "num_heads=2"]
RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


def cifar_python(folder: Path) -> Path:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    for at, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {b"data": CIFAR[2 * at : 2 * at + 2].reshape(2, -1), b"labels": [0, 1]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=2))
    return folder.parent


def cifar_binary(folder: Path) -> Path:
    for at, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        rows = CIFAR[2 * at : 2 * at + 2].reshape(2, -1)
        (folder / name).write_bytes(np.hstack([np.array([[0], [1]], np.uint8), rows]).tobytes())
    (folder / "batches.meta.txt").write_text("cat\ndog\n")
    return folder


def cifar100_binary(folder: Path) -> Path:
    rows = np.hstack([np.array([[9, 0], [9, 1]] * 5, np.uint8), CIFAR[:10].reshape(10, -1)])
    (folder / "train.bin").write_bytes(rows.tobytes())
    rows = np.hstack([np.array([[9, 0], [9, 1]], np.uint8), CIFAR[10:].reshape(2, -1)])
    (folder / "test.bin").write_bytes(rows.tobytes())
    (folder / "fine_label_names.txt").write_text("cat\ndog\n")
    return folder


@pytest.mark.parametrize("make", [cifar_python, cifar_binary, cifar100_binary])
def test_cifar_is_read(make: Callable[[Path], Path], tmp_path: Path) -> None:
    data = load_dataset(str(make(tmp_path)))
    assert data.name == ("cifar100" if "100" in make.__name__ else "cifar10") and data.classes == ("cat", "dog")
    assert np.array_equal(data.train.images.numpy(), CIFAR[:10]) and np.array_equal(data.test.images.numpy(), CIFAR[10:])
    assert data.train.labels.tolist() == [0, 1] * 5 and data.model_kwargs == {"patch_size": 4}


def test_labels_that_are_not_integers_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = cifar_python(tmp_path)
    batch = {b"data": CIFAR[:2].reshape(2, -1), b"labels": [0.5, 1.0]}
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    assert "expected labels that are integers, got float64" in refused("--dataset", folder)


def test_a_damaged_length_allocates_nothing(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = cifar_python(tmp_path)
    path = folder / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"\x80\x04\x95" + (2**50).to_bytes(8, "little") + b"N.")  # a pickle frame with a length of one petabyte
    assert "which is missing, damaged or not a dataset" in refused("--dataset", folder)


def test_a_pickle_that_executes_code_is_refused(tmp_path: Path) -> None:
    folder = cifar_python(tmp_path)

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(UserError, match="builtins.print is not allowed in this file"):
        load_dataset(str(folder))


def idx_files(folder: Path, compressed: bool = True) -> Path:
    for part, size in (("train", 6), ("t10k", 4)):
        images = RNG.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(size, dtype=np.uint8) % 2)):
            header = np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes()
            name = f"{part}-{kind}-ubyte"
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes(), mtime=0))
            else:
                (folder / name).write_bytes(header + values.tobytes())
    return folder


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_is_read(compressed: bool, tmp_path: Path) -> None:
    data = load_dataset(str(idx_files(tmp_path, compressed)))
    assert data.train.images.shape == (6, 1, 28, 28) and data.test.images.shape == (4, 1, 28, 28)
    assert data.classes == ("0", "1") and data.test.labels.tolist() == [0, 1, 0, 1]


def picture(path: Path, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def image_folder(folder: Path, size: tuple[int, int] = (16, 16)) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture(folder / part / name / f"{i}.png", size)
    return folder


def tiny_imagenet(folder: Path) -> Path:
    lines = []
    for at, name in enumerate(("n01", "n02")):
        for i in range(4):
            picture(folder / "train" / name / "images" / f"{name}_{i}.png")
        picture(folder / "val" / "images" / f"val_{at}.png")
        lines.append(f"val_{at}.png\t{name}\t0\t0\t15\t15")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_image_folders_are_read(tmp_path: Path) -> None:
    data = load_dataset(str(image_folder(tmp_path)))
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [0] * 4 + [1] * 4
    expected = np.asarray(Image.open(tmp_path / "train" / "dog" / "1.png")).transpose(2, 0, 1)
    assert np.array_equal(data.train.images[5].numpy(), expected)
    assert load_dataset(str(tmp_path), img_size=8).test.images.shape == (4, 3, 8, 8)


def test_tiny_imagenet_is_read(tmp_path: Path) -> None:
    data = load_dataset(str(tiny_imagenet(tmp_path)))
    assert data.classes == ("n01", "n02") and data.test.labels.tolist() == [0, 1]
    expected = np.asarray(Image.open(tmp_path / "val" / "images" / "val_1.png")).transpose(2, 0, 1)
    assert np.array_equal(data.test.images[1].numpy(), expected)


def test_longer_sides_are_center_cropped(tmp_path: Path) -> None:
    image_folder(tmp_path)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # only the center is white
    Image.fromarray(wide).save(tmp_path / "train" / "cat" / "0.png")
    assert load_dataset(str(tmp_path), img_size=8).train.images[0].float().mean() > 250


def test_a_few_unreadable_images_are_skipped_and_named(tmp_path: Path, capsys) -> None:
    image_folder(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = load_dataset(str(tmp_path / "data"))
    assert data.unreadable == (f"{broken}: image file is truncated",)
    assert data.train.labels.tolist() == [0] * 3 + [1] * 4 and data.test.labels.tolist() == [0, 0, 1, 1]
    small = ["--model-kwargs", "depth=1", "embed_dim=16", "num_heads=2", "--epochs", "1", "--warmup-epochs", "0"]
    assert main(["train", "--dataset", str(tmp_path / "data"), *small, "--output", str(tmp_path / "run")]) == 0
    message = f"skipped, because they cannot be decoded: 1\n  {broken}: image file is truncated\n"
    assert message in capsys.readouterr().out
    assert main(["validate", "--checkpoint", str(tmp_path / "run")]) == 0
    assert message in capsys.readouterr().out


def test_images_that_need_a_plugin_are_named(tmp_path: Path) -> None:
    image_folder(tmp_path)
    photo = tmp_path / "train" / "cat" / "photo.HEIC"
    photo.write_bytes(b"\0\0\0\x18ftypheic")
    assert load_dataset(str(tmp_path)).unreadable[0].startswith(f"{photo}: cannot identify image file")


def damage_many(folder: Path) -> None:
    for path in sorted((folder / "train" / "cat").iterdir())[:3]:
        path.write_bytes(b"no image")


def other_size(folder: Path) -> None:
    picture(folder / "val" / "dog" / "1.png", (20, 16))


def no_class(folder: Path) -> None:
    for path in (folder / "val" / "dog").iterdir():
        path.unlink()


def one_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "val" / "dog")


def undecodable_class(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part / "dog").rename(folder / part / os.fsdecode(b"d\xff\xf6g"))


def no_val(folder: Path) -> None:
    (folder / "val").rename(folder / "other")


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_many, "3 of 12 images cannot be decoded, such as"),
        (other_size, "1.png: expected 16 x 16 pixels as in the first image, got 20 x 16 pixels; set --img-size N"),
        (no_class, "expected images"),
        (one_class, "expected 2 classes or more, got cat"),
        pytest.param(
            undecodable_class,
            r"expected names in UTF-8, got 'd\\udcff\\udcf6g': rename its folder",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system"),
        ),
        (no_val, "expected a folder val, valid, validation or test next to train"),
    ],
)
def test_damaged_folders_are_refused(damage: Callable, message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    damage(image_folder(tmp_path / "data"))
    assert message in refused("--dataset", tmp_path / "data", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make, name, content, message",
    [
        (cifar_binary, "data_batch_2.bin", b"short", "data_batch_2.bin: expected a multiple of 3073 bytes, got 5"),
        (cifar_binary, "test_batch.bin", bytes([7]) + bytes(3072), "expected labels from 0 to 1, got 7 to 7"),
        (
            idx_files,
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"1234567890123456", mtime=0),
            "expected the magic number 0x0803",
        ),
        (idx_files, "t10k-labels-idx1-ubyte.gz", b"", "expected the magic number 0x0801"),
        (tiny_imagenet, "val/val_annotations.txt", b"val_0.png\tn09\t0\t0\t1\t1\n", "val_annotations.txt, line 1: expected"),
        (idx_files, "nothing", b"", None),
    ],
)
def test_damaged_files_are_refused(
    make: Callable, name: str, content: bytes, message: str | None, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = make(tmp_path)
    (folder / name).write_bytes(content)
    if message is None:  # unknown files are ignored
        load_dataset(str(folder))
    else:
        assert message in refused("--dataset", folder)


def test_an_unknown_folder_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"unknown format of {tmp_path}; expected a pack (.npz) or a folder with CIFAR" in refused("--dataset", tmp_path)
    assert "--img-size: expected a finite number above 0" in refused("--img-size", 0)


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    folder = cifar_binary(tmp_path)
    for i in range(1, 6):
        path = folder / f"data_batch_{i}.bin"
        path.write_bytes(path.read_bytes()[:3073])
    with pytest.raises(UserError, match="expected training images of every class, got none of dog"):
        load_dataset(str(folder))


def streamed(folder: Path, **options) -> Dataset:
    return load_dataset(str(folder), img_size=8, stream=True, **options)


def fed(data: Dataset, replace_unreadable: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    order = torch.arange(len(data.train)).flip(0).tensor_split(3)
    return list(data.train.batches(order, replace_unreadable=replace_unreadable))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_equal_those_in_memory(tmp_path: Path, workers: int) -> None:
    image_folder(tmp_path)
    held, data = load_dataset(str(tmp_path), img_size=8), streamed(tmp_path, workers=workers)
    assert (data.classes, data.train.shape) == (held.classes, held.train.shape)
    torch.testing.assert_close((data.mean, data.std), (held.mean, held.std))
    for actual, expected in zip(fed(data), fed(held), strict=True):
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_a_damaged_streamed_file_is_named_and_replaced(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_text("no image")
    data = streamed(tmp_path, workers=0)
    images, labels = (torch.cat(each) for each in zip(*fed(data, replace_unreadable=True), strict=True))
    assert len(images) == 8 and labels.tolist() == [1] * 4 + [0] * 4
    assert torch.equal(images[6], images[5])  # image 1, which is damaged, is replaced with image 2; the order is reversed
    (message,) = data.train.unreadable
    assert message.startswith(f"{tmp_path / 'train' / 'cat' / '1.png'}: cannot identify image file")
    assert sum(len(labels) for _, labels in fed(data)) == 7
    for name in ("0.png", "2.png"):
        (tmp_path / "train" / "cat" / name).write_text("no image")
    with pytest.raises(UserError, match="of 8 images cannot be decoded, such as"):
        fed(data, replace_unreadable=True)


def test_streamed_runs_resume_exactly_and_equal_in_memory_runs(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    words = ["train", "--dataset", str(tmp_path / "data"), "--img-size", "8", "--workers", "1", "--batch-size", "4"]
    words += ["--crop-scale", "0.35", "--warmup-epochs", "0", "--model-kwargs", *TINY, "patch_size=2"]
    for name, steps, stream in (("held", [2], "--no-stream"), ("straight", [2], "--stream"), ("in two", [1, 2], "--stream")):
        for epochs in steps:
            where = ["--output", str(tmp_path / name)] if epochs == steps[0] else ["--resume", str(tmp_path / name)]
            assert main([*words, "--epochs", str(epochs), "--sched", "constant", stream, *where]) == 0
    held, straight, in_two = (load_checkpoint(tmp_path / name)["model"] for name in ("held", "straight", "in two"))
    torch.testing.assert_close(in_two, straight, rtol=0, atol=0)
    torch.testing.assert_close(held, straight, rtol=0, atol=0)


def test_damaged_files_are_named_once_per_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x01IHDR")
    words = ["train", "--dataset", str(tmp_path / "data"), "--img-size", "8", "--stream", "--workers", "0", "--epochs", "2"]
    words += ["-b", "4", "--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2", "patch_size=2"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.count("skipped, because they cannot be decoded: 1\n") == 1 and out.count("1.png: ") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no process groups on this system")
def test_a_signal_to_the_process_group_spares_the_workers(tmp_path: Path) -> None:
    """torchrun and cluster schedulers send signals to the whole process group."""
    image_folder(tmp_path / "data")
    words = ["train", "--dataset", tmp_path / "data", "--img-size", "8", "--stream", "--workers", "2", "--epochs", "100000"]
    words += [
        "-b",
        "2",
        "--output",
        tmp_path / "run",
        "--model-kwargs",
        "embed_dim=16",
        "depth=1",
        "num_heads=2",
        "patch_size=2",
    ]
    command = [sys.executable, "-m", "vix_kernels", *map(str, words)]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        os.killpg(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "continue with --resume" in stderr, stderr


def test_only_folders_are_streamed(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "--stream: digits is read into memory" in refused("--stream", "--output", tmp_path / "run")


def test_streams_need_images_of_one_size(tmp_path: Path, refused: Callable[..., str]) -> None:
    image_folder(tmp_path / "data")
    assert "--img-size N" in refused("--dataset", tmp_path / "data", "--stream", "--output", tmp_path / "run")


WIDE = np.array([[0, 256, 25_700], [12_850, 65_534, 65_535]], np.uint16)


@pytest.mark.parametrize("name", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(name: str, tmp_path: Path) -> None:
    Image.fromarray(WIDE).save(tmp_path / f"wide.{name}")
    assert np.array_equal(decode(tmp_path / f"wide.{name}", None), np.stack([WIDE >> 8] * 3))


@pytest.mark.parametrize("dtype, kind", [(np.int32, "integers (mode I)"), (np.float32, "floats (mode F)")])
def test_pixels_without_a_known_range_are_refused(dtype: type, kind: str, tmp_path: Path) -> None:
    Image.fromarray(WIDE.astype(dtype)).save(tmp_path / "wide.tif")
    assert str(decode(tmp_path / "wide.tif", None)).startswith(f"expected pixels of 8 or 16 bits, got 32-bit {kind}")


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    """On non-Apple file systems, macOS writes a metadata file `._NAME` for every file."""
    image_folder(tmp_path)
    for path in list(tmp_path.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    picture(tmp_path / "train" / "cat" / ".thumbnails" / "0.png")
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test), data.unreadable) == (8, 4, ())


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bomb(path: Path) -> None:
    """Write a valid image slightly larger than the size at which Pillow warns."""
    Image.new("1", (9_500, 9_500)).save(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs and needs extra rights to create links")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "name, make, reason",
    [
        ("x.png", fifo, "expected a regular file, got a FIFO"),
        ("x.png", lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        ("x.png", lambda path: path.symlink_to("nothing.png"), "No such file or directory"),
        ("more", lambda path: path.symlink_to(path.parent.parent), "got a folder through a symbolic link to {train}"),
        ("x.png", bomb, "expected at most 89,478,485 pixels, got 9500 x 9500"),
    ],
    ids=["FIFO", "link to itself", "dangling link", "link to a folder around it", "decompression bomb"],
)
def test_files_that_cannot_be_opened_are_named(
    name: str, make: Callable[[Path], object], reason: str, stream: bool, tmp_path: Path
) -> None:
    path = image_folder(tmp_path) / "train" / "cat" / name
    make(path)
    data = load_dataset(str(tmp_path), img_size=8, stream=stream, workers=0)
    if stream:
        list(data.train.batches([torch.arange(9)]))
    (message,) = data.all_unreadable()
    assert message.startswith(f"{path}: ") and reason.format(train=tmp_path / "train") in message


@pytest.mark.skipif(os.name == "nt", reason="Windows needs extra rights to create links")
def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    picture(tmp_path / "elsewhere" / "deep" / "7.png")
    (tmp_path / "data" / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert load_dataset(str(tmp_path / "data")).train.labels.tolist() == [0] * 5 + [1] * 4
    (tmp_path / "data" / "train" / "cow").symlink_to("nowhere")
    with pytest.raises(UserError, match="cow: expected a folder, got a broken symbolic link"):
        load_dataset(str(tmp_path / "data"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "vpi"], "vpi"),
        (["--model-kwargs", "depth=0"], "depth: expected an integer >= 1, got 0"),
        (["--model-kwargs", "img_size=16"], "img_size: the images of data have (8, 8), got (16, 16)"),
        (["-b", "5", "--grad-accum-steps", "5"], "--batch-size: the smallest batch has 4 images, too few for"),
        (["--resume", "{run}", "--seed", "7"], "--resume: the checkpoint has seed 0, this run has 7"),
        (["--resume", "{run}", "--dataset", "{other}"], "--resume: the checkpoint has different classes"),
        (["--resume", "{run}", "--epochs", "1"], "--epochs: expected at least the 2"),
    ],
)
def test_settings_are_checked_before_images_are_decoded(
    words: list[str], message: str, two_epochs: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(folders.__globals__, "decode", None)  # decoding would fail with an error about a damaged dataset
    places = dict(run=two_epochs / "run", other=two_epochs / "other")
    if "--resume" not in words:
        words = ["--output", str(two_epochs / "new"), "--dataset", str(two_epochs / "data"), "--img-size", "8", *words]
    assert message in refused(*(word.format(**places) for word in words))


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two epochs, and return a folder.

    The folder contains the run in `run`, its dataset in `data`, and a dataset with different classes in `other`.
    """
    folder = tmp_path_factory.mktemp("two_epochs")
    image_folder(folder / "data")
    image_folder(folder / "other").joinpath("train", "dog").rename(folder / "other" / "train" / "cow")
    folder.joinpath("other", "val", "dog").rename(folder / "other" / "val" / "cow")
    words = ["--img-size", "8", "-b", "8", "--epochs", "2", "--model", "vip", "--model-kwargs", *TINY]
    assert main(["train", "--dataset", str(folder / "data"), "--output", str(folder / "run"), *words]) == 0
    return folder


def test_validate_checks_before_images_are_decoded(
    two_epochs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(folders.__globals__, "decode", None)
    with pytest.raises(SystemExit):
        main(["validate", "--checkpoint", str(two_epochs / "run"), "--dataset", str(two_epochs / "other")])
    assert "expected the model's 2 classes (cat, dog, ...), got 2 classes (cat, cow, ...) in other" in capsys.readouterr().err


def test_validate_resizes_to_rectangular_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path / "data", (24, 16))
    image_folder(tmp_path / "larger", (50, 40))
    words = ["--epochs", "1", "--warmup-epochs", "0", "--model", "vip", "--model-kwargs", *TINY]
    assert main(["train", "--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "run"), *words]) == 0
    assert load_checkpoint(tmp_path / "run")["model_kwargs"]["img_size"] == (16, 24)
    assert main(["validate", "--checkpoint", str(tmp_path / "run"), "--dataset", str(tmp_path / "larger")]) == 0
    assert "of 4 held-out images" in capsys.readouterr().out


def test_a_damaged_index_or_length_in_a_pickle_allocates_nothing() -> None:
    """Python's C unpickler would allocate a memo with over two billion entries, or a byte array of any length."""
    assert Unpickler(b"\x80\x02K\x01r\xff\xff\xff\x7f.", set()).load() == 1
    with pytest.raises(KeyError):
        Unpickler(b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x7f.", set()).load()

"""Images in folders: one a class, or as Tiny ImageNet has them. Decoded at once, into memory, or while they are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .dataset import Dataset, make_dataset
from .images import MOST_UNREADABLE, HeldImages, StreamedImages, decode, hidden

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
HELD_OUT = ("val", "valid", "validation", "test")
HELD_BYTES = 2**32  # of decoded images; more are streamed
SAMPLE = 512  # images that the statistics of streamed ones are taken from
Files = list[tuple[Path, int]]  # images and their labels


def is_folder(folder: Path) -> bool:
    return (folder / "train").is_dir()


def folders(folder: Path, img_size: int | None, stream: bool | None, workers: int) -> Dataset:
    """train/CLASS/IMAGE and val/CLASS/IMAGE (or valid, validation, test), at any depth below the class.

    Tiny ImageNet has val/images and val/val_annotations.txt instead. Images that cannot be decoded are left out, up to one in
    a hundred.

    Args:
        img_size: side of the squares that images are resized and cropped to; None: all have one size already.
        stream: read them when they are needed, by so many `workers`; None: if they would take more than HELD_BYTES.
    """
    train = folder / "train"
    classes = _folders_in(train)
    if not classes:
        raise ValueError(f"{train}: expected a folder for each class, got none")
    held_out = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
    if held_out is None:
        raise FileNotFoundError(f"{folder}: expected a folder {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]} beside train")
    annotations = held_out / "val_annotations.txt"
    train_files = _of_classes(train, classes)
    test_files = _annotated(annotations, classes) if annotations.is_file() else _of_classes(held_out, classes)
    name, files = folder.resolve().name, [*train_files, *test_files]
    if stream is None:
        stream = _bytes(files, img_size) > HELD_BYTES
    if stream:
        return _streamed(name, classes, train_files, test_files, img_size, workers)
    images, labels, unreadable = _decoded(files, img_size)
    lost = set(unreadable)
    cut = sum(str(path) not in lost for path, _ in train_files)
    train, test = HeldImages(images[:cut], labels[:cut]), HeldImages(images[cut:], labels[cut:])
    return make_dataset(name, classes, train, test, unreadable=unreadable)


def _bytes(files: Files, img_size: int | None) -> int:
    """Of all images, decoded; those without a common size are taken to be as large as the first."""
    if img_size is None:
        opened = (decode(path, None) for path, _ in files)
        return next((len(files) * pixels.size for pixels in opened if not isinstance(pixels, Exception)), 0)
    return len(files) * 3 * img_size**2


def _streamed(
    name: str, classes: Sequence[str], train_files: Files, test_files: Files, img_size: int | None, workers: int
) -> Dataset:
    if img_size is None:
        raise ValueError("these are too many to hold, and images that are streamed need one size: name it by --img-size N")
    train, test = (
        StreamedImages(tuple(path for path, _ in files), torch.tensor([label for _, label in files]), img_size, workers)
        for files in (train_files, test_files)
    )
    sample, _, unreadable = _decoded(train_files[:: max(1, len(train_files) // SAMPLE)], img_size)
    return make_dataset(name, tuple(classes), train, test, statistics=sample, unreadable=unreadable)


def _folders_in(folder: Path) -> tuple[str, ...]:
    """Their names; a dot in front hides one."""
    return tuple(sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")))


def _of_classes(folder: Path, classes: Sequence[str]) -> Files:
    if strange := set(_folders_in(folder)) - set(classes):
        raise ValueError(f"{folder}: expected the classes of the training images, got {', '.join(sorted(strange))} too")
    files = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder}: expected a folder for the class {name}")
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder / name}: expected images ({' '.join(sorted(SUFFIXES))}), got none")
        files += [(path, label) for path in found]
    return files


def _annotated(path: Path, classes: Sequence[str]) -> Files:
    """The lines of val_annotations.txt: file, class and a box, which is not read."""
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        label = labels.get(rest.partition("\t")[0])
        if label is None:
            raise ValueError(f"{path.name}, line {number}: expected an image and its class, got {line[:60]!r}")
        files.append((path.parent / "images" / Path(name).name, label))
    return files


def _decoded(files: Files, img_size: int | None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """uint8 images (n, 3, height, width), their labels, and the files that could not be read."""
    first = next((pixels for path, _ in files if not isinstance(pixels := decode(path, img_size), Exception)), None)
    if first is None:
        raise ValueError("none of the images can be decoded")
    images = np.empty((len(files), *first.shape), np.uint8)
    unreadable: dict[str, str] = {}

    def fill(at: int) -> None:
        pixels = decode(files[at][0], img_size)
        if isinstance(pixels, Exception):
            unreadable[str(files[at][0])] = str(pixels)
        elif pixels.shape != first.shape:
            raise ValueError(
                f"{files[at][0]} is {_size(pixels)}, the first image {_size(first)}: --img-size N makes them one size"
            )
        else:
            images[at] = pixels

    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside of Python's lock
        for _ in tqdm(pool.map(fill, range(len(files))), "decoding", len(files), unit="image", leave=False, disable=hidden()):
            pass
    if len(unreadable) > max(1, MOST_UNREADABLE * len(files)):
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"{len(unreadable)} of {len(files)} images cannot be decoded, such as {path}: {why}")
    kept = [at for at, (path, _) in enumerate(files) if str(path) not in unreadable]
    labels = torch.tensor([files[at][1] for at in kept])
    return torch.from_numpy(images[kept] if unreadable else images), labels, tuple(sorted(unreadable))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]} pixels"

"""Read images, in advance or on demand, from a dataset with one folder per class or with the layout of Tiny ImageNet."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .dataset import Dataset, Source, make_dataset, suited_patch_size
from .images import MOST_UNREADABLE, HeldImages, StreamedImages, decode, hidden, with_reason

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm"}
OTHER_SUFFIXES = {".heic", ".heif", ".jxl"}  # these need Pillow plugins; without them, the files are reported as unreadable
HELD_OUT = ("val", "valid", "validation", "test")
HELD_BYTES = 2**32  # maximum size of decoded images in memory; larger datasets are streamed by default
SAMPLE = 512  # pixel statistics of streamed datasets use at least this many training images, if available
Files = list[tuple[Path, int]]  # image files and their labels


def is_folder(folder: Path) -> bool:
    return (folder / "train").is_dir()


def folders(folder: Path, size: tuple[int, int] | None, stream: bool | None, workers: int) -> Source:
    """Open images in train/CLASS/ and val/CLASS/ (or valid, validation, test), including subfolders of CLASS.

    As in Tiny ImageNet, val can contain images/ and val_annotations.txt instead of CLASS/.

    Images that cannot be decoded are skipped. Reading fails if at least two images, and more than one percent of all
    images, cannot be decoded. If images are decoded on demand, this limit applies separately to the training images, the
    held-out images and the sample for pixel statistics.

    Args:
        folder: the folder that contains train and val.
        size: (height, width) to which images are resized and cropped. If None, all images must have the same size.
        stream: whether to decode images on demand. If None, they are decoded on demand if they would take more
            than HELD_BYTES of memory.
        workers: the number of processes that decode streamed images.
    """
    train = folder / "train"
    classes = _folders_in(train)
    if not classes:
        raise ValueError(f"{train}: expected a folder for each class, got none")
    held_out = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
    if held_out is None:
        raise FileNotFoundError(f"{folder}: expected a folder {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]} next to train")
    annotations = held_out / "val_annotations.txt"
    train_files = _of_classes(train, classes)
    test_files = _annotated(annotations, classes) if annotations.is_file() else _of_classes(held_out, classes)
    name, files = folder.resolve().name, [*train_files, *test_files]
    shape = (3, *size) if size else _shape_of_first(files)
    if stream is None:
        stream = len(files) * math.prod(shape) > HELD_BYTES
    if stream and size is None:
        raise ValueError("streaming (--stream, or more than 4 GiB of decoded images) needs a common size: set --img-size N")

    def held() -> Dataset:
        images, kept, unreadable = _decoded(files, shape, size)
        labels = torch.tensor([files[i][1] for i in kept])
        num_train = sum(i < len(train_files) for i in kept)
        parts = HeldImages(images[:num_train], labels[:num_train]), HeldImages(images[num_train:], labels[num_train:])
        return make_dataset(name, classes, *parts, unreadable=unreadable)

    def streamed() -> Dataset:
        parts = (
            StreamedImages(tuple(path for path, _ in part), torch.tensor([label for _, label in part]), shape[1:], workers)
            for part in (train_files, test_files)
        )
        sample, _, unreadable = _decoded(train_files[:: max(1, len(train_files) // SAMPLE)], shape, size)
        return make_dataset(name, classes, *parts, statistics=sample, unreadable=unreadable)

    patch_size = {"patch_size": suited_patch_size(shape)}
    return Source(name, classes, shape, len(train_files), patch_size, streamed if stream else held, streams=stream)


def _shape_of_first(files: Files) -> tuple[int, int, int]:
    """Return the shape of the first image that can be decoded."""
    for path, _ in files:
        pixels = decode(path, None)
        if not isinstance(pixels, Exception):
            return pixels.shape
    raise ValueError(f"cannot decode any of the images, for example {with_reason(path, pixels)}")


def _folders_in(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of all subfolders except hidden ones."""
    names = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path}: expected a folder, got a broken symbolic link")
        if path.is_dir():
            names.append(path.name)
    return tuple(sorted(names))


def _of_classes(folder: Path, classes: Sequence[str]) -> Files:
    if unknown := set(_folders_in(folder)) - set(classes):
        raise ValueError(f"{folder}: expected only classes of the training images, got {', '.join(sorted(unknown))}")
    files = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder}: expected a folder for the class {name}")
        found = list(_images_in(folder / name))
        if not found:
            raise ValueError(f"{folder / name}: expected images ({' '.join(sorted(SUFFIXES))}), got none")
        files += [(path, label) for path in found]
    return files


def _images_in(folder: Path, ancestors: tuple[os.stat_result, ...] = ()) -> Iterator[Path]:
    """Yield the files with an image suffix in `folder` and its subfolders, sorted by name within each folder.

    Hidden files and folders are ignored, because macOS writes `._NAME` files. A symbolic link that is broken or points to one
    of its parent folders is yielded like an image, so that `decode` reports it.
    """
    ancestors = (*(ancestors or [each.stat() for each in folder.absolute().parents]), folder.stat())
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        path = Path(entry.path)
        if entry.is_symlink() and (not path.exists() or any(os.path.samestat(path.stat(), each) for each in ancestors)):
            yield path
        elif entry.is_dir():
            yield from _images_in(path, ancestors)
        elif path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES:
            yield path


def _annotated(path: Path, classes: Sequence[str]) -> Files:
    """Return the files and labels in val_annotations.txt.

    Each line has a file name, a class and a bounding box. The bounding box is not used.
    """
    labels = {name: label for label, name in enumerate(classes)}
    files = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        label = labels.get(rest.partition("\t")[0])
        if label is None:
            raise ValueError(f"{path.name}, line {number}: expected an image and its class, got {line[:60]!r}")
        files.append((path.parent / "images" / Path(name).name, label))
    return files


def _decoded(
    files: Files, shape: tuple[int, int, int], size: tuple[int, int] | None
) -> tuple[Tensor, list[int], tuple[str, ...]]:
    """Decode `files` and check that each image has the given shape.

    Returns:
        The uint8 images (n, *shape), their indices in `files`, and the files that cannot be decoded, each with the reason.
    """
    images = np.empty((len(files), *shape), np.uint8)
    unreadable: dict[int, str] = {}

    def fill(i: int) -> None:
        path = files[i][0]
        pixels = decode(path, size)
        if isinstance(pixels, Exception):
            unreadable[i] = with_reason(path, pixels)
        elif pixels.shape != shape:
            sizes = f"expected {_pixels(shape)} as in the first image, got {_pixels(pixels.shape)}"
            raise ValueError(f"{path}: {sizes}; set --img-size N")
        else:
            images[i] = pixels

    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(threads) as pool:  # Pillow releases the GIL while it decodes
        for _ in tqdm(pool.map(fill, range(len(files))), "decoding", len(files), unit="image", leave=False, disable=hidden()):
            pass
    if len(unreadable) > max(1, MOST_UNREADABLE * len(files)) or len(unreadable) == len(files):
        raise ValueError(f"{len(unreadable)} of {len(files)} images cannot be decoded, such as {min(unreadable.values())}")
    kept = [i for i in range(len(files)) if i not in unreadable]
    return torch.from_numpy(images[kept] if unreadable else images), kept, tuple(sorted(unreadable.values()))


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[1]} pixels"

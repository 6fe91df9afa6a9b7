"""Images in folders: one a class, or as Tiny ImageNet has them. Decoded at once, into memory, or while they are needed."""

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

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
HELD_OUT = ("val", "valid", "validation", "test")
HELD_BYTES = 2**32  # of decoded images; more are streamed
SAMPLE = 512  # images that the statistics of streamed ones are taken from
Files = list[tuple[Path, int]]  # images and their labels


def is_folder(folder: Path) -> bool:
    return (folder / "train").is_dir()


def folders(folder: Path, size: tuple[int, int] | None, stream: bool | None, workers: int) -> Source:
    """train/CLASS/IMAGE and val/CLASS/IMAGE (or valid, validation, test), at any depth below the class.

    Tiny ImageNet has val/images and val/val_annotations.txt instead. Images that cannot be decoded are skipped, up to one in
    a hundred.

    Args:
        size: height and width that images are resized and cropped to; None: all have one size already.
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
    shape = (3, *size) if size else _shape_of_first(files)
    if stream is None:
        stream = len(files) * math.prod(shape) > HELD_BYTES
    if stream and size is None:
        raise ValueError("these are too many to hold, and images that are streamed need one size: name it by --img-size N")

    def held() -> Dataset:
        images, kept, unreadable = _decoded(files, shape, size)
        labels = torch.tensor([files[at][1] for at in kept])
        cut = sum(at < len(train_files) for at in kept)
        parts = HeldImages(images[:cut], labels[:cut]), HeldImages(images[cut:], labels[cut:])
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
    """Of the first image that can be decoded."""
    for path, _ in files:
        pixels = decode(path, None)
        if not isinstance(pixels, Exception):
            return pixels.shape
    raise ValueError(f"none of the images can be decoded, such as {with_reason(path, pixels)}")


def _folders_in(folder: Path) -> tuple[str, ...]:
    """Their names, without hidden ones."""
    names = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path}: expected a folder, got a symbolic link that leads nowhere")
        if path.is_dir():
            names.append(path.name)
    return tuple(sorted(names))


def _of_classes(folder: Path, classes: Sequence[str]) -> Files:
    if strange := set(_folders_in(folder)) - set(classes):
        raise ValueError(f"{folder}: expected the classes of the training images, got {', '.join(sorted(strange))} too")
    files = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder}: expected a folder for the class {name}")
        found = list(_images_in(folder / name))
        if not found:
            raise ValueError(f"{folder / name}: expected images ({' '.join(sorted(SUFFIXES))}), got none")
        files += [(path, label) for path in found]
    return files


def _images_in(folder: Path, around: tuple[os.stat_result, ...] = ()) -> Iterator[Path]:
    """Files with the suffix of an image, also in subfolders, in order. Hidden ones are ignored: macOS writes `._NAME` files.

    A symbolic link that leads nowhere or to a folder around it counts as an image, so that `decode` reports it.
    """
    around = (*(around or [each.stat() for each in folder.absolute().parents]), folder.stat())
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        path = Path(entry.path)
        if entry.is_symlink() and (not path.exists() or any(os.path.samestat(path.stat(), each) for each in around)):
            yield path
        elif entry.is_dir():
            yield from _images_in(path, around)
        elif path.suffix.lower() in SUFFIXES:
            yield path


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


def _decoded(
    files: Files, shape: tuple[int, int, int], size: tuple[int, int] | None
) -> tuple[Tensor, list[int], tuple[str, ...]]:
    """uint8 images (n, *shape), their places in `files`, and the files that cannot be decoded, each with the reason."""
    images = np.empty((len(files), *shape), np.uint8)
    unreadable: dict[int, str] = {}

    def fill(at: int) -> None:
        path = files[at][0]
        pixels = decode(path, size)
        if isinstance(pixels, Exception):
            unreadable[at] = with_reason(path, pixels)
        elif pixels.shape != shape:
            sizes = f"{_pixels(pixels.shape)}, the first image {_pixels(shape)}"
            raise ValueError(f"{path} is {sizes}: --img-size N makes them one size")
        else:
            images[at] = pixels

    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside of Python's lock
        for _ in tqdm(pool.map(fill, range(len(files))), "decoding", len(files), unit="image", leave=False, disable=hidden()):
            pass
    if len(unreadable) > max(1, MOST_UNREADABLE * len(files)) or len(unreadable) == len(files):
        raise ValueError(f"{len(unreadable)} of {len(files)} images cannot be decoded, such as {min(unreadable.values())}")
    kept = [at for at in range(len(files)) if at not in unreadable]
    return torch.from_numpy(images[kept] if unreadable else images), kept, tuple(sorted(unreadable.values()))


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[1]} pixels"

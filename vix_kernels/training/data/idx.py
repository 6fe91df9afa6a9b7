"""Read MNIST and other datasets in the same format: images and labels in four idx files, which may be compressed."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..augment import random_affine
from ..draws import Draws
from .dataset import Dataset, make_dataset
from .images import HeldImages

IMAGES, LABELS = 0x0803, 0x0801  # magic numbers for arrays of unsigned bytes with 3 dimensions, and with 1 dimension
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def find_idx(folder: Path, part: str, kind: str) -> Path | None:
    """Return the file for `part` (train or t10k) and `kind` (images-idx3 or labels-idx1), or None if it does not exist.

    In some copies of MNIST, the file names have a dot instead of a hyphen before idx, as in train-images.idx3-ubyte.
    """
    names = (f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-', '.')}-ubyte")
    files = (folder / (name + ending) for name in names for ending in (".gz", ""))
    return next((file for file in files if file.is_file()), None)


def is_idx(folder: Path) -> bool:
    return find_idx(folder, "train", "images-idx3") is not None


def idx(folder: Path) -> Dataset:
    """Read the grayscale images and labels of the train and t10k splits. The files may be compressed (.gz).

    The classes are the numbers from 0 to the largest training label, or the classes of Fashion-MNIST if the name of `folder`
    contains "fashion".
    """
    parts = []
    for part in ("train", "t10k"):
        arrays = []
        for kind, magic in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
            path = find_idx(folder, part, kind)
            if path is None:
                raise FileNotFoundError(f"{part}-{kind}-ubyte.gz")
            arrays.append(_read(path, magic))
        images, labels = arrays
        parts.append(HeldImages(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))))
    fashion = "fashion" in folder.resolve().name.lower()
    classes = FASHION if fashion else tuple(map(str, range(int(parts[0].labels.max()) + 1)))
    return make_dataset(folder.resolve().name, classes, *parts, augment=drawings)


def drawings(images: Tensor, draws: Draws) -> Tensor:
    """Augment digits and drawings: rotate, zoom and shift them, without flips."""
    return random_affine(images, draws, degrees=10, scale=0.1, shift=0.1)


def _read(path: Path, magic: int) -> np.ndarray:
    """Return the array in an idx file. A big-endian header (magic number and sizes, 32 bits each) precedes the uint8 values."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    dimensions = magic & 0xFF
    header = np.frombuffer(content[: 4 * (1 + dimensions)], ">u4")
    if len(header) != 1 + dimensions or header[0] != magic:
        raise ValueError(f"{path.name}: expected the magic number {magic:#06x} and {dimensions} sizes")
    shape, values = tuple(map(int, header[1:])), np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
    if values.size != np.prod(shape):
        raise ValueError(f"{path.name}: expected {np.prod(shape)} bytes for sizes {shape}, got {values.size}")
    return values.reshape(shape).copy()

"""Read CIFAR-10 and CIFAR-100 in their original formats: Python pickles or binary files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..unpickle import Unpickler
from .dataset import Dataset, integer_labels, make_dataset
from .images import HeldImages

PIXELS = 3 * 32 * 32
# Each entry starts with the training files, the test file, and the file with the class names. For pickles, it ends with the
# keys of the labels and of the class names. For binary files, it ends with the number of bytes before each image, the last of
# which is the label.
PYTHON = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", b"labels", b"label_names"),
    "cifar100": (["train"], "test", "meta", b"fine_labels", b"fine_label_names"),
}
BINARY = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt", 1),
    "cifar100": (["train.bin"], "test.bin", "fine_label_names.txt", 2),
}
# The dataset is in the given folder or in a subfolder that was unpacked from one of the original archives.
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


def find_cifar(folder: Path) -> Path | None:
    """Return the first of `folder` and its subfolders in FOLDERS that contains a file with class names, or None."""
    for inner in FOLDERS:
        if any((folder / inner / files[2]).is_file() for files in (*PYTHON.values(), *BINARY.values())):
            return folder / inner
    return None


def cifar(folder: Path) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 in either format from a folder that `find_cifar` returned."""
    for name, (train, test, meta, labels, names) in PYTHON.items():
        if (folder / meta).is_file():
            classes = tuple(each.decode() for each in _unpickled(folder / meta)[names])
            parts = [_python(folder / file, labels) for file in (*train, test)]
            return _dataset(name, classes, parts)
    for name, (train, test, meta, header) in BINARY.items():
        if (folder / meta).is_file():
            classes = tuple((folder / meta).read_text().split())
            return _dataset(name, classes, [_binary(folder / file, header) for file in (*train, test)])
    raise ValueError(f"expected one of {', '.join(files[2] for files in (*PYTHON.values(), *BINARY.values()))}")


def _dataset(name: str, classes: tuple[str, ...], parts: list[HeldImages]) -> Dataset:
    *train, test = parts
    joined = HeldImages(torch.cat([part.images for part in train]), torch.cat([part.labels for part in train]))
    return make_dataset(name, classes, joined, test)


def _python(path: Path, key: bytes) -> HeldImages:
    content = _unpickled(path)
    pixels = np.asarray(content[b"data"], np.uint8)
    return HeldImages(_images(path, pixels), integer_labels(content[key]))


def _binary(path: Path, header: int) -> HeldImages:
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % (header + PIXELS):
        raise ValueError(f"{path.name}: expected a multiple of {header + PIXELS} bytes, got {len(content)}")
    rows = content.reshape(-1, header + PIXELS)
    return HeldImages(_images(path, rows[:, header:]), torch.from_numpy(rows[:, header - 1].astype(np.int64)))


def _images(path: Path, pixels: np.ndarray) -> Tensor:
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise ValueError(f"{path.name}: expected images of {PIXELS} bytes, got an array of shape {pixels.shape}")
    return torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, 3, 32, 32)


_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


def _unpickled(path: Path) -> dict[bytes, Any]:
    return Unpickler(path.read_bytes(), _ARRAYS, encoding="bytes").load()

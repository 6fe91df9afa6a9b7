"""Data sets held in memory as tensors. A new one is a function in this file and a line in `DATASETS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .augment import random_affine, random_flip_crop
from .config import UserError


@dataclass(frozen=True)
class Dataset:
    """Images are uint8 (n, channels, height, width), labels int64 (n,); `augment` sees float images in [0, 1]."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    max_value: int
    mean: Tensor  # of each channel, (channels, 1, 1), over the training images as floats in [0, 1]; std likewise
    std: Tensor
    augment: Callable[[Tensor], Tensor]
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # what suits these images, beside their shape

    def to(self, device: torch.device) -> Dataset:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def description(self) -> dict[str, Any]:
        """For the checkpoint: what its reader needs to feed it and to name its classes, and to know the data again."""
        return {
            "classes": list(self.classes),
            "train_images": len(self.train_labels),
            "test_images": len(self.test_labels),
            "max_value": self.max_value,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def inputs(self, images: Tensor, augment: bool = False) -> Tensor:
        """uint8 images to what a model reads: augmented if asked, zero mean and unit variance."""
        x = images.float() / self.max_value
        return ((self.augment(x) if augment else x) - self.mean) / self.std


def load_dataset(name: str) -> Dataset:
    """The data set of this name, or the pack at this path (see `pack`)."""
    if name not in DATASETS and Path(name).suffix != ".npz":
        raise UserError(f"--dataset: expected {', '.join(DATASETS)} or the path of a pack (.npz), got {name!r}")
    try:
        return DATASETS[name]() if name in DATASETS else pack(name)
    except ModuleNotFoundError as error:
        raise UserError(f"--dataset: {name} needs {error.name}: pip install 'vix_kernels[train]'") from error
    except Exception as error:  # whatever a missing, truncated or foreign file makes its reader raise
        raise UserError(f"--dataset: cannot read {name}, it is missing, damaged or no data set: {error!r}") from error


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, shipped with scikit-learn; 360 are held out, 20 % of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    if pixels.shape != (1797, 64) or labels.min() < 0 or labels.max() > 9 or pixels.min() < 0 or pixels.max() > 16:
        raise ValueError("expected 1797 images of 64 pixels from 0 to 16")
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    images, labels = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
    mean, std = pixel_statistics(images[train], max_value=16)
    return Dataset(
        name="digits",
        classes=tuple("0123456789"),
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        max_value=16,
        mean=mean,
        std=std,
        augment=lambda x: random_affine(x, degrees=15, scale=0.1, shift=0.125),
        model_kwargs={"patch_size": 2},
    )


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def pack(path: str | Path) -> Dataset:
    """JPEG images of one size, decoded to RGB, from one .npz file; those of split 0 train, those of split 1 are held out.

    Image i is the JPEG file `headers[header_offsets[h] : header_offsets[h + 1]] + scans[offsets[i] : offsets[i + 1]]` of
    bytes, h = header_id[i]: small images share the headers that would outweigh them. `labels[i]` is a place in `classes`.
    """
    with np.load(path) as file:
        names = ("headers", "header_offsets", "header_id", "scans", "offsets", "labels", "split", "classes")
        arrays = {name: file[name] for name in names}
    labels, split = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("labels", "split"))
    classes = tuple(map(str, arrays["classes"]))
    if not len(labels) == len(split) == len(arrays["header_id"]) == len(arrays["offsets"]) - 1:
        raise ValueError("labels, split, header_id and offsets speak of different numbers of images")
    train, test = split == 0, split == 1
    if not (train.any() and test.any() and (train | test).all()):
        raise ValueError(f"expected a split of 0 and 1, got {split.unique().tolist()}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"expected labels from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}")
    images = _decode(arrays)
    mean, std = pixel_statistics(images[train], max_value=255)
    side = math.gcd(*images.shape[2:])
    patch_size = max(p for p in range(1, side + 1) if side % p == 0 and p <= max(1, side // 8))  # 8 x 8 tokens or more
    return Dataset(
        name=Path(path).stem,
        classes=classes,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        max_value=255,
        mean=mean,
        std=std,
        augment=lambda x: random_flip_crop(x, shift=0.125),
        model_kwargs={"patch_size": patch_size},
    )


def _decode(arrays: dict[str, np.ndarray]) -> Tensor:
    """The images of a pack, uint8 (n, 3, height, width)."""
    from PIL import Image

    headers, scans = arrays["headers"].tobytes(), arrays["scans"].tobytes()
    header_offsets, offsets = arrays["header_offsets"].tolist(), arrays["offsets"].tolist()
    images = None
    for i, h in enumerate(tqdm(arrays["header_id"].tolist(), "decoding", unit="image", leave=False, disable=None)):
        jpeg = headers[header_offsets[h] : header_offsets[h + 1]] + scans[offsets[i] : offsets[i + 1]]
        try:
            pixels = np.asarray(Image.open(BytesIO(jpeg), formats=["JPEG"]).convert("RGB"))
        except OSError as error:
            raise ValueError(f"image {i} is no whole JPEG image") from error
        if images is None:
            images = np.empty((len(offsets) - 1, 3, *pixels.shape[:2]), np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            raise ValueError(f"image {i}: expected the shape of image 0, {images.shape[2:]}, got {pixels.shape[:2]}")
        images[i] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def pixel_statistics(images: Tensor, *, max_value: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images (n, channels, height, width), as (channels, 1, 1).

    Counted, not summed up: exact, and without a float copy of the images.
    """
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256).double() / max_value
    mean = share @ values
    std = (share @ values.square() - mean.square()).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)

"""A data set, and what its readers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..augment import random_flip_crop
from ..draws import Draws
from .images import HeldImages, Images

Augmentation = Callable[[Tensor, Draws], Tensor]


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    max_value: int  # of the uint8 images
    mean: Tensor  # of each channel, (channels, 1, 1), over the training images as floats in [0, 1]; std likewise
    std: Tensor
    augment: Augmentation  # of float images in [0, 1]
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # what suits these images, beside their shape
    unreadable: tuple[str, ...] = ()  # files that were left out

    def to(self, device: torch.device) -> Dataset:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("train", "test", "mean", "std")})

    def all_unreadable(self) -> set[str]:
        """Those that were left out, and those that have been met since."""
        return {*self.unreadable, *self.train.unreadable, *self.test.unreadable}

    def description(self) -> dict[str, Any]:
        """For the checkpoint: what its reader needs to feed it and to name its classes, and to know the data again."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "max_value": self.max_value,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def normalised(self, images: Tensor) -> Tensor:
        """Floats in [0, 1] to what a model reads: zero mean and unit variance."""
        return (images - self.mean) / self.std

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 images to what a model reads."""
        return self.normalised(images.float() / self.max_value)


def photographs(images: Tensor, draws: Draws) -> Tensor:
    """As small photographs are augmented: mirrored, and shifted by up to an eighth of their side."""
    return random_flip_crop(images, draws, shift=0.125)


def make_dataset(
    name: str,
    classes: tuple[str, ...],
    train: Images,
    test: Images,
    *,
    max_value: int = 255,
    augment: Augmentation = photographs,
    patch_size: int | None = None,
    statistics: Tensor | None = None,
    unreadable: tuple[str, ...] = (),
) -> Dataset:
    """A data set, by default augmented as photographs, and in as large patches as leave 8 x 8 tokens or more.

    Args:
        statistics: uint8 images whose mean and deviation stand for all; default the training images, which are in memory then.

    Raises:
        ValueError: labels are out of range, a class has no image to learn from, or there is one class, or a name that cannot be
            shown.
    """
    for text in (name, *classes):
        if not _is_text(text):
            raise ValueError(f"expected names in UTF-8, got {text!r}: rename its folder")
    if len(classes) < 2:
        raise ValueError(f"expected 2 classes or more, got {', '.join(classes) or 'none'}")
    for part, images in {"training": train, "test": test}.items():
        labels = images.labels
        if len(images) != len(labels) or not len(labels):
            raise ValueError(f"expected as many {part} labels as images, and some; got {len(labels)} and {len(images)}")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"expected labels from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}")
    counts = train.labels.bincount(minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"expected training images of every class, got none of {', '.join(empty[:5])}")
    if patch_size is None:
        side = math.gcd(*train.shape[1:])
        patch_size = max(p for p in range(1, side + 1) if side % p == 0 and p <= max(1, side // 8))
    if statistics is None:
        assert isinstance(train, HeldImages)
        statistics = train.images
    mean, std = pixel_statistics(statistics, max_value=max_value)
    return Dataset(
        name, classes, train, test, max_value, mean, std, augment, {"patch_size": patch_size}, unreadable
    )  # fmt: skip


def integer_labels(values: Any) -> Tensor:
    """int64 labels of an array or a sequence. Raises `ValueError` for numbers that are not integers."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"expected labels that are integers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _is_text(name: str) -> bool:
    """File names may hold bytes that no encoding explains."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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

"""The classes `Source` and `Dataset`, and functions shared by the readers of all formats."""

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
class Source:
    """A dataset before its images are loaded.

    It contains the information needed to create a model and to check the settings of a run.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height and width of an image
    train_images: int  # number of training images, including those that cannot be decoded
    model_kwargs: dict[str, Any]  # suggested model arguments, as in Dataset
    load: Callable[[], Dataset]
    streams: bool = False  # whether images are decoded on demand


@dataclass(frozen=True)
class Dataset:
    """Training and test images with their classes, pixel statistics and augmentation."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    max_value: int  # largest pixel value of the uint8 images, which is mapped to 1
    mean: Tensor  # (channels, 1, 1), mean of the training images, or of a sample of them, as floats in [0, 1]
    std: Tensor  # (channels, 1, 1), standard deviation of the same images
    augment: Augmentation  # a function that augments float images in [0, 1]
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # suggested model arguments, except the shape
    unreadable: tuple[str, ...] = ()  # files skipped while loading, each with the reason

    def source(self) -> Source:
        return Source(self.name, self.classes, self.train.shape, len(self.train), self.model_kwargs, lambda: self)

    def to(self, device: torch.device) -> Dataset:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("train", "test", "mean", "std")})

    def all_unreadable(self) -> set[str]:
        """Return the files that have been skipped so far, each with the reason."""
        return {*self.unreadable, *self.train.unreadable, *self.test.unreadable}

    def description(self) -> dict[str, Any]:
        """Return the description of this dataset that is stored in checkpoints.

        It is used to normalize inputs, to name classes, and to check that a resumed run uses the same dataset.
        """
        return {
            "name": self.name,
            "classes": list(self.classes),
            "shape": list(self.train.shape),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "max_value": self.max_value,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def normalised(self, images: Tensor) -> Tensor:
        """Normalize float images in [0, 1] to zero mean and unit variance, as models expect."""
        return (images - self.mean) / self.std

    def inputs(self, images: Tensor) -> Tensor:
        """Convert uint8 images to normalized floats, as models expect."""
        return self.normalised(images.float() / self.max_value)


def photographs(images: Tensor, draws: Draws) -> Tensor:
    """Augment small photographs: flip them horizontally at random, and shift them by up to an eighth of their size."""
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
    """Check the labels and names, compute the pixel statistics, and return the dataset.

    Args:
        patch_size: the suggested patch size for models. By default, the result of `suited_patch_size`.
        statistics: the uint8 images from which to compute the mean and standard deviation. By default, the training images,
            which must then be `HeldImages`.

    Raises:
        ValueError: if there are no training or test images, labels are out of range, a class has no training image, there are
            fewer than 2 classes, the numbers of labels and images differ, or a name cannot be encoded in UTF-8.
    """
    for text in (name, *classes):
        if not _is_text(text):
            raise ValueError(f"expected names in UTF-8, got {text!r}: rename its folder")
    if len(classes) < 2:
        raise ValueError(f"expected 2 classes or more, got {', '.join(classes) or 'none'}")
    for part, images in {"training": train, "test": test}.items():
        if len(images) != len(images.labels):
            raise ValueError(f"expected as many {part} labels as images, got {len(images.labels)} and {len(images)}")
    check_labels(classes, train.labels, test.labels)
    if patch_size is None:
        patch_size = suited_patch_size(train.shape)
    if statistics is None:
        assert isinstance(train, HeldImages)
        statistics = train.images
    mean, std = pixel_statistics(statistics, max_value=max_value)
    return Dataset(
        name, classes, train, test, max_value, mean, std, augment, {"patch_size": patch_size}, unreadable
    )  # fmt: skip


def check_labels(classes: tuple[str, ...], train: Tensor, test: Tensor) -> None:
    """Raise `ValueError` if there are no training or test images, a label is out of range, or a class has no training image."""
    for part, labels in {"training": train, "test": test}.items():
        if not len(labels):
            raise ValueError(f"expected at least one {part} image, got none")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"expected labels from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}")
    counts = train.bincount(minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"expected training images of every class, got none of {', '.join(empty[:5])}")


def suited_patch_size(shape: tuple[int, int, int]) -> int:
    """Return the largest divisor of gcd(height, width) that is at most an eighth of the gcd, or 1 if the gcd is less than 8.

    For square images with at least 8 pixels per side, this is the largest patch size that gives at least 8 x 8 tokens.
    """
    side = math.gcd(*shape[1:])
    return max(p for p in range(1, side + 1) if side % p == 0 and p <= max(1, side // 8))


def integer_labels(values: Any) -> Tensor:
    """Convert an array or a sequence of integers to int64 labels. Raise `ValueError` for other types."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"expected labels that are integers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _is_text(name: str) -> bool:
    """Return whether `name` can be encoded in UTF-8. File names may contain bytes that are not valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def pixel_statistics(images: Tensor, *, max_value: int) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel of uint8 images (n, channels, height, width).

    Both have the shape (channels, 1, 1) and refer to values divided by `max_value`. They are computed from a histogram, which
    is exact and needs no float copy of the images. The deviation of a constant channel is set to 1, to avoid a division by
    zero.
    """
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    frequencies = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256).double() / max_value
    mean = frequencies @ values
    std = (frequencies * (values - mean[:, None]).square()).sum(1).sqrt()
    std = torch.where(counts.amax(1) == counts.sum(1), 1.0, std)
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)

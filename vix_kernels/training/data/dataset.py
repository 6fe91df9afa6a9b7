"""A data set in memory, and what its readers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..augment import random_flip_crop


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
    unreadable: tuple[str, ...] = ()  # files that were left out

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


def make_dataset(
    name: str,
    classes: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    max_value: int = 255,
    augment: Callable[[Tensor], Tensor] = lambda x: random_flip_crop(x, shift=0.125),
    patch_size: int | None = None,
    unreadable: tuple[str, ...] = (),
) -> Dataset:
    """A data set of (images, labels) for training and testing.

    By default as photographs are augmented, and in as large patches as leave 8 x 8 tokens or more.

    Raises:
        ValueError: labels are out of range, or a class has no image to learn from.
    """
    for part, (images, labels) in {"training": train, "test": test}.items():
        if len(images) != len(labels) or not len(labels):
            raise ValueError(f"expected as many {part} labels as images, and some; got {len(labels)} and {len(images)}")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"expected labels from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}")
    counts = train[1].bincount(minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"expected training images of every class, got none of {', '.join(empty[:5])}")
    if patch_size is None:
        side = math.gcd(*train[0].shape[2:])
        patch_size = max(p for p in range(1, side + 1) if side % p == 0 and p <= max(1, side // 8))
    mean, std = pixel_statistics(train[0], max_value=max_value)
    return Dataset(
        name, classes, *train, *test, max_value, mean, std, augment, {"patch_size": patch_size}, unreadable
    )  # fmt: skip


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

"""Data sets held in memory as tensors. A new one is a function in this file and a line in `DATASETS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import UserError


@dataclass(frozen=True)
class Dataset:
    """Images are uint8 (n, channels, height, width), labels int64 (n,); `augment` sees float images in [0, 1]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    max_value: int
    mean: float
    std: float
    augment: Callable[[Tensor], Tensor]
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # what suits these images, beside their shape

    def to(self, device: torch.device) -> Dataset:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def inputs(self, images: Tensor, augment: bool = False) -> Tensor:
        """uint8 images to what a model reads: augmented if asked, zero mean and unit variance."""
        x = images.float() / self.max_value
        return ((self.augment(x) if augment else x) - self.mean) / self.std


def load_dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise UserError(f"--dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    try:
        return DATASETS[name]()
    except ModuleNotFoundError as error:
        raise UserError(f"dataset {name} needs {error.name}: pip install 'vix_kernels[train]'") from error
    except Exception as error:  # whatever a missing, truncated or foreign file makes its reader raise
        raise UserError(f"dataset {name} cannot be read, its files are missing or damaged: {error!r}") from error


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, shipped with scikit-learn; 360 are held out, 20 % of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    if pixels.shape != (1797, 64) or labels.min() < 0 or labels.max() > 9 or pixels.min() < 0 or pixels.max() > 16:
        raise ValueError("expected 1797 images of 64 pixels from 0 to 16")
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    images, labels = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
    values = images[train].float() / 16
    return Dataset(
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        num_classes=10,
        max_value=16,
        mean=values.mean().item(),
        std=values.std().item(),
        augment=lambda x: random_affine(x, degrees=15, scale=0.1, shift=0.125),
        model_kwargs={"patch_size": 2},
    )


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def random_affine(images: Tensor, *, degrees: float, scale: float, shift: float) -> Tensor:
    """Turn, zoom and shift each image (batch, channels, height, width) by its own uniform draw, filling with zeros.

    `scale` is the largest relative change of size, `shift` the largest shift as a part of the image. The draws are
    made on the CPU, so that every device sees the same images.
    """
    turn, zoom, dx, dy = torch.rand(4, len(images)).mul(2).sub(1)
    angle, zoom = turn * math.radians(degrees), 1 + scale * zoom
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([cos, -sin, 2 * shift * dx, sin, cos, 2 * shift * dy], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

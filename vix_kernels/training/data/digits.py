"""Handwritten digits. They are part of scikit-learn and need no download."""

from __future__ import annotations

import torch

from ..augment import random_affine
from .dataset import Dataset, make_dataset
from .images import HeldImages


def digits() -> Dataset:
    """Return 1,797 handwritten digits of 8 x 8 pixels from scikit-learn. 360 of them (20% of each class) are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    if pixels.shape != (1797, 64) or labels.min() < 0 or labels.max() > 9 or pixels.min() < 0 or pixels.max() > 16:
        raise ValueError("expected 1797 images of 64 pixels, with values from 0 to 16")
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    images, labels = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
    return make_dataset(
        "digits",
        tuple("0123456789"),
        HeldImages(images[train], labels[train]),
        HeldImages(images[test], labels[test]),
        max_value=16,
        augment=lambda x, draws: random_affine(x, draws, degrees=15, scale=0.1, shift=0.125),
        patch_size=2,
    )

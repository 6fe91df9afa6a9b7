"""Random augmentations for float images (batch, channels, height, width).

Each function processes a whole batch at once. Except in `mix`, each image gets different random numbers. This also holds for
the automatic augmentation in trivial.py. In contrast, the automatic augmentations of torchvision and kornia apply the same
operation to all images of a batch, and those of timm process one PIL image at a time.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws, sent


def random_affine(images: Tensor, draws: Draws, *, degrees: float, scale: float, shift: float) -> Tensor:
    """Rotate, zoom and shift each image by uniformly drawn amounts. Pixels that come from outside the image are zero.

    Args:
        degrees: the largest rotation in either direction.
        scale: the largest relative change in the height and width of the sampled region.
        shift: the largest shift in each direction, as a fraction of the image size.
    """
    rotation, zoom, dx, dy = (draws.uniform(-1, 1) for _ in range(4))
    angle, zoom = rotation * math.radians(degrees), 1 + scale * zoom
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    return warp(images, [[cos, -sin, 2 * shift * dx], [sin, cos, 2 * shift * dy]])


def random_resized_crop(images: Tensor, draws: Draws, *, scale: float) -> Tensor:
    """Crop a random part of each image and enlarge it to the size of the image (arXiv:1409.4842).

    The area of the crop is at least `scale` times the area of the image. Its aspect ratio is that of the image times a
    factor between 3/4 and 4/3.
    """
    area = draws.uniform(scale, 1)
    aspect = (draws.uniform(-1, 1) * (-area.log()).clamp(max=math.log(4 / 3))).exp()  # keeps the crop inside the image
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    x, y = (1 - width) * draws.uniform(-1, 1), (1 - height) * draws.uniform(-1, 1)
    return warp(images, [[width, 0.0, x], [0.0, height, y]], outside="border")


def warp(images: Tensor, matrix: list[list[Tensor | float]], outside: str = "zeros") -> Tensor:
    """Apply an affine transformation: sample output pixel (x, y) from the input position `matrix @ (x, y, 1)`.

    Coordinates range from -1 to 1.

    Args:
        matrix: 2 rows of 3 entries. An entry is a number, or a tensor (batch,) with one number for each image.
        outside: what to sample outside the input: "zeros", or "border" for the nearest pixel.
    """
    theta = images.new_empty(len(images), 2, 3)
    for row, column in product(range(2), range(3)):
        entry, target = matrix[row][column], theta[:, row, column]
        target.copy_(sent(entry, images.device)) if isinstance(entry, Tensor) else target.fill_(entry)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)


def random_flip_crop(images: Tensor, draws: Draws, *, shift: float) -> Tensor:
    """Flip each image horizontally with probability 0.5, pad it by reflection, and take a random crop of the original size.

    `shift` is the padding on each side as a fraction of the image size. It must be less than 1, and the padding is rounded down
    to whole pixels.
    """
    batch, channels, height, width = images.shape
    rows, columns = _shifted(height, shift, draws), _shifted(width, shift, draws)
    columns = torch.where(draws.chance(0.5)[:, None], columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None], rows[:, None, :, None]
    return images[tuple(sent(i, images.device) for i in (*index, columns[:, None, None, :]))]


def _shifted(size: int, shift: float, draws: Draws) -> Tensor:
    """Draw a random shift along one axis for each image. Positions outside the image are reflected at its borders.

    Returns:
        The source position of each pixel, (batch, size).
    """
    largest = int(shift * size)
    source = (torch.arange(size) + draws.integers(-largest, largest + 1)[:, None]).abs()
    return size - 1 - (size - 1 - source).abs()


def random_erasing(images: Tensor, draws: Draws, probability: float) -> Tensor:
    """Erase a random rectangle of each image with the given probability (arXiv:1708.04896).

    Erased pixels are set to 0, which is the mean of normalized images. The size of the rectangle is random: it covers 2 to 33
    percent of the image, and its aspect ratio is between 1/3.3 and 3.3. Its sides are then rounded to whole pixels and limited
    to the size of the image.
    """
    height, width = images.shape[2:]
    area = draws.uniform(0.02, 0.33) * height * width
    aspect = draws.uniform(-math.log(3.3), math.log(3.3)).exp()
    rows = _interval(height, (area * aspect).sqrt(), draws.uniform())
    columns = _interval(width, (area / aspect).sqrt(), draws.uniform())
    selected = draws.chance(probability)[:, None, None]
    return images.masked_fill(sent((rows[:, :, None] & columns[:, None, :] & selected).unsqueeze(1), images.device), 0)


def _interval(size: int, length: Tensor, offset: Tensor) -> Tensor:
    """Return a mask (batch, size) that is True for `length` consecutive pixels.

    `length` is rounded, and clamped to the range from 1 to `size`. `offset` in [0, 1) selects one of the possible starts.
    """
    length = length.round().clamp(1, size)
    start = (offset * (size - length + 1)).floor()
    position = torch.arange(size)
    return (position >= start[:, None]) & (position < (start + length)[:, None])


def mix(images: Tensor, labels: Tensor, draws: Draws, *, classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix image i with image `batch - 1 - i`. All pairs use the same random numbers.

    mixup (arXiv:1710.09412) blends the two images. cutmix (arXiv:1905.04899) copies a rectangle from the other image. If both
    are enabled, each is used with probability 0.5.

    Args:
        mixup, cutmix: the parameter a of Beta(a, a), from which the weight of image i is drawn. 0 disables the method.
            At least one of the two methods must be enabled.

    Returns:
        The mixed images, and class probabilities (batch, classes) as their targets.
    """
    cut = bool(cutmix) and (not mixup or draws.batch.random() < 0.5)
    strength = cutmix if cut else mixup
    weight = draws.batch.beta(strength, strength)
    others = images.flip(0)
    if cut:
        height, width = images.shape[2:]
        side = math.sqrt(1 - weight)
        (top, left), (tall, wide) = draws.batch.random(2), (round(side * height), round(side * width))
        top, left = int(top * (height - tall + 1)), int(left * (width - wide + 1))
        box = (..., slice(top, top + tall), slice(left, left + wide))
        images = images.clone()
        images[box] = others[box]
        weight = 1 - tall * wide / (height * width)  # recomputed, because the sides are rounded to whole pixels
    else:
        images = weight * images + (1 - weight) * others
    targets = F.one_hot(labels, classes).to(images.dtype)
    return images, weight * targets + (1 - weight) * targets.flip(0)

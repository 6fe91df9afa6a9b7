"""Random changes of float images (batch, channels, height, width), each image by draws of its own, whole batches at once.

Of the libraries, torchvision and kornia apply one operation of an automatic augmentation to a whole batch, and timm changes one
PIL image at a time.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws, sent


def random_affine(images: Tensor, draws: Draws, *, degrees: float, scale: float, shift: float) -> Tensor:
    """Turn, zoom and shift by uniform draws, filling with zeros.

    `scale` is the largest relative change of size, `shift` the largest shift as a part of the image.
    """
    turn, zoom, dx, dy = (draws.uniform(-1, 1) for _ in range(4))
    angle, zoom = turn * math.radians(degrees), 1 + scale * zoom
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    return warp(images, [[cos, -sin, 2 * shift * dx], [sin, cos, 2 * shift * dy]])


def random_resized_crop(images: Tensor, draws: Draws, *, scale: float) -> Tensor:
    """Enlarge a random part of each image to the size of the image (arXiv:1409.4842).

    The part has at least `scale` of the area, and 3/4 to 4/3 of the aspect ratio.
    """
    area = draws.uniform(scale, 1)
    aspect = (draws.uniform(-1, 1) * (-area.log()).clamp(max=math.log(4 / 3))).exp()  # no side is longer than the image's
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    x, y = (1 - width) * draws.uniform(-1, 1), (1 - height) * draws.uniform(-1, 1)
    return warp(images, [[width, 0.0, x], [0.0, height, y]], outside="border")


def warp(images: Tensor, matrix: list[list[Tensor | float]], outside: str = "zeros") -> Tensor:
    """Look every pixel (x, y), from -1 to 1, up at matrix @ (x, y, 1), beyond the image as `outside` says: zeros or border.

    Entries of the matrix: a number an image.
    """
    theta = images.new_empty(len(images), 2, 3)
    for row, column in product(range(2), range(3)):
        entry, place = matrix[row][column], theta[:, row, column]
        place.copy_(sent(entry, images.device)) if isinstance(entry, Tensor) else place.fill_(entry)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)


def random_flip_crop(images: Tensor, draws: Draws, *, shift: float) -> Tensor:
    """Mirror left and right half of the time, then crop at random from the image padded by its own reflection.

    `shift` is the padding on each side as a part of the image; whole pixels, at most one less than the image has.
    """
    batch, channels, height, width = images.shape
    rows, columns = _shifted(height, shift, draws), _shifted(width, shift, draws)
    columns = torch.where(draws.chance(0.5)[:, None], columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None], rows[:, None, :, None]
    return images[tuple(sent(i, images.device) for i in (*index, columns[:, None, None, :]))]


def _shifted(size: int, shift: float, draws: Draws) -> Tensor:
    """(batch, size): for each pixel of a shifted line the pixel it comes from, reflected at the borders."""
    most = int(shift * size)
    source = (torch.arange(size) + draws.integers(-most, most + 1)[:, None]).abs()
    return size - 1 - (size - 1 - source).abs()


def random_erasing(images: Tensor, draws: Draws, probability: float) -> Tensor:
    """Set a rectangle of some images to 0, which is their mean once they are normalised (arXiv:1708.04896).

    Of 2 to 33 per cent of the image, up to 3.3 times as long as wide, anywhere.
    """
    height, width = images.shape[2:]
    area = draws.uniform(0.02, 0.33) * height * width
    aspect = draws.uniform(-math.log(3.3), math.log(3.3)).exp()
    rows = _interval(height, (area * aspect).sqrt(), draws.uniform())
    columns = _interval(width, (area / aspect).sqrt(), draws.uniform())
    chosen = draws.chance(probability)[:, None, None]
    return images.masked_fill(sent((rows[:, :, None] & columns[:, None, :] & chosen).unsqueeze(1), images.device), 0)


def _interval(size: int, length: Tensor, place: Tensor) -> Tensor:
    """(batch, size), true on `length` pixels, rounded, at least one; `place` in [0, 1) says where they start."""
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor()
    at = torch.arange(size)
    return (at >= start[:, None]) & (at < (start + length)[:, None])


def mix(images: Tensor, labels: Tensor, draws: Draws, *, classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Every image with the one at its place from the end, by one draw for the batch; and the shares of the classes.

    mixup (arXiv:1710.09412) blends them, cutmix (arXiv:1905.04899) puts a rectangle of the other in, the share of either drawn
    from Beta(a, a) with its `mixup` or `cutmix`, 0 for never; with both, each half of the time.

    Returns:
        Images of the same shape, and targets (batch, classes), which sum to 1.
    """
    cut = bool(cutmix) and (not mixup or draws.batch.random() < 0.5)
    strength = cutmix if cut else mixup
    share = draws.batch.beta(strength, strength)
    others = images.flip(0)
    if cut:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        (top, left), (tall, wide) = draws.batch.random(2), (round(side * height), round(side * width))
        top, left = int(top * (height - tall + 1)), int(left * (width - wide + 1))
        box = (..., slice(top, top + tall), slice(left, left + wide))
        images = images.clone()
        images[box] = others[box]
        share = 1 - tall * wide / (height * width)  # of whole pixels
    else:
        images = share * images + (1 - share) * others
    targets = F.one_hot(labels, classes).to(images.dtype)
    return images, share * targets + (1 - share) * targets.flip(0)

"""Random changes of float images (batch, channels, height, width), each image by a draw of its own.

The draws are made on the CPU, so that every device sees the same images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_affine(images: Tensor, *, degrees: float, scale: float, shift: float) -> Tensor:
    """Turn, zoom and shift by uniform draws, filling with zeros.

    `scale` is the largest relative change of size, `shift` the largest shift as a part of the image.
    """
    turn, zoom, dx, dy = torch.rand(4, len(images)).mul(2).sub(1)
    angle, zoom = turn * math.radians(degrees), 1 + scale * zoom
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([cos, -sin, 2 * shift * dx, sin, cos, 2 * shift * dy], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def random_flip_crop(images: Tensor, *, shift: float) -> Tensor:
    """Mirror left and right half of the time, then crop at random from the image padded by its own reflection.

    `shift` is the padding on each side as a part of the image; whole pixels, at most one less than the image has.
    """
    batch, channels, height, width = images.shape
    rows, columns = _shifted(height, shift, batch), _shifted(width, shift, batch)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None], rows[:, None, :, None]
    return images[tuple(i.to(images.device) for i in (*index, columns[:, None, None, :]))]


def _shifted(size: int, shift: float, batch: int) -> Tensor:
    """(batch, size): for each pixel of a shifted line the pixel it comes from, reflected at the borders."""
    most = int(shift * size)
    source = (torch.arange(size) + torch.randint(-most, most + 1, (batch, 1))).abs()
    return size - 1 - (size - 1 - source).abs()

"""TrivialAugment (Müller and Hutter, arXiv:2103.10158): one random operation per image, with a uniformly drawn strength.

The operations and their maximum strengths come from the paper's augmentation space "TA (Wide)", with one exception:
translations move an image by at most half its side instead of 32 pixels.

The operations take float images (batch, channels, height, width) in [0, 1]. `strength` and `sign` have the shape
(batch, 1, 1, 1). `strength` is between 0 and 1, and `sign` is -1 or 1. Some operations ignore one or both of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import warp
from .draws import Draws, sent

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def trivial_augment(images: Tensor, draws: Draws) -> Tensor:
    """Apply a randomly selected operation to each image."""
    selected, strength = draws.integers(0, len(OPERATIONS)), draws.uniform()
    sign = torch.where(draws.chance(0.5), 1.0, -1.0)
    out = images.clone()
    for number, operation in enumerate(OPERATIONS):
        at = (selected == number).nonzero()[:, 0]
        if len(at):
            index = sent(at, images.device)
            strengths, signs = (sent(each[at], images.device)[:, None, None, None] for each in (strength, sign))
            out[index] = operation(images[index], strengths, signs)
    return out


def identity(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return x


def shear_x(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return warp(x, [[1.0, _numbers(0.99 * sign * strength), 0.0], [0.0, 1.0, 0.0]])


def shear_y(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return warp(x, [[1.0, 0.0, 0.0], [_numbers(0.99 * sign * strength), 1.0, 0.0]])


def translate_x(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return warp(x, [[1.0, 0.0, _numbers(sign * strength)], [0.0, 1.0, 0.0]])


def translate_y(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return warp(x, [[1.0, 0.0, 0.0], [0.0, 1.0, _numbers(sign * strength)]])


def rotate(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    angle = _numbers(sign * strength) * math.radians(135)
    aspect = x.shape[2] / x.shape[3]  # warp's coordinates run from -1 to 1 along both sides, even if the image is not square
    return warp(x, [[angle.cos(), -angle.sin() * aspect, 0.0], [angle.sin() / aspect, angle.cos(), 0.0]])


def brightness(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _extrapolate(torch.zeros_like(x), x, strength, sign)


def color(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _extrapolate(_gray(x), x, strength, sign)


def contrast(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _extrapolate(_gray(x).mean(dim=(2, 3), keepdim=True), x, strength, sign)


def sharpness(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    smooth = x.clone()  # border pixels are not smoothed
    smooth[:, :, 1:-1, 1:-1] = (9 * F.avg_pool2d(x, 3, stride=1) + 4 * x[:, :, 1:-1, 1:-1]) / 13
    return _extrapolate(smooth, x, strength, sign)


def posterize(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    step = 2 ** (6 * strength).round()  # quantization step in units of 1/255, which keeps 8 to 2 bits
    return ((255 * x).round() / step).floor() * step / 255


def solarize(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x <= 1 - strength, x, 1 - x)


def autocontrast(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), x)


def equalize(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Equalize the histogram of each channel, with Pillow's rounding."""
    values = (255 * x).round().long().flatten(2)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view_as(x).to(x.dtype) / 255


OPERATIONS: tuple[Operation, ...] = (
    identity, autocontrast, equalize, rotate, solarize, color, posterize, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip


def _numbers(x: Tensor) -> Tensor:
    """Reshape (batch, 1, 1, 1) to (batch,)."""
    return x.flatten()


def _gray(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _extrapolate(other: Tensor, x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Move x toward `other` (sign -1) or away from it (sign 1) by 0.99 * strength * |x - other|, and clamp to [0, 1]."""
    return torch.lerp(other.expand_as(x), x, 1 + 0.99 * sign * strength).clamp(0, 1)

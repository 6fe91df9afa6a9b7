"""Rotary position embedding, and the gradient of its angles (primitives/rotate.py states the equations)."""

from __future__ import annotations

from torch import Tensor

from ..layout import Rotary, accumulator, empty_like_tokens
from .tiles import Rotation, groups, wide


def rotate(q: Tensor, k: Tensor, rotary: Rotary, inverse: bool) -> tuple[Tensor, Tensor]:
    """Both, as `_rotated`."""
    return _rotated(q, rotary, inverse), _rotated(k, rotary, inverse)


def _rotated(x: Tensor, rotary: Rotary, inverse: bool) -> Tensor:
    """x (B, H, N, D) with pair (u, v) of each token turned by its angle; the gradient is the inverse turn."""
    rope = Rotation(rotary, accumulator(x.dtype))
    y = empty_like_tokens(x, x.shape[3])
    for group, _ in groups(x, x.shape[3]):
        if x.dtype == rope.dtype:
            rope(x[group], group, inverse, out=y[group])
        else:
            y[group] = rope(wide(x[group]), group, inverse)
    return y


def angle_gradient(x: Tensor, dx: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """u dv - v du of the pairs of x and dx (B, H, N, D), summed over samples, and over heads where they share the angles.

    Where dx is 0, x counts as 0, whatever it holds.
    """
    width = 2 * angles.shape[2]
    total = angles.new_zeros(angles.shape)
    for sample in range(len(x)):
        rows, grads = (each[sample, ..., :width].to(angles.dtype) for each in (x, dx))
        rows, grads = (each.unflatten(-1, (-1, 2) if interleaved else (2, -1)) for each in (rows, grads))
        (u, v), (du, dv) = (each.unbind(-1 if interleaved else -2) for each in (rows, grads))
        u, v = u.masked_fill(dv == 0, 0), v.masked_fill(du == 0, 0)
        total += (u * dv - v * du).sum_to_size(total.shape)
    return total

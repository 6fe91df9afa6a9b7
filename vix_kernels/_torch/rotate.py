"""Rotary position embedding and the gradient of its angles (see primitives/rotate.py for the equations)."""

from __future__ import annotations

from torch import Tensor

from ..layout import Rotary, accumulator, empty_like_tokens
from .tiles import Rotation, groups, wide


def rotate(q: Tensor, k: Tensor, rotary: Rotary, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by their angles, or by the negative angles if `inverse`."""
    return _rotated(q, rotary, inverse), _rotated(k, rotary, inverse)


def _rotated(x: Tensor, rotary: Rotary, inverse: bool) -> Tensor:
    """Return x (B, H, N, D) rotated by the angles of its tokens, or by the negative angles if `inverse`."""
    rope = Rotation(rotary, accumulator(x.dtype))
    y = empty_like_tokens(x, x.shape[3])
    for group, _ in groups(x, x.shape[3]):
        if x.dtype == rope.dtype:
            rope(x[group], group, inverse, out=y[group])
        else:
            y[group] = rope(wide(x[group]), group, inverse)
    return y


def angle_gradient(x: Tensor, dx: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Return u dv - v du for x and dx (B, H, N, D), summed over samples, and over heads if angles.shape[0] is 1.

    If a factor du or dv is 0, the product is 0, even if the other factor is NaN.
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

"""rotate: rotary position embedding of queries and keys.

    u' = u cos - v sin            v' = u sin + v cos            for the pairs (u, v) of the first R channels

The gradient is the rotation by -angle, so nothing but the tables is kept for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tiled
from .layout import empty_like_tokens, unit_last_stride
from .registry import refuse_transforms, register


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angles of their tokens, in float32.

    Args:
        q, k: (batch, heads, N, D), of one shape and dtype. Any strides with a unit last one.
        cos, sin: float32 (heads or 1, N, R / 2); channels from R on stay as they are.
        interleaved: the pairs are channels (2i, 2i + 1), else (i, i + R / 2).
        backend: "torch" or "triton".

    Returns:
        The rotated q and k, in their own dtype. Differentiable in q and k.
    """
    refuse_transforms()
    return _Rotate.apply(unit_last_stride(q), unit_last_stride(k), cos, sin, interleaved, backend)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The equation, for one tensor."""
    rotary, dtype = 2 * cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    rotated, rest = x[..., :rotary].to(dtype), x[..., rotary:]
    u, v = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    pairs = u * cos - v * sin, u * sin + v * cos
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([y.to(x.dtype), rest], -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved, backend):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, backend
        return rotate_forward(q, k, cos, sin, interleaved, False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        dq, dk = unit_last_stride(dq), unit_last_stride(dk)
        dq, dk = rotate_forward(dq, dk, *ctx.saved_tensors, ctx.interleaved, True, ctx.backend)
        return dq, dk, None, None, None, None


def _tiled(q, k, cos, sin, interleaved, inverse):
    return tiled.rotate(q, cos, sin, interleaved, inverse), tiled.rotate(k, cos, sin, interleaved, inverse)


def _fake(q, k, cos, sin, interleaved, inverse, backend):
    return empty_like_tokens(q, q.shape[3]), empty_like_tokens(k, k.shape[3])


rotate_forward = register(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, str backend)"
    " -> (Tensor q_rotated, Tensor k_rotated)",
    tiled=_tiled,
    triton="rotate.rotate",
    fake=_fake,
)

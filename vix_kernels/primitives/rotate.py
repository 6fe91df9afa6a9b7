"""rotate: rotary position embedding for queries and keys.

    u' = u cos - v sin            v' = u sin + v cos            for the pairs (u, v) of the first R channels

To compute the gradients of q and k, the backward pass rotates the gradients of the results by -angle, so it needs only cos and
sin. The gradient of an angle is the cross product u dv - v du of a pair and its gradient, summed over all pairs that the angle
rotates. The cross product is the same before and after the rotation. A pair with gradient 0, such as padding, contributes 0
even if it is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Rotary, empty_like_tokens, flattened, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register


def rotate(
    q: Tensor,
    k: Tensor,
    rotary: Rotary,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angles of their tokens. Products and sums are computed in float32 (float64 for float64 inputs).

    Args:
        q, k: (batch, heads, N, D), with equal shapes and dtypes. Views with last stride 1 are not copied.
        rotary: rotary embedding, with tables (heads or 1, N, R / 2). Channels R and above are copied unchanged.
        backend: "torch" or "triton".

    Returns:
        The rotated q and k, in the same dtype. Differentiable in q, k and rotary.angles.
    """
    inputs = unit_last_stride(q), unit_last_stride(k), *flattened(rotary)
    if needs_autograd(inputs):
        return _Rotate.apply(*inputs, backend)
    return rotate_forward(*inputs[:2], rotary, False, backend)


def rotate_reference(x: Tensor, rotary: Rotary) -> Tensor:
    """Return x rotated by the angles of its tokens, computed in plain PyTorch."""
    cos, sin, interleaved, _ = rotary
    width, dtype = 2 * cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    rotated, rest = x[..., :width].to(dtype), x[..., width:]
    u, v = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    pairs = u * cos - v * sin, u * sin + v * cos
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([y.to(x.dtype), rest], -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, angles, interleaved, backend):
        learned = ctx.needs_input_grad[4]
        ctx.save_for_backward(cos, sin, *((angles, q, k) if learned else (None, None, None)))
        ctx.interleaved, ctx.backend = interleaved, backend
        return rotate_forward(q, k, Rotary(cos, sin, interleaved), False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dq, dk):
        cos, sin, _, q, k = saved
        dq, dk = unit_last_stride(dq), unit_last_stride(dk)
        dq, dk = rotate_forward(dq, dk, Rotary(cos, sin, ctx.interleaved), True, ctx.backend)
        dangles = None
        if q is not None:
            dangles = sum(angle_gradient(x, dx, cos, ctx.interleaved, ctx.backend) for x, dx in ((q, dq), (k, dk)))
        return dq, dk, None, None, dangles, None, None


def _fake(q, k, rotary, inverse, backend):
    return empty_like_tokens(q, q.shape[3]), empty_like_tokens(k, k.shape[3])


rotate_forward = register(
    "rotate(Tensor q, Tensor k, Rotary rotary, bool inverse, str backend) -> (Tensor q_rotated, Tensor k_rotated)",
    module="rotate",
    fake=_fake,
)
angle_gradient = register(
    "angle_gradient(Tensor x, Tensor dx, Tensor angles, bool interleaved, str backend) -> Tensor dangles",
    module="rotate",
    fake=lambda x, dx, angles, interleaved, backend: angles.new_empty(angles.shape),
)

"""token_conv: depthwise convolution of the values over tokens, for the residual term of Nystrom attention.

    out_t = sum_u w_u v_{t + u - taps // 2}

The channels of a head share one filter. v is padded with zeros. A masked token is treated as 0, even if it is NaN. Tiles of
tokens are multiplied by a banded matrix, so a NaN or infinity in v also affects some outputs whose windows do not contain it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import empty_like_tokens, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register


def token_conv(v: Tensor, weight: Tensor, *, mask: Tensor | None = None, backend: str = "torch") -> Tensor:
    """Correlate the tokens of each head with the filter of that head.

    Args:
        v: (batch, heads, N, E). Views with last stride 1 are not copied.
        weight: (heads, 1, taps, 1), as in Conv2d.weight, in float32 or v's dtype. The number of taps must be odd.
        mask: bool (batch, N), True = valid.
        backend: "torch" or "triton".

    Returns:
        (batch, heads, N, E) in v's dtype. Differentiable in v and weight.

    Raises:
        ValueError: weight has the wrong shape or an even number of taps.
    """
    heads, taps = v.shape[1], weight.shape[2] if weight.dim() == 4 else 0
    if tuple(weight.shape) != (heads, 1, taps, 1) or taps % 2 == 0:
        raise ValueError(f"weight: expected shape ({heads}, 1, taps, 1) with an odd number of taps, got {tuple(weight.shape)}")
    v = unit_last_stride(v)
    call = _TokenConv.apply if needs_autograd((v, weight)) else token_conv_forward
    return call(v, weight, mask, backend)


def token_conv_reference(v: Tensor, weight: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the result of `token_conv`, computed by unfolding v into windows of `taps` tokens.

    The function does not use Conv2d, because oneDNN computes wrong gradients for long filters.
    """
    if mask is not None:
        v = torch.where(mask[:, None, :, None], v, 0.0)
    taps = weight.shape[2]
    windows = F.pad(v, (0, 0, taps // 2, taps // 2)).unfold(2, taps, 1)
    return torch.einsum("bhneu,hu->bhne", windows, weight[:, 0, :, 0].to(v.dtype))


class _TokenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, weight, mask, backend):
        ctx.save_for_backward(v, weight, mask)
        ctx.backend = backend
        return token_conv_forward(v, weight, mask, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dout):
        v, weight, mask = saved
        needs = ctx.needs_input_grad[:2]
        grads = token_conv_backward(dout, v, weight, mask, None, needs, ctx.backend)
        dv, dweight = (x if need else None for x, need in zip(grads, needs, strict=True))
        return dv, dweight, None, None


def _fake_forward(v, weight, mask, backend):
    return empty_like_tokens(v, v.shape[3])


def _fake_backward(dout, v, weight, mask, dv_other, needs, backend):
    need_v, need_weight = needs
    dv = empty_like_tokens(v, v.shape[3]) if need_v else v.new_empty(0)
    return dv, weight.new_empty(weight.shape if need_weight else (0,))


token_conv_forward = register(
    "token_conv_forward(Tensor v, Tensor weight, Tensor? mask, str backend) -> Tensor",
    module="token_conv",
    fake=_fake_forward,
)
token_conv_backward = register(
    "token_conv_backward(Tensor dout, Tensor v, Tensor weight, Tensor? mask, Tensor? dv_other, "
    "bool[] needs, str backend) -> (Tensor dv, Tensor dweight)",
    module="token_conv",
    fake=_fake_backward,
)

"""project: compute K slots (see aggregate.py) as weighted sums of N tokens. The weights do not depend on the tokens.

    keys_j = sum_n E_nj k_n            values_j = sum_n F_nj v_n

A masked token is treated as 0, even if it is NaN. With RoPE, keys are rotated first. The kernels cast the projections E and F
to the dtype of k and v. Sums over tokens are computed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Rotary, accumulator, empty_like_tokens, flattened, joined, unit_last_stride
from .autograd import once_differentiable
from .registry import needs_autograd, register
from .rotate import angle_gradient, rotate_reference

_PROBLEM = "Tensor key_projection, Tensor? value_projection, Tensor k, Tensor v, Tensor? mask, Rotary? rotary"


def project(
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of the slots, for use in `broadcast`.

    Args:
        k: (batch, heads, N, D). Views with last stride 1 are not copied.
        v: (batch, heads, N, V), in k's dtype.
        key_projection: weights E of the keys, (heads or 1, N, K), float32 or in k's dtype.
        value_projection: weights F of the values, with the same shape as key_projection. If None, key_projection is also used
            for values.
        mask: bool (batch, N), True = valid.
        rotary: rotary embedding of k.
        backend: "torch" or "triton".

    Returns:
        keys (batch, heads, K, D) in k's dtype and values (batch, heads, K, V) in float32 (float64 for float64 inputs).
        Differentiable in k, v, both projections and rotary.angles.
    """
    k, v, key_projection = unit_last_stride(k), unit_last_stride(v), unit_last_stride(key_projection)
    value_projection = None if value_projection is None else unit_last_stride(value_projection)
    inputs = key_projection, value_projection, k, v, mask, *flattened(rotary)
    if needs_autograd(inputs):
        return _Project.apply(*inputs, backend)
    return project_forward(key_projection, value_projection, k, v, mask, rotary, backend)


def project_reference(
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the same keys and values as `project`, computed in plain PyTorch."""
    if mask is not None:
        valid = mask[:, None, :, None]
        k, v = torch.where(valid, k, 0.0), torch.where(valid, v, 0.0)
    if rotary is not None:
        k = rotate_reference(k, rotary)
    value_projection = key_projection if value_projection is None else value_projection
    return key_projection.to(k.dtype).mT @ k, (value_projection.to(v.dtype).mT @ v).to(accumulator(v.dtype))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key_projection, value_projection, k, v, mask, cos, sin, angles, interleaved, backend):
        ctx.save_for_backward(key_projection, value_projection, k, v, mask, cos, sin, angles)
        ctx.interleaved, ctx.backend = interleaved, backend
        return project_forward(key_projection, value_projection, k, v, mask, joined(cos, sin, interleaved), backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dkeys, dvalues):
        key_projection, value_projection, k, v, mask, cos, sin, _ = saved
        need_key_projection, need_value_projection, need_k, need_v, _, _, _, need_angles, *_ = ctx.needs_input_grad
        needs = need_key_projection, need_value_projection, need_k or need_angles, need_v
        dkeys, dvalues = unit_last_stride(dkeys), unit_last_stride(dvalues)
        grads = project_backward(
            dkeys, dvalues, key_projection, value_projection, k, v, mask, joined(cos, sin, ctx.interleaved), needs,
            ctx.backend,
        )  # fmt: skip
        dangles = angle_gradient(k, grads[2], cos, ctx.interleaved, ctx.backend) if need_angles else None
        grads = [x if need else None for x, need in zip(grads, ctx.needs_input_grad[:4], strict=True)]
        return *grads, None, None, None, dangles, None, None


def _fake_forward(key_projection, value_projection, k, v, mask, rotary, backend):
    batch, heads, _, width = k.shape
    slots = key_projection.shape[2]
    return k.new_empty(batch, heads, slots, width), v.new_empty(batch, heads, slots, v.shape[3], dtype=accumulator(v.dtype))


def _fake_backward(dkeys, dvalues, key_projection, value_projection, k, v, mask, rotary, needs, backend):
    *need_projections, need_k, need_v = needs
    de, df = (key_projection.new_empty(key_projection.shape if need else (0,)) for need in need_projections)
    dk = empty_like_tokens(k, k.shape[3]) if need_k else k.new_empty(0)
    return de, df, dk, empty_like_tokens(v, v.shape[3]) if need_v else v.new_empty(0)


project_forward = register(
    f"project_forward({_PROBLEM}, str backend) -> (Tensor keys, Tensor values)",
    module="project",
    fake=_fake_forward,
)
project_backward = register(
    f"project_backward(Tensor dkeys, Tensor dvalues, {_PROBLEM}, bool[] needs, str backend)"
    " -> (Tensor dkey_projection, Tensor dvalue_projection, Tensor dk, Tensor dv)",
    module="project",
    fake=_fake_backward,
)

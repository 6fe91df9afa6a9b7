"""project: K slots take fixed weights of N tokens, whatever these hold.

    keys_j = sum_n E_nj k_n            values_j = sum_n F_nj v_n

A token that does not take part is read as 0, whatever it holds. Under RoPE keys are rotated first. The projections multiply
in the dtype of the tokens, whose gradients they get; sums over tokens are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import once_differentiable
from .layout import accumulator, empty_like_tokens, unit_last_stride
from .registry import refuse_transforms, register
from .rotate import angle_gradient, rotate_reference
from .tiled import Tile, _flat, _groups, _read, _Rope, _Scratch, _window, _write

_PROBLEM = (
    "Tensor key_projection, Tensor? value_projection, Tensor k, Tensor v, Tensor? mask, Tensor? cos, Tensor? sin, "
    "bool interleaved"
)


def project(
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    angles: Tensor | None = None,
    interleaved: bool = True,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Keys and values of the slots, as `broadcast` takes them.

    Args:
        k: (batch, heads, N, D). Any strides with a unit last one.
        v: (batch, heads, N, E), in k's dtype.
        key_projection: E, (heads or 1, N, K), float32 or in k's dtype.
        value_projection: F, like key_projection; None: the key projection.
        mask: bool (batch, N), True = the token takes part.
        cos, sin: float32 (heads or 1, N, R / 2), rotary tables for the first R channels of k.
        angles: what cos and sin are of, where it takes a gradient.
        interleaved: the rotary pairs are channels (2i, 2i + 1), else (i, i + R / 2).
        backend: "torch" or "triton".

    Returns:
        keys (batch, heads, K, D) in k's dtype and values (batch, heads, K, E) in float32 (float64 for float64 tokens).
        Differentiable in k, v, both projections and angles.
    """
    refuse_transforms()
    k, v, key_projection = unit_last_stride(k), unit_last_stride(v), unit_last_stride(key_projection)
    value_projection = None if value_projection is None else unit_last_stride(value_projection)
    return _Project.apply(key_projection, value_projection, k, v, mask, cos, sin, angles, interleaved, backend)


def project_reference(
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """The equations."""
    if mask is not None:
        taken = mask[:, None, :, None]
        k, v = torch.where(taken, k, 0.0), torch.where(taken, v, 0.0)
    if cos is not None:
        k = rotate_reference(k, cos, sin, interleaved)
    value_projection = key_projection if value_projection is None else value_projection
    return key_projection.to(k.dtype).mT @ k, (value_projection.to(v.dtype).mT @ v).to(accumulator(v.dtype))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key_projection, value_projection, k, v, mask, cos, sin, angles, interleaved, backend):
        ctx.save_for_backward(key_projection, value_projection, k, v, mask, cos, sin, angles)
        ctx.interleaved, ctx.backend = interleaved, backend
        return project_forward(key_projection, value_projection, k, v, mask, cos, sin, interleaved, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, dkeys, dvalues):
        key_projection, value_projection, k, v, mask, cos, sin, _ = saved
        need_key_projection, need_value_projection, need_k, need_v, _, _, _, need_angles, *_ = ctx.needs_input_grad
        needs = need_key_projection, need_value_projection, need_k or need_angles, need_v
        dkeys, dvalues = unit_last_stride(dkeys), unit_last_stride(dvalues)
        grads = project_backward(
            dkeys, dvalues, key_projection, value_projection, k, v, mask, cos, sin, ctx.interleaved, *needs, ctx.backend
        )
        dangles = angle_gradient(k, grads[2], cos, ctx.interleaved, ctx.backend) if need_angles else None
        grads = [x if need else None for x, need in zip(grads, ctx.needs_input_grad[:4], strict=True)]
        return *grads, None, None, None, dangles, None, None


# The operator in PyTorch: a few large matrix products


def _tiled_forward(
    key_projection: Tensor,
    value_projection: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    rope = _Rope(cos, sin, interleaved, accumulator(k.dtype))
    slots = key_projection.shape[2]
    keys, values = (x.new_zeros(*x.shape[:2], slots, x.shape[3], dtype=rope.dtype) for x in (k, v))
    e, f = _weights(key_projection, value_projection, k)
    for group, tiles in _groups(k, slots):
        for tile in tiles:
            _flat(keys, group).baddbmm_(_flat(e, tile).mT, _read(k, tile, mask, rope))
            _flat(values, group).baddbmm_(_flat(f, tile).mT, _read(v, tile, mask))
    return keys.to(k.dtype), values


def _tiled_backward(
    dkeys: Tensor,
    dvalues: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    need_key_projection: bool,
    need_value_projection: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dE, dF, dk and dv, each empty unless needed.

    dk_n = sum_j E_nj dkeys_j    dE_nj = sum over samples (and heads that share E) of k_n . dkeys_j    dv, dF likewise
    """
    rope = _Rope(cos, sin, interleaved, accumulator(k.dtype))
    e, f = _weights(key_projection, value_projection, k)
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    de = key_projection.new_zeros(key_projection.shape if need_key_projection else (0,), dtype=e.dtype)
    df = key_projection.new_zeros(value_projection.shape if need_value_projection else (0,), dtype=e.dtype)
    shared = value_projection is None
    room = _Scratch(e)
    for group, tiles in _groups(k, key_projection.shape[2]):
        grads, contents = _flat(dkeys, group), _flat(dvalues, group)
        for tile in tiles:
            if need_key_projection:
                _add_products(de, _read(k, tile, mask, rope), grads, tile)
            if need_value_projection or (shared and need_key_projection):
                _add_products(de if shared else df, _read(v, tile, mask), contents, tile)
            if need_k:
                _write(dk, tile, torch.bmm(_flat(e, tile), grads, out=_window(dk, tile, room)), rope)
            if need_v:
                _write(dv, tile, torch.bmm(_flat(f, tile), contents, out=_window(dv, tile, room)))
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return de.to(key_projection.dtype), df.to(key_projection.dtype), dk, dv


def _weights(key_projection: Tensor, value_projection: Tensor | None, k: Tensor) -> list[Tensor]:
    """Both projections, wide, for every sample and head."""
    both = (key_projection, key_projection if value_projection is None else value_projection)
    return [x.to(accumulator(k.dtype)).expand(*k.shape[:2], -1, -1) for x in both]


def _add_products(total: Tensor, rows: Tensor, grads: Tensor, tile: Tile) -> None:
    """Add rows_n . grads_j of a tile's (pairs, tokens, width) and (pairs, K, width) to total (heads or 1, N, K)."""
    _, heads, tokens = tile
    if len(total) == 1:
        total[0, tokens].addbmm_(rows, grads.mT)
        return
    part = total[heads, tokens]
    for x, dx in zip(rows.split(len(part)), grads.split(len(part)), strict=True):
        part.baddbmm_(x, dx.mT)


def _fake_forward(key_projection, value_projection, k, v, mask, cos, sin, interleaved, backend):
    batch, heads, _, width = k.shape
    slots = key_projection.shape[2]
    return k.new_empty(batch, heads, slots, width), v.new_empty(batch, heads, slots, v.shape[3], dtype=accumulator(v.dtype))


def _fake_backward(
    dkeys, dvalues, key_projection, value_projection, k, v, mask, cos, sin, interleaved,
    need_key_projection, need_value_projection, need_k, need_v, backend,
):  # fmt: skip
    de, df = (
        key_projection.new_empty(key_projection.shape if need else (0,))
        for need in (need_key_projection, need_value_projection)
    )
    dk = empty_like_tokens(k, k.shape[3]) if need_k else k.new_empty(0)
    return de, df, dk, empty_like_tokens(v, v.shape[3]) if need_v else v.new_empty(0)


project_forward = register(
    f"project_forward({_PROBLEM}, str backend) -> (Tensor keys, Tensor values)",
    tiled=_tiled_forward,
    triton="project.project_forward",
    fake=_fake_forward,
)
project_backward = register(
    f"project_backward(Tensor dkeys, Tensor dvalues, {_PROBLEM}, bool need_key_projection, bool need_value_projection, "
    "bool need_k, bool need_v, str backend) -> (Tensor dkey_projection, Tensor dvalue_projection, Tensor dk, Tensor dv)",
    tiled=_tiled_backward,
    triton="project.project_backward",
    fake=_fake_backward,
)

"""Weighted sums of tokens, computed as large matrix products (see primitives/project.py for the equations)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Needs, Rotary, accumulator, empty_like_tokens
from .tiles import Rotation, Scratch, Tile, flat, groups, read, window, write


def project_forward(
    key_projection: Tensor,
    value_projection: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
) -> tuple[Tensor, Tensor]:
    rope = Rotation(rotary, accumulator(k.dtype))
    slots = key_projection.shape[2]
    keys, values = (x.new_zeros(*x.shape[:2], slots, x.shape[3], dtype=rope.dtype) for x in (k, v))
    e, f = _weights(key_projection, value_projection, k)
    for group, tiles in groups(k, slots):
        for tile in tiles:
            flat(keys, group).baddbmm_(flat(e, tile).mT, read(k, tile, mask, rope))
            flat(values, group).baddbmm_(flat(f, tile).mT, read(v, tile, mask))
    return keys.to(k.dtype), values


def project_backward(
    dkeys: Tensor,
    dvalues: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dE, dF, dk and dv. Gradients that `needs` does not request are empty.

    dk_n = sum_j E_nj dkeys_j    dE_nj = sum of k_n . dkeys_j over samples

    dv and dF are computed in the same way. If a projection has one matrix for all heads, its gradient is also summed over
    heads. If value_projection is None, dE also includes dF.
    """
    need_key_projection, need_value_projection, need_k, need_v = needs
    rope = Rotation(rotary, accumulator(k.dtype))
    e, f = _weights(key_projection, value_projection, k)
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    de = key_projection.new_zeros(key_projection.shape if need_key_projection else (0,), dtype=e.dtype)
    df = key_projection.new_zeros(value_projection.shape if need_value_projection else (0,), dtype=e.dtype)
    shared = value_projection is None
    room = Scratch(e)
    for group, tiles in groups(k, key_projection.shape[2]):
        grads, contents = flat(dkeys, group), flat(dvalues, group)
        for tile in tiles:
            if need_key_projection:
                _add_products(de, read(k, tile, mask, rope), grads, tile)
            if need_value_projection or (shared and need_key_projection):
                _add_products(de if shared else df, read(v, tile, mask), contents, tile)
            if need_k:
                write(dk, tile, torch.bmm(flat(e, tile), grads, out=window(dk, tile, room)), rope)
            if need_v:
                write(dv, tile, torch.bmm(flat(f, tile), contents, out=window(dv, tile, room)))
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return de.to(key_projection.dtype), df.to(key_projection.dtype), dk, dv


def _weights(key_projection: Tensor, value_projection: Tensor | None, k: Tensor) -> list[Tensor]:
    """Return both projections in the accumulator's dtype, expanded to all samples and heads."""
    both = (key_projection, key_projection if value_projection is None else value_projection)
    return [x.to(accumulator(k.dtype)).expand(*k.shape[:2], -1, -1) for x in both]


def _add_products(total: Tensor, rows: Tensor, grads: Tensor, tile: Tile) -> None:
    """Add the products rows_n . grads_j of a tile to `total` (heads or 1, N, K).

    The products are summed over samples. If the first size of `total` is 1, they are also summed over heads.

    Args:
        rows: (pairs, tokens, width), where pairs = samples * heads.
        grads: (pairs, K, width).
    """
    _, heads, tokens = tile
    if len(total) == 1:
        total[0, tokens].addbmm_(rows, grads.mT)
        return
    part = total[heads, tokens]
    for x, dx in zip(rows.split(len(part)), grads.split(len(part)), strict=True):
        part.baddbmm_(x, dx.mT)

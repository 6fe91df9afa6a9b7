"""Slots attend to tokens, one tile of tokens at a time (primitives/aggregate.py states the equations).

Logits and lse are in units of log 2. A bias is the matrix that a product is added to, which is nearly free.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import Needs, Rotary, Statistics, empty_like_tokens
from .tiles import LOG2E, Rotation, Scratch, Tile, at_least_one, flat, groups, points_of, read, slots_grad, taken, window, write


def aggregate_forward(
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
    scale: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots attend to tokens: values (B, H, M, E); lse, top and total (B, H, M). b_n = -|s k_n|^2 / 2 if gaussian, else 0.

    top_j is the largest logit of a slot, total_j = sum_n exp(l_jn - top_j), and lse_j = top_j + log total_j. A masked key has
    b_n = -inf and is read as 0, whatever it holds. A slot without any key gets values 0, lse -inf and total 0.
    """
    points = points_of(slots, k)
    rope = Rotation(rotary, points.dtype)
    values = points.new_zeros((*k.shape[:2], slots.shape[2], v.shape[3]))
    lse, tops, totals = (points.new_empty(values.shape[:3]) for _ in range(3))
    square, rows = Scratch(points), Scratch(points)
    for group, tiles in groups(k, slots.shape[2]):
        p, state = flat(points, group), flat(values, group)
        # The lowest number, not -inf: a slot that has seen no key yet must not compute inf - inf.
        top = p.new_full((*p.shape[:2], 1), torch.finfo(p.dtype).min)
        total = torch.zeros_like(top)
        for tile in tiles:
            keys, contents = read(k, tile, mask, rope), read(v, tile, mask)
            logits = _key_logits(p, keys, tile, mask, scale, gaussian, square, rows)
            running_max = torch.maximum(top, logits.amax(-1, keepdim=True))
            logits.sub_(running_max)
            exps = square.apply(torch.exp2)
            decay = top.sub_(running_max).exp2_()
            total = torch.addcmul(exps.sum(-1, keepdim=True), total, decay)
            state.mul_(decay).baddbmm_(exps, contents)
            top = running_max
        state.div_(at_least_one(total))
        for x, result in ((tops, top), (totals, total), (lse, top + total.log2())):
            write(x, group, result)
    return values, lse, tops, totals


def aggregate_backward(
    dvalues: Tensor,
    dlse: Tensor | None,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
    scale: float,
    gaussian: bool,
    values: Tensor,
    statistics: Statistics,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """dslots, dk and dv, each empty unless `needs` asks for it.

    dl_jn = P_jn (dvalues_j . (v_n - values_j) + dlse_j)    dv_n = sum_j P_jn dvalues_j
    dk_n = s sum_j dl_jn p_j - s^2 k_n sum_j dl_jn (the second if gaussian)    dp_j = s sum_n dl_jn k_n

    The logits are those of forward, bit for bit: the same products of the same operands. So the probabilities
    P_jn = exp(l_jn - top_j) / total_j sum to 1 however large the logits are; rows of slots carry the 1 / total_j.
    """
    points = points_of(slots, k)
    scaled, rope = points * scale, Rotation(rotary, points.dtype)
    (need_slots, need_k, need_v), (top, total) = needs, statistics
    total = at_least_one(total)
    weighted = dvalues / total.unsqueeze(3)
    dlogit = torch.zeros_like(total) if dlse is None else dlse * LOG2E / total
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    dslots = points.new_zeros((*k.shape[:2], *slots.shape[2:])) if need_slots else None
    square, other, rows, key_room, value_room = (Scratch(points) for _ in range(5))
    for group, tiles in groups(k, slots.shape[2]):
        p, scaled_slots, dstate = (flat(x, group) for x in (points, scaled, weighted))
        shift, tops, sums = (flat(x, group).unsqueeze(2) for x in (dlogit, top, total))
        alone = len(tiles) == 1  # a tile has all tokens, and so their sums
        if not alone:
            shift = shift - _row_products(dstate, flat(values, group))
        for tile in tiles:
            keys, contents = read(k, tile, mask, rope), read(v, tile, mask)
            logits = _key_logits(p, keys, tile, mask, scale, gaussian, square, rows)
            logits.sub_(tops).clamp_(max=0)  # a matrix product on other threads may round differently
            exps = square.apply(torch.exp2)
            if need_v:
                write(dv, tile, torch.bmm(exps.mT, dstate, out=window(dv, tile, value_room)))
            if not (need_k or need_slots):
                continue
            if alone:
                dlogits = torch.bmm(dstate, contents.mT, out=other(*exps.shape)).mul_(exps)
                dlogits.addcmul_(exps, shift - dlogits.sum(-1, keepdim=True) / sums)
            else:
                dlogits = torch.baddbmm(shift, dstate, contents.mT, out=other(*exps.shape)).mul_(exps)
            if need_k:
                dkeys = torch.bmm(dlogits.mT, scaled_slots, out=window(dk, tile, key_room))
                if gaussian:
                    dkeys.addcmul_(keys, dlogits.sum(1).unsqueeze(2), value=-(scale**2))
                write(dk, tile, dkeys, rope)
            if need_slots:
                flat(dslots, group).baddbmm_(dlogits, keys, alpha=scale)
    if mask is not None:  # even where a slot's gradient is NaN
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return slots_grad(dslots, slots), dk, dv


def _key_logits(
    p: Tensor, keys: Tensor, tile: Tile, mask: Tensor | None, scale: float, gaussian: bool, square: Scratch, rows: Scratch
) -> Tensor:
    """l_jn of a tile, (pairs, M, tokens), in units of log 2. Forward and backward must get the same bits."""
    bias = _key_bias(keys, tile, mask, scale, gaussian, rows).unsqueeze(1)
    return torch.baddbmm(bias, p, keys.mT, alpha=scale * LOG2E, out=square(*p.shape[:2], keys.shape[1]))


def _key_bias(keys: Tensor, tile: Tile, mask: Tensor | None, scale: float, gaussian: bool, rows: Scratch) -> Tensor:
    """b_n of a tile, (pairs, tokens), in units of log 2."""
    if gaussian:
        bias = torch.mul(keys, keys, out=rows(*keys.shape)).sum(-1).mul_(-0.5 * scale**2 * LOG2E)
        bias += bias - bias  # NaN where the square overflows; -inf would say that there is no key
    else:
        bias = keys.new_zeros(keys.shape[:2])
    if mask is not None:
        hidden = ~taken(mask, tile)
        bias.view(len(hidden), -1, bias.shape[1]).masked_fill_(hidden, -torch.inf)
    return bias


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """x_j . y_j (pairs, M, 1) of rows, rounded as in larger products: where a slot attends to one token, x_j . v_n cancels."""
    rows = x.shape[1]
    x, y = (F.pad(each, (0, 0, 0, -rows % 16)).unflatten(1, (-1, 16)) for each in (x, y))
    return (x @ y.mT).diagonal(dim1=-2, dim2=-1).flatten(1)[:, :rows].unsqueeze(2)

"""Slots attend to tokens, one tile of tokens at a time (see primitives/aggregate.py for the equations).

Logits are multiplied by log2(e), and lse is a base-2 logarithm. The key bias is passed to baddbmm, which adds it at almost
no cost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import Needs, Rotary, Statistics, empty_like_tokens
from .tiles import (
    LOG2E,
    Rotation,
    Scratch,
    Tile,
    at_least_one,
    expand_slots,
    flat,
    groups,
    read,
    slots_grad,
    valid_tokens,
    window,
    write,
)


def aggregate_forward(
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
    scale: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values (B, H, M, E) and three tensors (B, H, M): lse, row_max and total.

    The key bias b_n is -|scale k_n|^2 / 2 if gaussian, else 0. The logits are l_jn = (scale p_j . k_n + b_n) log2(e).
    row_max_j is the largest logit of slot j, total_j = sum_n exp2(l_jn - row_max_j), and lse_j = row_max_j + log2 total_j. A
    masked key has b_n = -inf and is read as 0, even if it is NaN. A slot without valid keys has values 0, lse -inf and total 0.
    """
    all_slots = expand_slots(slots, k)
    rope = Rotation(rotary, all_slots.dtype)
    values = all_slots.new_empty((*k.shape[:2], slots.shape[2], v.shape[3]))
    lse, row_max, total = (all_slots.new_empty(values.shape[:3]) for _ in range(3))
    square, rows = Scratch(all_slots), Scratch(all_slots)
    for group, tiles in groups(k, slots.shape[2]):
        p, state = flat(all_slots, group), flat(values, group)
        running_max = running_total = None
        for tile in tiles:
            keys, contents = read(k, tile, mask, rope), read(v, tile, mask)
            logits = _key_logits(p, keys, tile, mask, scale, gaussian, square, rows)
            # Clamp to the lowest finite number, because -inf - (-inf) would be NaN before the first valid key of a slot.
            new_max = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).min)
            if running_max is not None:
                torch.maximum(running_max, new_max, out=new_max)
            logits.sub_(new_max)
            exps = square.apply(torch.exp2)
            new_total = exps.sum(-1, keepdim=True)
            if running_max is None:
                torch.bmm(exps, contents, out=state)
            else:
                decay = running_max.sub_(new_max).exp2_()
                new_total.addcmul_(running_total, decay)
                state.mul_(decay).baddbmm_(exps, contents)
            running_max, running_total = new_max, new_total
        state.div_(at_least_one(running_total))
        for x, result in ((row_max, running_max), (total, running_total), (lse, running_max + running_total.log2())):
            write(x, group, result)
    return values, lse, row_max, total


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
    """Return dslots, dk and dv. Gradients that `needs` does not request are empty.

    dl_jn = P_jn (dvalues_j . (v_n - values_j) + dlse_j / ln 2)    dv_n = sum_j P_jn dvalues_j
    dk_n = s sum_j dl_jn p_j - s^2 k_n sum_j dl_jn (second term only if gaussian)    dp_j = s sum_n dl_jn k_n

    Here s = scale, and dl_jn is the gradient with respect to s p_j . k_n + b_n. With the same number of threads, the logits
    l_jn are bit-identical to those of the forward pass, because both passes call `_key_logits` with the same arguments.
    Therefore, the probabilities P_jn = exp2(l_jn - row_max_j) / total_j sum to 1, even for large logits. Instead of dividing
    every exponential by total_j, the function divides dvalues and dlse by total_j before the loop over tokens.
    """
    all_slots = expand_slots(slots, k)
    scaled, rope = all_slots * scale, Rotation(rotary, all_slots.dtype)
    (need_slots, need_k, need_v), (row_max, total) = needs, statistics
    total = at_least_one(total)
    weighted = dvalues / total.unsqueeze(3)
    dlogit = torch.zeros_like(total) if dlse is None else dlse * LOG2E / total
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    dslots = all_slots.new_zeros((*k.shape[:2], *slots.shape[2:])) if need_slots else None
    square, other, rows, key_room, value_room = (Scratch(all_slots) for _ in range(5))
    for group, tiles in groups(k, slots.shape[2]):
        p, scaled_slots, dstate = (flat(x, group) for x in (all_slots, scaled, weighted))
        shift, group_max, group_total = (flat(x, group).unsqueeze(2) for x in (dlogit, row_max, total))
        alone = len(tiles) == 1  # the tile contains all tokens, so its row sums are complete
        if not alone:
            shift = shift - _row_products(dstate, flat(values, group))
        for tile in tiles:
            keys, contents = read(k, tile, mask, rope), read(v, tile, mask)
            logits = _key_logits(p, keys, tile, mask, scale, gaussian, square, rows)
            # Logits can exceed row_max if the number of threads has changed since the forward pass.
            logits.sub_(group_max).clamp_(max=0)
            exps = square.apply(torch.exp2)
            if need_v:
                write(dv, tile, torch.bmm(exps.mT, dstate, out=window(dv, tile, value_room)))
            if not (need_k or need_slots):
                continue
            if alone:
                dlogits = torch.bmm(dstate, contents.mT, out=other(*exps.shape)).mul_(exps)
                dlogits.addcmul_(exps, shift - dlogits.sum(-1, keepdim=True) / group_total)
            else:
                dlogits = torch.baddbmm(shift, dstate, contents.mT, out=other(*exps.shape)).mul_(exps)
            if need_k:
                dkeys = torch.bmm(dlogits.mT, scaled_slots, out=window(dk, tile, key_room))
                if gaussian:
                    dkeys.addcmul_(keys, dlogits.sum(1).unsqueeze(2), value=-(scale**2))
                write(dk, tile, dkeys, rope)
            if need_slots:
                flat(dslots, group).baddbmm_(dlogits, keys, alpha=scale)
    if mask is not None:  # the gradient of a masked key must be 0 even if a slot's gradient is NaN
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return slots_grad(dslots, slots), dk, dv


def _key_logits(
    p: Tensor, keys: Tensor, tile: Tile, mask: Tensor | None, scale: float, gaussian: bool, square: Scratch, rows: Scratch
) -> Tensor:
    """Return the logits l_jn (pairs, M, tokens) of a tile. A pair is a sample and a head.

    The forward and backward passes need bit-identical logits.
    """
    bias = _key_bias(keys, tile, mask, scale, gaussian, rows).unsqueeze(1)
    return torch.baddbmm(bias, p, keys.mT, alpha=scale * LOG2E, out=square(*p.shape[:2], keys.shape[1]))


def _key_bias(keys: Tensor, tile: Tile, mask: Tensor | None, scale: float, gaussian: bool, rows: Scratch) -> Tensor:
    """Return a tensor (pairs, tokens): b_n log2(e) for each key of a tile."""
    if gaussian:
        bias = torch.mul(keys, keys, out=rows(*keys.shape)).sum(-1).mul_(-0.5 * scale**2 * LOG2E)
        bias += bias - bias  # turns -inf into NaN if the square overflows, because -inf would mask the key
    else:
        bias = keys.new_zeros(keys.shape[:2])
    if mask is not None:
        hidden = ~valid_tokens(mask, tile)
        bias.view(len(hidden), -1, bias.shape[1]).masked_fill_(hidden, -torch.inf)
    return bias


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot products x_j . y_j of the rows of x and y, (pairs, M, 1).

    They are rounded like the products dvalues_j . v_n in aggregate_backward, so dvalues_j . v_n - dvalues_j . values_j is
    exactly 0 if slot j attends only to token n.
    """
    rows = x.shape[1]
    x, y = (F.pad(each, (0, 0, 0, -rows % 16)).unflatten(1, (-1, 16)) for each in (x, y))
    return (x @ y.mT).diagonal(dim1=-2, dim2=-1).flatten(1)[:, :rows].unsqueeze(2)

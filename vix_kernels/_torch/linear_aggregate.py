"""Sums of values, weighted by features of keys, one tile of tokens at a time (see primitives/linear.py for the equations)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens
from .features import Features
from .tiles import Tile, flat, groups, read, slots_grad, valid_tokens, window, write


def linear_aggregate_forward(
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Return sums (B, H, M, E) and norms (B, H, M)."""
    features_of = Features(slots, k, rotary, feature_map)
    sums = features_of.empty(*k.shape[:2], features_of.num_slots, v.shape[3]).zero_()
    norms = features_of.empty(*sums.shape[:3]).zero_()
    for group, tiles in groups(k, features_of.num_slots):
        state, total = flat(sums, group), flat(norms, group)
        for tile in tiles:
            features = features_of(features_of.logits(read(k, tile, mask, features_of.rope), group))
            if mask is not None:
                features.mul_(_valid_factor(mask, tile, features))
            state.baddbmm_(features.mT, read(v, tile, mask))
            total.add_(features.sum(1))
    return sums, norms


def linear_aggregate_backward(
    dsums: Tensor,
    dnorms: Tensor,
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rotary: Rotary | None,
    feature_map: str,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dslots, dk and dv. Gradients that `needs` does not request are empty.

    With the logits l_jn = p_j . k_n:
    dl_jn = phi'(l_jn) (dS_j . v_n + dz_j)      dv_n = sum_j f_jn dS_j      dk_n = sum_j dl_jn p_j      dp_j = sum_n dl_jn k_n
    """
    need_slots, need_k, need_v = needs
    features_of = Features(slots, k, rotary, feature_map)
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    dslots = features_of.slot_sums(k) if need_slots and slots is not None else None
    for group, tiles in groups(k, features_of.num_slots):
        dstate, dtotal = flat(dsums, group), flat(dnorms, group).unsqueeze(1)
        for tile in tiles:
            keys = read(k, tile, mask, features_of.rope)
            logits = features_of.logits(keys, group)
            if need_k or dslots is not None:
                dlogits = torch.baddbmm(dtotal, read(v, tile, mask), dstate.mT, out=features_of.other(*logits.shape))
                features_of.times_slope(dlogits, logits)
                if mask is not None:
                    dlogits.mul_(_valid_factor(mask, tile, dlogits))
                if need_k:
                    write(dk, tile, features_of.to_tokens(dlogits, dk, tile), features_of.rope)
                if dslots is not None:
                    flat(dslots, group).baddbmm_(keys.mT, dlogits)
            if need_v:
                write(dv, tile, torch.bmm(features_of(logits), dstate, out=window(dv, tile, features_of.room)))
    if mask is not None:  # the gradient of a masked key must be 0 even if a slot's gradient is NaN
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return k.new_empty(0) if dslots is None else slots_grad(dslots.mT, slots), dk, dv


def _valid_factor(mask: Tensor, tile: Tile, like: Tensor) -> Tensor:
    """Return a tensor (pairs, tokens, 1): 1 for each valid key of a tile, 0 for each masked key.

    A pair is a sample and a head.
    """
    rows = valid_tokens(mask, tile).to(like.dtype)
    return rows.expand(-1, like.shape[0] // len(rows), -1).flatten(0, 1).unsqueeze(2)

"""The linear moves in plain PyTorch, one tile of tokens at a time (primitives/linear.py states the equations).

As in tiled.py: pure functions without autograd, in fp32 (fp64 for fp64 inputs), that keep no features: backward makes them
again. Without slots the features are as wide as the head, and a tile of tokens is a tile of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import empty_like_tokens
from .tiled import (
    LOG2E,
    Group,
    Tile,
    _flat,
    _groups,
    _level,
    _points,
    _read,
    _Rope,
    _Scratch,
    _slots_grad,
    _taken,
    _wide,
    _window,
    _write,
)


def linear_aggregate_forward(
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """values (B, H, M, E) and lse (B, H, M)."""
    move = _Move(slots, k, cos, sin, interleaved, feature_map)
    values = move.empty(*k.shape[:2], move.num_slots, v.shape[3]).zero_()
    sums = move.empty(*values.shape[:3], 1).zero_()
    for group, tiles in _groups(k, move.num_slots):
        state, total = _flat(values, group), _flat(sums, group)
        for tile in tiles:
            features = move.features(move.logits(_read(k, tile, mask, move.rope), group))
            if mask is not None:
                features.mul_(_takes_part(mask, tile, features))
            state.baddbmm_(features.mT, _read(v, tile, mask))
            total.add_(features.sum(1).unsqueeze(2))
    return values.div_(_divisor(sums)), sums.log2_().squeeze(3)


def linear_aggregate_backward(
    dvalues: Tensor,
    dlse: Tensor,
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
    values: Tensor,
    lse: Tensor,
    need_slots: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dslots, dk and dv, each empty unless needed.

    With z_j = 2^lse_j: dl_jn = phi'(l_jn) / z_j (dvalues_j . (v_n - values_j) + dlse_j / ln 2)
    dv_n = sum_j f_jn / z_j dvalues_j      dk_n = sum_j dl_jn p_j      dp_j = sum_n dl_jn k_n
    """
    move = _Move(slots, k, cos, sin, interleaved, feature_map)
    inverse = _level(lse).neg_().exp2_().unsqueeze(3)  # a slot without features is not read
    rows = _wide(dvalues) * inverse
    lift = (dlse.unsqueeze(3) * LOG2E - (dvalues * values).sum(-1, keepdim=True)) * inverse
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    dslots = move.slot_sums(k) if need_slots and slots is not None else None
    for group, tiles in _groups(k, move.num_slots):
        dstate, offset = _flat(rows, group), _flat(lift, group).mT
        for tile in tiles:
            keys = _read(k, tile, mask, move.rope)
            logits = move.logits(keys, group)
            if need_k or dslots is not None:
                dlogits = torch.baddbmm(offset, _read(v, tile, mask), dstate.mT, out=move.other(*logits.shape))
                move.times_slope(dlogits, logits)
                if mask is not None:
                    dlogits.mul_(_takes_part(mask, tile, dlogits))
                if need_k:
                    _write(dk, tile, move.to_tokens(dlogits, dk, tile), move.rope)
                if dslots is not None:
                    _flat(dslots, group).baddbmm_(keys.mT, dlogits)
            if need_v:
                _write(dv, tile, torch.bmm(move.features(logits), dstate, out=_window(dv, tile, move.room)))
    if mask is not None:  # even where a slot's gradient is NaN
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return k.new_empty(0) if dslots is None else _slots_grad(dslots, slots), dk, dv


def linear_broadcast_forward(
    q: Tensor,
    slots: Tensor | None,
    values: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, E) in q's dtype, and total (B, H, N), its denominator."""
    move = _Move(slots, q, cos, sin, interleaved, feature_map)
    weights = lse.exp2().unsqueeze(3)
    weighted = values * weights
    out, total = empty_like_tokens(q, values.shape[3]), move.empty(*q.shape[:3])
    for group, tiles in _groups(q, move.num_slots):
        state, each = _flat(weighted, group), _flat(weights, group)
        for tile in tiles:
            features = move.features(move.logits(_read(q, tile, None, move.rope), group))
            sums = torch.bmm(features, each).add_(eps)
            result = torch.bmm(features, state, out=_window(out, tile, move.room))
            _write(total, tile, sums)
            _write(out, tile, result.div_(_divisor(sums)))
    return out, total


def linear_broadcast_backward(
    dout: Tensor,
    q: Tensor,
    slots: Tensor | None,
    values: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
    total: Tensor,
    need_slots: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dslots (empty unless needed), dvalues and dlse (both empty unless need_values).

    With t_n the denominator and P_nj = f_nj z_j / t_n:
    dg_nj = dout_n . (values_j - out_n)      dl_nj = phi'(l_nj) z_j / t_n dg_nj      dvalues_j = sum_n P_nj dout_n
    dq_n = sum_j dl_nj p_j      dp_j = sum_n dl_nj q_n      dlse_j = ln 2 sum_n P_nj dg_nj

    dout_n . out_n is sum_j P_nj dout_n . values_j again, because `out` may have been rounded to a narrow dtype.
    """
    move = _Move(slots, q, cos, sin, interleaved, feature_map)
    values, weights = _wide(values), lse.exp2().unsqueeze(2)
    dq = empty_like_tokens(q, q.shape[3])
    dslots = move.slot_sums(q) if need_slots and slots is not None else None
    # Transposed: E x tokens times tokens x M is the faster order.
    dvalues = move.empty(*q.shape[:2], values.shape[3], move.num_slots).zero_()
    dlse = move.empty(*q.shape[:2], move.num_slots).zero_()
    for group, tiles in _groups(q, move.num_slots):
        state, each = _flat(values, group), _flat(weights, group)
        dstate, da = _flat(dvalues, group), _flat(dlse, group)
        for tile in tiles:
            queries, dresult, divisor = _read(q, tile, None, move.rope), _flat(dout, tile), _divisor(_flat(total, tile))
            logits = move.logits(queries, group)
            shares = torch.div(each, divisor.unsqueeze(2), out=move.shares(*logits.shape))
            probs = move.features(logits).mul_(shares)
            dlogits = torch.bmm(dresult, state.mT, out=move.other(*logits.shape))
            dlogits.sub_((probs * dlogits).sum(-1, keepdim=True))
            if need_values:
                dstate.baddbmm_(dresult.mT, probs)
                da.add_((probs * dlogits).sum(1))
            move.times_slope(dlogits.mul_(shares), logits)
            _write(dq, tile, move.to_tokens(dlogits, dq, tile), move.rope)
            if dslots is not None:
                _flat(dslots, group).baddbmm_(queries.mT, dlogits)
    grads = (dvalues.mT.contiguous(), dlse.div_(LOG2E)) if need_values else (values.new_empty(0), values.new_empty(0))
    return dq, q.new_empty(0) if dslots is None else _slots_grad(dslots, slots), *grads


class _Move:
    """What both moves do with their tokens: turn them, project them, map them."""

    def __init__(
        self, slots: Tensor | None, x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, feature_map: str
    ) -> None:
        self.like = x.new_empty(0, dtype=_wide(x[:0]).dtype)
        self.points = None if slots is None else _points(slots, x, 1.0)
        self.num_slots = x.shape[3] if slots is None else slots.shape[2]
        self.rope = _Rope(cos, sin, interleaved, self.like.dtype)
        self.elu = feature_map == "elu"
        self.square, self.other, self.third, self.shares, self.room = (_Scratch(self.like) for _ in range(5))

    def empty(self, *shape: int) -> Tensor:
        return self.like.new_empty(shape)

    def slot_sums(self, x: Tensor) -> Tensor:
        """Sums over tokens for the gradient of the slots, transposed."""
        return self.empty(*x.shape[:2], x.shape[3], self.num_slots).zero_()

    def logits(self, x: Tensor, group: Group) -> Tensor:
        if self.points is None:
            return x
        return torch.bmm(x, _flat(self.points, group).mT, out=self.square(*x.shape[:2], self.num_slots))

    def features(self, logits: Tensor) -> Tensor:
        """phi(logits), in a buffer of its own."""
        features = torch.clamp(logits, max=0, out=self.third(*logits.shape)) if self.elu else None
        if self.elu:
            return features.exp_().add_(logits.clamp(min=0))
        return torch.clamp(logits, min=0, out=self.third(*logits.shape))

    def times_slope(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """dlogits times phi'(logits), in place."""
        if self.elu:
            return dlogits.mul_(torch.clamp(logits, max=0, out=self.third(*logits.shape)).exp_())
        return dlogits.mul_(logits > 0)

    def to_tokens(self, dlogits: Tensor, dx: Tensor, tile: Tile) -> Tensor:
        """The rows of a tile of dx."""
        if self.points is None:
            return dlogits
        return torch.bmm(dlogits, _flat(self.points, tile[:2]), out=_window(dx, tile, self.room))


def _takes_part(mask: Tensor, tile: Tile, like: Tensor) -> Tensor:
    """1 for keys that take part, else 0: (pairs, tokens of the tile, 1)."""
    rows = _taken(mask, tile).to(like.dtype)
    return rows.expand(-1, like.shape[0] // len(rows), -1).flatten(0, 1).unsqueeze(2)


def _divisor(total: Tensor) -> Tensor:
    """The denominator; without features the numerator is 0, and so is the result."""
    return total.masked_fill(total == 0, 1)

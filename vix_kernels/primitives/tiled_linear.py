"""The linear passes in plain PyTorch, one tile of tokens at a time (primitives/linear.py states the equations).

As in tiled.py: pure functions without autograd, in fp32 (fp64 for fp64 inputs), that keep no features: backward makes them
again. Without slots the features are as wide as the head, and a tile of tokens is a tile of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import empty_like_tokens
from .tiled import (
    Group,
    Tile,
    _flat,
    _groups,
    _points,
    _read,
    _Rope,
    _Scratch,
    _slots_grad,
    _taken,
    _unused_rows,
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
    """sums (B, H, M, E) and norms (B, H, M)."""
    features_of = _Features(slots, k, cos, sin, interleaved, feature_map)
    sums = features_of.empty(*k.shape[:2], features_of.num_slots, v.shape[3]).zero_()
    norms = features_of.empty(*sums.shape[:3]).zero_()
    for group, tiles in _groups(k, features_of.num_slots):
        state, total = _flat(sums, group), _flat(norms, group)
        for tile in tiles:
            features = features_of(features_of.logits(_read(k, tile, mask, features_of.rope), group))
            if mask is not None:
                features.mul_(_valid_factor(mask, tile, features))
            state.baddbmm_(features.mT, _read(v, tile, mask))
            total.add_(features.sum(1))
    return sums, norms


def linear_aggregate_backward(
    dsums: Tensor,
    dnorms: Tensor,
    slots: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
    need_slots: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dslots, dk and dv, each empty unless needed.

    dl_jn = phi'(l_jn) (dS_j . v_n + dz_j)      dv_n = sum_j f_jn dS_j      dk_n = sum_j dl_jn p_j      dp_j = sum_n dl_jn k_n
    """
    features_of = _Features(slots, k, cos, sin, interleaved, feature_map)
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    dslots = features_of.slot_sums(k) if need_slots and slots is not None else None
    for group, tiles in _groups(k, features_of.num_slots):
        dstate, dtotal = _flat(dsums, group), _flat(dnorms, group).unsqueeze(1)
        for tile in tiles:
            keys = _read(k, tile, mask, features_of.rope)
            logits = features_of.logits(keys, group)
            if need_k or dslots is not None:
                dlogits = torch.baddbmm(dtotal, _read(v, tile, mask), dstate.mT, out=features_of.other(*logits.shape))
                features_of.times_slope(dlogits, logits)
                if mask is not None:
                    dlogits.mul_(_valid_factor(mask, tile, dlogits))
                if need_k:
                    _write(dk, tile, features_of.to_tokens(dlogits, dk, tile), features_of.rope)
                if dslots is not None:
                    _flat(dslots, group).baddbmm_(keys.mT, dlogits)
            if need_v:
                _write(dv, tile, torch.bmm(features_of(logits), dstate, out=_window(dv, tile, features_of.room)))
    if mask is not None:  # even where a slot's gradient is NaN
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return k.new_empty(0) if dslots is None else _slots_grad(dslots.mT, slots), dk, dv


def linear_broadcast_forward(
    q: Tensor,
    slots: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, E) in q's dtype, and total (B, H, N), its denominator."""
    features_of = _Features(slots, q, cos, sin, interleaved, feature_map)
    out, total = empty_like_tokens(q, sums.shape[3]), features_of.empty(*q.shape[:3])
    for group, tiles in _groups(q, features_of.num_slots):
        state, norm = _flat(sums, group), _flat(norms, group).unsqueeze(2)
        for tile in tiles:
            features = features_of(features_of.logits(_read(q, tile, None, features_of.rope), group))
            divisor = torch.bmm(features, norm).add_(eps)
            result = torch.bmm(features, state, out=_window(out, tile, features_of.room))
            _write(total, tile, divisor)
            _write(out, tile, result.div_(_divisor(divisor)))
    return out, total


def linear_broadcast_backward(
    dout: Tensor,
    q: Tensor,
    slots: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    feature_map: str,
    total: Tensor,
    need_slots: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dslots (empty unless needed), dsums and dnorms (both empty unless need_sums).

    With t_n the denominator and d_n = dout_n / t_n:
    dl_nj = phi'(l_nj) (d_n . S_j - z_j d_n . out_n)      dq_n = sum_j dl_nj p_j      dp_j = sum_n dl_nj q_n
    dS_j = sum_n f_nj d_n      dz_j = -sum_n f_nj d_n . out_n

    d_n . out_n is sum_j f_nj d_n . S_j / t_n, because `out` may have been rounded to a narrow dtype. S, z and t are scaled to a
    largest t of about 1 in each head, so that d_n stays finite where all features are small.
    """
    features_of = _Features(slots, q, cos, sin, interleaved, feature_map)
    size = torch.where(total.isfinite(), total, 0).amax(-1, keepdim=True)  # (B, H, 1)
    size = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent)  # a power of two changes no other bits; 1 for 0
    least = 1e8 * torch.finfo(total.dtype).tiny  # tokens that no feature reaches, or hardly, have no gradient
    sums, norms, total = _wide(sums) / size.unsqueeze(3), norms / size, total / size
    dq = empty_like_tokens(q, q.shape[3])
    dslots = features_of.slot_sums(q) if need_slots and slots is not None else None
    # Transposed: E x tokens times tokens x M is the faster order.
    dsums = features_of.empty(*q.shape[:2], sums.shape[3], features_of.num_slots).zero_()
    dnorms = features_of.empty(*q.shape[:2], features_of.num_slots).zero_()
    for group, tiles in _groups(q, features_of.num_slots):
        state, norm = _flat(sums, group), _flat(norms, group).unsqueeze(1)
        dstate, dnorm = _flat(dsums, group), _flat(dnorms, group)
        for tile in tiles:
            queries, dresult = _read(q, tile, None, features_of.rope), _flat(dout, tile)
            divisor = _flat(total, tile).unsqueeze(2)
            divisor = divisor.masked_fill(divisor < least, torch.inf)
            if (unused := _unused_rows(queries, divisor, dresult)) is not None:
                queries, divisor = queries.masked_fill(unused, 0), divisor.masked_fill(unused, 1)
            dresult = dresult / divisor
            logits = features_of.logits(queries, group)
            features = features_of(logits)
            dlogits = torch.bmm(dresult, state.mT, out=features_of.other(*logits.shape))
            delta = (features * dlogits).sum(-1, keepdim=True).div_(divisor)  # d_n . out_n
            if need_sums:
                dstate.baddbmm_(dresult.mT, features)
                dnorm.sub_(torch.bmm(delta.mT, features).squeeze(1))
            features_of.times_slope(dlogits.addcmul_(delta, norm, value=-1), logits)
            _write(dq, tile, features_of.to_tokens(dlogits, dq, tile), features_of.rope)
            if dslots is not None:
                _flat(dslots, group).baddbmm_(queries.mT, dlogits)
    dslots = q.new_empty(0) if dslots is None else _slots_grad(dslots.mT, slots)
    if not need_sums:
        return dq, dslots, sums.new_empty(0), sums.new_empty(0)
    return dq, dslots, (dsums.mT / size.unsqueeze(3)).contiguous(), dnorms / size


class _Features:
    """What both passes do with their tokens: rotate them, project them, map them."""

    def __init__(
        self, slots: Tensor | None, x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, feature_map: str
    ) -> None:
        self.like = x.new_empty(0, dtype=_wide(x[:0]).dtype)
        self.points = None if slots is None else _points(slots, x)
        self.num_slots = x.shape[3] if slots is None else slots.shape[2]
        self.rope = _Rope(cos, sin, interleaved, self.like.dtype)
        self.elu = feature_map == "elu"
        self.square, self.other, self.third, self.room = (_Scratch(self.like) for _ in range(4))

    def empty(self, *shape: int) -> Tensor:
        return self.like.new_empty(shape)

    def slot_sums(self, x: Tensor) -> Tensor:
        """Sums over tokens for the gradient of the slots, transposed."""
        return self.empty(*x.shape[:2], x.shape[3], self.num_slots).zero_()

    def logits(self, x: Tensor, group: Group) -> Tensor:
        if self.points is None:
            return x
        return torch.bmm(x, _flat(self.points, group).mT, out=self.square(*x.shape[:2], self.num_slots))

    def __call__(self, logits: Tensor) -> Tensor:
        """phi(logits), in a buffer of its own."""
        if self.elu:
            return self._exp(logits).add_(logits.clamp(min=0))
        return torch.clamp(logits, min=0, out=self.third(*logits.shape))

    def times_slope(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """dlogits times phi'(logits), in place."""
        return dlogits.mul_(self._exp(logits) if self.elu else logits > 0)

    def _exp(self, logits: Tensor) -> Tensor:
        """exp(min(logits, 0))."""
        torch.clamp(logits, max=0, out=self.third(*logits.shape))
        return self.third.apply(torch.exp)

    def to_tokens(self, dlogits: Tensor, dx: Tensor, tile: Tile) -> Tensor:
        """The rows of a tile of dx."""
        if self.points is None:
            return dlogits
        return torch.bmm(dlogits, _flat(self.points, tile[:2]), out=_window(dx, tile, self.room))


def _valid_factor(mask: Tensor, tile: Tile, like: Tensor) -> Tensor:
    """1 for valid keys, else 0: (pairs, tokens of the tile, 1)."""
    rows = _taken(mask, tile).to(like.dtype)
    return rows.expand(-1, like.shape[0] // len(rows), -1).flatten(0, 1).unsqueeze(2)


def _divisor(total: Tensor) -> Tensor:
    """The denominator; without features the numerator is 0, and so is the result."""
    return total.masked_fill(total == 0, 1)

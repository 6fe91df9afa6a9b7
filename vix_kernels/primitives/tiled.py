"""The two moves and the rotation in plain PyTorch, one token tile at a time.

    aggregate   l_jn = s p_j . k_n + b_n    values_j = sum_n softmax_n(l_jn) v_n    lse_j = logsumexp_n l_jn
    broadcast   g_nj = s p_j . q_n + a_j    out_n = sum_j softmax_j(g_nj) values_j

Pure functions without autograd: they are the bodies of registered ops, so backward is spelled out and recomputes what forward
did not keep. No array of tokens x slots ever exists: everything indexed by a token lives in a tile, everything indexed by
a slot is a sum over tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 512


def _tiles(tokens: int) -> list[slice]:
    return [slice(start, min(start + TILE, tokens)) for start in range(0, tokens, TILE)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = 2 * cos.shape[-1]
    u, v = _pairs(x, width, interleaved)
    y = x.clone()
    yu, yv = _pairs(y, width, interleaved)
    yu.copy_(u * cos - v * sin)
    yv.copy_(u * sin + v * cos)
    return y


def _pairs(x: Tensor, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0:width:2], x[..., 1:width:2]
    return x[..., : width // 2], x[..., width // 2 : width]


def _load(x: Tensor, tile: slice, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    y = x[:, :, tile].to(_wide(x.dtype))
    if mask is not None:
        y = y.masked_fill(~mask[:, None, tile, None], 0.0)
    if cos is not None:
        y = _rotated(y, cos[:, tile].to(y.dtype), sin[:, tile].to(y.dtype), interleaved).to(x.dtype).to(y.dtype)
    return y


def _logits(slots: Tensor, k: Tensor, mask: Tensor | None, tile: slice, scale: float, gaussian: bool) -> Tensor:
    logits = scale * (slots @ k.mT)
    if gaussian:
        logits -= 0.5 * scale**2 * k.square().sum(-1)[:, :, None]
    if mask is not None:
        logits.masked_fill_(~mask[:, None, None, tile], -torch.inf)
    return logits


def aggregate_forward(slots, k, v, mask, cos, sin, interleaved, scale, gaussian):
    batch, heads, tokens, _ = k.shape
    wide = _wide(k.dtype)
    slots = slots.to(wide)
    values = k.new_zeros((batch, heads, slots.shape[2], v.shape[3]), dtype=wide)
    lse = k.new_full((batch, heads, slots.shape[2]), -torch.inf, dtype=wide)
    for tile in _tiles(tokens):
        kt = _load(k, tile, mask, cos, sin, interleaved)
        vt = _load(v, tile, mask, None, None, False)
        logits = _logits(slots, kt, mask, tile, scale, gaussian)
        new = torch.logaddexp(lse, logits.logsumexp(-1))
        shift = new.masked_fill(new == -torch.inf, 0.0)
        values.mul_((lse - shift).exp().unsqueeze(-1)).add_((logits - shift.unsqueeze(-1)).exp() @ vt)
        lse = new
    return values, lse


def aggregate_backward(
    dvalues, dlse, slots, k, v, mask, cos, sin, interleaved, scale, gaussian, values, lse, need_slots
):
    wide = _wide(k.dtype)
    points = slots.to(wide)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    batch, heads = k.shape[:2]
    dslots = k.new_zeros((batch, heads, *slots.shape[2:]), dtype=wide)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)
    offset = (dlse - (dvalues * values).sum(-1)).unsqueeze(-1)
    for tile in _tiles(k.shape[2]):
        kt = _load(k, tile, mask, cos, sin, interleaved)
        vt = _load(v, tile, mask, None, None, False)
        p = (_logits(points, kt, mask, tile, scale, gaussian) - shift).exp()
        dv[:, :, tile] = p.mT @ dvalues
        dl = p * (dvalues @ vt.mT + offset)
        dkt = scale * (dl.mT @ points)
        if gaussian:
            dkt -= scale**2 * kt * dl.sum(-2).unsqueeze(-1)
        if cos is not None:
            dkt = _rotated(dkt, cos[:, tile].to(wide), -sin[:, tile].to(wide), interleaved)
        dk[:, :, tile] = dkt
        if need_slots:
            dslots += scale * (dl @ kt)
    return _reduce(dslots, slots) if need_slots else slots.new_empty(0), dk, dv


def broadcast_forward(q, slots, values, slot_bias, cos, sin, interleaved, scale):
    batch, heads, tokens, _ = q.shape
    wide = _wide(q.dtype)
    points, values = slots.to(wide), values.to(wide)
    out = q.new_empty((batch, heads, tokens, values.shape[3]))
    lse = q.new_empty((batch, heads, tokens), dtype=wide)
    for tile in _tiles(tokens):
        qt = _load(q, tile, None, cos, sin, interleaved)
        logits = scale * (qt @ points.mT)
        if slot_bias is not None:
            logits += slot_bias.to(wide).unsqueeze(-2)
        lse[:, :, tile] = logits.logsumexp(-1)
        shift = lse[:, :, tile].masked_fill(lse[:, :, tile] == -torch.inf, torch.inf)
        out[:, :, tile] = (logits - shift.unsqueeze(-1)).exp() @ values
    return out, lse


def broadcast_backward(dout, q, slots, values, slot_bias, cos, sin, interleaved, scale, out, lse, need_slots):
    wide = _wide(q.dtype)
    points, states = slots.to(wide), values.to(wide)
    batch, heads = q.shape[:2]
    dq = torch.empty_like(q)
    dslots = q.new_zeros((batch, heads, *slots.shape[2:]), dtype=wide)
    dvalues = torch.zeros_like(states)
    dbias = q.new_zeros((batch, heads, slots.shape[2]), dtype=wide)
    for tile in _tiles(q.shape[2]):
        qt = _load(q, tile, None, cos, sin, interleaved)
        dt, ot = dout[:, :, tile].to(wide), out[:, :, tile].to(wide)
        logits = scale * (qt @ points.mT)
        if slot_bias is not None:
            logits += slot_bias.to(wide).unsqueeze(-2)
        shift = lse[:, :, tile].masked_fill(lse[:, :, tile] == -torch.inf, torch.inf)
        p = (logits - shift.unsqueeze(-1)).exp()
        dvalues += p.mT @ dt
        dg = p * (dt @ states.mT - (dt * ot).sum(-1, keepdim=True))
        dqt = scale * (dg @ points)
        if cos is not None:
            dqt = _rotated(dqt, cos[:, tile].to(wide), -sin[:, tile].to(wide), interleaved)
        dq[:, :, tile] = dqt
        dbias += dg.sum(-2)
        if need_slots:
            dslots += scale * (dg.mT @ qt)
    return dq, _reduce(dslots, slots) if need_slots else slots.new_empty(0), dvalues, dbias


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    wide = _wide(x.dtype)
    cos, sin = cos.to(wide), (-sin if inverse else sin).to(wide)
    y = torch.empty_like(x)
    for tile in _tiles(x.shape[2]):
        y[:, :, tile] = _rotated(x[:, :, tile].to(wide), cos[:, tile], sin[:, tile], interleaved)
    return y

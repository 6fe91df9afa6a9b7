"""Tokens attend to slots, one tile of tokens at a time (see primitives/broadcast.py for the equations).

Logits are multiplied by log2(e), and slot_bias is a base-2 logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Needs, Rotary, Statistics, accumulator, empty_like_tokens
from .tiles import (
    LOG2E,
    Rotation,
    Scratch,
    at_least_one,
    expand_slots,
    flat,
    groups,
    read,
    slots_grad,
    unused_rows,
    wide,
    window,
    write,
)
from .token_conv import token_conv_add


def broadcast_forward(
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None,
    rotary: Rotary | None,
    scale: float,
    v: Tensor | None,
    conv_weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, H, N, E) in q's dtype, and two empty tensors in place of the statistics that the Triton kernel returns.

    The bias a_j is slot_bias (B, H, M), or 0 if slot_bias is None. If slot_bias is a mask (B, M), slots whose element is 0 have
    bias -inf, and all other slots have bias 0. A slot with bias -inf has probability 0. If all slots have bias -inf, the output
    of the attention is 0. If v and conv_weight are given, the convolution of v is added to out.
    """
    all_slots, values, biases = expand_slots(slots, q), wide(values), _slot_bias(slot_bias, slots, q)
    rope = Rotation(rotary, all_slots.dtype)
    out = empty_like_tokens(q, values.shape[3])
    square, room = Scratch(all_slots), Scratch(all_slots)
    for group, tiles in groups(q, slots.shape[2]):
        pt, state, bias = flat(all_slots, group).mT, flat(values, group), flat(biases, group).unsqueeze(1)
        for tile in tiles:
            exps, total = _query_exps(read(q, tile, None, rope), pt, bias, scale, square)
            result = torch.bmm(exps, state, out=window(out, tile, room))
            write(out, tile, result.div_(total))
    if v is not None:
        token_conv_add(out, v, conv_weight, mask)
    return out, *(q.new_empty(0, dtype=all_slots.dtype) for _ in range(2))


def broadcast_backward(
    dout: Tensor,
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None,
    rotary: Rotary | None,
    scale: float,
    out: Tensor | None,
    statistics: Statistics,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dslots, dvalues and dslot_bias.

    dslots is empty unless needs[0] is set. dvalues and dslot_bias are empty unless needs[1] is set.

    With s = scale and P_nj = softmax_j(g_nj):
    dg_nj = P_nj dout_n . (values_j - out_n)    dvalues_j = sum_n P_nj dout_n
    dq_n = s sum_j dg_nj p_j    dp_j = s sum_n dg_nj q_n    da_j = ln 2 sum_n dg_nj

    The function recomputes the softmax and does not read `out` or `statistics`. It computes dout_n . out_n as
    sum_j P_nj dout_n . values_j, not from `out`, which may be rounded to 16 bits. Therefore, sum_j dg_nj = 0 up to rounding
    errors, and dq is accurate even if slots have a large common mean.
    """
    need_slots, need_values = needs
    all_slots = expand_slots(slots, q)
    scaled = all_slots * scale
    values, biases = wide(values), _slot_bias(slot_bias, slots, q)
    rope = Rotation(rotary, all_slots.dtype)
    dq = empty_like_tokens(q, q.shape[3])
    # Sums over tokens are stored transposed, because multiplying (E, tokens) by (tokens, M) is the faster order.
    dvalues = all_slots.new_zeros((*q.shape[:2], values.shape[3], slots.shape[2]))
    dbias = all_slots.new_zeros((*q.shape[:2], slots.shape[2]))
    dslots = all_slots.new_zeros((*q.shape[:2], q.shape[3], slots.shape[2])) if need_slots else None
    square, other, room = Scratch(all_slots), Scratch(all_slots), Scratch(all_slots)
    for group, tiles in groups(q, slots.shape[2]):
        pt, state_t = flat(all_slots, group).mT, flat(values, group).mT
        scaled_slots, bias = flat(scaled, group), flat(biases, group).unsqueeze(1)
        dstate, da = flat(dvalues, group), flat(dbias, group)
        for tile in tiles:
            queries, dresult = read(q, tile, None, rope), flat(dout, tile)
            exps, total = _query_exps(queries, pt, bias, scale, square)
            if (unused := unused_rows(queries, total, dresult)) is not None:
                queries, exps = queries.masked_fill(unused, 0), exps.masked_fill_(unused, 0)
                total = total.masked_fill(unused, 1)
            dresult = dresult / total  # probabilities are exps / total
            if need_values:
                dstate.baddbmm_(dresult.mT, exps)
            dlogits = torch.bmm(dresult, state_t, out=other(*exps.shape)).mul_(exps)
            dlogits.addcmul_(exps, dlogits.sum(-1, keepdim=True).div_(total), value=-1)
            write(dq, tile, torch.bmm(dlogits, scaled_slots, out=window(dq, tile, room)), rope)
            if need_values:
                da.add_(dlogits.sum(1))
            if need_slots:
                flat(dslots, group).baddbmm_(queries.mT, dlogits, alpha=scale)
    dslots = slots.new_empty(0) if dslots is None else slots_grad(dslots.mT, slots)
    if not need_values:
        return dq, dslots, values.new_empty(0), values.new_empty(0)
    return dq, dslots, dvalues.mT.contiguous(), dbias.div_(LOG2E)


def _query_exps(queries: Tensor, pt: Tensor, bias: Tensor, scale: float, square: Scratch) -> tuple[Tensor, Tensor]:
    """Return the exponentials exp(g_nj - max_j g_nj) of a tile, and their sums over slots.

    The exponentials have shape (pairs, tokens, M), where pairs = samples * heads. If all biases are -inf, the exponentials are
    0 and the sum is set to 1.
    """
    logits = torch.baddbmm(bias, queries, pt, alpha=scale * LOG2E, out=square(*queries.shape[:2], pt.shape[2]))
    row_max = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # avoids -inf - (-inf)
    logits.sub_(row_max)
    exps = square.apply(torch.exp2)
    return exps, at_least_one(exps.sum(-1, keepdim=True))


def _slot_bias(slot_bias: Tensor | None, slots: Tensor, q: Tensor) -> Tensor:
    """Return slot_bias expanded to (B, H, M). None becomes 0. A mask becomes 0 for valid slots and -inf for invalid slots."""
    if slot_bias is None:
        return q.new_zeros((), dtype=accumulator(q.dtype)).expand(*q.shape[:2], slots.shape[2])
    if slot_bias.dim() == 2:  # a mask
        bias = torch.where(slot_bias != 0, 0.0, float("-inf")).to(accumulator(q.dtype))
        return bias[:, None].expand(*q.shape[:2], slots.shape[2])
    return wide(slot_bias)

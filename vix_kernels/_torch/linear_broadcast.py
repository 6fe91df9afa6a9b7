"""The output of linear attention, one tile of tokens at a time (see primitives/linear.py for the equations)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Needs, Rotary, empty_like_tokens
from .features import Features
from .tiles import flat, groups, read, slots_grad, unused_rows, wide, window, write


def linear_broadcast_forward(
    q: Tensor,
    slots: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    rotary: Rotary | None,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, E) in q's dtype, and the denominator `total` (B, H, N)."""
    features_of = Features(slots, q, rotary, feature_map)
    out, total = empty_like_tokens(q, sums.shape[3]), features_of.empty(*q.shape[:3])
    for group, tiles in groups(q, features_of.num_slots):
        state, norm = flat(sums, group), flat(norms, group).unsqueeze(2)
        for tile in tiles:
            features = features_of(features_of.logits(read(q, tile, None, features_of.rope), group))
            divisor = torch.bmm(features, norm).add_(eps)
            result = torch.bmm(features, state, out=window(out, tile, features_of.room))
            write(total, tile, divisor)
            write(out, tile, result.div_(_divisor(divisor)))
    return out, total


def linear_broadcast_backward(
    dout: Tensor,
    q: Tensor,
    slots: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    rotary: Rotary | None,
    feature_map: str,
    total: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dslots, dsums and dnorms.

    dslots is empty unless needs[0] is set. dsums and dnorms are empty unless needs[1] is set.

    With the logits l_nj = p_j . q_n, the denominator t_n, and d_n = dout_n / t_n:
    dl_nj = phi'(l_nj) (d_n . S_j - z_j d_n . out_n)      dq_n = sum_j dl_nj p_j      dp_j = sum_n dl_nj q_n
    dS_j = sum_n f_nj d_n      dz_j = -sum_n f_nj d_n . out_n

    d_n . out_n is computed as sum_j f_nj d_n . S_j / t_n, not from out_n, which may be rounded to 16 bits. S, z and t are
    scaled so that the largest t of each sample and head is about 1. Otherwise, d_n would overflow if all features were small.
    """
    need_slots, need_sums = needs
    features_of = Features(slots, q, rotary, feature_map)
    size = torch.where(total.isfinite(), total, 0).amax(-1, keepdim=True)  # (B, H, 1)
    size = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent)  # power of two for exact divisions, or 1 if size is 0
    least = 1e8 * torch.finfo(total.dtype).tiny  # tokens with a smaller scaled denominator have gradient 0
    sums, norms, total = wide(sums) / size.unsqueeze(3), norms / size, total / size
    dq = empty_like_tokens(q, q.shape[3])
    dslots = features_of.slot_sums(q) if need_slots and slots is not None else None
    # dsums is stored transposed, because multiplying (E, tokens) by (tokens, M) is the faster order.
    dsums = features_of.empty(*q.shape[:2], sums.shape[3], features_of.num_slots).zero_()
    dnorms = features_of.empty(*q.shape[:2], features_of.num_slots).zero_()
    for group, tiles in groups(q, features_of.num_slots):
        state, norm = flat(sums, group), flat(norms, group).unsqueeze(1)
        dstate, dnorm = flat(dsums, group), flat(dnorms, group)
        for tile in tiles:
            queries, dresult = read(q, tile, None, features_of.rope), flat(dout, tile)
            divisor = flat(total, tile).unsqueeze(2)
            divisor = divisor.masked_fill(divisor < least, torch.inf)
            if (unused := unused_rows(queries, divisor, dresult)) is not None:
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
            write(dq, tile, features_of.to_tokens(dlogits, dq, tile), features_of.rope)
            if dslots is not None:
                flat(dslots, group).baddbmm_(queries.mT, dlogits)
    dslots = q.new_empty(0) if dslots is None else slots_grad(dslots.mT, slots)
    if not need_sums:
        return dq, dslots, sums.new_empty(0), sums.new_empty(0)
    return dq, dslots, (dsums.mT / size.unsqueeze(3)).contiguous(), dnorms / size


def _divisor(total: Tensor) -> Tensor:
    """Return the denominator with zeros replaced by 1. If a denominator is 0, so is the numerator, and the output is 0."""
    return total.masked_fill(total == 0, 1)

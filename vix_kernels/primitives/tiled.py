"""The two passes and the rotation in plain PyTorch, one tile of tokens at a time.

    aggregate   l_jn = s p_j . k_n + b_n    values_j = sum_n softmax_n(l_jn) v_n       lse_j = logsumexp_n l_jn
    broadcast   g_nj = s p_j . q_n + a_j    out_n    = sum_j softmax_j(g_nj) values_j

Pure functions without autograd: they are the bodies of registered ops, so backward is spelled out and recomputes what
forward did not keep. Tokens x slots never exist at once, only a tile of them, in a buffer that all tiles share.

Products, softmax and sums run in fp32 (fp64 for fp64 inputs); narrower inputs are widened head by head. Logits, lse and
slot_bias are in units of log 2: exp2 is several times faster than exp on a CPU. A bias is the matrix that a product is
added to, which is nearly free.

Shapes: slots (Bs, Hs, M, D) with Bs in {1, B} and Hs in {1, H}; q, k (B, H, N, D); v (B, H, N, E); values (B, H, M, E);
mask bool (B, N); cos, sin fp32 (1 or H, N, R / 2) with R <= D: the rotary embedding of q (broadcast) or k (aggregate),
on the first R channels. What is made of tokens has their layout, all else is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import accumulator, empty_like_tokens

LOG2E = 1 / math.log(2)
# Logits in a tile. Small enough for the caches of a CPU core, large enough to hide what calls and launches cost.
TILE_CPU, TILE_GPU = 2**19, 2**24
GRAIN, VECTORS = 2**15, 64  # elements from which on PyTorch uses another thread, and two vectors of any CPU

# The samples and heads that are worked on together, and a tile of their tokens: indices of (B, H, ...) and (B, H, N, ...).
Group = tuple[slice, slice]
Tile = tuple[slice, slice, slice]


def aggregate_forward(
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots attend to tokens: values (B, H, M, E); lse, top and total (B, H, M). b_n = -|s k_n|^2 / 2 if gaussian, else 0.

    top_j is the largest logit of a slot, total_j = sum_n exp(l_jn - top_j), and lse_j = top_j + log total_j. A masked key has
    b_n = -inf and is read as 0, whatever it holds. A slot without any key gets values 0, lse -inf and total 0.
    """
    points = _points(slots, k)
    rope = _Rope(cos, sin, interleaved, points.dtype)
    values = points.new_zeros((*k.shape[:2], slots.shape[2], v.shape[3]))
    lse, tops, totals = (points.new_empty(values.shape[:3]) for _ in range(3))
    square, rows = _Scratch(points), _Scratch(points)
    for group, tiles in _groups(k, slots.shape[2]):
        p, state = _flat(points, group), _flat(values, group)
        # The lowest number, not -inf: a slot that has seen no key yet must not compute inf - inf.
        top = p.new_full((*p.shape[:2], 1), torch.finfo(p.dtype).min)
        total = torch.zeros_like(top)
        for tile in tiles:
            keys, contents = _read(k, tile, mask, rope), _read(v, tile, mask)
            logits = _key_logits(p, keys, tile, mask, scale, gaussian, square, rows)
            running_max = torch.maximum(top, logits.amax(-1, keepdim=True))
            logits.sub_(running_max)
            exps = square.apply(torch.exp2)
            decay = top.sub_(running_max).exp2_()
            total = torch.addcmul(exps.sum(-1, keepdim=True), total, decay)
            state.mul_(decay).baddbmm_(exps, contents)
            top = running_max
        state.div_(_at_least_one(total))
        for x, result in ((tops, top), (totals, total), (lse, top + total.log2())):
            _write(x, group, result)
    return values, lse, tops, totals


def aggregate_backward(
    dvalues: Tensor,
    dlse: Tensor | None,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
    gaussian: bool,
    values: Tensor,
    top: Tensor,
    total: Tensor,
    need_slots: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dslots, dk and dv, each empty unless needed.

    dl_jn = P_jn (dvalues_j . (v_n - values_j) + dlse_j)    dv_n = sum_j P_jn dvalues_j
    dk_n = s sum_j dl_jn p_j - s^2 k_n sum_j dl_jn (the second if gaussian)    dp_j = s sum_n dl_jn k_n

    The logits are those of forward, bit for bit: the same products of the same operands. So the probabilities
    P_jn = exp(l_jn - top_j) / total_j sum to 1 however large the logits are; rows of slots carry the 1 / total_j.
    """
    points = _points(slots, k)
    scaled, rope = points * scale, _Rope(cos, sin, interleaved, points.dtype)
    total = _at_least_one(total)
    weighted = dvalues / total.unsqueeze(3)
    dlogit = torch.zeros_like(total) if dlse is None else dlse * LOG2E / total
    dk, dv = (empty_like_tokens(x, x.shape[3]) if need else x.new_empty(0) for x, need in ((k, need_k), (v, need_v)))
    dslots = points.new_zeros((*k.shape[:2], *slots.shape[2:])) if need_slots else None
    square, other, rows, key_room, value_room = (_Scratch(points) for _ in range(5))
    for group, tiles in _groups(k, slots.shape[2]):
        p, scaled_slots, dstate = (_flat(x, group) for x in (points, scaled, weighted))
        shift, tops, sums = (_flat(x, group).unsqueeze(2) for x in (dlogit, top, total))
        alone = len(tiles) == 1  # a tile has all tokens, and so their sums
        if not alone:
            shift = shift - _row_products(dstate, _flat(values, group))
        for tile in tiles:
            keys, contents = _read(k, tile, mask, rope), _read(v, tile, mask)
            logits = _key_logits(p, keys, tile, mask, scale, gaussian, square, rows)
            logits.sub_(tops).clamp_(max=0)  # a matrix product on other threads may round differently
            exps = square.apply(torch.exp2)
            if need_v:
                _write(dv, tile, torch.bmm(exps.mT, dstate, out=_window(dv, tile, value_room)))
            if not (need_k or need_slots):
                continue
            if alone:
                dlogits = torch.bmm(dstate, contents.mT, out=other(*exps.shape)).mul_(exps)
                dlogits.addcmul_(exps, shift - dlogits.sum(-1, keepdim=True) / sums)
            else:
                dlogits = torch.baddbmm(shift, dstate, contents.mT, out=other(*exps.shape)).mul_(exps)
            if need_k:
                dkeys = torch.bmm(dlogits.mT, scaled_slots, out=_window(dk, tile, key_room))
                if gaussian:
                    dkeys.addcmul_(keys, dlogits.sum(1).unsqueeze(2), value=-(scale**2))
                _write(dk, tile, dkeys, rope)
            if need_slots:
                _flat(dslots, group).baddbmm_(dlogits, keys, alpha=scale)
    if mask is not None:  # even where a slot's gradient is NaN
        hidden = ~mask[:, None, :, None]
        dk, dv = (x.masked_fill_(hidden, 0) if need else x for x, need in ((dk, need_k), (dv, need_v)))
    return _slots_grad(dslots, slots), dk, dv


def broadcast_forward(
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
) -> Tensor:
    """Tokens attend to slots: out (B, H, N, E) in q's dtype, with a_j = slot_bias (B, H, M) or 0.

    A slot of bias -inf has probability 0; a token without any slot gets out 0.
    """
    points, values, biases = _points(slots, q), _wide(values), _slot_bias(slot_bias, slots, q)
    rope = _Rope(cos, sin, interleaved, points.dtype)
    out = empty_like_tokens(q, values.shape[3])
    square, room = _Scratch(points), _Scratch(points)
    for group, tiles in _groups(q, slots.shape[2]):
        pt, state, bias = _flat(points, group).mT, _flat(values, group), _flat(biases, group).unsqueeze(1)
        for tile in tiles:
            exps, total = _query_exps(_read(q, tile, None, rope), pt, bias, scale, square)
            result = torch.bmm(exps, state, out=_window(out, tile, room))
            _write(out, tile, result.div_(total))
    return out


def broadcast_backward(
    dout: Tensor,
    q: Tensor,
    slots: Tensor,
    values: Tensor,
    slot_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
    need_slots: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dslots (empty unless needed), dvalues and dslot_bias (both empty unless need_values).

    dg_nj = P_nj dout_n . (values_j - out_n)    dvalues_j = sum_n P_nj dout_n
    dq_n = s sum_j dg_nj p_j    dp_j = s sum_n dg_nj q_n    da_j = sum_n dg_nj

    The softmax is computed again, so nothing but the inputs is kept. dout_n . out_n is sum_j P_nj dout_n . values_j, because
    `out` may have been rounded to a narrow dtype: dg_n sums to 0, and slots with a common mean keep dq exact.
    """
    points = _points(slots, q)
    scaled = points * scale
    values, biases = _wide(values), _slot_bias(slot_bias, slots, q)
    rope = _Rope(cos, sin, interleaved, points.dtype)
    dq = empty_like_tokens(q, q.shape[3])
    # Sums over tokens are kept transposed: E x tokens times tokens x M is the faster order.
    dvalues = points.new_zeros((*q.shape[:2], values.shape[3], slots.shape[2]))
    dbias = points.new_zeros((*q.shape[:2], slots.shape[2]))
    dslots = points.new_zeros((*q.shape[:2], q.shape[3], slots.shape[2])) if need_slots else None
    square, other, room = _Scratch(points), _Scratch(points), _Scratch(points)
    for group, tiles in _groups(q, slots.shape[2]):
        pt, state_t = _flat(points, group).mT, _flat(values, group).mT
        scaled_slots, bias = _flat(scaled, group), _flat(biases, group).unsqueeze(1)
        dstate, da = _flat(dvalues, group), _flat(dbias, group)
        for tile in tiles:
            queries, dresult = _read(q, tile, None, rope), _flat(dout, tile)
            exps, total = _query_exps(queries, pt, bias, scale, square)
            if (unused := _unused_rows(queries, total, dresult)) is not None:
                queries, exps = queries.masked_fill(unused, 0), exps.masked_fill_(unused, 0)
                total = total.masked_fill(unused, 1)
            dresult = dresult / total  # carries the 1 / total of the probabilities
            if need_values:
                dstate.baddbmm_(dresult.mT, exps)
            dlogits = torch.bmm(dresult, state_t, out=other(*exps.shape)).mul_(exps)
            dlogits.addcmul_(exps, dlogits.sum(-1, keepdim=True).div_(total), value=-1)
            _write(dq, tile, torch.bmm(dlogits, scaled_slots, out=_window(dq, tile, room)), rope)
            if need_values:
                da.add_(dlogits.sum(1))
            if need_slots:
                _flat(dslots, group).baddbmm_(queries.mT, dlogits, alpha=scale)
    dslots = slots.new_empty(0) if dslots is None else _slots_grad(dslots.mT, slots)
    if not need_values:
        return dq, dslots, values.new_empty(0), values.new_empty(0)
    return dq, dslots, dvalues.mT.contiguous(), dbias.div_(LOG2E)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x (B, H, N, D) with pair (u, v) of each token turned by its angle; the gradient is the inverse turn."""
    rope = _Rope(cos, sin, interleaved, accumulator(x.dtype))
    y = empty_like_tokens(x, x.shape[3])
    for group, _ in _groups(x, x.shape[3]):
        if x.dtype == rope.dtype:
            rope(x[group], group, inverse, out=y[group])
        else:
            y[group] = rope(_wide(x[group]), group, inverse)
    return y


def angle_gradient(x: Tensor, dx: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """u dv - v du of the pairs of x and dx (B, H, N, D), summed over samples, and over heads where they share the angles.

    Where dx is 0, x counts as 0, whatever it holds.
    """
    width = 2 * angles.shape[2]
    total = angles.new_zeros(angles.shape)
    for sample in range(len(x)):
        rows, grads = (each[sample, ..., :width].to(angles.dtype) for each in (x, dx))
        rows, grads = (each.unflatten(-1, (-1, 2) if interleaved else (2, -1)) for each in (rows, grads))
        (u, v), (du, dv) = (each.unbind(-1 if interleaved else -2) for each in (rows, grads))
        u, v = u.masked_fill(dv == 0, 0), v.masked_fill(du == 0, 0)
        total += (u * dv - v * du).sum_to_size(total.shape)
    return total


class _Rope:
    """u' = u cos - v sin, v' = u sin + v cos, or nothing if there are no tables.

    Pairs (u, v) are channels (2i, 2i + 1) if interleaved, else (i, i + R / 2).
    """

    def __init__(self, cos: Tensor | None, sin: Tensor | None, interleaved: bool, dtype: torch.dtype) -> None:
        self.interleaved, self.dtype = interleaved, dtype
        self.cos, self.sin = (None, None) if cos is None else (cos.to(dtype), sin.to(dtype))
        # A complex product is the fastest turn of neighbours.
        self.turns = torch.complex(self.cos, self.sin) if interleaved and cos is not None else None
        self.cos_of_both = None if cos is None or interleaved else self.cos.repeat(1, 1, 2)

    def __call__(self, x: Tensor, where: Group | Tile, inverse: bool = False, out: Tensor | None = None) -> Tensor:
        """x (b, h, tokens, D), the wide rows of a group or a tile."""
        if self.cos is None:
            return x
        part = (slice(None) if len(self.cos) == 1 else where[1], *where[2:])
        width = 2 * self.cos.shape[-1]
        y = torch.empty_like(x) if out is None else out
        y[..., width:] = x[..., width:]
        if self.interleaved and _is_complex(x) and _is_complex(y):
            turns = self.turns[part]
            # Not the lazy conj(): inside a compiled graph its mark is overlooked.
            turns = turns.conj_physical() if inverse else turns
            torch.mul(_complex(x[..., :width]), turns, out=_complex(y[..., :width]))
            return y
        sin, sign = self.sin[part], -1 if inverse else 1
        (u, v), (yu, yv) = self._halves(x, width), self._halves(y, width)
        if self.interleaved:
            torch.mul(u, self.cos[part], out=yu)
            torch.mul(v, self.cos[part], out=yv)
        else:
            torch.mul(x[..., :width], self.cos_of_both[part], out=y[..., :width])
        yu.addcmul_(v, sin, value=-sign)
        yv.addcmul_(u, sin, value=sign)
        return y

    def _halves(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return x[..., 0:width:2], x[..., 1:width:2]
        return x[..., : width // 2], x[..., width // 2 : width]


def _is_complex(x: Tensor) -> bool:
    """Whether neighbours can be viewed as complex numbers without a copy."""
    return x.stride(-1) == 1 and all(stride % 2 == 0 for stride in (*x.stride()[:-1], x.storage_offset()))


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class _Scratch:
    """A buffer that all tiles share: fresh memory for each would cost more in page faults than the arithmetic in it."""

    def __init__(self, like: Tensor) -> None:
        self.memory = self.view = self.padded = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        if self.view.shape != shape:
            size = math.prod(shape)
            threads = min(torch.get_num_threads(), -(-size // GRAIN))
            padded = -(-size // (VECTORS * max(1, threads))) * VECTORS * max(1, threads)
            if self.memory.numel() < padded:
                self.memory = self.memory.new_zeros(padded)
            self.view, self.padded = self.memory[:size].view(shape), self.memory[:padded]
        return self.view

    def apply(self, function: Callable[..., Tensor]) -> Tensor:
        """function(x, out=x) of the buffer in use, rounded alike in every place.

        PyTorch computes the last elements of each thread one by one, which of exp2 gives other bits than vectors do. Those are
        elements beyond the buffer, so that no sample's bits depend on how many samples there are.
        """
        function(self.padded, out=self.padded)
        return self.view


def _groups(x: Tensor, slots: int) -> Iterator[tuple[Group, list[Tile]]]:
    """Cut (batch, heads, tokens) into tiles: several samples or heads of short sequences, runs of tokens of long ones.

    A tile is a stretch of memory where it can be. Where the heads of a token are neighbours, as behind a linear map, it has all
    heads of some tokens: one head alone is a few cache lines of every page, and waits for each of them.
    """
    batch, heads, tokens, _ = x.shape
    room = max(1, (TILE_CPU if x.device.type == "cpu" else TILE_GPU) // slots)
    pairs = max(1, room // max(1, tokens))
    if x.stride(1) < x.stride(2) and 4 * heads > pairs:  # and one sample, whose heads are a view
        pairs = heads
    b_step, h_step = max(1, pairs // max(1, heads)), max(1, min(heads, pairs))
    n_step = room // (b_step * h_step)
    if n_step < tokens:
        n_step = max(16, n_step // 16 * 16)
    for b in range(0, batch, b_step):
        for h in range(0, heads, h_step):
            group = slice(b, b + b_step), slice(h, h + h_step)
            yield group, [(*group, slice(n, n + n_step)) for n in range(0, tokens, n_step)]


def _flat(x: Tensor, where: Group | Tile) -> Tensor:
    """A group or a tile of x as (sample-head pairs, ...), wide. A view if x is wide, and contiguous or the group one sample."""
    return _wide(x[where].flatten(0, 1))


def _read(x: Tensor, where: Group | Tile, mask: Tensor | None, rope: _Rope | None = None) -> Tensor:
    """The tokens of a group or a tile, (pairs, tokens, width), with masked ones 0, and turned."""
    rows = _wide(x[where])
    if mask is not None:
        rows = rows.masked_fill(~_taken(mask, where)[..., None], 0.0)
    if rope is not None and rope.cos is not None:
        rows = _wide(rope(rows, where).to(x.dtype))
    return rows.flatten(0, 1)


def _taken(mask: Tensor, where: Group | Tile) -> Tensor:
    """Which tokens take part, (samples, 1, tokens)."""
    return mask[(where[0], *where[2:])][:, None]


def _window(x: Tensor, where: Group | Tile, room: _Scratch) -> Tensor:
    """Where to compute a group or a tile of x, (pairs, tokens, width): in x itself if it is wide and pairs are a view of it."""
    part = x[where]
    if part.dtype == room.memory.dtype and (len(part) == 1 or part.is_contiguous()):
        return part.flatten(0, 1)
    return room(part.shape[0] * part.shape[1], *part.shape[2:])


def _write(x: Tensor, where: Group | Tile, rows: Tensor, rope: _Rope | None = None) -> None:
    """Bring computed rows to x, turned back."""
    part = x[where]
    rows = rows.view(part.shape)
    if rope is not None and rope.cos is not None:
        elsewhere = rows.data_ptr() != part.data_ptr() and rows.dtype == part.dtype
        rows = rope(rows, where, inverse=True, out=part if elsewhere else None)
    if rows.data_ptr() != part.data_ptr():
        part.copy_(rows)


def _key_logits(
    p: Tensor, keys: Tensor, tile: Tile, mask: Tensor | None, scale: float, gaussian: bool, square: _Scratch, rows: _Scratch
) -> Tensor:
    """l_jn of a tile, (pairs, M, tokens), in units of log 2. Forward and backward must get the same bits."""
    bias = _key_bias(keys, tile, mask, scale, gaussian, rows).unsqueeze(1)
    return torch.baddbmm(bias, p, keys.mT, alpha=scale * LOG2E, out=square(*p.shape[:2], keys.shape[1]))


def _key_bias(keys: Tensor, tile: Tile, mask: Tensor | None, scale: float, gaussian: bool, rows: _Scratch) -> Tensor:
    """b_n of a tile, (pairs, tokens), in units of log 2."""
    if gaussian:
        bias = torch.mul(keys, keys, out=rows(*keys.shape)).sum(-1).mul_(-0.5 * scale**2 * LOG2E)
        bias += bias - bias  # NaN where the square overflows; -inf would say that there is no key
    else:
        bias = keys.new_zeros(keys.shape[:2])
    if mask is not None:
        hidden = ~_taken(mask, tile)
        bias.view(len(hidden), -1, bias.shape[1]).masked_fill_(hidden, -torch.inf)
    return bias


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """x_j . y_j (pairs, M, 1) of rows, rounded as in larger products: where a slot attends to one token, x_j . v_n cancels."""
    rows = x.shape[1]
    x, y = (F.pad(each, (0, 0, 0, -rows % 16)).unflatten(1, (-1, 16)) for each in (x, y))
    return (x @ y.mT).diagonal(dim1=-2, dim2=-1).flatten(1)[:, :rows].unsqueeze(2)


def _query_exps(queries: Tensor, pt: Tensor, bias: Tensor, scale: float, square: _Scratch) -> tuple[Tensor, Tensor]:
    """exp(g_nj - max_j g_nj) of a tile, (pairs, tokens, M), and their sums over the slots, 1 for a token without slots."""
    logits = torch.baddbmm(bias, queries, pt, alpha=scale * LOG2E, out=square(*queries.shape[:2], pt.shape[2]))
    top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # no inf - inf for a token without slots
    logits.sub_(top)
    exps = square.apply(torch.exp2)
    return exps, _at_least_one(exps.sum(-1, keepdim=True))


def _unused_rows(queries: Tensor, total: Tensor, dresult: Tensor) -> Tensor | None:
    """Which tokens of a tile, (pairs, tokens, 1), hold NaN or inf and have outputs that the loss does not use: padding.

    Their gradients are 0, but 0 times NaN is NaN. None if no token holds one, which a CPU can ask without waiting. `total` does
    not tell alone: logits that are all -inf are those of a token without slots.
    """
    broken = ~(queries.sum(-1, keepdim=True) + total).isfinite()
    if total.device.type == "cpu" and not broken.any():
        return None
    return broken & (dresult == 0).all(-1, keepdim=True)


def _slot_bias(slot_bias: Tensor | None, slots: Tensor, q: Tensor) -> Tensor:
    """a_j (B, H, M)."""
    if slot_bias is None:
        return q.new_zeros((), dtype=accumulator(q.dtype)).expand(*q.shape[:2], slots.shape[2])
    return _wide(slot_bias)


def _points(slots: Tensor, x: Tensor) -> Tensor:
    """The slots of every sample and head, wide."""
    return slots.to(accumulator(x.dtype)).expand(*x.shape[:2], -1, -1)


def _at_least_one(total: Tensor) -> Tensor:
    """Sums of exponentials, of which the largest is exactly 1: only one without any term is smaller."""
    return total.clamp(min=1)


def _slots_grad(sums: Tensor | None, slots: Tensor) -> Tensor:
    """The gradient of the slots from the sums over the tokens of every sample and head."""
    return slots.new_empty(0) if sums is None else sums.sum_to_size(slots.shape).to(slots.dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))

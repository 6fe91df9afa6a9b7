"""What the primitives share in PyTorch: tiles of tokens, their rotation, and buffers that all tiles use.

Pure functions without autograd: they are parts of the bodies of registered operators, so backward is spelled out and
recomputes what forward did not keep. Tokens x slots never exist at once, only a tile of them, in a buffer that all tiles
share. Products and sums run in fp32 (fp64 for fp64 inputs); narrower inputs are widened head by head.

Shapes: slots (Bs, Hs, M, D) with Bs in {1, B} and Hs in {1, H}; q, k (B, H, N, D); v (B, H, N, E); values (B, H, M, E);
mask bool (B, N); cos, sin fp32 (1 or H, N, R / 2) with R <= D: the rotary embedding of q or k, on the first R channels. What
is made of tokens has their layout, all else is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..layout import Rotary, accumulator, flattened

LOG2E = 1 / math.log(2)  # logits are in units of log 2: exp2 is several times faster than exp on a CPU
# Logits in a tile. Small enough for the caches of a CPU core, large enough to hide what calls and launches cost.
TILE_CPU, TILE_GPU = 2**19, 2**24
GRAIN, VECTORS = 2**15, 64  # elements from which on PyTorch uses another thread, and two vectors of any CPU

# The samples and heads that are worked on together, and a tile of their tokens: indices of (B, H, ...) and (B, H, N, ...).
Group = tuple[slice, slice]
Tile = tuple[slice, slice, slice]


class Rotation:
    """u' = u cos - v sin, v' = u sin + v cos, or nothing if there are no tables.

    Pairs (u, v) are channels (2i, 2i + 1) if interleaved, else (i, i + R / 2).
    """

    def __init__(self, rotary: Rotary | None, dtype: torch.dtype) -> None:
        cos, sin, _, interleaved = flattened(rotary)
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


class Scratch:
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


def groups(x: Tensor, slots: int) -> Iterator[tuple[Group, list[Tile]]]:
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


def flat(x: Tensor, where: Group | Tile) -> Tensor:
    """A group or a tile of x as (sample-head pairs, ...), wide. A view if x is wide, and contiguous or the group one sample."""
    return wide(x[where].flatten(0, 1))


def read(x: Tensor, where: Group | Tile, mask: Tensor | None, rope: Rotation | None = None) -> Tensor:
    """The tokens of a group or a tile, (pairs, tokens, width), with masked ones 0, and turned."""
    rows = wide(x[where])
    if mask is not None:
        rows = rows.masked_fill(~taken(mask, where)[..., None], 0.0)
    if rope is not None and rope.cos is not None:
        rows = wide(rope(rows, where).to(x.dtype))
    return rows.flatten(0, 1)


def taken(mask: Tensor, where: Group | Tile) -> Tensor:
    """Which tokens take part, (samples, 1, tokens)."""
    return mask[(where[0], *where[2:])][:, None]


def window(x: Tensor, where: Group | Tile, room: Scratch) -> Tensor:
    """Where to compute a group or a tile of x, (pairs, tokens, width): in x itself if it is wide and pairs are a view of it."""
    part = x[where]
    if part.dtype == room.memory.dtype and (len(part) == 1 or part.is_contiguous()):
        return part.flatten(0, 1)
    return room(part.shape[0] * part.shape[1], *part.shape[2:])


def write(x: Tensor, where: Group | Tile, rows: Tensor, rope: Rotation | None = None) -> None:
    """Bring computed rows to x, turned back."""
    part = x[where]
    rows = rows.view(part.shape)
    if rope is not None and rope.cos is not None:
        elsewhere = rows.data_ptr() != part.data_ptr() and rows.dtype == part.dtype
        rows = rope(rows, where, inverse=True, out=part if elsewhere else None)
    if rows.data_ptr() != part.data_ptr():
        part.copy_(rows)


def unused_rows(queries: Tensor, total: Tensor, dresult: Tensor) -> Tensor | None:
    """Which tokens of a tile, (pairs, tokens, 1), hold NaN or inf and have outputs that the loss does not use: padding.

    Their gradients are 0, but 0 times NaN is NaN. None if no token holds one, which a CPU can ask without waiting. `total` does
    not tell alone: logits that are all -inf are those of a token without slots.
    """
    broken = ~(queries.sum(-1, keepdim=True) + total).isfinite()
    if total.device.type == "cpu" and not broken.any():
        return None
    return broken & (dresult == 0).all(-1, keepdim=True)


def points_of(slots: Tensor, x: Tensor) -> Tensor:
    """The slots of every sample and head, wide."""
    return slots.to(accumulator(x.dtype)).expand(*x.shape[:2], -1, -1)


def at_least_one(total: Tensor) -> Tensor:
    """Sums of exponentials, of which the largest is exactly 1: only one without any term is smaller."""
    return total.clamp(min=1)


def slots_grad(sums: Tensor | None, slots: Tensor) -> Tensor:
    """The gradient of the slots from the sums over the tokens of every sample and head."""
    return slots.new_empty(0) if sums is None else sums.sum_to_size(slots.shape).to(slots.dtype).contiguous()


def wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))

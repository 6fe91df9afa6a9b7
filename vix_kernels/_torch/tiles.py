"""Tiles, rotations and buffers for the PyTorch implementations of the primitives.

The PyTorch implementations are the bodies of registered operators, so they do not use autograd. Each backward function is
written explicitly, and recomputes intermediate results that the forward function did not save. The logits of only one tile of
tokens are in memory at a time, in a buffer that all tiles reuse. Products and sums are computed in float32 (float64 for float64
inputs). 16-bit inputs are cast one tile at a time.

Shapes: slots (Bs, Hs, M, D) with Bs in {1, B} and Hs in {1, H}; q, k (B, H, N, D); v (B, H, N, E); values (B, H, M, E); mask
bool (B, N); cos, sin float32 or float64 (1 or H, N, R / 2), for the first R <= D channels of q or k. The functions
flatten samples and heads to one dimension, `pairs`.
Outputs and gradients of tokens have the same memory layout as the tokens. Other tensors are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..layout import Rotary, accumulator, flattened

LOG2E = 1 / math.log(2)  # logits are multiplied by log2(e), because exp2 is several times faster than exp on a CPU
# Number of logits per tile. On a CPU, the logits of a tile fit in the caches of a core. On a GPU, a tile has enough logits to
# hide the overhead of kernel launches.
TILE_CPU, TILE_GPU = 2**19, 2**24
# GRAIN is the smallest number of elements per thread in PyTorch's pointwise operators. VECTORS is a multiple of the number of
# elements in two SIMD vectors of any CPU.
GRAIN, VECTORS = 2**15, 64

# Group: an index into (B, H, ...) that selects samples and heads to process together. Tile: an index into (B, H, N, ...) that
# selects some of their tokens.
Group = tuple[slice, slice]
Tile = tuple[slice, slice, slice]


class Rotation:
    """Rotary embedding u' = u cos - v sin, v' = u sin + v cos. If rotary is None, the rotation is the identity.

    Pairs (u, v) are channels (2i, 2i + 1) if interleaved, else (i, i + R / 2).
    """

    def __init__(self, rotary: Rotary | None, dtype: torch.dtype) -> None:
        cos, sin, _, interleaved = flattened(rotary)
        self.interleaved, self.dtype = interleaved, dtype
        self.cos, self.sin = (None, None) if cos is None else (cos.to(dtype), sin.to(dtype))
        # Complex multiplication is the fastest way to rotate pairs of adjacent channels.
        self.phases = torch.complex(self.cos, self.sin) if interleaved and cos is not None else None
        self.cos_of_both = None if cos is None or interleaved else self.cos.repeat(1, 1, 2)

    def __call__(self, x: Tensor, where: Group | Tile, inverse: bool = False, out: Tensor | None = None) -> Tensor:
        """Return x rotated by the angles of its tokens, or by the negative angles if `inverse`.

        x is (b, h, tokens, D): the tokens of the group or tile `where`, in the accumulator's dtype. If `out` is given, the
        result is written to it. If rotary is None, x is returned, and `out` is not used.
        """
        if self.cos is None:
            return x
        part = (slice(None) if len(self.cos) == 1 else where[1], *where[2:])
        width = 2 * self.cos.shape[-1]
        y = torch.empty_like(x) if out is None else out
        y[..., width:] = x[..., width:]
        if self.interleaved and _is_complex(x) and _is_complex(y):
            phases = self.phases[part]
            # conj() is lazy, and compiled graphs ignore the flag that it sets.
            phases = phases.conj_physical() if inverse else phases
            torch.mul(_complex(x[..., :width]), phases, out=_complex(y[..., :width]))
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
    """Return whether pairs of adjacent channels can be viewed as complex numbers."""
    return x.stride(-1) == 1 and all(stride % 2 == 0 for stride in (*x.stride()[:-1], x.storage_offset()))


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class Scratch:
    """A buffer that all tiles reuse. If each tile allocated memory, page faults would take longer than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.memory = self.view = self.padded = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        if self.view.shape != shape:
            size = math.prod(shape)
            threads = min(torch.get_num_threads(), -(-size // GRAIN))
            padded = -(-size // (VECTORS * max(1, threads))) * VECTORS * max(1, threads)
            if self.memory.numel() < padded:
                self.memory = self.memory.new_empty(padded)
                if padded > size:
                    self.memory[size:].zero_()
            self.view, self.padded = self.memory[:size].view(shape), self.memory[:padded]
        return self.view

    def apply(self, function: Callable[..., Tensor]) -> Tensor:
        """Call function(x, out=x) on the current view, and return the view. The rounding is the same for all elements.

        PyTorch computes the last few elements of each thread one by one, and its scalar exp2 rounds differently from its
        vectorized exp2. The buffer is padded so that each thread computes a whole number of vectors. So the result for a sample
        does not depend on the batch size.
        """
        function(self.padded, out=self.padded)
        return self.view


def groups(x: Tensor, slots: int) -> Iterator[tuple[Group, list[Tile]]]:
    """Split the tokens of x (batch, heads, tokens, channels) into tiles. Yield each group of samples and heads with its tiles.

    Each token of each head has `slots` logits. A tile has about TILE_CPU logits on a CPU, and about TILE_GPU logits on a GPU.
    If sequences are short, a tile contains several samples or heads. If they are long, a tile contains only some of their
    tokens. Tiles are contiguous in memory if possible. If the heads of a token are adjacent in memory, as in the output of a
    linear layer, a tile contains all heads of its tokens. Reading one head at a time would be slow, because it would use only a
    few cache lines of each page.
    """
    batch, heads, tokens, _ = x.shape
    room = max(1, (TILE_CPU if x.device.type == "cpu" else TILE_GPU) // slots)
    pairs = max(1, room // max(1, tokens))
    if x.stride(1) < x.stride(2) and 4 * heads > pairs:  # a tile of one sample can be flattened without a copy
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
    """Return a group or a tile of x with samples and heads flattened into pairs (sample, head), in the accumulator's dtype.

    The result is a view if x already has this dtype and if x is contiguous or the group has only one sample.
    """
    return wide(x[where].flatten(0, 1))


def read(x: Tensor, where: Group | Tile, mask: Tensor | None, rope: Rotation | None = None) -> Tensor:
    """Return the tokens (pairs, tokens, width) of a group or a tile. Masked tokens are 0, and `rope` is applied."""
    rows = wide(x[where])
    if mask is not None:
        rows = rows.masked_fill(~valid_tokens(mask, where)[..., None], 0.0)
    if rope is not None and rope.cos is not None:
        rows = wide(rope(rows, where).to(x.dtype))
    return rows.flatten(0, 1)


def valid_tokens(mask: Tensor, where: Group | Tile) -> Tensor:
    """Return the mask (samples, 1, tokens) of a group or a tile."""
    return mask[(where[0], *where[2:])][:, None]


def window(x: Tensor, where: Group | Tile, room: Scratch) -> Tensor:
    """Return the memory (pairs, tokens, width) in which to compute a group or a tile of the output x.

    This is a view of x if x has the dtype of `room` and samples and heads can be flattened without a copy. Otherwise it is a
    view of `room`.
    """
    part = x[where]
    if part.dtype == room.memory.dtype and (len(part) == 1 or part.is_contiguous()):
        return part.flatten(0, 1)
    return room(part.shape[0] * part.shape[1], *part.shape[2:])


def write(x: Tensor, where: Group | Tile, rows: Tensor, rope: Rotation | None = None) -> None:
    """Write rows to a group or a tile of x, after rotating them by the inverse of `rope`."""
    part = x[where]
    rows = rows.view(part.shape)
    if rope is not None and rope.cos is not None:
        elsewhere = rows.data_ptr() != part.data_ptr() and rows.dtype == part.dtype
        rows = rope(rows, where, inverse=True, out=part if elsewhere else None)
    if rows.data_ptr() != part.data_ptr():
        part.copy_(rows)


def unused_rows(queries: Tensor, total: Tensor, dresult: Tensor) -> Tensor | None:
    """Return a mask (pairs, tokens, 1) of tokens that contain NaN or inf and have an output gradient of 0.

    The gradients of these tokens must be 0, but 0 times NaN is NaN. On a CPU, return None if no token contains NaN or inf. On a
    GPU, this check would synchronize, so it is skipped. Checking only `total` is not enough, because `total` is finite if all
    logits of a token are -inf.
    """
    broken = ~(queries.sum(-1, keepdim=True) + total).isfinite()
    if total.device.type == "cpu" and not broken.any():
        return None
    return broken & (dresult == 0).all(-1, keepdim=True)


def expand_slots(slots: Tensor, x: Tensor) -> Tensor:
    """Return the slots in the accumulator's dtype, expanded to all samples and heads of x."""
    return slots.to(accumulator(x.dtype)).expand(*x.shape[:2], -1, -1)


def at_least_one(total: Tensor) -> Tensor:
    """Return `total` with zeros replaced by 1. A nonzero total is at least 1, because one of its terms is exp(0)."""
    return total.clamp(min=1)


def slots_grad(sums: Tensor | None, slots: Tensor) -> Tensor:
    """Sum the slot gradients of all samples and heads to the shape of `slots`. Return an empty tensor if `sums` is None."""
    return slots.new_empty(0) if sums is None else sums.sum_to_size(slots.shape).to(slots.dtype).contiguous()


def wide(x: Tensor) -> Tensor:
    """Return x in the accumulator's dtype, float32 or float64."""
    return x.to(accumulator(x.dtype))

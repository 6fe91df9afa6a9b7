"""Position encodings for a grid of tokens: learned embeddings and rotary tables.

Rotary tables encode one-dimensional positions (RoFormer, arXiv:2104.09864), or two-dimensional positions along the axes or
along learned directions (arXiv:2403.13298).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix_kernels import Rope, rope_1d, rope_axial, rope_mixed, rope_mixed_frequencies

POSITIONS = ("learned", "rope_1d", "rope_axial", "rope_mixed", "none")


def learned_position(position: str, tokens: int, dim: int) -> nn.Parameter | None:
    """Return a learned embedding (1, tokens, dim) to add to the tokens, or None if `position` is not "learned"."""
    if position != "learned":
        return None
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, dim), std=0.02))


def rotary_position(
    position: str, grid: tuple[int, int], dim: int, num_heads: int, depth: int, prefix_tokens: int = 0
) -> nn.Module | None:
    """Return a module that maps a layer index to a rotary table. Prefix tokens are not rotated.

    If `position` is not a rotary encoding, return None.
    """
    if not position.startswith("rope"):
        return None
    head_dim, multiple = dim // num_heads, 2 if position == "rope_1d" else 4
    if head_dim % multiple:
        raise ValueError(f"embed_dim: expected a multiple of {multiple} per head for {position}, got {head_dim}")
    if position == "rope_1d":
        return RotaryPosition(partial(rope_1d, grid[0] * grid[1], head_dim, prefix_tokens=prefix_tokens))
    if position == "rope_axial":
        return RotaryPosition(partial(rope_axial, *grid, head_dim, prefix_tokens=prefix_tokens))
    return MixedRotaryPosition(grid, head_dim, num_heads, depth, prefix_tokens)


class RotaryPosition(nn.Module):
    """A fixed rotary table. It is not saved with the model, and stays float32 when the model is cast."""

    def __init__(self, make: Callable[..., Rope]) -> None:
        super().__init__()
        self._make = make
        self._set(make())

    def _set(self, rope: Rope) -> None:
        self.register_buffer("cos", rope.cos, persistent=False)
        self.register_buffer("sin", rope.sin, persistent=False)
        self.layout = rope.layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPosition:
        super()._apply(fn, recurse)
        # `fn` may have rounded the table to bfloat16, or moved it from the meta device without its values.
        self._set(self._make(device=self.cos.device))
        return self

    def forward(self, layer: int) -> Rope:
        return Rope(self.cos, self.sin, self.layout)


class MixedRotaryPosition(nn.Module):
    """A rotary table with learned frequencies for each layer and head. The frequencies stay float32 when the model is cast."""

    def __init__(self, grid: tuple[int, int], head_dim: int, num_heads: int, depth: int, prefix_tokens: int) -> None:
        super().__init__()
        self.grid, self.prefix_tokens = grid, prefix_tokens
        start = [rope_mixed_frequencies(head_dim, num_heads, seed=layer) for layer in range(depth)]
        self.frequencies = nn.Parameter(torch.stack(start))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedRotaryPosition:
        before = self.frequencies.detach()
        super()._apply(fn, recurse)
        # Move the frequencies without a cast. A cast would round them, and the errors of the angles would grow with position.
        if self.frequencies.dtype != torch.float32:
            self.frequencies.data = before.to(self.frequencies.device)
        return self

    def forward(self, layer: int) -> Rope:
        return rope_mixed(*self.grid, self.frequencies[layer], prefix_tokens=self.prefix_tokens)


def resample_tokens(table: Tensor, dim: int, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Return `table`, resampled from a token map of size `old` to size `new` with bicubic interpolation.

    Dimension `dim` contains the prefix tokens, which do not change, followed by the tokens of the map. The interpolation runs
    in float32, and the result has the dtype of `table`.
    """
    rows = table.movedim(dim, 0)
    prefix, cells = rows[:prefix_tokens], rows[prefix_tokens:]
    maps = cells.float().reshape(*old, -1).permute(2, 0, 1)[None]
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    cells = maps.reshape(new[0] * new[1], *cells.shape[1:]).to(table.dtype)
    return torch.cat([prefix, cells]).movedim(0, dim).contiguous()

"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864).

    u' = u cos(theta) - v sin(theta)        v' = u sin(theta) + v cos(theta)        theta_{t,i} = t base^(-2i / R)

The equations rotate (u, v), pair i of the channels of a query or key at position t. Only the first R channels form pairs.
rope_axial and rope_mixed use different angles. The tables of cosines and sines are float32, even for 16-bit tokens. rope_1d and
rope_axial compute the tables in float64 and then round them to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import backends
from ..layout import Rotary
from ..plans import planned
from ..primitives import rotate
from ..primitives.rotate import rotate_reference
from .checks import check_floating, check_integer, check_number, check_qkv, check_tensor, dtype_name

Layout = Literal["interleaved", "half"]
LAYOUTS = ("interleaved", "half")


@dataclass(frozen=True, eq=False)
class Rope:
    """Tables of cosines and sines for rotating the channels of every token.

    Attributes:
        cos, sin: float32 or float64 (heads or 1, tokens, R / 2). float64 tables require float64 tokens.
        layout: which channels form a pair: (2i, 2i + 1) for "interleaved", (i, i + R / 2) for "half".
        angles: the angles from which cos and sin were computed, or None if these angles require no gradient. See Rope.of.
        remake: a function that recomputes this Rope from the tensors on which the angles depend. Copying and pickling use this
            function, because the angles are part of an autograd graph.
    """

    cos: Tensor
    sin: Tensor
    layout: Layout = "interleaved"
    angles: Tensor | None = None
    remake: Callable[[], Rope] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected 'interleaved' or 'half', got {self.layout!r}")
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            check_tensor(name, table)
            if table.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name}: expected float32 (16 bits are not precise enough), got {table.dtype}")
            if table.dim() != 3 or table.shape != self.cos.shape:
                raise ValueError(
                    f"{name}: expected shape (heads or 1, tokens, R / 2), equal for cos and sin, got {tuple(table.shape)}"
                )
            if table.dtype != self.cos.dtype or table.device != self.cos.device:
                raise ValueError(
                    f"{name}: expected cos' {self.cos.dtype} on {self.cos.device}, got {table.dtype} on {table.device}"
                )
            if table.requires_grad:
                raise ValueError(f"{name}: expected a table that requires no gradient (see Rope.of for learned angles)")
        if self.angles is None:
            return
        check_tensor("angles", self.angles)
        if self.angles.shape != self.cos.shape or self.angles.dtype != self.cos.dtype or self.angles.device != self.cos.device:
            expected, got = (
                f"{dtype_name(x.dtype)} {tuple(x.shape)} on {x.device}" for x in (self.cos, self.angles)
            )  # fmt: skip
            raise ValueError(f"angles: expected cos' dtype, shape and device, {expected}, got {got}")

    @staticmethod
    def of(angles: Tensor, layout: Layout = "interleaved") -> Rope:
        """Return the Rope for `angles`, float32 (heads or 1, tokens, R / 2). The angles may require a gradient."""
        check_floating("angles", angles)
        if angles.dtype not in (torch.float32, torch.float64) or angles.dim() != 3 or 0 in angles.shape:
            got = f"{dtype_name(angles.dtype)} {tuple(angles.shape)}"
            raise TypeError(f"angles: expected float32 (heads or 1, tokens, R / 2), got {got}")
        fixed = angles.detach()
        return Rope(fixed.cos(), fixed.sin(), layout, angles if angles.requires_grad else None)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.remake is not None:
            return _remade, (self.remake,)
        return Rope, (self.cos, self.sin, self.layout, self.angles)

    @property
    def heads(self) -> int:
        return self.cos.shape[0]

    @property
    def tokens(self) -> int:
        return self.cos.shape[1]

    @property
    def dim(self) -> int:
        """R, the number of rotated channels."""
        return 2 * self.cos.shape[2]

    @property
    def interleaved(self) -> bool:
        return self.layout == "interleaved"

    @property
    def rotary(self) -> Rotary:
        """The tables in the form that the functions in primitives/ expect."""
        return Rotary(self.cos, self.sin, self.interleaved, self.angles)

    @property
    def differentiable(self) -> Rotary:
        """The tables for reference implementations. If `angles` is set, autograd can differentiate the tables."""
        cos, sin = (self.cos, self.sin) if self.angles is None else (self.angles.cos(), self.angles.sin())
        return Rotary(cos, sin, self.interleaved)

    def to(self, device: torch.device | str) -> Rope:
        """Return this Rope with its tensors on `device`."""
        angles = None if self.angles is None else self.angles.to(device)
        rope = Rope(self.cos.to(device), self.sin.to(device), self.layout, angles)
        return rope if self.remake is None else rope._with(partial(_moved, self.remake, device))

    def _with(self, remake: Callable[[], Rope]) -> Rope:
        object.__setattr__(self, "remake", remake)  # Rope is frozen
        return self


def rope_1d(
    tokens: int,
    dim: int,
    *,
    base: float = 10000.0,
    layout: Layout = "interleaved",
    prefix_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Rope:
    """Return the Rope for a sequence, with angles t * base^(-2i / dim) for positions t < tokens and channel pairs i < dim / 2.

    Args:
        tokens: number of tokens, without the prefix.
        dim: R, the number of rotated channels. Must be even. If it is less than head_dim, the last channels are not rotated.
        base: base of the frequencies. The longest wavelength is less than 2 pi base.
        layout: "interleaved" (RoFormer, GPT-J, timm) or "half" (GPT-NeoX, Llama).
        prefix_tokens: number of leading tokens (class and register tokens) that are not rotated and not counted in `tokens`.
        device: device of the tables.

    Returns:
        A Rope whose tables are float32 (1, prefix_tokens + tokens, R / 2), the same for all heads.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type. The message names the argument.
    """
    check_integer("tokens", tokens, 1)
    frequencies = _frequencies(dim, 2, base)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return _table(angles[None], layout, prefix_tokens, device)


def rope_axial(
    height: int,
    width: int,
    dim: int,
    *,
    base: float = 100.0,
    layout: Layout = "interleaved",
    prefix_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Rope:
    """Return the Rope for a grid of tokens in raster order (Heo et al., Rotary Position Embedding for ViT, arXiv 2403.13298).

    theta_i = x base^(-4i / dim) and theta_{i + dim / 4} = y base^(-4i / dim), where i < dim / 4. x is the column of the
    token and y is its row. Both start at 0.

    Args:
        height, width: numbers of rows and columns of the grid.
        dim: R, the number of rotated channels, a multiple of 4.
        base, layout, prefix_tokens, device: as in rope_1d.

    Returns:
        A Rope whose tables are float32 (1, prefix_tokens + height * width, R / 2), the same for all heads.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type. The message names the argument.
    """
    x, y = _grid(height, width)
    frequencies = _frequencies(dim, 4, base)
    return _table(torch.cat([x * frequencies, y * frequencies], -1)[None], layout, prefix_tokens, device)


def rope_mixed(height: int, width: int, frequencies: Tensor, *, layout: Layout = "interleaved", prefix_tokens: int = 0) -> Rope:
    """Return the Rope for a grid of tokens, with learned frequencies for each head (RoPE-Mixed, arXiv 2403.13298, equation 11).

    theta_{h,i} = x w^x_{h,i} + y w^y_{h,i}, where x is the column of the token and y is its row. Both start at 0.

    Args:
        height, width: numbers of rows and columns of the grid.
        frequencies: float32 (2, heads, R / 2), w^x and w^y. To learn them, pass a parameter that is initialized with
            rope_mixed_frequencies, and exclude it from weight decay.
        layout, prefix_tokens: as in rope_1d.

    Returns:
        A Rope whose tables are float32 (heads, prefix_tokens + height * width, R / 2), on the device of `frequencies`.
        Differentiable in `frequencies`.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type. The message names the argument.
    """
    check_floating("frequencies", frequencies)
    if frequencies.dim() != 3 or frequencies.shape[0] != 2 or frequencies.numel() == 0:
        raise ValueError(f"frequencies: expected shape (2, heads, R / 2), got {tuple(frequencies.shape)}")
    _check_prefix(prefix_tokens)
    wide = frequencies.to(torch.promote_types(frequencies.dtype, torch.float32))
    x, y = (each.to(wide.dtype) for each in _grid(height, width, wide.device))  # created on the device to avoid a copy
    across, down = wide[:, :, None]  # each (heads, 1, R / 2)
    # A matrix product would round its operands under TF32 or autocast.
    rope = Rope.of(torch.nn.functional.pad(x * across + y * down, (0, 0, prefix_tokens, 0)), layout)
    if rope.angles is None:
        return rope
    return rope._with(partial(rope_mixed, height, width, frequencies, layout=layout, prefix_tokens=prefix_tokens))


def rope_mixed_frequencies(dim: int, num_heads: int, *, seed: int, base: float = 10.0) -> Tensor:
    """Return initial frequencies for rope_mixed: two orthogonal directions, rotated by a random angle for each head.

    Args:
        dim: R, the number of rotated channels, a multiple of 4.
        num_heads: number of heads.
        seed: seed of the random numbers. The same seed produces the same frequencies on every rank.
        base: the magnitudes of the frequencies are base^(-4i / dim) for i < dim / 4.

    Returns:
        float32 (2, num_heads, dim / 2), on the CPU.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type. The message names the argument.
    """
    check_integer("num_heads", num_heads, 1)
    check_integer("seed", seed)
    lengths = _frequencies(dim, 4, base)
    turn = 2 * math.pi * torch.rand(num_heads, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turns = torch.cat([turn.expand(-1, len(lengths)), turn.expand(-1, len(lengths)) + math.pi / 2], -1)
    return (lengths.repeat(2) * torch.stack([turns.cos(), turns.sin()])).float()


def _remade(remake: Callable[[], Rope]) -> Rope:
    return remake()


def _moved(remake: Callable[[], Rope], device: torch.device | str) -> Rope:
    return remake().to(device)


def _frequencies(dim: int, divisor: int, base: float) -> Tensor:
    """Return base^(-divisor i / dim) for i < dim / divisor, in float64."""
    if check_integer("dim", dim) < divisor or dim % divisor:
        raise ValueError(f"dim: expected a multiple of {divisor} channels, got {dim}")
    check_number("base", base)
    return base ** (-torch.arange(0, dim, divisor, dtype=torch.float64) / dim)


def _grid(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the column and the row of every token in raster order, each as (tokens, 1) in float64."""
    for name, size in (("height", height), ("width", width)):
        check_integer(name, size, 1)
    at = torch.arange(height * width, device=device)[:, None]
    return (at % width).double(), (at // width).double()


def _check_prefix(prefix_tokens: int) -> None:
    check_integer("prefix_tokens", prefix_tokens, 0)


def _table(angles: Tensor, layout: Layout, prefix_tokens: int, device: torch.device | str | None) -> Rope:
    """Return a Rope with float32 tables for float64 angles. `prefix_tokens` rows with angle 0 are added at the front."""
    _check_prefix(prefix_tokens)
    angles = torch.nn.functional.pad(angles, (0, 0, prefix_tokens, 0))
    return Rope(angles.cos().float().to(device), angles.sin().float().to(device), layout)


@planned
def apply_rope(q: Tensor, k: Tensor, rope: Rope, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate q and k. With Triton, one kernel rotates both.

    Only the tables are saved for the backward pass, unless the angles require a gradient.

    Args:
        q, k: (batch, heads, tokens, head_dim), with the same shape and dtype. Views with last stride 1 are not copied.
        rope: the rotation. It applies to the first rope.dim channels. rope.dim must not exceed head_dim.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        The rotated q and k, in the dtype of the inputs. Differentiable in q, k and rope.angles.

    Raises:
        ValueError, TypeError, RuntimeError: as in performer_attention.
    """
    check_qkv(q, k, k)
    rotary = check_rope(rope, q, k)
    backend = backends.resolve(backend, q, q.shape[3])
    if backend == "reference":
        return apply_rope_reference(q, k, rope)
    return rotate(q, k, rotary, backend=backend)


def mask_and_rotate_reference(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with zeros in the padded tokens of k and v, and with q and k rotated, in plain PyTorch."""
    if key_padding_mask is not None:
        valid = key_padding_mask[:, None, :, None]
        k, v = torch.where(valid, k, 0.0), torch.where(valid, v, 0.0)
    if rope is not None:
        q, k = apply_rope_reference(q, k, rope)
    return q, k, v


def apply_rope_reference(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return the rotated q and k, computed in plain PyTorch.

    Supports all devices and torch.func transforms.
    """
    rotary = rope.differentiable
    return tuple(rotate_reference(x, rotary) for x in (q, k))


def check_rope(rope: Rope, q: Tensor, k: Tensor) -> Rotary:
    """Check that q and k have the same number of tokens, and that `rope` matches them. Return its tables as a Rotary."""
    if not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope (see rope_1d), got {type(rope).__name__}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"rope: expected q and k of equal lengths, got {q.shape[2]} and {k.shape[2]} tokens")
    if rope.tokens != q.shape[2]:
        raise ValueError(f"rope: expected angles for q's {q.shape[2]} tokens, got {rope.tokens}")
    if rope.heads != 1 and rope.heads != q.shape[1]:  # not `in`, which the compiler does not support for dynamic sizes
        raise ValueError(f"rope: expected angles for 1 head or for q's {q.shape[1]} heads, got {rope.heads}")
    if rope.dim > q.shape[3]:
        raise ValueError(f"rope: expected dim <= q's head_dim {q.shape[3]}, got {rope.dim}")
    if rope.cos.dtype == torch.float64 and q.dtype != torch.float64:
        raise TypeError(f"rope: expected float32 tables for q's {dtype_name(q.dtype)}, got float64")
    if rope.cos.device != q.device:
        raise ValueError(f"rope: expected q's device {q.device}, got {rope.cos.device} (see Rope.to)")
    return rope.rotary

"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864).

    u' = u cos(theta) - v sin(theta)        v' = u sin(theta) + v cos(theta)        theta_{t,i} = t base^(-2i / R)

for every pair (u, v) of the first R channels of a query or key at position t. Angles, cosines and sines are float32
(made in float64) whatever the dtype of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import backends
from ..primitives import rotate
from ..primitives.rotate import rotate_reference

Layout = Literal["interleaved", "half"]
LAYOUTS = ("interleaved", "half")


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of every token: one row of cosines and sines each.

    Attributes:
        cos, sin: float32 (heads or 1, tokens, R / 2).
        layout: "interleaved", the pairs are channels (2i, 2i + 1), or "half", channels (i, i + R / 2).
    """

    cos: Tensor
    sin: Tensor
    layout: Layout = "interleaved"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected 'interleaved' or 'half', got {self.layout!r}")
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            if table.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32 (low precision loses the position), got {table.dtype}")
            if table.dim() != 3 or table.shape != self.cos.shape:
                raise ValueError(
                    f"{name}: expected shape (heads or 1, tokens, R / 2), equal for cos and sin, got {tuple(table.shape)}"
                )
            if table.requires_grad:
                raise NotImplementedError(f"{name}: gradients of the angles are not supported")

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

    def to(self, device: torch.device | str) -> Rope:
        """The same rotation on another device; the tables stay float32."""
        return Rope(self.cos.to(device), self.sin.to(device), self.layout)


def rope_1d(
    tokens: int,
    dim: int,
    *,
    base: float = 10000.0,
    layout: Layout = "interleaved",
    prefix_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Rope:
    """Angles t * base^(-2i / dim) for positions t = 0 .. tokens - 1.

    Args:
        tokens: how many tokens are rotated.
        dim: R, the number of rotated channels: head_dim, or less to leave the last channels as they are. Even.
        base: the longest wave length is 2 pi base.
        layout: "interleaved" (RoFormer, GPT-J, timm) or "half" (GPT-NeoX, Llama).
        prefix_tokens: tokens in front (class, registers) that are not rotated and not counted.
        device: where the tables live.

    Returns:
        A Rope of prefix_tokens + tokens rows, shared by all heads.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected an even number of channels, at least 2, got {dim}")
    if not base > 0:
        raise ValueError(f"base: expected a number > 0, got {base}")
    if prefix_tokens < 0:
        raise ValueError(f"prefix_tokens: expected at least 0, got {prefix_tokens}")
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    angles = torch.nn.functional.pad(angles, (0, 0, prefix_tokens, 0))[None]
    return Rope(angles.cos().float().to(device), angles.sin().float().to(device), layout)


def apply_rope(q: Tensor, k: Tensor, rope: Rope, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate q and k; one kernel, nothing kept for backward but the tables.

    Args:
        q, k: (batch, heads, tokens, head_dim), of one shape and dtype. Any strides with a unit last one.
        rope: the angles; rope.dim <= head_dim, further channels pass unchanged.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        The rotated q and k, in their own dtype.
    """
    from .checks import check_qkv, check_rope

    check_qkv(q, k, k)
    check_rope(rope, q, k)
    backend = backends.resolve(backend, q, q.shape[3])
    if backend == "reference":
        return apply_rope_reference(q, k, rope)
    return rotate(q, k, rope.cos, rope.sin, interleaved=rope.interleaved, backend=backend)


def apply_rope_reference(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """The equations in plain PyTorch; any device, any transform."""
    return tuple(rotate_reference(x, rope.cos, rope.sin, rope.interleaved) for x in (q, k))

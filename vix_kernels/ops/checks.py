"""What every attention asks of its arguments. An error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, N, D), k (B, H, N', D), v (B, H, N', E) of one floating dtype on one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {dtype_name(x.dtype)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {dtype_name(q.dtype)}, got {dtype_name(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected q's batch {q.shape[0]}, got {x.shape[0]}")
        if x.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: expected q's {q.shape[1]} heads, got {x.shape[1]} (grouped heads are not supported)")
        if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name}: expected at least one head, token and channel, got shape {tuple(x.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected q's head_dim {q.shape[3]}, got {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected k's {k.shape[2]} tokens, got {v.shape[2]}")


def check_mask(mask: Tensor | None, k: Tensor) -> None:
    """key_padding_mask: bool (B, N')."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected dtype bool (True = takes part), got {dtype_name(mask.dtype)}")
    expected = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"key_padding_mask: expected shape (batch, key tokens) = {expected}, got {tuple(mask.shape)}")
    if mask.device != k.device:
        raise ValueError(f"key_padding_mask: expected k's device {k.device}, got {mask.device}")


def check_projection(projection: Tensor, q: Tensor) -> Tensor:
    """The projection as slots (1, heads or 1, M, D), in float32 (float64 for float64 tokens)."""
    if not isinstance(projection, Tensor):
        raise TypeError(f"projection: expected a Tensor, got {type(projection).__name__}")
    if projection.dim() not in (2, 3):
        raise ValueError(f"projection: expected shape (M, head_dim) or (heads, M, head_dim), got {tuple(projection.shape)}")
    if projection.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"projection: expected float32 (16 bits lose the features), got {dtype_name(projection.dtype)}")
    if projection.shape[-1] != q.shape[3]:
        raise ValueError(f"projection: expected q's head_dim {q.shape[3]} columns, got {projection.shape[-1]}")
    if projection.shape[-2] == 0:
        raise ValueError("projection: expected at least one feature, got 0")
    if projection.dim() == 3 and projection.shape[0] != q.shape[1]:
        raise ValueError(f"projection: expected q's {q.shape[1]} heads, got {projection.shape[0]}")
    if projection.device != q.device:
        raise ValueError(f"projection: expected q's device {q.device}, got {projection.device}")
    projection = projection.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return projection[None, None] if projection.dim() == 2 else projection[None]


def check_scale(scale: float | None, head_dim: int) -> float:
    """A positive number; head_dim ** -0.5 unless given."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, Tensor):
        raise TypeError("scale: expected a Python number, got a Tensor (reading it would wait for the device)")
    if not scale > 0:
        raise ValueError(f"scale: expected a number > 0, got {scale}")
    return float(scale)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors in its dtype (float64 stays); elsewhere as they are."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors  # check_qkv will say so
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)

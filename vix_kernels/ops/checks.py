"""Argument checks for the attention functions. Each error names the argument and states the expected and the actual value."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, x: Any) -> None:
    """Check that x is a dense Tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense Tensor, got a {layout} one")


def check_floating(name: str, x: Any) -> None:
    """Check that x is a dense Tensor whose dtype is one of DTYPES."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {dtype_name(x.dtype)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype_name(x.dtype)}")


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Return `value` if it is an integer >= `least`. Bools and floats such as 2.0 are rejected."""
    integer = isinstance(value, numbers.Integral | torch.SymInt) and not isinstance(value, bool)
    if not integer or (least is not None and value < least):
        kind = f"an integer >= {least}" if least is not None else "an integer"
        raise (ValueError if integer else TypeError)(f"{name}: expected {kind}, got {value!r}")
    return value


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """Return `value` as a float if it is a finite Python number > 0. If `zero` is set, 0 is also allowed."""
    kind = f"a finite number {'>=' if zero else '>'} 0"
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Python number, got a Tensor (reading it would synchronize with the device)")
    if not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {kind}, got {value!r}")
    if not (0 <= value < math.inf) or (value == 0 and not zero):
        raise ValueError(f"{name}: expected {kind}, got {value}")
    return float(value)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> None:
    """Check the shapes, dtypes and devices of q (B, H, N, D), k (B, H, N', D) and v (B, H, N', E).

    All three must have the same floating-point dtype and device. Also check `key_padding_mask`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, tokens, head_dim), got shape {tuple(x.shape)}")
        check_floating(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {dtype_name(q.dtype)}, got {dtype_name(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected q's batch size {q.shape[0]}, got {x.shape[0]}")
        if x.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: expected q's {q.shape[1]} heads, got {x.shape[1]} (grouped heads are not supported)")
        if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name}: expected at least one head, token and channel, got shape {tuple(x.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected q's head_dim {q.shape[3]}, got {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected k's {k.shape[2]} tokens, got {v.shape[2]}")
    check_mask(key_padding_mask, k)


def check_mask(mask: Tensor | None, k: Tensor, name: str = "key_padding_mask", columns: str = "key tokens") -> None:
    """Check that `mask` is None or a bool mask (B, N') for the tokens of k (B, H, N', D), where True = valid."""
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype bool (True = valid), got {dtype_name(mask.dtype)}")
    expected = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"{name}: expected shape (batch, {columns}) = {expected}, got {tuple(mask.shape)}")
    if mask.device != k.device:
        raise ValueError(f"{name}: expected device {k.device}, got {mask.device}")


def check_projection(projection: Tensor, q: Tensor, name: str = "projection") -> Tensor:
    """Check a projection, and return it as (1, heads or 1, M, D) in float32, or in float64 if q is float64."""
    check_tensor(name, projection)
    if projection.dim() not in (2, 3):
        raise ValueError(f"{name}: expected shape (M, head_dim) or (heads, M, head_dim), got {tuple(projection.shape)}")
    if projection.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 (16 bits are not precise enough), got {dtype_name(projection.dtype)}")
    if projection.shape[-1] != q.shape[3]:
        raise ValueError(f"{name}: expected {q.shape[3]} columns to match q's head_dim, got {projection.shape[-1]}")
    if projection.shape[-2] == 0:
        raise ValueError(f"{name}: expected at least one feature, got 0")
    if projection.dim() == 3 and projection.shape[0] != q.shape[1]:
        raise ValueError(f"{name}: expected q's {q.shape[1]} heads, got {projection.shape[0]}")
    if projection.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {projection.device}")
    projection = projection.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return projection[None, None] if projection.dim() == 2 else projection[None]


def check_exact_rows(count: int, q: Tensor) -> int:
    """Return `count` if it is an integer from 0 to the number of queries in q (batch, heads, queries, head_dim)."""
    if check_integer("exact_rows", count, 0) > q.shape[2]:
        raise ValueError(f"exact_rows: expected at most q's {q.shape[2]} queries, got {count}")
    return count


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return `scale` if it is a number > 0, or head_dim ** -0.5 if it is None."""
    return head_dim**-0.5 if scale is None else check_number("scale", scale)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, cast to autocast's dtype if autocast is enabled. Integer and float64 tensors are not cast."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors  # check_qkv raises the error
    device = tensors[0].device.type
    if any(x.layout != torch.strided for x in tensors) or device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)

"""Host-side arguments that every launch needs: strides, dummy pointers for what is absent, padded widths."""

from __future__ import annotations

from torch import Tensor


def padded(width: int) -> int:
    """The power of two, at least 16 (the least a matrix instruction takes), that holds `width` columns."""
    return max(16, 1 << (width - 1).bit_length())


def token_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def output_strides(x: Tensor) -> tuple[int, int, int]:
    """Those of tokens; zeros for a gradient that nobody asked for."""
    return token_strides(x) if x.dim() == 4 else (0, 0, 0)


def slot_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, heads, slots); a dimension of length 1 is shared, so its stride is 0."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def rotary_arguments(cos: Tensor | None, sin: Tensor | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cos, sin, the rotary width (0: no rotation) and the stride between heads (0: one table for all)."""
    if cos is None or sin is None:
        return stand_in, stand_in, 0, 0
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, 2 * cos.shape[-1], 0 if cos.shape[0] == 1 else cos.stride(0)
